"""Files and folders that appear whole or not at all: write beside, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gnomon.base.errors import CheckpointError, DiskFullError

TEMP: Final = ".tmp-"
TRASH: Final = ".trash-"
FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_NO_FSYNC: Final = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # folders on some file systems, anything on Windows
_NO_SWAP: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)


def beside(path: Path, kind: str = TEMP) -> Path:
    """A free hidden name next to `path`: `<kind><name>-<pid>-<random>`."""
    return path.with_name(f"{kind}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def disk_error(error: OSError, doing: str) -> CheckpointError:
    """A teaching error for a failed write: DiskFullError when the disk or quota is full, else CheckpointError."""
    what = error.strerror or str(error)
    where = f" at {str(error.filename)!r}" if error.filename else ""
    if error.errno in FULL:
        return DiskFullError(f"{doing}: {what}{where}; what was there before is untouched. Free some space, go on then")
    hint = "give a folder that you may write to" if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else ""
    code = errno.errorcode.get(error.errno or 0, "no code")
    return CheckpointError(
        f"{doing}: {what} ({code}){where}; what was there before is untouched. {hint or 'Look after the disk'}"
    )


def fsync_path(path: Path) -> None:
    """Flush a file or folder to the disk. Raises OSError when that fails, not where the system has no such call."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt":  # folders cannot be opened there
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that they outlive a loss of power; nothing happens when it is there."""
    new = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        with contextlib.suppress(OSError):  # a folder above ours may be closed to reading
            fsync_path(folder.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """`with replacing(path) as temp:` write `temp`; it takes the place of `path` when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = beside(path)
    try:
        yield temp
        fsync_path(temp)
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content` (text as UTF-8); a crash leaves the old file or the new one, never a part."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replacing(path) as temp:
        handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write_all(handle, data)
        finally:
            os.close(handle)


def write_all(handle: int, data: bytes) -> None:
    """Write every byte to an open file; `os.write` alone may stop early."""
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step, so that neither is ever missing; False where the system cannot (Linux only)."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        call = libc.renameat2
    except AttributeError:  # an old C library
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(a), here, os.fsencode(b), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


def discard(path: Path) -> None:
    """Delete a file, link or folder: first the name goes, then the content, so that nothing half deleted is seen."""
    trash = beside(path, TRASH)
    os.rename(path, trash)
    fsync_path(path.parent)
    remove(trash)


def remove(path: Path) -> None:
    """Remove a file, a link (never what it points to) or a folder as far as it goes; errors are left for a sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
