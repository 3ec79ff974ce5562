"""Which checkpoints stay, what a dead process left, how much disk it all takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gnomon.base import checkpoint as ck
from gnomon.base.atomic import write_atomic
from gnomon.base.errors import CheckpointError


def save(root: Path, step: int, text: str = "x" * 500) -> None:
    with ck.publish(root, step) as folder:
        write_atomic(folder / "config.json", text)


def test_kept_are_the_newest_every_mth_the_best_and_the_protected(quick: Path) -> None:
    for step in range(1, 13):
        save(quick, step)
    gone = ck.prune(quick, 2, every=5, best=3, protect={1, "checkpoint-2", quick / "checkpoint-4"})
    assert ck.steps(quick) == [1, 2, 3, 4, 5, 10, 11, 12]
    assert gone == ["checkpoint-6", "checkpoint-7", "checkpoint-8", "checkpoint-9"]
    assert ck.prune(quick, 2, every=5, best=3, protect={1, 2, 4}) == []
    with pytest.raises(CheckpointError, match="every = 0"):
        ck.prune(quick, 2, every=0)


def test_a_run_that_went_back_keeps_its_own_and_not_the_higher_numbers(quick: Path) -> None:
    """What unsloth-zoo #782 shipped: rotation by number removed what the resumed run had just written."""
    for step in (500, 1000, 1500):
        save(quick, step)
    save(quick, 600)  # resumed from 500
    assert ck.newest(quick).step == 600
    assert ck.prune(quick, 2, protect={500}) == ["checkpoint-1000"]
    save(quick, 700)
    ck.prune(quick, 2, protect={500})
    assert ck.steps(quick) == [500, 600, 700]


def test_nothing_goes_before_two_good_ones_are_verified(quick: Path) -> None:
    for step in (1, 2, 3, 4):
        save(quick, step)
    for step in (3, 4):  # same size, other content: only a full check sees it
        (quick / f"checkpoint-{step}" / "config.json").write_text("y" * 500)
    assert ck.prune(quick, 2) == []
    assert ck.newest(quick).step == 2
    save(quick, 5)
    assert ck.prune(quick, 2) == ["checkpoint-1"]
    assert ck.steps(quick) == [2, 3, 4, 5]  # damaged ones are left to look at


def test_links_are_never_followed_by_deleting(quick: Path) -> None:
    outside = quick / "outside"
    save(outside, 1)
    root = quick / "root"
    for step in (3, 4, 5):
        save(root, step)
    (root / "checkpoint-1").symlink_to(outside / "checkpoint-1")
    (root / ".trash-x-1-ab").symlink_to(outside)
    assert ck.prune(root, 2) == ["checkpoint-3"]
    assert ck.sweep(root).removed == (".trash-x-1-ab",)
    ck.verify_folder(outside / "checkpoint-1")


def test_sweep_takes_what_the_dead_left_and_nothing_else(quick: Path) -> None:
    save(quick, 1)
    save(quick, 2)
    os.rename(quick / "checkpoint-2", quick / ".old-checkpoint-2-77-ab12")  # killed between two renames
    (quick / ".old-checkpoint-1-77-ab12").mkdir()
    ours = (".tmp-checkpoint-3-1-ab", ".trash-checkpoint-0-1-ab", ".tmpA1b2C3", ".tmp-latest-9-ab")
    theirs = (".git", ".tmpfile", ".trashcan", "x.tmp", ".ballast", ".lock", ".old-letters")
    for name in (*ours, *theirs):
        (quick / name).mkdir() if "checkpoint" in name else (quick / name).write_text("x")
    swept = ck.sweep(quick)
    assert set(swept.removed) == {*ours, ".old-checkpoint-1-77-ab12"}
    assert swept.restored == ("checkpoint-2",)
    assert {p.name for p in quick.iterdir()} == {*theirs, "checkpoint-1", "checkpoint-2", "latest"}
    assert ck.newest(quick).step == 2
    assert ck.sweep(quick) == ck.Swept()
    assert ck.sweep(quick / "none") == ck.Swept()


