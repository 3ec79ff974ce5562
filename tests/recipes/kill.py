"""Kill -9 at random moments of a training run; `test_killed.py` starts this. Usage: kill.py OUT ROUNDS CONFIG

Every round is a fork of this process (torch imported, nothing computed), which trains OUT/run on from its newest
checkpoint until it is killed or done. After every death the folder is judged. Facts go to stdout as one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from gnomon.base import checkpoint
from gnomon.base.errors import CheckpointError
from gnomon.recipes import pretrain_run, pretraining
from gnomon.recipes.pretrain_config import resolve, resume_point, settle


def train(folder: Path, data: Path, tiny: dict[str, Any]) -> None:
    _, found = resume_point("auto", folder)
    config, changed = settle(found.values(), resolve(None, tiny, found.values())[0]) if found.path else (
        resolve(None, tiny)[0], []
    )  # fmt: skip
    start = pretraining.start_at(found.path, changed, found.skipped)
    pretrain_run.run(config, folder, data=data, start=start)


def child(folder: Path, data: Path, tiny: dict[str, Any], life: float) -> bool:
    """Train in a fork for `life` seconds at most; True = it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            train(folder, data, tiny)
        except BaseException:  # noqa: BLE001 - told, then judged by the exit status
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    end = time.monotonic() + life
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status != 0:
                raise SystemExit(f"a run ended by itself with status {status}")
            return False
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    whole = lines[:-1]  # the last part is torn, or empty
    return {r["step"]: r["train/loss"] for r in map(json.loads, whole)}


def main(out: Path, rounds: int, tiny: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dice = random.Random("kill")  # noqa: S311
    began = time.monotonic()
    assert not child(out / "reference", out / "data", tiny, 600)
    span = time.monotonic() - began
    wanted = losses(out / "reference")
    names = ("kills", "while_saving", "unreadable", "worst_loss", "unequal", "finished", "resumed")
    facts: dict[str, Any] = dict.fromkeys(names, 0)
    run, newest_before = out / "run", 0
    while facts["kills"] < rounds:
        killed = child(run, out / "data", tiny, dice.uniform(0, span))
        rows = losses(run)
        facts["unequal"] += sum(rows[s] != wanted[s] for s in rows)
        root = run / "checkpoints"
        try:
            newest = checkpoint.newest(root).step if checkpoint.steps(root) else 0
        except CheckpointError as error:
            print(error, file=sys.stderr)
            newest = -1
        facts["unreadable"] += newest < newest_before
        facts["worst_loss"] = max(facts["worst_loss"], max(rows, default=0) - newest)
        newest_before = newest
        if killed:
            facts["kills"] += 1
            facts["while_saving"] += bool(list(root.glob(".tmp-*")))
            facts["resumed"] += newest > 0
        else:
            facts["finished"] += 1
            facts["unequal"] += rows != wanted
            shutil.rmtree(run)
            newest_before = 0
    print(json.dumps({**facts, "seconds": time.monotonic() - began, "span": span}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
