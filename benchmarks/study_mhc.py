"""What hyper-connections give at a small size: held-out loss against nets of as many parameters, paired by seed.

    python benchmarks/study_mhc.py --seeds 5 --tokens 3500000 --out FILE

Arms, preset micro: `mhc` (4 streams); `plain` (one stream, its MLP wider by as many parameters); `skip`: `plain` with
one long skip in place of streams, the stream behind the middle block kept and added behind the last one, times a
learned factor per channel that begins at 0 (algorithms.md §1.7 and goal 4: what the speedrun put in the place of
hyper-connections; which layers, is ours). Of one seed all arms see the same records in the same order and start from
the same stream of random numbers; optimisers, rates, schedule and tokens are the same. The corpus of a seed is a stream
of its own and is seen once. Held-out loss: mean cross-entropy in nats of the trained targets of one val set, float32.
Finished runs stay in FILE.runs and are not run again; several processes may share the work. p: t-test of the paired
differences, two-sided.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from study_base import T_975, quiet, say
from torch import Tensor, nn

from gnomon.base import seeds
from gnomon.base.atomic import write_atomic
from gnomon.data.corpus import Bins, BinSource, collate
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig, preset
from gnomon.reasoner import shipped
from gnomon.recipes.pretrain import CorpusConfig, prepare
from gnomon.training import optim
from gnomon.training.loop import Loss, fit
from gnomon.training.token_loss import token_loss

ARMS = ("plain", "skip", "mhc")
ROWS, LENGTH = 8, 256
VAL_RECORDS = 2_000
TOKENS_PER_RECORD = 50  # below the mean, so that no record is seen twice


class Skip(nn.Module):
    """One long skip as a `steer` of the decoder: x + factor * (stream behind block `start`) behind the last block."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.start, self.end = config.layers // 2 - 1, config.layers - 1
        self.factor = nn.Parameter(torch.zeros(config.channels))
        self._kept: Tensor | None = None

    def __call__(self, index: int, x: Tensor) -> Tensor:
        if index == self.start:
            self._kept = x
        if index != self.end:
            return x
        assert self._kept is not None
        return x + self.factor * self._kept


def shape(arm: str, vocab: int) -> DecoderConfig:
    """mHC's coefficients are 131,352 parameters at micro; an MLP of 5 instead of 4 times the width has 131,072 more."""
    return preset("micro", vocab) if arm == "mhc" else preset("micro", vocab, streams=1, ffn=5)


