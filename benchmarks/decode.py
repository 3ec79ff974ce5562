"""Decoding speed, side by side with named peers in one process and one run.

    python benchmarks/decode.py --preset quick|full --json

Workload: requests with fixed prompts and budgets uniform over {0, 4, 8, 16, 32, 64, 128} (mixed) or all 64 (uniform).
Useful tokens are the think tokens up to each row's budget. Peers never end by themselves; ours practically never does,
and where it does only the tokens that it thought count.
Our side answers with one token after the close; tags, prompts and that answer cost time and count for nothing.
Peers get their requests sorted by budget, in batches that run to their largest budget; a batch of zeros is free.
llama.cpp (SmolLM2 only, where llama-cpp-python is installed) batches continuously, longest budgets first: llamacpp.py.
Ratios are of useful tokens per second: medians over interleaved pairs, with the least and the largest pair. Stories of
every number: docs/log.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llamacpp
import torch
from common import Work, workload
from layer import bench_layer, bench_layer_smollm2, bench_rules

from gnomon.base import seeds
from gnomon.decoding.engine import Engine
from gnomon.model.backbone import Backbone
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request
from gnomon.reasoner import Reasoner, shipped

INT8_BYTES = 1280 / 4096  # of a float32 weight: a byte, and a scale and a lowest weight for every block of 32


@dataclass(frozen=True)
class Run:
    """seconds of the whole workload; first: seconds to the first think token, median over the requests that think.

    useful: the think tokens that were made and asked for.
    """

    seconds: float
    first: float
    useful: int

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.useful / self.seconds


def endless(vocab: int, pad: int) -> Layout:
    """Tags of one id each that a model practically never writes, so that every budget is used up."""
    think, end, answer, end_answer, eos = range(vocab - 5, vocab)
    return Layout((think,), (end,), (answer,), (end_answer,), {"steps": ()}, (eos,), pad)


def ours(backbone: Backbone, layout: Layout, work: Work, batch: int) -> Run:
    """The engine, mixed budgets in one go. Raises AssertionError where a budget was overdrawn, or many not used up."""
    engine = Engine(backbone, layout, max_batch=batch)
    asked = [
        Request(str(i), prompt, plan="steps", budget=budget, max_answer_tokens=1)
        for i, (prompt, budget) in enumerate(zip(work.prompts, work.budgets, strict=True))
    ]
    firsts: dict[str, float] = {}
    start = time.perf_counter()
    traces = engine.run(
        asked, sink=lambda c: firsts.setdefault(c.id, time.perf_counter()) if c.region == "think" else 0
    )
    seconds = time.perf_counter() - start
    early = sum(t.used < b for t, b in zip(traces, work.budgets, strict=True))
    assert early <= len(asked) // 50, f"{early} rows closed early; the bench layout does not suit this model"
    assert all(t.overshoot == 0 for t in traces)
    thought = [at for r in asked if r.budget and (at := firsts.get(r.id)) is not None]
    return Run(seconds, statistics.median(thought) - start, sum(t.used for t in traces))


class Clock:
    """A stopping criterion that never stops; it notes when the first token of a batch was there."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def generate(model: Any, work: Work, batch: int, pad: int) -> Run:
    """transformers.generate: greedy, sorted by budget, left-padded, each batch to its largest budget."""
    from transformers import StoppingCriteriaList

    order = sorted(range(len(work.prompts)), key=lambda i: (work.budgets[i], len(work.prompts[i])))
    firsts: list[float] = []
    start = time.perf_counter()
    for at in range(0, len(order), batch):
        rows = order[at : at + batch]
        most = max(work.budgets[i] for i in rows)
        if most == 0:
            continue
        width = max(len(work.prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for r, i in enumerate(rows):
            ids[r, width - len(work.prompts[i]) :] = torch.tensor(work.prompts[i])
            mask[r, width - len(work.prompts[i]) :] = 1
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                max_new_tokens=most, min_new_tokens=most, eos_token_id=None, pad_token_id=pad,
                stopping_criteria=StoppingCriteriaList([clock]),
            )  # fmt: skip
        assert out.shape[1] == width + most
        assert clock.first is not None
        firsts += [clock.first - start] * sum(work.budgets[i] > 0 for i in rows)
    return Run(time.perf_counter() - start, statistics.median(firsts), work.useful)


def llama_cpp(model: llamacpp.Stepper, work: Work) -> Run:
    """llama.cpp: greedy, longest budgets first, a free sequence gets the next request."""
    start = time.perf_counter()
    made, firsts = llamacpp.continuous(model, work.prompts, work.budgets)
    seconds = time.perf_counter() - start
    assert [len(ids) for ids in made] == list(work.budgets)
    return Run(seconds, statistics.median(firsts) - start, work.useful)


def rounds(sides: dict[str, Callable[[], Run]], n: int) -> dict[str, list[Run]]:
    """n interleaved runs of every side after one that is not kept; on stderr what each did."""
    kept: dict[str, list[Run]] = {name: [] for name in sides}
    for i in range(n + 1):
        for name, side in sides.items():
            run = side()
            print(f"  {name} {i}/{n}: {run.seconds:.2f} s, {run.rate:.0f} tok/s", file=sys.stderr, flush=True)
            if i:
                kept[name].append(run)
    return kept


def compared(left: Sequence[Run], right: Sequence[Run]) -> dict[str, Any]:
    """How many times as fast `left` is, as median, least and largest of pairs of equal rounds."""
    ratios = sorted(a.rate / b.rate for a, b in zip(left, right, strict=True))
    return {
        "ratio": statistics.median(ratios),
        "range": [ratios[0], ratios[-1]],
        "pairs": len(ratios),
        "ours_s": statistics.median(a.seconds for a in left),
        "peer_s": statistics.median(b.seconds for b in right),
        "ours_tok_s": statistics.median(a.rate for a in left),
        "peer_tok_s": statistics.median(b.rate for b in right),
        "ours_first_token_s": statistics.median(a.first for a in left),
        "peer_first_token_s": statistics.median(b.first for b in right),
    }


def pairs(left: Callable[[], Run], right: Callable[[], Run], n: int) -> dict[str, Any]:
    """n interleaved runs of two sides, compared."""
    both = rounds({"ours": left, "peer": right}, n)
    return compared(both["ours"], both["peer"])


def plain_llama(parameters: int, vocab: int, context: int) -> Any:
    """A random Llama of about as many parameters as ours, six layers of 160 channels like nano."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers = 160, 6
    inner = (parameters - 2 * vocab * width - layers * 4 * width * width) // (3 * width * layers)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=5,
        intermediate_size=int(inner), max_position_embeddings=context, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    seeds.seed_torch("bench-llama")
    return LlamaForCausalLM(config).eval()


def read_bandwidth() -> float:
    """Bytes per second of reading a large array with all threads, best of ten."""
    data = torch.ones(2**27)  # 512 MiB
    best = 0.0
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def bench_nano(n: int, repeats: int) -> dict[str, Any]:
    """nano at batch 32 against `generate` on the same weights and on a plain Llama of equal size."""
    from transformers import AutoModelForCausalLM

    import gnomon.hf  # noqa: F401

    reasoner = Reasoner.load("nano")
    pad, vocab = reasoner.codec.layout.pad, reasoner.backbone.vocab_size
    same = AutoModelForCausalLM.from_pretrained(shipped("nano"), dtype=torch.float32).eval()
    parameters = sum(p.numel() for p in same.parameters())
    llama = plain_llama(parameters, vocab, reasoner.backbone.context)
    layout = endless(vocab, pad)
    found: dict[str, Any] = {"parameters": {"nano": parameters, "llama": sum(p.numel() for p in llama.parameters())}}
    for kind in ("mixed", "uniform"):
        work = workload(reasoner.codec.encode_prompt, n, kind)
        for peer, model in (("generate", same), ("llama", llama)):
            got = pairs(
                lambda w=work: ours(reasoner.backbone, layout, w, 32),  # type: ignore[misc]
                lambda w=work, m=model: generate(m, w, 32, pad),  # type: ignore[misc]
                repeats,
            )
            got["useful_tokens"] = work.useful
            found[f"{kind}_{peer}"] = got
    return found


def bench_smollm2(n: int, tokens: int, repeats: int) -> dict[str, Any]:
    """SmolLM2-135M through our backbones (float32, int8), `generate` and llama.cpp, all in the same rounds."""
    from transformers import AutoModelForCausalLM

    from gnomon.model.gguf import find_smollm2
    from gnomon.model.load import load_backbone, resolve_base

    reasoner = Reasoner.load("smollm2")
    pad, vocab = reasoner.codec.layout.pad, reasoner.backbone.vocab_size
    peer = AutoModelForCausalLM.from_pretrained(resolve_base("smollm2"), dtype=torch.float32).eval()
    peer.generation_config.eos_token_id = None
    weights = sum(p.nbytes for p in peer.parameters())
    layout = endless(vocab, pad)
    whole = workload(reasoner.codec.encode_prompt, n, "mixed")
    single = Work(whole.prompts[:2], (tokens, tokens))
    backbones = {"float32": reasoner.backbone, "int8": load_backbone("smollm2", weights="int8")}
    bandwidth, threads = read_bandwidth(), torch.get_num_threads()
    found: dict[str, Any] = {"weight_bytes": weights, "read_bandwidth": bandwidth}
    gguf, why = llamacpp.available(find_smollm2())
    found |= {"llama_cpp": None, "llama_cpp_reason": why} if why else {"llama_cpp": version("llama-cpp-python")}
    for name, work, batch in (("b1", single, 1), ("mixed_b16", whole, 16)):
        print(f"smollm2 {name}: {len(work.prompts)} requests, {work.useful} tokens", file=sys.stderr)
        sides: dict[str, Callable[[], Run]] = {
            kind: lambda b=backbone, w=work, k=batch: ours(b, layout, w, k)  # type: ignore[misc]
            for kind, backbone in backbones.items()
        }
        sides["generate"] = lambda w=work, k=batch: generate(peer, w, k, pad)  # type: ignore[misc]
        with llamacpp.opened(gguf, work.prompts, work.budgets, batch, threads) as (forms, models, rates):
            for form in forms.values():
                sides[f"llama.cpp {form}"] = lambda w=work, m=models[form]: llama_cpp(m, w)  # type: ignore[misc]
            kept = rounds(sides, repeats)
        for kind in backbones:
            found[f"{kind}_{name}"] = compared(kept[kind], kept["generate"])
        for kind, form in forms.items():
            got = compared(kept[kind], kept[f"llama.cpp {form}"])
            found[f"{kind}_{name}_llama_cpp"] = got | {"format": form, "tok_s_by_format": rates}
    for kind, backbone in backbones.items():
        step = step_seconds(backbone, single.prompts[0], tokens)
        held = weights if kind == "float32" else weights * INT8_BYTES
        found[f"{kind}_b1_step"] = {"seconds": step, "tok_s": 1 / step, "bandwidth_share": held / step / bandwidth}
    return found


def step_seconds(backbone: Backbone, prompt: Sequence[int], steps: int) -> float:
    """Median seconds of one decoding step at batch 1, prompt not counted."""
    cache = backbone.new_cache(1, len(prompt) + steps + 8)
    backbone.extend(cache, [list(prompt)], logits="none")
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        backbone.extend(cache, [[7]])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory(side: str) -> float:
    """MiB of peak resident memory of a fresh process that runs one side of nano's mixed workload."""
    out = subprocess.run(
        [sys.executable, __file__, "--side", side], capture_output=True, text=True, check=True
    ).stdout.split()
    return float(out[-1])


def one_side(side: str) -> None:
    """What `peak_memory` starts."""
    reasoner = Reasoner.load("nano")
    work = workload(reasoner.codec.encode_prompt, 128, "mixed")
    pad, vocab = reasoner.codec.layout.pad, reasoner.backbone.vocab_size
    if side == "ours":
        ours(reasoner.backbone, endless(vocab, pad), work, 32)
    elif side == "generate":
        from transformers import AutoModelForCausalLM

        import gnomon.hf  # noqa: F401

        generate(AutoModelForCausalLM.from_pretrained(shipped("nano"), dtype=torch.float32).eval(), work, 32, pad)
    # Not ru_maxrss: it survives exec, so that a child would report its parent's peak.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("quick", "full"), default="quick")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    parser.add_argument("--only", choices=("nano", "layer", "layer-smollm2", "smollm2"), help="one part")
    parser.add_argument("--side", choices=("ours", "generate"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        one_side(args.side)
        return
    full = args.preset == "full"
    body: dict[str, Any] = {"preset": args.preset, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.only in (None, "nano"):
        nano = body["nano"] = bench_nano(256 if full else 96, 5 if full else 2)
        body["nano_mixed_b32_ratio"] = nano["mixed_generate"]["ratio"]
        body["nano_uniform_b32_ratio"] = nano["uniform_generate"]["ratio"]
        body["nano_mixed_b32_best_peer"] = min(nano["mixed_generate"]["ratio"], nano["mixed_llama"]["ratio"])
        body["nano_uniform_b32_best_peer"] = min(nano["uniform_generate"]["ratio"], nano["uniform_llama"]["ratio"])
        if full:
            body["peak_memory_mib"] = {side: peak_memory(side) for side in ("ours", "generate")}
    if args.only in (None, "layer"):
        layer = body["layer"] = bench_layer(256 if full else 64, 40 if full else 20)
        for batch in (1, 32):
            body[f"layer_overhead_b{batch}"] = layer[f"heads_b{batch}"]["median"]
            body[f"whole_layer_overhead_b{batch}"] = layer[f"whole_b{batch}"]["median"]
        body["rules"] = bench_rules(256 if full else 64, 40 if full else 20)
    if args.only in (None, "layer-smollm2"):
        layer = body["layer_smollm2"] = bench_layer_smollm2(40 if full else 20)
        body |= {f"layer_overhead_smollm2_b{batch}": layer[f"whole_b{batch}"]["median"] for batch in (1, 32)}
    if args.only in (None, "smollm2"):
        smol = body["smollm2"] = bench_smollm2(24, 64 if full else 24, 5 if full else 1)
        body["smollm2_b1_ratio"] = smol["float32_b1"]["ratio"]
        body["smollm2_mixed_b16_ratio"] = smol["float32_mixed_b16"]["ratio"]
        body["smollm2_int8_b1_ratio"] = smol["int8_b1"]["ratio"]
        body["smollm2_int8_mixed_b16_ratio"] = smol["int8_mixed_b16"]["ratio"]
        body |= {f"smollm2_{name}_ratio": got["ratio"] for name, got in smol.items() if name.endswith("_llama_cpp")}
        body["bandwidth_share_b1"] = smol["float32_b1_step"]["bandwidth_share"]
    if args.json:
        print(json.dumps(body))
        return
    for key, value in body.items():
        print(f"{key:28s} {json.dumps(value) if isinstance(value, dict) else value}")


if __name__ == "__main__":
    main()
