"""Training speed: our loop against the Hugging Face `Trainer`, and mHC against our plain net, in one process.

    python benchmarks/train.py --preset nano --json [--device cuda] [--compile] [--rounds N]

Peer: `transformers.Trainer` with its defaults (fused AdamW, clipping at 1, attention by SDPA) on a Llama of as many
parameters, layers, channels and heads as our plain net (one stream). Ours: `training.loop.fit` with Muon and AdamW, as
we pretrain, and with fused AdamW alone. Both get the same precision, threads and tokens a step.
`full`: rows of random ids, every target trained, no padding anywhere. `records`: records of the built-in mixture; ours
packed into rows, the peer's padded to the longest of a batch, both with as many useful tokens a step as fit; useful =
real ids of records. A collator of a few lines pads for the peer, faster than the tokenizer's own would.
A side's time is that of whole steps with their data, behind two that are not counted; rounds are interleaved; ratios
are of tokens per second: median, least and largest over rounds. MFU: 6 floating point operations per weight of a matrix
and token, and those of causal attention, over the best product of two 1024 x 1024 matrices of that precision.
Stories of every number: docs/log.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gnomon.base import seeds
from gnomon.data.corpus import Bins, BinSource, PackedRow, StepData, collate
from gnomon.data.encode import Encoded
from gnomon.data.prefetch import Prefetch
from gnomon.data.tokenizer import Tokenizer
from gnomon.model import fused
from gnomon.model.decoder import Decoder, preset
from gnomon.reasoner import shipped
from gnomon.recipes.pretrain import CorpusConfig, prepare
from gnomon.training import optim
from gnomon.training.loop import Loss, fit
from gnomon.training.token_loss import token_loss

SKIPPED = 2  # steps at the beginning of a side that are not counted
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """What all sides share."""

    preset: str
    vocab: int
    rows: int
    length: int
    steps: int
    device: str
    precision: str
    compile: bool
    cpu_time: bool = False

    def clock(self) -> float:
        """Seconds: of the wall, or those that this process has computed."""
        return time.process_time() if self.cpu_time else time.perf_counter()


@dataclass(frozen=True)
class Run:
    """seconds of the counted steps, the useful tokens in them, and the seconds that a step waited for its data."""

    seconds: float
    tokens: int
    waited: float = 0.0

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return self.tokens / self.seconds


# --- data ------------------------------------------------------------------------------------------------------------


class FullRows:
    """A source of rows of random ids, one record each; made once."""

    fingerprint = "full rows"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        shape = ((setting.steps + SKIPPED) * setting.rows, setting.length)
        self.ids = torch.randint(0, setting.vocab, shape, generator=seeds.torch_generator("bench-train"))
        self.made = [PackedRow.of([Encoded(row, [1] * setting.length)]) for row in self.ids.tolist()]

    def step(self, number: int) -> StepData:
        first = number * self.setting.rows
        return StepData(tuple(self.made[first : first + self.setting.rows]), self.setting.length)

    def close(self) -> None:
        """Nothing is open."""


def task_records(folder: Path, records: int = 6_000) -> Callable[[], Bins]:
    """Records of the built-in mixture, in the shipped tokenizer's ids; opens them."""
    prepare(folder, Tokenizer.load(shipped("nano")), CorpusConfig(records=records, stream="bench-train"), workers=1)
    return lambda: Bins(folder)


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(setting: Setting, streams: int, source: Any, *, packed: bool, adamw: bool = False) -> Run:
    """Our loop on a new net, with the data read ahead as in a run."""
    seeds.seed_torch("bench-train")
    model = Decoder(preset(setting.preset, setting.vocab, streams=streams)).to(setting.device).train()
    network = torch.compile(model) if setting.compile else model
    low = setting.precision == "bf16"
    if adamw:
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)]
    else:
        optimizers = optim.build(model, optim.OptimConfig())
    watch = Watch(setting)
    ahead = Prefetch(source, prepare=lambda data: collate(data.rows, data.length))

    def losses(step: int) -> Iterable[Loss]:
        ahead.step(step)
        waited, batch = ahead.wait_seconds, ahead.prepared
        began = time.perf_counter()
        ids, positions, targets = (x.to(setting.device) for x in (batch.ids, batch.positions, batch.targets))
        waited += time.perf_counter() - began
        with torch.autocast(setting.device, dtype=torch.bfloat16, enabled=low):
            hidden = network(ids, positions, "records" if packed else None, logits="none").hidden
            total, count = token_loss(hidden, model.unembed.weight, targets)
        yield total / count, {"tokens": float(batch.tokens), "data/wait": waited}

    try:
        fit(losses, optimizers, setting.steps + SKIPPED, on_step=lambda _, row: watch(row["tokens"], row["data/wait"]))
    finally:
        ahead.close()
    return watch.run()