def test_the_same_content_again_keeps_what_is_there(quick: Path) -> None:
    save(quick, 1)
    save(quick, 2)
    inode = (quick / "checkpoint-2").stat().st_ino
    save(quick, 2)
    assert (quick / "checkpoint-2").stat().st_ino == inode
    save(quick, 1)  # older: it becomes the newest, so it is put anew
    assert ck.newest(quick).step == 1
    save(quick, 1, "other")
    assert (quick / "checkpoint-1" / "config.json").read_text() == "other"


def test_the_clock_does_not_count(quick: Path) -> None:
    for step, when in ((1, 2e9), (2, 1e9)):
        save(quick, step)
        for path in (quick / f"checkpoint-{step}", quick / f"checkpoint-{step}" / "MANIFEST.json"):
            os.utime(path, (when, when))
    assert ck.newest(quick).step == 2


@pytest.mark.parametrize("step", [-1, 10**12])
def test_impossible_steps_are_refused(quick: Path, step: int) -> None:
    with pytest.raises(CheckpointError, match="a checkpoint has a step"):
        save(quick, step)


def test_the_reserve_is_really_allocated_and_given_back(quick: Path) -> None:
    with ck.Ballast(quick) as ballast:
        assert ballast.size == 0 and ballast.free() == 0
        assert ballast.hold(300_000)
        assert ballast.path.stat().st_blocks * 512 >= 300_000
        assert ck.Ballast(quick).hold(300_000)  # left by a killed process: taken over
        assert ballast.hold(100_000) and ballast.size == 100_000
        assert ballast.free() == 100_000 and not ballast.path.exists()
        ballast.hold(1000)
    assert list(quick.iterdir()) == []


class Usage:
    """The most bytes that checkpoints, finished or not, take at any change of a name or flush of a file."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.most = root, 0
        for name in ("fsync", "rename", "replace", "unlink"):
            patch.setattr(os, name, self._watched(getattr(os, name)))

    def _watched(self, call: Any) -> Any:
        def inner(*args: Any, **kwargs: Any) -> Any:
            self.look()
            done = call(*args, **kwargs)
            self.look()
            return done

        return inner

    def look(self) -> None:
        total = 0
        for base, _, names in os.walk(self.root):
            if Path(base) != self.root:  # not `latest`
                for name in names:
                    try:
                        total += os.lstat(f"{base}/{name}").st_size
                    except FileNotFoundError:
                        continue
        self.most = max(self.most, total)


def many(root: Path, count: int, keep: int, patch: pytest.MonkeyPatch) -> None:
    usage = Usage(root, patch)
    for step in range(1, count + 1):
        ck.store(root, step, lambda folder, step=step: write_atomic(folder / "model.bin", f"{step:>20000}"))
        ck.prune(root, keep)
    assert ck.steps(root) == list(range(count - keep + 1, count + 1))
    size = max(ck.size_of(root / f"checkpoint-{step}") for step in ck.steps(root))
    assert keep * size < usage.most <= (keep + 1) * size
    assert ck.newest(root).skipped == ()


def test_disk_use_of_30_saves(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(quick, 30, 3, monkeypatch)


@pytest.mark.slow
def test_disk_use_of_1000_saves(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many(quick, 1000, 3, monkeypatch)


MEMORY = """
import json, resource, sys, torch
from pathlib import Path
from gnomon.base import checkpoint as ck
state = {str(i): torch.zeros(10_000_000) for i in range(3)}
for t in state.values(): t += 1
ck.save_tensors(Path(sys.argv[1]), "warm.safetensors", {"a": torch.zeros(2)})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ck.save_tensors(Path(sys.argv[1]), "x.safetensors", {**state, "tied": state["0"]})
print(json.dumps((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_save_holds_no_second_copy_of_the_state(tmp_path: Path) -> None:
    """120 MB of state and a tied tensor of 40: only the tied one is copied, and finiteness is checked in parts."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    call = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, env=env, check=True)
    assert json.loads(done.stdout) < 100_000_000
    assert (tmp_path / "x.safetensors").stat().st_size > 160_000_000
