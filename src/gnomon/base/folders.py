"""Checkpoint folders on disk: the manifest of one, whether it is whole, and which of them is the newest good one."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from gnomon.base.atomic import fsync_path, write_atomic
from gnomon.base.errors import CheckpointError

MANIFEST: Final = "MANIFEST.json"
LATEST: Final = "latest"
VERSION: Final = 2  # 1 had no checksum of the manifest itself and no `serial`
_STEP = re.compile(r"checkpoint-(0|[1-9][0-9]{0,11})")
_DROPPINGS: Final = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave; they change no model
_MOST: Final = 64 * 2**20  # bytes of a manifest that are read


def safe_name(name: str) -> str:
    """A relative file name that stays in its folder. Raises CheckpointError for any other."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts or "\\" in name or not name.isprintable():
        raise CheckpointError(f"file name {name!r} leaves its folder; give a plain name inside it")
    return name


# --- manifest --------------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files, sub-folders) below `folder`, links not followed; anything else is a file here."""
    files: list[Path] = []
    subs: list[Path] = []
    for base, folders, names in os.walk(folder):
        for name in folders:
            (files if (Path(base) / name).is_symlink() else subs).append(Path(base) / name)
        files += [Path(base) / name for name in names]
    return sorted(files), sorted(subs)


