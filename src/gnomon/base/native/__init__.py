"""Kernels in C, compiled once at first use into the user's cache. Where there is no compiler the torch path serves.

`matrix.h` is what kernels share. `GNOMON_NATIVE=0` switches all of them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SWITCH: Final = "GNOMON_NATIVE"
HEADERS: Final = Path(__file__).parent
POOL: Final = HEADERS / "pool.c"  # the threads that all kernels share
# No -ffast-math: infinities mark masked scores. Sums may be reordered inside one row, never across rows.
_FLAGS: Final = (
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-pthread", f"-I{HEADERS}",
)  # fmt: skip
_EXTRA: Final = (("-march=native",), ())
Pointer = ctypes.c_void_p


def cache_dir() -> Path:
    """Where compiled libraries are kept. Raises RuntimeError where there is neither a home nor XDG_CACHE_HOME."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "gnomon" / "native"


@lru_cache(maxsize=16)
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None where there is no compiler, it fails, or `GNOMON_NATIVE=0` says no.

    Where the user's cache cannot be used, a private folder among the temporary files takes its place.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    for folder in _folders() if compiler else ():
        assert compiler is not None
        usable = True
        for extra in _EXTRA:
            try:
                path = _compiled(compiler, source, (*_FLAGS, *extra), folder)
                lib = ctypes.CDLL(str(path)) if path else None
            except OSError:
                usable = False
                continue
            if lib is not None:
                if source == POOL:
                    return lib
                lib.gn_packed_size.restype = ctypes.c_int64
                if (pool := library(POOL)) is not None:
                    lib.gn_use_pool(ctypes.cast(pool.gn_pool_run, Pointer))
                return lib
        if usable:
            return None  # the compiler refuses, and would elsewhere
    return None


def _folders() -> Iterator[Path]:
    """The user's cache, then a folder among the temporary files that nobody else can write to."""
    with suppress(RuntimeError):
        yield cache_dir()
    if not hasattr(os, "getuid"):
        return
    with suppress(OSError):
        private = Path(tempfile.gettempdir()) / f"gnomon-native-{os.getuid()}"
        private.mkdir(mode=0o700, exist_ok=True)
        found = private.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            yield private


def _compiled(compiler: str, source: Path, flags: tuple[str, ...], folder: Path) -> Path | None:
    """The library for this source, compiler and processor: from the folder, or compiled into it.

    None where the compiler refuses. Raises OSError where the folder cannot be used.
    """
    text = source.read_bytes() + b"".join(p.read_bytes() for p in sorted(HEADERS.glob("*.h")))
    key = hashlib.sha256(text + repr((compiler, flags, platform.machine(), _processor())).encode()).hexdigest()[:20]
    target = folder / f"{source.stem}-{key}.so"
    try:
        target.lstat()
        return target
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
    beside = target.with_suffix(f".{secrets.token_hex(4)}.tmp")
    beside.touch()
    command = [compiler, *flags, "-o", str(beside), str(source), "-lm"]
    try:
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0:
            beside.replace(target)
            return target
    except subprocess.TimeoutExpired:
        return None
    finally:
        beside.unlink(missing_ok=True)
    return None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@lru_cache(maxsize=1024)
def many(kind: Any, n: int) -> Any:
    """The type of an array of n: ctypes forgets it with its last instance, and making it takes 50 microseconds."""
    return kind * n


def pointer(array: NDArray[Any]) -> Pointer:
    """The address of an array's numbers."""
    return Pointer(array.ctypes.data)


class Arrays:
    """Float32 arrays that a C structure points to; they live as long as this object."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        self._lib = lib
        self._kept: list[NDArray[np.float32]] = []

    def plain(self, values: NDArray[Any]) -> int:
        """Address of the values as they are, row after row."""
        array = np.ascontiguousarray(values, dtype=np.float32)
        self._kept.append(array)
        return int(array.ctypes.data)

    def packed(self, weight: NDArray[Any]) -> int:
        """Address of weight [out, in] as panels (matrix.h)."""
        values = np.asarray(weight, dtype=np.float32)
        outputs, inputs = values.shape
        size = self._lib.gn_packed_size(outputs, inputs)
        room = np.empty(size + 16, dtype=np.float32)
        panels = room[(-room.ctypes.data % 64) // 4 :][:size]  # panels start on a cache line
        rows, columns = (ctypes.c_int64(s // 4) for s in values.strides)
        self._lib.gn_pack(pointer(values), rows, columns, outputs, inputs, pointer(panels))
        self._kept.append(panels)
        return int(panels.ctypes.data)
