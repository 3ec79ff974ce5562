"""The only code that reads or writes weights: safetensors with a checksum manifest, published atomically.

A checkpoint folder appears by one rename, after every file in it is on the disk and `MANIFEST.json` (name, size,
SHA-256 of each) was written last. Nothing is ever unpickled. `latest` is a file with a name: a hint, not the truth.
`folders.py` reads and checks such folders, `disk.py` keeps room for them; both are offered here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gnomon.base.atomic import (
    TEMP,
    beside,
    disk_error,
    exchange,
    fsync_path,
    make_folder,
    remove,
    replacing,
    write_atomic,
)
from gnomon.base.disk import (
    LEAST,
    OLD,
    Ballast,
    Swept,
    alive,
    preflight,
    prune,
    remove_orphans,
    sweep,
)  # fmt: skip
from gnomon.base.errors import CheckpointError, DiskFullError, NotFiniteError
from gnomon.base.folders import (
    LATEST,
    MANIFEST,
    Found,
    by_age,
    newest,
    read_manifest,
    safe_name,
    size_of,
    steps,
    verify_folder,
    write_manifest,
)  # fmt: skip

if TYPE_CHECKING:
    import torch

__all__ = [
    "LATEST", "MANIFEST", "Ballast", "Found", "Swept", "alive", "check_tensors", "load_tensors", "newest", "preflight",
    "prune", "publish", "read_manifest", "save_tensors", "size_of", "steps", "store", "sweep", "tensor_names",
    "verify_folder", "write_manifest",
]  # fmt: skip

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "C64": "complex64", "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip
_OS_ERROR = re.compile(r"os error ([0-9]+)")


# --- tensors ---------------------------------------------------------------------------------------------------------


def save_tensors(
    folder: Path, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `tensors` to folder/name (safetensors), whole or not at all; returns the path.

    Tied tensors are stored once per name. Raises NotFiniteError for NaN or infinite floats, naming the tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    bad = [k for k, v in tensors.items() if not _finite(v)]
    if bad:
        raise NotFiniteError(
            f"refusing to save {name}: NaN or infinite values in {len(bad)} of {len(tensors)} tensors "
            f"({', '.join(bad[:5])}); the last good checkpoint is untouched"
        )
    path = folder / safe_name(name)
    try:
        with replacing(path) as temp:
            handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            mode = stat.S_IMODE(os.fstat(handle).st_mode)  # what the umask leaves; safetensors makes its files private
            os.close(handle)
            try:
                save_file(_plain(tensors), str(temp), metadata={"format": "pt", **(metadata or {})})
            except SafetensorError as error:
                code = _OS_ERROR.search(str(error))
                if code is None:
                    raise CheckpointError(f"{name} cannot be saved: {error}") from error
                raise OSError(int(code.group(1)), os.strerror(int(code.group(1))), str(path)) from error
            os.chmod(temp, mode)
    except OSError as error:
        raise disk_error(error, f"cannot save {name}") from error
    return path


def _finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite; looked at in parts, since the test makes copies."""
    import torch

    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    return all(bool(torch.isfinite(part).all()) for part in flat.split(2**22))


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, each alone and whole in its memory; only those that are not so already are copied."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        value = tensor.detach().to("cpu").contiguous()
        place = value.untyped_storage().data_ptr()
        if place in seen:
            value = value.clone()
        seen.add(place)
        plain[name] = value
    return plain


def load_tensors(folder: Path, name: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Tensors of folder/name. Raises CheckpointError for a missing, damaged, pickled or non-finite file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / safe_name(name)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in folder.glob("*"))[:12]) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{name} is missing in {str(folder)!r} (there: {there or 'nothing'})")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{str(path)!r} is not a safetensors file; pickled weights are never read, convert it")
    try:
        tensors: dict[str, torch.Tensor] = load_file(str(path), device=device)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None
    bad = [k for k, v in tensors.items() if not _finite(v)]
    if bad:
        raise CheckpointError(f"{str(path)!r} holds NaN or infinite values in {', '.join(bad[:5])}")
    return tensors


