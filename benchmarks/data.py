"""How fast and in how much memory text is read, and how long a training step waits for it.

python benchmarks/data.py --gigabytes 2 --json
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from gnomon.base import seeds
from gnomon.data.corpus import StepData, collate
from gnomon.data.feeds import Feed
from gnomon.data.prefetch import Prefetch
from gnomon.data.stream import TextConfig, TextSource, text_source
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder, preset
from gnomon.protocol.tags import END_THINK, THINK
from gnomon.reasoner import shipped


def row(index: int, lines: int = 40) -> dict[str, str]:
    rng = seeds.rng("benchmark", index)
    steps = [f"take {rng.randint(1, 99)} and add {rng.randint(1, 99)} to it" for _ in range(rng.randint(2, lines))]
    return {
        "prompt": f"Problem {index}: what comes out?",
        "completion": f"{THINK}{chr(10).join(steps)}{END_THINK}{index}",
    }


def rss() -> float:
    """Memory of this process, MB. (`ru_maxrss` of a child begins with its parent's.)"""
    return psutil.Process().memory_info().rss / 2**20


def write(folder: Path, gigabytes: float) -> dict[str, Path]:
    block = [row(i) for i in range(20_000)]
    lines = "".join(json.dumps(r) + "\n" for r in block).encode()
    found = {"big": folder / "big.jsonl", "jsonl": folder / "some.jsonl", "jsonl.gz": folder / "some.jsonl.gz"}
    long = "".join(json.dumps(row(i, 300)) + "\n" for i in range(5_000)).encode()  # about 5 kB a row
    with found["big"].open("wb") as file:
        while file.tell() < gigabytes * 10**9:
            file.write(long)
    found["jsonl"].write_bytes(lines * 2)
    found["jsonl.gz"].write_bytes(gzip.compress(lines * 2, 6))
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        return found
    table = pa.Table.from_pylist(block * 2)
    found |= {"parquet": folder / "some.parquet", "arrow": folder / "some.arrow"}
    pq.write_table(table, found["parquet"])
    with pa.ipc.new_stream(str(found["arrow"]), table.schema) as out:
        out.write_table(table, max_chunksize=1000)
    return found


def source(path: Path, rows: int, context: int = 8192) -> TextSource:
    tok = Tokenizer.load(shipped("nano"))
    return text_source(TextConfig(files=(str(path),)), tok, rows, context, "benchmark")


def reading(path: Path) -> dict[str, float]:
    """Rows judged a second of one core, and the growth of peak memory behind the first step, over a whole pass."""
    one = source(path, 8)
    one.step(0)
    (feed,) = one._streams
    assert isinstance(feed, Feed)
    before, began, size = rss(), time.process_time(), 0
    peak = before
    while feed.epoch == 0:
        feed.next_sample()
        size += 1
        if size % 200 == 0:
            peak = max(peak, rss())
    spent = time.process_time() - began
    one.close()
    return {"rows": size, "rows_per_sec": size / spent, "rss_mb": peak, "rss_growth_mb": peak - before}


def making(path: Path, seconds: float = 15) -> dict[str, float]:
    """Packed tokens a second on one core."""
    one = source(path, 8)
    one.step(0)
    began, tokens, k, fill = time.process_time(), 0, 0, 0.0
    while time.process_time() - began < seconds:
        k += 1
        data = one.step(k)
        tokens += sum(len(r.ids) for r in data.rows)
        fill += data.counts["data/fill"]
    return {"tokens_per_sec": tokens / (time.process_time() - began), "fill": fill / k}


def waiting(path: Path, ahead: bool, steps: int = 40) -> dict[str, float]:
    """Share of a training step (micro, eight rows) that waits for data; forward, backward and a plain update."""
    tok = Tokenizer.load(shipped("nano"))
    seeds.seed_torch("benchmark")
    model = Decoder(preset("micro", tok.vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def batch(data: StepData) -> Any:
        return collate(data.rows, data.length)

    inner = source(path, 8)
    front = Prefetch(inner, prepare=batch)
    waited = spent = 0.0
    for k in range(steps):
        began = time.monotonic()
        if ahead:
            front.step(k)
            made = front.prepared
        else:
            made = batch(inner.step(k))
        wait = time.monotonic() - began
        logits = model(made.ids, made.positions, made.mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), made.targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if k >= 3:
            waited, spent = waited + wait, spent + time.monotonic() - began
    front.close()
    return {"wait_share": waited / spent, "seconds_per_step": spent / (steps - 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        files = write(Path(name), args.gigabytes)
        found: dict[str, Any] = {"bytes": files["big"].stat().st_size}
        for kind, path in files.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:  # peak memory of its own
                found[kind] = alone.submit(reading, path).result()
        found["making"] = making(files["jsonl"])
        found["without_prefetch"] = waiting(files["jsonl"], False)
        found["with_prefetch"] = waiting(files["jsonl"], True)
    print(json.dumps(found, indent=None if args.json else 2))


if __name__ == "__main__":
    main()
