"""The only code that reads or writes weights: safetensors with a checksum manifest, published atomically.

A checkpoint folder appears by one rename, after every file in it is on the disk and `MANIFEST.json` (name, size,
SHA-256 of each) was written last. Nothing is ever unpickled. `latest` is a file with a name: a hint, not the truth.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gnomon.base.atomic import fsync_path, write_atomic
from gnomon.base.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MANIFEST: Final = "MANIFEST.json"
LATEST: Final = "latest"
_STEP = re.compile(r"checkpoint-([0-9]{1,12})")
_TEMP = re.compile(r"\.tmp-checkpoint-[0-9]+-([0-9]+)-[0-9a-f]+")


# --- tensors ---------------------------------------------------------------------------------------------------------


def save_tensors(
    folder: Path, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `tensors` to folder/name (safetensors), whole or not at all; returns the path.

    Tied tensors are stored once per name. Raises CheckpointError for NaN or infinite floats, naming the tensors.
    """
    import torch
    from safetensors.torch import save

    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(
            f"refusing to save {name}: NaN or infinite values in {len(bad)} of {len(tensors)} tensors "
            f"({', '.join(bad[:5])}); the last good checkpoint is untouched"
        )
    plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
    path = folder / _safe_name(name)
    write_atomic(path, save(plain, metadata={"format": "pt", **(metadata or {})}))
    return path


def load_tensors(folder: Path, name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of folder/name. Raises CheckpointError for a missing, damaged, pickled or non-finite file."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / _safe_name(name)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*"))[:12]) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{name} is missing in {str(folder)!r} (there: {there or 'nothing'})")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{str(path)!r} is not a safetensors file; pickled weights are never read, convert it")
    try:
        tensors: dict[str, torch.Tensor] = load_file(str(path), device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None
    bad = [k for k, v in tensors.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise CheckpointError(f"{str(path)!r} holds NaN or infinite values in {', '.join(bad[:5])}")
    return tensors


def tensor_names(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the header alone. Raises CheckpointError as `load_tensors`."""
    from safetensors import SafetensorError, safe_open

    path = folder / _safe_name(name)
    if not path.is_file():
        raise CheckpointError(f"{name} is missing in {str(folder)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None


def _safe_name(name: str) -> str:
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts:
        raise CheckpointError(f"file name {name!r} leaves its folder; give a plain name inside it")
    return name


# --- manifest --------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Fsync every file of `folder`, then write MANIFEST.json over them."""
    rows = []
    for path in _files(folder):
        fsync_path(path)
        name = path.relative_to(folder).as_posix()
        rows.append({"name": name, "size": path.stat().st_size, "sha256": _digest(path)})
    for sub in sorted(p for p in folder.rglob("*") if p.is_dir()):
        fsync_path(sub)
    body = {"version": 1, **(extra or {}), "files": rows}
    write_atomic(folder / MANIFEST, json.dumps(body, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """MANIFEST.json of a folder. Raises CheckpointError when it is missing or no manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder.name} has no {MANIFEST}: it was not finished")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        good = all(
            isinstance(row["name"], str) and isinstance(row["size"], int) and isinstance(row["sha256"], str)
            for row in body["files"]
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(f"{folder.name}/{MANIFEST} is damaged")
    return dict(body)


def verify_folder(folder: Path, checksums: bool = True) -> None:
    """Raise CheckpointError, naming the file, unless every file of the manifest is there, whole and unchanged."""
    for row in read_manifest(folder)["files"]:
        path = folder / _safe_name(row["name"])
        if not path.is_file():
            raise CheckpointError(f"{folder.name} lacks {row['name']}")
        if path.stat().st_size != row["size"]:
            raise CheckpointError(f"{folder.name}/{row['name']} has {path.stat().st_size} of {row['size']} bytes")
        if checksums and _digest(path) != row["sha256"]:
            raise CheckpointError(f"{folder.name}/{row['name']} was changed: its checksum differs")


# --- checkpoints of a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A good checkpoint, its step, and the newer ones that were skipped with the reason of each."""

    path: Path
    step: int
    skipped: tuple[tuple[str, str], ...] = ()


@contextlib.contextmanager
def publish(root: Path, step: int) -> Iterator[Path]:
    """`with publish(run / "checkpoints", 500) as folder:` write files into `folder`; it appears when the block ends.

    After an error nothing is published and the temporary folder is removed. Orphans of dead processes are removed.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_orphans(root)
    temp = root / f".tmp-checkpoint-{step}-{os.getpid()}-{secrets.token_hex(4)}"
    temp.mkdir()
    try:
        yield temp
        write_manifest(temp, {"step": step})
        final = root / f"checkpoint-{step}"
        if final.exists():  # a resumed run reached the same step again
            old = root / f".tmp-checkpoint-{step}-{os.getpid()}-{secrets.token_hex(4)}"
            os.rename(final, old)
            os.rename(temp, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temp, final)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    fsync_path(root)
    write_atomic(root / LATEST, final.name + "\n")


def _remove_orphans(root: Path) -> None:
    for path in root.glob(".tmp-checkpoint-*"):
        match = _TEMP.fullmatch(path.name)
        if match and not alive(int(match.group(1))):
            shutil.rmtree(path, ignore_errors=True)


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


def steps(root: Path) -> list[int]:
    """Steps that have a folder, in order, complete or not."""
    found = [_STEP.fullmatch(p.name) for p in root.glob("checkpoint-*") if p.is_dir()]
    return sorted(int(m.group(1)) for m in found if m)


def newest(root: Path, checksums: bool = True) -> Found:
    """The newest checkpoint that verifies; what was skipped on the way is named in it.

    Raises CheckpointError when there is none, with the reason of each.
    """
    skipped: list[tuple[str, str]] = []
    for step in reversed(steps(root)):
        path = root / f"checkpoint-{step}"
        try:
            verify_folder(path, checksums)
            return Found(path, step, tuple(skipped))
        except CheckpointError as error:
            skipped.append((path.name, str(error)))
    why = "; ".join(reason for _, reason in skipped) or "there is no checkpoint-<step> folder"
    raise CheckpointError(f"no usable checkpoint in {str(root)!r}: {why}")


def prune(root: Path, keep: int) -> list[str]:
    """Remove the oldest checkpoints until `keep` good ones are left; returns the removed names.

    Raises CheckpointError for keep < 2: the last one may be the one that a crash is tearing.
    """
    if keep < 2:
        raise CheckpointError(f"keep = {keep}; keep at least 2 checkpoints, so that one is always good")
    good = []
    for step in reversed(steps(root)):
        with contextlib.suppress(CheckpointError):
            verify_folder(root / f"checkpoint-{step}", checksums=False)
            good.append(step)
    removed = []
    for step in good[keep:]:
        name = f"checkpoint-{step}"
        (root / name / MANIFEST).unlink(missing_ok=True)  # from here on it counts as unfinished
        shutil.rmtree(root / name, ignore_errors=True)
        removed.append(name)
    return removed