def _regular(path: Path, name: str) -> os.stat_result:
    """What is known of a regular file. Raises CheckpointError for links and anything else."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise CheckpointError(f"{name} is a symbolic link; a checkpoint holds its files itself (copy it there)")
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{name} is no regular file")
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sum(body: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sum`."""
    plain = {k: v for k, v in body.items() if k != "sum"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, extra: Mapping[str, Any] | None = None) -> None:
    """Fsync every file of `folder`, then write MANIFEST.json over them. Raises CheckpointError for links."""
    rows = []
    files, subs = _walk(folder)
    for path in files:
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        size = _regular(path, f"{folder.name}/{name}").st_size
        fsync_path(path)
        rows.append({"name": name, "size": size, "sha256": _digest(path)})
    for sub in subs:
        fsync_path(sub)
    body = {**(extra or {}), "version": VERSION, "files": rows}
    write_atomic(folder / MANIFEST, json.dumps({**body, "sum": _sum(body)}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """MANIFEST.json of a folder. Raises CheckpointError when it is missing, damaged or of another version."""
    path, name = folder / MANIFEST, f"{folder.name}/{MANIFEST}"
    try:
        size = _regular(path, name).st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder.name} has no {MANIFEST}: it was not finished") from None
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from None
    damaged = CheckpointError(f"{name} is damaged")
    if size > _MOST:
        raise damaged
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
        rows = body["files"]
        good = all(
            isinstance(row["name"], str) and type(row["size"]) is int and isinstance(row["sha256"], str) for row in rows
        ) and len({row["name"] for row in rows}) == len(rows)
        version = body["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version not in (1, VERSION):
        raise CheckpointError(f"{name} is of version {version!r}, this gnomon reads 1 to {VERSION}: use the newer one")
    if not good or (version == VERSION and (body.get("sum") != _sum(body) or not text.endswith("}\n"))):
        raise damaged
    return dict(body)


def verify_folder(folder: Path, checksums: bool = True) -> None:
    """Raise CheckpointError, naming the file, unless the files of the manifest, all and alone, are there unchanged.

    checksums False: names and sizes only.
    """
    if folder.is_symlink():
        raise CheckpointError(f"{folder.name} is a symbolic link; a checkpoint is a folder of its own (copy it there)")
    if not folder.is_dir():
        raise CheckpointError(f"{folder.name} is no folder")
    body = read_manifest(folder)
    step = _STEP.fullmatch(folder.name)
    if step and body.get("step", int(step.group(1))) != int(step.group(1)):
        raise CheckpointError(f"{folder.name} was saved as step {body['step']}: somebody renamed it; name it so again")
    rows = {safe_name(row["name"]): row for row in body["files"]}
    try:
        for path in _walk(folder)[0]:
            name = path.relative_to(folder).as_posix()
            known = name == MANIFEST or name in rows or path.name in _DROPPINGS or path.name.startswith(".nfs")
            if not known:
                raise CheckpointError(f"{folder.name} holds {name}, which is not of this checkpoint; move it out")
        for name, row in rows.items():
            _verify_file(folder, name, row, checksums)
    except OSError as error:
        raise CheckpointError(f"{folder.name} cannot be read: {error}") from None


def _verify_file(folder: Path, name: str, row: Mapping[str, Any], checksums: bool) -> None:
    path = folder / name
    try:
        size = _regular(path, f"{folder.name}/{name}").st_size
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder.name} lacks {name}") from None
    if size != row["size"]:
        raise CheckpointError(f"{folder.name}/{name} has {size} of {row['size']} bytes")
    if checksums and _digest(path) != row["sha256"]:
        raise CheckpointError(f"{folder.name}/{name} was changed: its checksum differs")


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint by its manifest. Raises CheckpointError when that is not readable."""
    return sum(row["size"] for row in read_manifest(folder)["files"]) + (folder / MANIFEST).stat().st_size


# --- which are there -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A good checkpoint, its step, and what was skipped on the way to it with the reason of each."""

    path: Path
    step: int
    skipped: tuple[tuple[str, str], ...] = ()


def _named(root: Path) -> list[int]:
    found = [_STEP.fullmatch(p.name) for p in root.glob("checkpoint-*")]
    return sorted(int(m.group(1)) for m in found if m)


def steps(root: Path) -> list[int]:
    """Steps that have a folder, in order, complete or not."""
    return [step for step in _named(root) if (root / f"checkpoint-{step}").is_dir()]


def by_age(root: Path) -> list[tuple[int, int]]:
    """(step, serial) of everything named like a checkpoint, the last saved first.

    `serial` counts the saves of a folder: after a return to step 500, checkpoint-600 is newer than a checkpoint-1000
    of the abandoned way. Clocks do not count. What has no readable manifest stands before the steps below it.
    """
    found, highest = [], 0
    for step in _named(root):
        try:
            serial = read_manifest(root / f"checkpoint-{step}").get("serial", 0)
            serial = serial if type(serial) is int else 0
        except CheckpointError:
            serial = highest
        highest = max(highest, serial)
        found.append((step, serial))
    return sorted(found, key=lambda row: (row[1], row[0]), reverse=True)


def newest(root: Path, checksums: bool = True, check: Callable[[Path], None] | None = None) -> Found:
    """The newest checkpoint that verifies; what was skipped on the way is named in it.

    check: a further test that raises CheckpointError, such as the shapes of the tensors in it. The file `latest` is a
    hint: it decides nothing, but one that points nowhere is named. Raises CheckpointError when no checkpoint is good,
    with the reason of each.
    """
    skipped: list[tuple[str, str]] = []
    for step, _ in by_age(root):
        path = root / f"checkpoint-{step}"
        try:
            verify_folder(path, checksums)
            if check is not None:
                check(path)
            return Found(path, step, (*skipped, *_lost_latest(root)))
        except CheckpointError as error:
            skipped.append((path.name, str(error)))
    why = "; ".join(reason for _, reason in (*skipped, *_lost_latest(root))) or "there is no checkpoint-<step> folder"
    raise CheckpointError(f"no usable checkpoint in {str(root)!r}: {why}")


def _lost_latest(root: Path) -> list[tuple[str, str]]:
    path = root / LATEST
    if not path.is_symlink() and not path.exists():
        return []
    try:
        _regular(path, LATEST)
        with path.open("rb") as file:
            name = file.read(200).decode("utf-8").strip()
    except CheckpointError as error:
        return [(LATEST, str(error))]
    except (OSError, ValueError) as error:
        return [(LATEST, f"{LATEST} cannot be read: {error}")]
    if _STEP.fullmatch(name) and (root / name).is_dir():
        return []
    return [(LATEST, f"{LATEST} names {name!r}, which is not there")]
