"""A disk that fails: every write point of a save, once each, and a disk that is really full."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError

from gnomon.base import checkpoint as ck
from gnomon.base.atomic import write_atomic
from gnomon.base.errors import CheckpointError, DiskFullError
from gnomon.interfaces import cli

CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir")
SLACK = 8192  # bytes for `latest` and folders
GROWS = ("open", "write", "mkdir", "save_file")  # what a full disk refuses


def fill(folder: Path, value: float = 1.0) -> None:
    """What training writes, in small: weights, optimiser, configuration."""
    ck.save_tensors(folder, "model.safetensors", {"w": torch.full((8, 4), value)})
    ck.save_tensors(folder / "train", "0-adamw.safetensors", {"w|exp_avg": torch.full((8, 4), value)})
    write_atomic(folder / "config.json", '{"model_type": "gnomon"}')


class Faults:
    """Raises `code` at call number `at` of a save; `lasting`: at every later one that a full disk would refuse."""

    def __init__(self, at: int, code: int, lasting: bool = False) -> None:
        self.at, self.code, self.lasting, self.count, self.hit = at, code, lasting, 0, False

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            reading = name == "open" and not args[1] & os.O_CREAT
            if name == "mkdir" and Path(args[0]).is_dir():  # "make it unless it is there": no fault matters
                return call(*args, **kwargs)
            if "dir_fd" in kwargs:  # rmtree: what it leaves of a discarded folder goes at the next sweep
                return call(*args, **kwargs)
            self.count += 1
            later = self.lasting and self.count > self.at and name in GROWS and not reading
            if self.count == self.at or later:
                self.hit = True
                if name == "save_file":
                    raise SafetensorError(f"Error while serializing: I/O error: failed (os error {self.code})")
                raise OSError(self.code, os.strerror(self.code), str(args[0]))
            return call(*args, **kwargs)

        return inner

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in CALLS:
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        patch.setattr(ck, "exchange", self.wrap("exchange", ck.exchange))
        patch.setattr(safetensors.torch, "save_file", self.wrap("save_file", safetensors.torch.save_file))


def hidden(root: Path) -> list[str]:
    return [p.name for p in root.rglob(".*")]


def value_of(root: Path, step: int) -> float:
    ck.verify_folder(root / f"checkpoint-{step}")
    return float(ck.load_tensors(root / f"checkpoint-{step}", "model.safetensors")["w"][0, 0])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("step", [2, 1], ids=["new", "same"])
@pytest.mark.parametrize("swap", [True, False], ids=["swap", "no-swap"])
def test_a_fault_at_each_point_of_publish(
    quick: Path, monkeypatch: pytest.MonkeyPatch, code: int, step: int, swap: bool
) -> None:
    if not swap:
        monkeypatch.setattr(ck, "exchange", lambda a, b: False)
    at = 0
    while True:
        at += 1
        root = quick / str(at)
        with ck.publish(root, 1) as folder:
            fill(folder)
        faults = Faults(at, code)
        with monkeypatch.context() as patch:
            faults.install(patch)
            try:
                with ck.publish(root, step) as folder:
                    fill(folder, 2.0)
                error = None
            except CheckpointError as caught:
                error = caught
        if not faults.hit:
            assert error is None and value_of(root, step) == 2.0
            break
        assert error is not None, f"fault {at} of {faults.count} went unnoticed"
        assert os.strerror(code) in str(error) or "cannot be saved" in str(error)
        assert isinstance(error, DiskFullError) == (code == errno.ENOSPC)
        assert hidden(root) == []
        assert value_of(root, 1) in ((1.0,) if step == 2 else (1.0, 2.0))
        if step == 2 and 2 in ck.steps(root):  # only its directory or `latest` could not be written
            assert value_of(root, 2) == 2.0
        assert ck.newest(root).skipped == ()
    assert at > 25


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "lasting"])
def test_full_disk_at_each_point_of_store(quick: Path, monkeypatch: pytest.MonkeyPatch, lasting: bool) -> None:
    at = 0
    while True:
        at += 1
        root, told = quick / str(at), list[str]()
        for step in (1, 2, 3):
            with ck.publish(root, step) as folder:
                write_atomic(folder / "x", str(step))
        faults = Faults(at, errno.ENOSPC, lasting)
        with monkeypatch.context() as patch:
            faults.install(patch)
            try:
                ck.store(root, 4, fill, protect={1}, tell=told.append)
                error = None
            except DiskFullError as caught:
                error = caught
        if not faults.hit:
            break
        assert hidden(root) == []
        assert (error is not None) == lasting or 4 in ck.steps(root), f"fault {at}"
        if error is None:
            assert value_of(root, 4) == 1.0
        else:
            assert error.exit_code == 28
            assert error.saved == ck.newest(root).path.name
        assert "removed" in told[1]
        assert set(ck.steps(root)) >= {1, 3}  # protected, and the two newest
    assert at > 25


def test_the_reserve_serves_the_last_save(tmp_path: Path) -> None:
    with ck.publish(tmp_path, 1) as folder:
        fill(folder)
    told: list[str] = []
    with ck.Ballast(tmp_path) as ballast:
        assert ballast.hold(ck.size_of(tmp_path / "checkpoint-1"))
        assert ballast.size == ck.size_of(tmp_path / "checkpoint-1")

        def write(folder: Path) -> None:
            if ballast.size:
                raise OSError(errno.ENOSPC, "full")
            fill(folder, 2.0)

        with pytest.raises(DiskFullError, match=r"checkpoint-2 was saved in the space") as caught:
            ck.store(tmp_path, 2, write, ballast=ballast, tell=told.append)
    assert caught.value.saved == "checkpoint-2"
    assert value_of(tmp_path, 2) == 2.0
    assert len(told) == 3 and "reserve" in told[2]


def test_the_command_line_ends_with_28_on_a_full_disk(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskFullError("no room for checkpoint-5", "checkpoint-4")

    monkeypatch.setattr("gnomon.base.runs.find_run", full)
    assert cli.run(["control", "x", "pause"]) == 28
    assert capsys.readouterr().err == "gnomon: no room for checkpoint-5\n"


def test_a_folder_that_cannot_be_written_is_named_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*file"):
        ck.preflight(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be saved"), ck.publish(tmp_path / "file", 3):
        pass


def test_preflight_wants_a_fifth_more_than_a_checkpoint(tmp_path: Path) -> None:
    free = ck.preflight(tmp_path / "new")
    assert free > 0 and ck.preflight(tmp_path, free // 2) > 0
    with pytest.raises(DiskFullError, match=r"1\.2 times its size"):
        ck.preflight(tmp_path, free)
    assert hidden(tmp_path) == []


# --- a file system that is really full, and one that is read-only ----------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    call = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "gnomon-test", str(place)]
    if mount is None or subprocess.run(call, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], capture_output=True, check=True)


def big(folder: Path, value: float = 1.0) -> None:
    ck.save_tensors(folder, "model.safetensors", {"w": torch.full((100, 100), value)})  # 40 kB, by the Rust writer
    ck.save_tensors(folder / "train", "0-adamw.safetensors", {"w|exp_avg": torch.full((50, 100), value)})
    shutil.copyfile(__file__, folder / "provenance.json")


def test_a_really_full_disk_at_every_page_of_a_save(small: Path) -> None:
    outcomes = []
    for pages in range(60):
        root = small / "run"
        with ck.publish(root, 1) as folder:
            big(folder)
        free = shutil.disk_usage(small).free - pages * 4096
        (small / "filler").write_bytes(bytes(free))
        try:
            with ck.publish(root, 2) as folder:
                big(folder, 2.0)
            outcomes.append(True)
        except DiskFullError:
            outcomes.append(False)
        assert hidden(root) == []
        assert value_of(root, 1) == 1.0
        assert ck.newest(root).skipped == ()
        if outcomes[-1]:
            assert value_of(root, 2) == 2.0
        shutil.rmtree(root)
        (small / "filler").unlink()
    assert outcomes[0] is False and outcomes[-1] is True
    assert outcomes == sorted(outcomes)
    assert sum(not ok for ok in outcomes) >= 20


def test_store_makes_room_on_a_really_full_disk(small: Path) -> None:
    for step in (1, 2, 3, 4):
        with ck.publish(small / "run", step) as folder:
            big(folder)
    with ck.Ballast(small / "run") as ballast:
        assert ballast.hold(100_000)
        (small / "filler").write_bytes(bytes(shutil.disk_usage(small).free - SLACK))
        assert not ck.Ballast(small).hold(2 * SLACK)
        ck.store(small / "run", 5, lambda folder: big(folder, 5.0), ballast=ballast)
        assert ck.steps(small / "run") == [3, 4, 5]  # two of four have gone for it
        (small / "filler2").write_bytes(bytes(shutil.disk_usage(small).free - SLACK))
        ck.store(small / "run", 6, lambda folder: big(folder, 6.0), ballast=ballast)
        (small / "filler3").write_bytes(bytes(shutil.disk_usage(small).free - SLACK))
        every = ck.steps(small / "run")
        with pytest.raises(DiskFullError) as caught:
            ck.store(small / "run", 7, lambda folder: big(folder, 7.0), ballast=ballast, protect=every)
        assert caught.value.saved == "checkpoint-7"
    assert value_of(small / "run", 7) == 7.0
    assert hidden(small) == []


def test_a_read_only_file_system(small: Path) -> None:
    root = small / "run"
    with ck.publish(root, 1) as folder:
        big(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True, capture_output=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system .*may write"):
        ck.store(root, 2, big)
    assert ck.newest(root).step == 1