class Watch:
    """Clock and counts behind the steps that are not counted."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.seen, self.tokens, self.waited = setting, 0, 0.0, 0.0
        self.began = self.ended = 0.0

    def __call__(self, tokens: float, waited: float = 0.0) -> None:
        """After a step."""
        self.seen += 1
        if self.setting.device == "cuda" and self.seen in (SKIPPED, SKIPPED + self.setting.steps):
            torch.cuda.synchronize()
        self.ended = self.setting.clock()
        if self.seen == SKIPPED:
            self.began = self.ended
        elif self.seen > SKIPPED:
            self.tokens += tokens
            self.waited += waited

    def run(self) -> Run:
        return Run(self.ended - self.began, int(self.tokens), self.waited)


# --- the peer --------------------------------------------------------------------------------------------------------


def llama(setting: Setting) -> Any:
    """A random Llama of the width, depth and heads of our preset, and of as many parameters as our plain net."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = preset(setting.preset, setting.vocab, streams=1)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in Decoder(c).parameters())
    inner = (wanted - 2 * c.vocab_size * c.channels - c.layers * 4 * c.channels**2) // (3 * c.channels * c.layers)
    seeds.seed_torch("bench-llama")
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.channels, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            intermediate_size=int(inner), max_position_embeddings=c.context, tie_word_embeddings=False,
            use_cache=False, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


def padded(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of the peer: ids padded on the right to the longest, with mask and labels."""
    width = max(len(i["input_ids"]) for i in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for r, item in enumerate(items):
        n = len(item["input_ids"])
        ids[r, :n], labels[r, :n], mask[r, :n] = item["input_ids"], item["labels"], 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def trainer(
    setting: Setting, data: list[dict[str, Any]], batch: int, collator: Any = None, grouped: bool = False
) -> Run:
    """The peer on `data`, items of `input_ids` and `labels`, `batch` of them a step. collator None: all of one length.

    grouped: batches of records of like length (`train_sampling_strategy="group_by_length"`), not its default.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    watch, tokens = Watch(setting), [0.0]

    def collate_counted(items: Sequence[dict[str, Any]]) -> Any:
        tokens.append(float(sum(len(i["input_ids"]) for i in items)))
        return (collator or stacked)(items)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            watch(tokens[state.global_step])

    with tempfile.TemporaryDirectory() as folder:
        peer = Trainer(
            model=llama(setting).to(setting.device),
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=batch, max_steps=setting.steps + SKIPPED,
                use_cpu=setting.device == "cpu", bf16=setting.precision == "bf16", torch_compile=setting.compile,
                report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=setting.device == "cuda",
                train_sampling_strategy="group_by_length" if grouped else "random",
            ),
            train_dataset=data,
            data_collator=collate_counted,
            callbacks=[Clock()],
        )  # fmt: skip
        with silenced():
            peer.train()
    return watch.run()


