"""Kernels are compiled once into the cache, or a private folder; without a compiler, or switched off, there is none."""

from __future__ import annotations

import shutil
import tempfile
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


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def unreadable(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Every look below `root` is refused, also to the superuser."""
    for name in ("stat", "lstat"):
        real = getattr(Path, name)

        def look(self: Path, *args: object, _real: object = real, **kwargs: object) -> object:
            if root in self.parents:
                raise PermissionError(13, "Permission denied", str(self))
            return _real(self, *args, **kwargs)  # type: ignore[operator]

        monkeypatch.setattr(Path, name, look)


@pytest.mark.skipif(not shutil.which("gcc") and not shutil.which("cc"), reason="no C compiler on this machine")
@pytest.mark.parametrize("trouble", ["no home", "unreadable", "a file in its place"])
def test_a_private_folder_takes_the_place_of_an_unusable_cache(
    trouble: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = tmp_path / "tmp"
    room.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    if trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    elif trouble == "unreadable":
        unreadable(monkeypatch, tmp_path / "cache")
    else:
        (tmp_path / "cache").write_text("in the way")
    lib = native.library(source)
    assert lib is not None and lib.twice(21) == 42
    (private,) = room.iterdir()
    assert private.stat().st_mode & 0o777 == 0o700 and {p.suffix for p in private.iterdir()} == {".so"}
    private.chmod(0o777)
    native.library.cache_clear()
    assert native.library(source) is None, "where others may write, nothing is loaded from"
    private.chmod(0o700)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    native.library.cache_clear()
    assert native.library(source) is None
    native.library.cache_clear()
