"""Kernels are compiled once into the cache; without a compiler, or switched off, there is none and nothing breaks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from gnomon.base import native

C = '#include "matrix.h"\nint twice(int x) { return 2 * x; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.library.cache_clear()
    path = tmp_path / "thing.c"
    path.write_text(C)
    return path


@pytest.mark.skipif(not shutil.which("gcc") and not shutil.which("cc"), reason="no C compiler on this machine")
def test_a_source_is_compiled_once_and_again_when_it_changes(source: Path) -> None:
    lib = native.library(source)
    assert lib is not None and lib.twice(21) == 42
    (first,) = native.cache_dir().glob("thing-*.so")
    stamp = first.stat().st_mtime_ns
    native.library.cache_clear()
    assert native.library(source) is not None and first.stat().st_mtime_ns == stamp
    source.write_text(C.replace("2 * x", "3 * x"))
    native.library.cache_clear()
    again = native.library(source)
    assert again is not None and again.twice(21) == 63 and len(list(native.cache_dir().glob("thing-*.so"))) == 2
    assert not list(native.cache_dir().glob("*.tmp"))


def test_no_compiler_a_broken_source_or_the_switch_mean_no_library(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text("this is not C")
    assert native.library(source) is None and not list(native.cache_dir().glob("thing-*"))
    source.write_text(C)
    native.library.cache_clear()
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.library(source) is None
    monkeypatch.delenv(native.SWITCH)
    native.library.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert native.library(source) is None
    native.library.cache_clear()