def stacked(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {k: torch.stack([i[k] for i in items]) for k in ("input_ids", "labels")}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """The Trainer prints its summary on stdout, which is ours."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


# --- measuring -------------------------------------------------------------------------------------------------------


def rounds(sides: dict[str, Callable[[], Run]], n: int) -> dict[str, list[Run]]:
    """n interleaved runs of every side; on stderr what each did."""
    kept: dict[str, list[Run]] = {name: [] for name in sides}
    for i in range(n):
        for name, side in sides.items():
            run = side()
            print(f"  {name} {i + 1}/{n}: {run.rate:,.0f} tok/s", file=sys.stderr, flush=True)
            kept[name].append(run)
    return kept


def ratio(left: Sequence[Run], right: Sequence[Run]) -> dict[str, Any]:
    """How many times as many useful tokens per second `left` does: median, least and largest of equal rounds."""
    found = sorted(a.rate / b.rate for a, b in zip(left, right, strict=True))
    return {"ratio": statistics.median(found), "range": [found[0], found[-1]], "rounds": len(found)}


def peak(device: str, precision: str) -> dict[str, float]:
    """FLOP/s of the product of two 1024 x 1024 matrices, best of 20: torch's, and oneDNN's on a CPU."""
    a = torch.randn(1024, 1024, device=device, dtype=DTYPES[precision])
    ways = {"torch": lambda: a @ a} | ({"onednn": lambda: fused.product(a, a)} if device == "cpu" else {})
    best = dict.fromkeys(ways, 0.0)
    for _ in range(20):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(4):
                way()
            if device == "cuda":
                torch.cuda.synchronize()
            best[name] = max(best[name], 4 * 2 * 1024**3 / (time.perf_counter() - began))
    return best


def flops_per_token(setting: Setting) -> float:
    """Training, plain net: 6 a matrix weight, and scores and mixing of causal attention forward and backward."""
    with torch.device("meta"):
        model = Decoder(preset(setting.preset, setting.vocab, streams=1))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight")
    return 6.0 * weights + 6.0 * model.config.layers * model.config.channels * setting.length


def measure(setting: Setting, bins: Callable[[], Bins], n: int) -> dict[str, Any]:
    """All sides of one precision. bins(): the task records, opened anew: who reads them closes them."""

    def packed() -> BinSource:
        return BinSource(bins(), setting.rows, setting.length, "bench-train", setting.vocab)

    full = FullRows(setting)
    texts = [{"input_ids": row, "labels": row} for row in full.ids]
    records, size = for_peer(bins()), packed_tokens(packed(), setting)
    batch = max(1, round(size / statistics.fmean(len(r["input_ids"]) for r in records)))
    sides: dict[str, Callable[[], Run]] = {
        "plain": lambda: ours(setting, 1, full, packed=False),
        "hf": lambda: trainer(setting, texts, setting.rows),
        "mhc": lambda: ours(setting, 4, full, packed=False),
        "plain adamw": lambda: ours(setting, 1, full, packed=False, adamw=True),
        "records plain": lambda: ours(setting, 1, packed(), packed=True),
        "records hf": lambda: trainer(setting, records, batch, padded),
        "records hf grouped": lambda: trainer(setting, records, batch, padded, grouped=True),
        "records mhc": lambda: ours(setting, 4, packed(), packed=True),
    }
    kept = rounds(sides, n)
    top, work = peak(setting.device, setting.precision), flops_per_token(setting)
    rate = {name: statistics.median(r.rate for r in runs) for name, runs in kept.items()}
    mhc = kept["mhc"] + kept["records mhc"]
    return {
        "full": ratio(kept["plain"], kept["hf"]),
        "full_adamw": ratio(kept["plain adamw"], kept["hf"]),
        "records": ratio(kept["records plain"], kept["records hf"]),
        "records_hf_grouped": ratio(kept["records plain"], kept["records hf grouped"]),
        "mhc_over_plain": ratio(kept["plain"], kept["mhc"]),
        "mhc_over_plain_records": ratio(kept["records plain"], kept["records mhc"]),
        "mhc_vs_hf": ratio(kept["mhc"], kept["hf"]),
        "data_wait_share": max(r.waited / r.seconds for r in mhc),
        "tok_per_sec": rate,
        "useful_tokens_per_step": {"full": setting.rows * setting.length, "records": size, "peer_batch": batch},
        "peak_tflops": {name: value / 1e12 for name, value in top.items()},
        "mfu": {name: rate[name] * work / max(top.values()) for name in ("plain", "hf", "mhc")},
    }


def for_peer(bins: Bins) -> list[dict[str, Any]]:
    """The same records with the loss on the same tokens, as the peer takes them."""
    found = []
    for i in range(len(bins)):
        record = bins.record(i)
        ids, trained = torch.tensor(record.ids), torch.tensor(record.loss).bool()
        found.append({"input_ids": ids, "labels": torch.where(trained, ids, -100)})
    return found


def packed_tokens(source: BinSource, setting: Setting) -> int:
    """Useful tokens of a packed step, mean over the counted ones."""
    steps = range(SKIPPED, SKIPPED + setting.steps)
    return round(statistics.fmean(sum(len(row.ids) for row in source.step(i).rows) for i in steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--vocab", type=int, help="default: 1024, for `small` and `base` 8192")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="counted steps of a side in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("both", *DTYPES), default="both")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile on both sides")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time of one thread, where others use the machine too")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    args = parser.parse_args()
    if args.cpu_time:
        args.threads = 1
    if args.threads:
        torch.set_num_threads(args.threads)
    vocab = args.vocab or (8192 if args.preset in ("small", "base") else 1024)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        bins = task_records(Path(folder))
        for precision in DTYPES if args.precision == "both" else (args.precision,):
            setting = Setting(
                args.preset, vocab, args.rows, args.length, args.steps, args.device, precision, args.compile,
                args.cpu_time,
            )  # fmt: skip
            print(f"{precision}, {args.device}, {torch.get_num_threads()} threads", file=sys.stderr, flush=True)
            found[precision] = measure(setting, bins, args.rounds)
    shown = found.get("bf16") or found["fp32"]
    report = {
        "vs_hf_trainer": min(f["full"]["ratio"] for f in found.values()),
        "vs_hf_trainer_records": min(f["records"]["ratio"] for f in found.values()),
        "mhc_over_plain": max(f["mhc_over_plain"]["ratio"] for f in found.values()),
        "data_wait_share": max(f["data_wait_share"] for f in found.values()),
        "tok_per_sec": shown["tok_per_sec"]["mhc"],
        "note": "ratios: the worse of the precisions measured; tok_per_sec: mHC, full rows, bf16 where it was measured",
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "preset": args.preset,
        "by_precision": found,
    }
    print(json.dumps(report) if args.json else json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
