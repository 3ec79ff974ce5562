"""Kill -9 while saving: at every system call, and at random moments. No state is unreadable, nothing saved is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gnomon.base import checkpoint as ck
from gnomon.base import seeds
from gnomon.base.lock import RunLock, probe

sys.path.insert(0, str(Path(__file__).parent))

import kill_save

SCRIPT = Path(__file__).with_name("kill_save.py")
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.mark.slow
@pytest.mark.parametrize("old", [(), ("old",)], ids=["swap", "no-swap"])
def test_kill_at_every_system_call_of_a_save(old: tuple[str, ...]) -> None:
    memory = Path("/dev/shm")  # fsync costs nothing there
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        call = [sys.executable, str(SCRIPT), "points", folder, *old]
        done = subprocess.run(call, capture_output=True, text=True, env=ENV, timeout=300, check=True)
    told = json.loads(done.stdout)
    assert told["bad"] == []
    assert told["points"] > 150


def one_round(folder: Path, number: int) -> tuple[int, int]:
    """Start, kill at a random moment; -> (last step that was told as saved, -1 for none; newest step after it)."""
    root = folder / "checkpoints"
    call = [sys.executable, str(SCRIPT), "save", str(folder), f"round {number}"]
    child = subprocess.Popen(call, stdout=subprocess.PIPE, env=ENV)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    time.sleep(0.15 * seeds.fraction("kill", number))
    child.kill()
    told = [int(line.split()[1]) for line in child.stdout.read().splitlines() if line.startswith(b"saved ")]
    child.wait()
    assert probe(folder) is None, "the lock outlived its process"
    assert kill_save.faults(root) == []  # before anything is cleaned up
    with RunLock(folder):
        ck.sweep(root)
    assert kill_save.leftovers(root) == []
    found = ck.newest(root) if ck.steps(root) else None
    assert found is None or found.skipped == ()
    return (told[-1] if told else -1), (found.step if found else -1)


def rounds(folder: Path, count: int) -> None:
    before = -1
    for number in range(count):
        told, newest = one_round(folder, number)
        assert newest >= max(told, before), f"round {number}: saved {told}, before {before}, found {newest}"
        assert len(ck.steps(folder / "checkpoints")) <= kill_save.KEEP + 1
        before = newest


def test_kill_at_random_moments(tmp_path: Path) -> None:
    rounds(tmp_path, 4)


@pytest.mark.slow
def test_kill_at_200_random_moments(tmp_path: Path) -> None:
    rounds(tmp_path, 200)
