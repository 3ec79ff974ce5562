"""Base models from local folders: checked before they are read, never from the Hub, never with their own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from gnomon.base.checkpoint import tensor_names
from gnomon.base.errors import CheckpointError, ModelError
from gnomon.model.backbone import OwnBackbone
from gnomon.model.device import resolve
from gnomon.model.foreign import HFBackbone
from gnomon.model.gguf import SMOLLM2, convert_gguf, smollm2_folder
from gnomon.model.llama import LlamaBackbone, check_weights, unsupported
from gnomon.model.llama_native import NativeLlama, library
from gnomon.model.native import own_backbone

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
ATTENTION: Final = ("sdpa", "eager")  # those that take a mask of their own, which slots need


def resolve_base(base: str | Path, cache: str | Path | None = None) -> Path:
    """The local folder of a base: a folder, a GGUF file (converted once into the cache) or the name `smollm2`.

    Raises ModelError naming what is missing and what to do.
    """
    if str(base) == SMOLLM2:
        return smollm2_folder(cache)
    path = Path(base).expanduser()
    if path.suffix == ".gguf":
        return convert_gguf(path, cache)
    if not path.is_dir():
        what = "is a file, not a model folder" if path.exists() else "does not exist"
        raise ModelError(
            f"{str(path)!r} {what}; give a local Hugging Face folder, a .gguf file or the name {SMOLLM2!r} "
            "(gnomon never downloads a model)"
        )
    return path


def check_folder(folder: Path, tokenizer: bool = True) -> dict[str, Any]:
    """The configuration of a complete model folder. Raises ModelError that lists everything missing at once."""
    missing: list[str] = []
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = _json(folder / "config.json")
        if "model_type" not in config:
            missing.append('"model_type" in config.json')
    else:
        missing.append("config.json")
    missing += _missing_weights(folder)
    if tokenizer and not (folder / TOKENIZER).is_file():
        missing.append(TOKENIZER)
    if missing:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:12]) or "nothing"
        raise ModelError(
            f"the model folder {str(folder)!r} is not complete; missing: {'; '.join(missing)} (there: {there})"
        )
    return config


def load_backbone(
    base: str | Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    weights: str = "float",
    attention: str | None = None,
    cache: str | Path | None = None,
) -> HFBackbone | LlamaBackbone | NativeLlama:
    """Any local Hugging Face causal LM behind the backbone protocol; `base` as in `resolve_base`.

    The Llama family in float32 on a CPU runs through its compiled pass, or a lean one in torch where there is no
    compiler, everything else through the model's own code.
    dtype: one of DTYPES; all but float32 run in the model's own code. weights: "int8" multiplies by int8 copies of the
    weights, where the compiled pass runs. attention: one of ATTENTION, how the model's own code attends, in training
    above all; None = sdpa where the architecture has it (Gemma 2 has eager only). The compiled and the lean pass attend
    in their own way, to the same results.
    Raises ModelError for an option that is not known or not to be had here, for a folder that is missing, half there,
    damaged, of an architecture that transformers does not know, whose weights do not fill the model, or that cannot be
    decoded in slots.
    """
    check_weights(weights)
    _known("dtype", dtype, DTYPES)
    if attention is not None:
        _known("attention", attention, ATTENTION)
    folder = resolve_base(base, cache)
    config = check_folder(folder, tokenizer=False)
    import torch
    from transformers import AutoModelForCausalLM

    place = resolve(device)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = str(error).split("\n", 1)[0]
        if "auto_map" in config:
            reason = f"it needs its own Python code, which gnomon never runs ({reason})"
        raise ModelError(f"{str(folder)!r} (model_type {config['model_type']!r}) cannot be loaded: {reason}") from None
    for name in ("missing_keys", "mismatched_keys"):
        if bad := sorted(str(k) for k in info.get(name) or ()):
            raise ModelError(
                f"the weights in {str(folder)!r} do not fill the model: {len(bad)} {name.replace('_', ' ')} "
                f"({', '.join(bad[:3])}); copy the folder again"
            )
    return serving(model.to(place), weights)


def serving(model: Any, weights: str = "float") -> HFBackbone | LlamaBackbone | NativeLlama:
    """The fastest backbone for a Hugging Face model in memory. Raises ModelError for int8 where it cannot be."""
    obstacle, compiled = unsupported(model), library() is not None
    if obstacle is None and compiled:
        return NativeLlama(model, weights)
    if weights != "float":
        reason = obstacle or "int8 products need a C compiler (gcc, cc or clang), and there is none here"
        raise ModelError(f'{model.name_or_path!r} cannot run with weights="int8": {reason}; leave weights="float"')
    return LlamaBackbone(model) if obstacle is None else HFBackbone(model)


def rebuilt(backbone: Any, module: Any = None) -> Any:
    """A backbone over the same module with its present weights, or over another of its kind.

    Compiled passes hold copies of weights as they were."""
    module = backbone.module if module is None else module
    if isinstance(backbone, OwnBackbone):
        return own_backbone(module)
    return serving(module, backbone.weights if isinstance(backbone, NativeLlama) else "float")


def _known(what: str, given: str, names: tuple[str, ...]) -> None:
    if given not in names:
        raise ModelError(f"unknown {what} {given!r}; write {', '.join(names[:-1])} or {names[-1]}")


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{str(path)!r} is not JSON ({error}); copy the folder again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{str(path)!r} holds {type(value).__name__}, not an object; copy the folder again")
    return value


def _missing_weights(folder: Path) -> list[str]:
    """What is missing or damaged among the weight files, in words."""
    if (folder / INDEX).is_file():
        shards = sorted({str(name) for name in _json(folder / INDEX).get("weight_map", {}).values()})
        names = shards or [WEIGHTS]
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        return [f"{WEIGHTS} (pickled weights are never read; convert them to safetensors)"]
    else:
        return [WEIGHTS]
    found = []
    for name in names:
        try:
            tensor_names(folder, name)
        except CheckpointError as error:
            found.append(f"{name} ({error})" if (folder / name).is_file() else name)
    return found
