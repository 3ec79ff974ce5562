"""A model folder without transformers: config.json + model.safetensors <-> Decoder.

The same folder opens with `AutoModelForCausalLM.from_pretrained` after `import gnomon.hf`: weights lie under
`decoder.`, where `GnomonForCausalLM` keeps its network. On disk matrices may be bfloat16; mHC parameters and the
gains of the heads are always float32 (algorithms.md §1.6). `dtype` in config.json is what to compute in, so both
readers work in float32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors, tensor_names
from gnomon.base.errors import ModelError
from gnomon.model.decoder import Decoder, DecoderConfig

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
MODEL_TYPE: Final = "gnomon"
PREFIX: Final = "decoder."
HYPER: Final = "hyper"  # part of the name of every mHC parameter


def save_decoder(
    folder: str | Path,
    decoder: Decoder,
    matrices: Literal["bf16", "fp32"] = "bf16",
    *,
    pad: int = 0,
    bos: int = 1,
    eos: int = 2,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and model.safetensors; the ids are those of the tokenizer that the decoder was trained with.

    state: weights to write in place of the decoder's own (gathered from several processes, or averaged).
    matrices: storage of every matrix that is not an mHC parameter. Raises CheckpointError for NaN or infinite weights.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    low = torch.bfloat16 if matrices == "bf16" else torch.float32
    tensors = {
        PREFIX + name: value.detach().to(torch.float32 if HYPER in name or value.ndim < 2 else low)
        for name, value in (decoder.state_dict() if state is None else state).items()
    }
    body: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": ["GnomonForCausalLM"],
        "dtype": "float32",
        **decoder.config.model_dump(),
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
    }
    save_tensors(place, WEIGHTS, tensors)
    write_atomic(place / CONFIG, json.dumps(body, indent=2) + "\n")


def load_decoder(folder: str | Path) -> Decoder:
    """The decoder of a folder in float32 on the CPU, in eval mode; torch's global generator is left as it was.

    Raises ModelError naming what is missing or foreign, CheckpointError for damaged weights.
    """
    place = Path(folder)
    config = read_config(place)
    tensors = load_tensors(place, WEIGHTS)
    with seeds.undisturbed():
        decoder = Decoder(config)
    _check_names(place, decoder.state_dict(), tensors)
    decoder.load_state_dict({name.removeprefix(PREFIX): value.float() for name, value in tensors.items()})
    return decoder.eval()


def check_decoder(folder: str | Path) -> None:
    """Raise ModelError or CheckpointError unless `folder` has the tensors of its config.json; reads no values."""
    place = Path(folder)
    with torch.device("meta"), seeds.undisturbed():
        decoder = Decoder(read_config(place))
    found = tensor_names(place, WEIGHTS)
    _check_names(
        place, decoder.state_dict(), {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    )


def read_config(folder: str | Path) -> DecoderConfig:
    """The shape of the decoder in `folder`. Raises ModelError as `load_decoder`."""
    place = Path(folder)
    if not place.is_dir():
        raise ModelError(f"there is no folder {str(place.absolute())!r}; give one that holds {CONFIG} and {WEIGHTS}.")
    missing = [name for name in (CONFIG, WEIGHTS) if not (place / name).is_file()]
    if missing:
        there = ", ".join(sorted(p.name for p in place.iterdir())[:12]) or "nothing"
        raise ModelError(
            f"{str(place.absolute())!r} is no whole model: {' and '.join(missing)} missing (there: {there}); copy the "
            "folder again or save the model again."
        )
    try:
        body = json.loads((place / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{str(place / CONFIG)!r} is not JSON: {error}") from None
    kind = body.get("model_type") if isinstance(body, dict) else None
    if kind != MODEL_TYPE:
        raise ModelError(
            f"{str(place / CONFIG)!r} has model_type {kind!r}, not {MODEL_TYPE!r}: load it as a foreign base."
        )
    lacking = [name for name in DecoderConfig.model_fields if name not in body]
    if lacking:
        raise ModelError(f"{str(place / CONFIG)!r} lacks {', '.join(lacking)}; save the model again.")
    try:
        return DecoderConfig.model_validate({name: body[name] for name in DecoderConfig.model_fields})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{str(place / CONFIG)!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _check_names(place: Path, wanted: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Every tensor of the decoder with its shape, and nothing else."""
    names = {PREFIX + name: tuple(value.shape) for name, value in wanted.items()}
    missing = sorted(set(names) - set(found))
    foreign = sorted(set(found) - set(names))
    wrong = [
        f"{n} is {tuple(found[n].shape)}, {CONFIG} says {shape}"
        for n, shape in names.items()
        if n in found and tuple(found[n].shape) != shape
    ]
    parts = [
        f"{len(bad)} {what} ({', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''})"
        for what, bad in (("missing", missing), ("unknown", foreign), ("of another shape", wrong))
        if bad
    ]
    if parts:
        raise ModelError(f"{str(place / WEIGHTS)!r} does not fit {CONFIG}: tensors {'; '.join(parts)}.")
