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
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

SWITCH: Final = "GNOMON_NATIVE"
HEADERS: Final = Path(__file__).parent
# No -ffast-math: infinities mark masked scores. Sums may be reordered inside one row, never across rows.
_FLAGS: Final = (
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-pthread", f"-I{HEADERS}",
)  # fmt: skip
_EXTRA: Final = (("-march=native",), ())
Pointer = ctypes.c_void_p


def cache_dir() -> Path:
    """Where compiled libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "gnomon" / "native"


@lru_cache(maxsize=8)
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled `source`; None where there is no compiler, it fails, or `GNOMON_NATIVE=0` says no."""
    if os.environ.get(SWITCH) == "0":
        return None
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    for extra in _EXTRA if compiler else ():
        assert compiler is not None
        path = _compiled(compiler, source, (*_FLAGS, *extra))
        if path is None:
            continue
        try:
            lib = ctypes.CDLL(str(path))
        except OSError:
            continue
        lib.gn_packed_size.restype = ctypes.c_int64
        return lib
    return None


def _compiled(compiler: str, source: Path, flags: tuple[str, ...]) -> Path | None:
    """The library for this source, compiler and processor: from the cache, or compiled into it."""
    text = source.read_bytes() + b"".join(p.read_bytes() for p in sorted(HEADERS.glob("*.h")))
    key = hashlib.sha256(text + repr((compiler, flags, platform.machine(), _processor())).encode()).hexdigest()[:20]
    target = cache_dir() / f"{source.stem}-{key}.so"
    if target.is_file():
        return target
    beside = target.with_suffix(f".{secrets.token_hex(4)}.tmp")
    command = [compiler, *flags, "-o", str(beside), str(source), "-lm"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0:
            beside.replace(target)
            return target
        beside.unlink(missing_ok=True)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


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
