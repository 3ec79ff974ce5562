"""One process per run folder: an OS lock that dies with its process, also after kill -9 and power loss."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import time
import weakref
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from gnomon.base.errors import GnomonError, RunBusyError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

NAME: Final = ".lock"
_PATIENCE: Final = 0.3  # s; a `probe` holds the lock for an instant, and a new holder has to write its name
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _flock(handle: int, how: str) -> bool:
    """Lock an open file: "exclusive" and "shared" try once, "wait" waits, "free" unlocks. False: somebody has it."""
    if fcntl is None:
        raise GnomonError("this system has no file locks (fcntl); runs need Linux, macOS or WSL")
    flags = {
        "exclusive": fcntl.LOCK_EX | fcntl.LOCK_NB, "shared": fcntl.LOCK_SH | fcntl.LOCK_NB,
        "wait": fcntl.LOCK_EX, "free": fcntl.LOCK_UN,
    }[how]  # fmt: skip
    try:
        fcntl.flock(handle, flags)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


@contextlib.contextmanager
def locked(handle: int) -> Iterator[None]:
    """Hold the lock of an open file; waits for others. For short jobs such as appending a line."""
    _flock(handle, "wait")
    try:
        yield
    finally:
        _flock(handle, "free")


class RunLock:
    """`with RunLock(folder):` — nobody else works in `folder` until the block ends or the process dies.

    Raises RunBusyError, naming the holder, when another process (or another RunLock of this one) has it. A forked child
    does not hold it: the lock ends with the process that took it, whatever its children do.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock, in this process."""
        return self._handle is not None

    def acquire(self) -> RunLock:
        """Take the lock; see the class."""
        if self._handle is not None:
            return self
        handle = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
            end = time.monotonic() + _PATIENCE
            while not _flock(handle, "exclusive"):
                if time.monotonic() >= end:
                    raise _busy(self.folder, _holder(handle))
                time.sleep(0.02)
            _write(handle, {"pid": os.getpid(), "started": time.time(), "host": platform.node()})
        except OSError as error:
            _close(handle)
            raise GnomonError(
                f"cannot lock the run folder {str(self.folder)!r}: {error.strerror or error} ({NAME}); "
                "give a folder on a local disk that you may write to"
            ) from error
        except BaseException:
            _close(handle)
            raise
        self._handle = handle
        _held.add(self)
        return self

    def release(self) -> None:
        """Give the lock back; twice is harmless."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(handle, 0)
        _close(handle)  # the last descriptor: unlocks

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def _after_fork() -> None:
    """In a forked child: drop the copies of the descriptors, or a left-over worker would keep a dead run locked."""
    for lock in list(_held):
        handle, lock._handle = lock._handle, None
        _close(handle)
    _held.clear()


if os.name == "posix":
    os.register_at_fork(after_in_child=_after_fork)


def probe(folder: Path) -> int | None:
    """The process that holds the run folder; None when nobody does, -1 when the holder is not known."""
    try:
        handle = os.open(folder / NAME, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return None
    try:
        if _flock(handle, "shared"):
            return None
        return int(_holder(handle).get("pid", -1))
    except OSError:  # a file system without locks: nobody can hold one
        return None
    finally:
        _close(handle)


def _busy(folder: Path, holder: dict[str, Any]) -> RunBusyError:
    pid = holder.get("pid")
    who = "another process" if pid is None else f"process {pid}"
    if pid == os.getpid():
        who += " (this one)"
    if holder.get("host") not in (None, platform.node()):
        who += f" on {holder['host']}"
    if pid is not None:
        who += datetime.fromtimestamp(holder["started"], UTC).strftime(", since %Y-%m-%d %H:%M:%S UTC,")
    stop = "end it" if pid is None else f"end it (kill {pid}; it saves first)"
    return RunBusyError(
        f"{str(folder)!r} is in use: {who} works in it. Wait for it, {stop}, or name another run folder", pid
    )


def _holder(handle: int) -> dict[str, Any]:
    """What the holder wrote; {} when it has not yet."""
    end = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(os.pread(handle, 4096, 0))
            return {"pid": int(found["pid"]), "started": float(found["started"]), "host": str(found["host"])}
        if time.monotonic() >= end:
            return {}
        time.sleep(0.02)


def _write(handle: int, facts: dict[str, Any]) -> None:
    text = json.dumps(facts).encode() + b"\n"
    with contextlib.suppress(OSError):  # on a full disk the lock holds, only without a name
        os.ftruncate(handle, 0)
        os.pwrite(handle, text, 0)


def _close(handle: int | None) -> None:
    if handle is not None:
        with contextlib.suppress(OSError):
            os.close(handle)
