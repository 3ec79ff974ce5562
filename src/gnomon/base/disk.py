"""Room for checkpoints: what is kept, what goes, what a dead process left, and a reserve for the last save."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gnomon.base.atomic import FULL, beside, discard, disk_error, fsync_path, make_folder, remove, write_all
from gnomon.base.errors import CheckpointError, DiskFullError
from gnomon.base.folders import by_age, newest, size_of, steps, verify_folder

LEAST: Final = 2  # good checkpoints that always stay: the last one may be the one that a crash is tearing
MARGIN: Final = 1.2  # free space before a save, in checkpoints
OLD: Final = ".old-"
_LEFT = re.compile(r"\.tmp-.*|\.trash-.*|\.tmp[A-Za-z0-9]{6}")  # ours, and the temporary files of safetensors
_OLD = re.compile(r"\.old-(checkpoint-[0-9]+)-[0-9]+-[0-9a-f]+")
_PID = re.compile(r"\.(?:tmp|trash)-.+-([0-9]+)-[0-9a-f]+")


# --- what a dead process left ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """Names that `sweep` removed, and checkpoints that it put back."""

    removed: tuple[str, ...] = ()
    restored: tuple[str, ...] = ()


def sweep(root: Path) -> Swept:
    """Remove what dead processes left half written or half deleted in a folder. Only under the lock of the run.

    A checkpoint that was moved aside for its successor, where that never came, is put back.
    """
    removed, restored = [], []
    for path in sorted(root.glob(".*")):
        old = _OLD.fullmatch(path.name)
        if old:
            final = root / old.group(1)
            if not final.exists() and not final.is_symlink():
                os.rename(path, final)
                fsync_path(root)
                restored.append(final.name)
                continue
        elif not _LEFT.fullmatch(path.name):
            continue
        remove(path)
        removed.append(path.name)
    return Swept(tuple(removed), tuple(restored))


def alive(pid: int) -> bool:
    """Whether a process with this number exists on this machine."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def remove_orphans(root: Path) -> None:
    """Remove temporary files and folders whose process is dead; those of the living stay, so no lock is needed."""
    for path in root.glob(".t*"):
        match = _PID.fullmatch(path.name)
        if match and not alive(int(match.group(1))):
            remove(path)


# --- retention -------------------------------------------------------------------------------------------------------


def prune(
    root: Path, keep: int, every: int | None = None, best: int | None = None, protect: Iterable[int | str | Path] = ()
) -> list[str]:
    """Remove old checkpoints; returns the removed names.

    Kept: the `keep` (≥ 2) last saved good ones, steps that `every` divides, the step `best`, and `protect` (steps,
    names or folders, such as the one resumed from). Nothing goes before the two last saved ones are read back and
    verified. Damaged ones and links are left for people to look at.
    """
    if keep < LEAST:
        raise CheckpointError(f"keep = {keep}; keep at least {LEAST} checkpoints, so that one is always good")
    if every is not None and every < 1:
        raise CheckpointError(f"every = {every}; write a number of steps above 0, or None")
    spared = {p if isinstance(p, int) else Path(p).name for p in protect}
    if len(steps(root)) <= keep:
        return []
    good: list[int] = []
    for step, _ in by_age(root):
        with contextlib.suppress(CheckpointError):
            verify_folder(root / f"checkpoint-{step}", checksums=len(good) < LEAST)
            good.append(step)
    removed = []
    for step in reversed(good[keep:]):  # the oldest first
        name = f"checkpoint-{step}"
        if step == best or step in spared or name in spared or (every is not None and step % every == 0):
            continue
        try:
            discard(root / name)
        except OSError as error:
            raise disk_error(error, f"cannot remove {name} in {str(root)!r}") from error
        removed.append(name)
    return removed


# --- room ------------------------------------------------------------------------------------------------------------


def preflight(root: Path, size: int | None = None) -> int:
    """Bytes that are free for checkpoints in `root`, which is made and tried by a write.

    size: bytes of one checkpoint; None = as the newest good one there, if any. Raises DiskFullError when less than 1.2
    times that is free, CheckpointError when the folder cannot be written.
    """
    try:
        make_folder(root)
        probe = beside(root / "probe")
        try:
            handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                write_all(handle, b"gnomon")
            finally:
                os.close(handle)
        finally:
            remove(probe)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise disk_error(error, f"cannot write checkpoints to {str(root)!r}") from error
    if size is None:
        with contextlib.suppress(CheckpointError):
            size = size_of(newest(root, checksums=False).path)
    if size is not None and free < MARGIN * size:
        raise DiskFullError(
            f"{free / 2**20:,.1f} MiB are free for {str(root)!r}, a checkpoint needs {MARGIN * size / 2**20:,.1f} "
            f"({MARGIN} times its size); free some space, or keep fewer checkpoints"
        )
    return free


class Ballast:
    """Space of one checkpoint, held in `root/.ballast`, so that the last save succeeds on a full disk.

    `with Ballast(root) as ballast: ballast.hold(size)`. The file goes when the block ends; one that a killed process
    left is taken over by the next.
    """

    def __init__(self, root: Path) -> None:
        self.path = root / ".ballast"

    @property
    def size(self) -> int:
        """Bytes held now."""
        return self.path.lstat().st_size if self.path.is_file() and not self.path.is_symlink() else 0

    def hold(self, size: int) -> bool:
        """Hold `size` bytes, really allocated. False, and nothing held, when the disk has no room for them."""
        if self.size == size:
            return True
        self.free()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                _allocate(handle, size)
            finally:
                os.close(handle)
        except OSError as error:
            remove(self.path)
            if error.errno in FULL:
                return False
            raise disk_error(error, f"cannot reserve space in {str(self.path.parent)!r}") from error
        return True

    def free(self) -> int:
        """Give the space back; returns the bytes."""
        size = self.size
        remove(self.path)
        return size

    def __enter__(self) -> Ballast:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()


def _allocate(handle: int, size: int) -> None:
    if size <= 0:
        return
    try:
        os.posix_fallocate(handle, 0, size)
        return
    except AttributeError:  # macOS, Windows
        pass
    except OSError as error:
        if error.errno in FULL:
            raise
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        write_all(handle, block[: size - start])