def corpus(folder: Path, tok: Tokenizer, split: str, stream: str, records: int) -> Bins:
    """Packed records, from the folder or made now, by one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / f"{split}.json").is_file():
            say(f"corpus {folder.name}")
            prepare(folder, tok, CorpusConfig(records=records, stream=stream, split=split), workers=1)
    return Bins(folder, split)


@torch.no_grad()
def held_out(model: Decoder, skip: Skip | None, source: BinSource) -> float:
    """Mean cross-entropy in nats over the trained targets of all rows, float32."""
    total, count = 0.0, 0
    for number in range(source.per_epoch):
        data = source.step(number)
        batch = collate(data.rows, data.length)
        hidden = model(batch.ids, batch.positions, "records", logits="none", steer=skip).hidden
        loss, n = token_loss(hidden, model.unembed.weight, batch.targets)
        total, count = total + float(loss), count + n
    return total / count


def trained(arm: str, seed: int, tokens: int, train: Bins, val: Bins, vocab: int, factor: float) -> dict[str, Any]:
    """One run and its held-out loss. factor: on all learning rates."""
    config = shape(arm, vocab)
    seeds.seed_torch("study-mhc", seed)
    model = Decoder(config).train()
    skip = Skip(config) if arm == "skip" else None
    rates = optim.OptimConfig()
    names = ("lr", "embed_lr", "unembed_lr", "hyper_lr")
    rates = rates.model_copy(update={name: getattr(rates, name) * factor for name in names})
    optimizers = optim.build(model, rates)
    if skip is not None:
        optimizers[1].add_param_group({"params": [skip.factor], "lr": rates.hyper_lr})
    source = BinSource(train, ROWS, LENGTH, f"study-mhc-{seed}", vocab)
    checks = BinSource(val, ROWS, LENGTH, "val", vocab)
    steps = math.ceil(tokens / (ROWS * LENGTH))
    assert steps <= source.per_epoch, f"{steps} steps, but the corpus has {source.per_epoch}"
    seen, began = 0.0, time.process_time()

    def losses(step: int) -> Iterable[Loss]:
        data = source.step(step)
        batch = collate(data.rows, data.length)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model(batch.ids, batch.positions, "records", logits="none", steer=skip).hidden
            loss, count = token_loss(hidden, model.unembed.weight, batch.targets)
        yield loss / count, {"tokens": float(batch.tokens)}

    def after(_: int, row: dict[str, Any]) -> None:
        nonlocal seen
        seen += row["tokens"]

    fit(losses, optimizers, steps, schedule=lambda f: optim.schedule(rates, f), clip=rates.clip, on_step=after)
    return {
        "loss": held_out(model, skip, checks),
        "tokens_asked": tokens,
        "rate": factor,
        "parameters": sum(p.numel() for p in model.parameters()) + (0 if skip is None else skip.factor.numel()),
        "tokens": int(seen),
        "steps": steps,
        "cpu_seconds": time.process_time() - began,
        "factor": None if skip is None else [float(skip.factor.detach().mean()), float(skip.factor.detach().std())],
    }


def compared(runs: dict[str, dict[str, Any]], left: str, right: str) -> dict[str, Any]:
    """Loss of `left` minus that of `right` over the seeds that both have; negative: `left` is better."""
    pairs = [
        (runs[f"{left}-{s}"], runs[f"{right}-{s}"]) for s in range(100) if {f"{left}-{s}", f"{right}-{s}"} <= set(runs)
    ]
    gaps = [a["loss"] - b["loss"] for a, b in pairs]
    if len(gaps) < 2:
        return {"gaps": gaps}
    from scipy import stats  # comes with scikit-learn, of the dev extra

    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    half = T_975[len(gaps)] * error
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue)
    return {"gaps": gaps, "mean": mean, "ci": [mean - half, mean + half], "p": p}


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Mean loss of every arm, and all pairs of arms."""
    losses = {arm: [r["loss"] for name, r in sorted(runs.items()) if name.startswith(f"{arm}-")] for arm in ARMS}
    return {
        "loss": {arm: statistics.fmean(v) for arm, v in losses.items() if v},
        "mhc - plain": compared(runs, "mhc", "plain"),
        "mhc - skip": compared(runs, "mhc", "skip"),
        "skip - plain": compared(runs, "skip", "plain"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=3_500_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--rate", type=float, default=1.0, help="factor on all learning rates of all arms")
    parser.add_argument("--corpora", type=Path, help="folder that keeps the records (default: beside the runs)")
    args = parser.parse_args()
    runs = args.out.with_name(args.out.name + ".runs")
    runs.mkdir(parents=True, exist_ok=True)
    tok, folder = Tokenizer.load(shipped("nano")), args.corpora or runs / "corpora"
    for seed in range(args.seeds):
        for arm in args.arms.split(","):
            with (runs / f"{arm}-{seed}.lock").open("w") as lock:
                if (runs / f"{arm}-{seed}.json").is_file() or not claimed(lock):
                    continue
                quiet()
                val = corpus(folder / "val", tok, "val", "study-mhc-val", VAL_RECORDS)
                records = math.ceil(args.tokens / TOKENS_PER_RECORD)
                train = corpus(folder / f"train-{seed}", tok, "train", f"study-mhc-{seed}", records)
                run = trained(arm, seed, args.tokens, train, val, tok.vocab_size, args.rate)
                write_atomic(runs / f"{arm}-{seed}.json", json.dumps(run, indent=1) + "\n")
                say(f"{arm}-{seed}: loss {run['loss']:.4f} after {run['tokens']:,} tokens, {run['cpu_seconds']:.0f} s")
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(runs.glob("*.json"))}
    if len({(r["tokens_asked"], r["rate"]) for r in found.values()}) > 1:
        raise SystemExit(f"{runs} holds runs of several lengths or rates; name another --out")
    report = {**summary(found), "runs": found}
    write_atomic(args.out, json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "runs"}, indent=1))


def claimed(lock: Any) -> bool:
    """Whether this process may do a run; the claim ends with the process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    main()
