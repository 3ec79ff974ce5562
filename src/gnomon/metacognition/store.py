"""The metacognitive layer on disk, beside an untouched base: config, weights and calibration card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import CheckpointError, ModelError
from gnomon.metacognition.calibration import FILE_NAME as CARD_FILE
from gnomon.metacognition.calibration import Card
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.heads import MetacogHeads

CONFIG_FILE: Final = "metacognition_config.json"
WEIGHTS_FILE: Final = "metacognition.safetensors"
VERSION: Final = 1


def save(folder: Path, heads: MetacogHeads, card: Card | None, base: str) -> None:
    """Write the layer; base: fingerprint of the base model that its states come from."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder, WEIGHTS_FILE, {k: v.detach().contiguous() for k, v in heads.state_dict().items()})
    body = {"version": VERSION, "base": base, "heads": heads.config.model_dump(mode="json")}
    write_atomic(folder / CONFIG_FILE, json.dumps(body, indent=1) + "\n")
    if card is not None:
        card.save(folder / CARD_FILE)


def load(folder: Path, base: str | None = None) -> tuple[MetacogHeads, Card | None] | None:
    """The layer of a folder, or None where there is none.

    base: fingerprint of the base model at hand. Raises ModelError for a layer of another base, CheckpointError for
    damaged files.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        config = MetacogConfig.model_validate(body["heads"])
        made_on = str(body["base"])
    except (json.JSONDecodeError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; train the heads again") from None
    if base is not None and made_on != base:
        raise ModelError(
            f"the metacognitive layer in {folder} was trained on base {made_on[:12]}, but this base is {base[:12]}; "
            "load the base that it belongs to, or train heads for this one with `gnomon train metacog`"
        )
    heads = MetacogHeads(config)
    state = load_tensors(folder, WEIGHTS_FILE)
    missing = sorted(set(heads.state_dict()) ^ set(state))
    if missing:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} does not fit its config: {', '.join(missing[:5])}")
    heads.load_state_dict(state)
    heads.eval()
    card = Card.load(folder / CARD_FILE, heads.fingerprint()) if (folder / CARD_FILE).is_file() else None
    return heads, card