def tensor_names(folder: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the header alone. Raises CheckpointError as `load_tensors`."""
    return {key: shape for key, (shape, _) in _header(folder, name).items()}


def _header(folder: Path, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name -> shape and dtype as safetensors spells it."""
    from safetensors import SafetensorError, safe_open

    path = folder / safe_name(name)
    if not path.is_file():
        raise CheckpointError(f"{name} is missing in {str(folder)!r}")
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            return {key: (tuple(part.get_shape()), str(part.get_dtype())) for key, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from None


def check_tensors(folder: Path, name: str, expected: Mapping[str, torch.Tensor]) -> None:
    """Compare the header of folder/name with `expected`, tensors or anything with `shape` and `dtype`.

    Raises CheckpointError naming the tensors that are missing, too many, or of another shape or dtype.
    """
    found = _header(folder, name)
    told = [f"{key} is missing" for key in expected if key not in found]
    told += [f"{key} is not of this model" for key in found if key not in expected]
    for key, want in expected.items():
        shape, code = found.get(key, (tuple(want.shape), ""))
        there, mine = _DTYPES.get(code, code), str(want.dtype).removeprefix("torch.")
        if shape != tuple(want.shape) or (code and there != mine):
            told.append(f"{key} is {shape} {there}, this model has {tuple(want.shape)} {mine}")
    if told:
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        raise CheckpointError(f"{folder.name}/{name} does not fit: {'; '.join(told[:5])}{more}")


# --- checkpoints of a run --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def publish(root: Path, step: int) -> Iterator[Path]:
    """`with publish(run / "checkpoints", 500) as folder:` write files into `folder`; it appears when the block ends.

    After an error nothing is published and the temporary folder is removed; a failing disk is named (DiskFullError
    when it is full). A checkpoint of the same step is replaced in one step and stays when it is the newest and has the
    same content. Orphans of dead processes are removed.
    """
    if not 0 <= step < 10**12:
        raise CheckpointError(f"step = {step}; a checkpoint has a step from 0 to 999999999999")
    final = root / f"checkpoint-{step}"
    temp = beside(final, TEMP)
    try:
        make_folder(root)
        remove_orphans(root)
        temp.mkdir()
        yield temp
        before = by_age(root)
        serial = 1 + max((serial for _, serial in before), default=0)
        write_manifest(temp, {"step": step, "serial": serial})
        if not (before and before[0][0] == step and _same(temp, final)):
            _place(temp, final)
        fsync_path(root)
        write_atomic(root / LATEST, final.name + "\n")
    except OSError as error:
        raise disk_error(error, f"{final.name} cannot be saved in {str(root)!r}") from error
    finally:
        remove(temp)


def _same(temp: Path, final: Path) -> bool:
    try:
        verify_folder(final)
        return bool(read_manifest(final)["files"] == read_manifest(temp)["files"])
    except CheckpointError:
        return False


def _place(temp: Path, final: Path) -> None:
    """Rename `temp` to `final`; what stood there has the name of `temp` afterwards, or is gone."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):  # not ours: kept, under another name
        os.rename(final, beside(final.with_name(f"foreign-{final.name}"), ""))
    try:
        os.rename(temp, final)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if exchange(temp, final):
        return
    old = beside(final, OLD)
    os.rename(final, old)
    try:
        os.rename(temp, final)
    except BaseException:
        os.rename(old, final)
        raise
    try:
        fsync_path(final.parent)
    finally:
        remove(old)


def store(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    protect: Iterable[int | str | Path] = (),
    ballast: Ballast | None = None,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """`publish` what `write(folder)` writes, and fight for it on a full disk; returns the checkpoint folder.

    First 1.2 times the last size must be free. On a full disk all but the two newest checkpoints (and `protect`) go,
    then one more try; if that fails too, the ballast is freed for a last one. After a save that needed the ballast, or
    failed, DiskFullError is raised (`saved` names the newest checkpoint): training must stop. tell: takes one line
    about each of these measures.
    """
    protect, say = tuple(protect), tell or (lambda _: None)

    def attempt(checked: bool = False) -> Path:
        if checked:
            preflight(root)
        with publish(root, step) as folder:
            write(folder)
        return root / f"checkpoint-{step}"

    try:
        return attempt(checked=True)
    except DiskFullError as error:
        say(f"checkpoint-{step}: {error}")
    try:
        gone = prune(root, LEAST, protect=protect)
        say(f"checkpoint-{step}: removed {', '.join(gone) or 'nothing'}, one more try")
        return attempt()
    except DiskFullError as error:
        full = str(error)
    if ballast is not None and ballast.free():
        say(f"checkpoint-{step}: freed the reserve for a last save")
        try:
            attempt()
            full = f"the disk is full; checkpoint-{step} was saved in the space that was held for it"
        except DiskFullError as error:
            full = str(error)
    raise DiskFullError(full, _last(root))


def _last(root: Path) -> str | None:
    try:
        return newest(root, checksums=False).path.name
    except CheckpointError:
        return None
