"""The metacognitive layer on disk, beside an untouched base: config, weights and calibration card."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.config import faults
from gnomon.base.errors import CheckpointError, ModelError
from gnomon.metacognition.calibration import FILE_NAME as CARD_FILE
from gnomon.metacognition.calibration import Card
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig, Steerer

CONFIG_FILE: Final = "metacognition_config.json"
WEIGHTS_FILE: Final = "metacognition.safetensors"
VERSION: Final = 1


_STEERER: Final = "steerer."  # in front of the names of its tensors


class Layer(NamedTuple):
    """What a folder holds: heads, and where they are there a card and a steerer."""

    heads: MetacogHeads
    card: Card | None
    steerer: Steerer | None
    adaptation: str | None = None  # fingerprint of the changes to the base that it was trained with


def fingerprint(heads: MetacogHeads, steerer: Steerer | None) -> str:
    """What a card is bound to: the weights of the whole layer."""
    if steerer is None:
        return heads.fingerprint()
    return hashlib.sha256(f"{heads.fingerprint()}:{steerer.fingerprint()}".encode()).hexdigest()


def save(
    folder: Path,
    heads: MetacogHeads,
    card: Card | None,
    base: str,
    steerer: Steerer | None = None,
    tokenizer: str | None = None,
    adaptation: str | None = None,
) -> None:
    """Write the layer. Without a card none is kept.

    base, tokenizer, adaptation: fingerprints of the base model that its states come from, of how text becomes its ids,
    and of what training changed of that base (None = nothing).
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().contiguous() for k, v in heads.state_dict().items()}
    body = {"version": VERSION, "base": base, "heads": heads.config.model_dump(mode="json")}
    if tokenizer is not None:
        body["tokenizer"] = tokenizer
    if adaptation is not None:
        body["adaptation"] = adaptation
    if steerer is not None:
        tensors |= {_STEERER + k: v.detach().contiguous() for k, v in steerer.state_dict().items()}
        body["steerer"] = steerer.config.model_dump(mode="json")
    save_tensors(folder, WEIGHTS_FILE, tensors)
    write_atomic(folder / CONFIG_FILE, json.dumps(body, indent=1) + "\n")
    if card is not None:
        card.save(folder / CARD_FILE)
    else:  # a card that lies here belongs to other weights, and the folder would be refused with it
        (folder / CARD_FILE).unlink(missing_ok=True)


def load(folder: Path, base: str | None = None, tokenizer: str | None = None) -> Layer | None:
    """The layer of a folder, or None where there is none.

    base, tokenizer: fingerprints of what is at hand; layers from before 2026-11-21 do not know their tokenizer. Raises
    ModelError for a layer of another base or tokenizer, CheckpointError for damaged files.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        body = _readable(json.loads(path.read_text(encoding="utf-8")), path)
        config = MetacogConfig.model_validate(body["heads"])
        steering = SteerConfig.model_validate(body["steerer"]) if "steerer" in body else None
        made_on, written_by = str(body["base"]), body.get("tokenizer")
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        why = "; ".join(faults(error)) if isinstance(error, ValidationError) else repr(error)
        raise CheckpointError(f"{path} cannot be read: {why}; train the heads again") from None
    if base is not None and made_on != base:
        raise ModelError(
            f"the metacognitive layer in {folder} was trained on base {made_on[:12]}, but this base is {base[:12]}; "
            "load the base that it belongs to, or train heads for this one with `gnomon train metacog`"
        )
    if tokenizer is not None and written_by not in (None, tokenizer):
        raise ModelError(
            f"the metacognitive layer in {folder} was trained with tokenizer {str(written_by)[:12]}, but this base has "
            f"{tokenizer[:12]}: its prompts become other ids; put back the tokenizer files or prompt style of the "
            "base, or train the layer again with `gnomon train metacog`"
        )
    heads = MetacogHeads(config).eval()
    steerer = None if steering is None else Steerer(steering, config).eval()
    state = load_tensors(folder, WEIGHTS_FILE)
    parts = {"": heads, **({} if steerer is None else {_STEERER: steerer})}
    wanted = {prefix + k: v.shape for prefix, part in parts.items() for k, v in part.state_dict().items()}
    wrong = sorted(set(wanted.items()) ^ {(k, v.shape) for k, v in state.items()})
    if wrong:
        names = ", ".join(dict.fromkeys(name for name, _ in wrong[:5]))
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit its config; copy both again, or train the heads again: {names}"
        )
    heads.load_state_dict({k: v for k, v in state.items() if not k.startswith(_STEERER)})
    if steerer is not None:
        steerer.load_state_dict({k.removeprefix(_STEERER): v for k, v in state.items() if k.startswith(_STEERER)})
    card = Card.load(folder / CARD_FILE, fingerprint(heads, steerer)) if (folder / CARD_FILE).is_file() else None
    if card is not None:
        _fits(card, config, folder / CARD_FILE)
    return Layer(heads, card, steerer, body.get("adaptation"))


def _readable(body: Any, path: Path) -> dict[str, Any]:
    """The config as it was read, if it is one and of the version that this code knows. Raises CheckpointError."""
    if not isinstance(body, dict):
        raise CheckpointError(f"{path} holds a {type(body).__name__}, not an object; copy it again")
    version = body.get("version")
    if version != VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointError(
            f"{path} is of version {version!r}, and this gnomon reads version {VERSION}; use the gnomon that wrote it, "
            "or train the layer again with `gnomon train metacog`"
        )
    return body


def _fits(card: Card, config: MetacogConfig, path: Path) -> None:
    """Raise CheckpointError where a card reads blocks or states that this base does not have."""
    domain, width = card.domain, len(card.domain.precision)
    if domain.layer >= config.n_layers or width != config.hidden_size:
        raise CheckpointError(
            f"the calibration card {path} reads {width} numbers of block {domain.layer}, but the base has "
            f"{config.n_layers} blocks of {config.hidden_size}; run `gnomon calibrate`"
        )
