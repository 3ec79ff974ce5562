"""`schema`: JSON schemas of the configs, for editors and other programs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import Parameter

from gnomon.base.errors import ConfigError, unknown
from gnomon.interfaces import console

if TYPE_CHECKING:
    from pydantic import BaseModel

Flag = Parameter(negative=())
# name -> (module, class, what it is for); the first ones are whole configs of `gnomon train NAME`.
CONFIGS: Final[dict[str, tuple[str, str, str]]] = {
    "pretrain": ("gnomon.recipes.pretrain_config", "PretrainRunConfig", "gnomon train pretrain"),
    "metacog": ("gnomon.recipes.metacog", "MetacogRunConfig", "gnomon train metacog"),
    "decoder": ("gnomon.model.decoder", "DecoderConfig", "config.json of an own model"),
    "layer": ("gnomon.metacognition.config", "MetacogConfig", "metacognition_config.json beside a model"),
}
RECIPES: Final = ("pretrain", "metacog")


def config_class(name: str) -> type[BaseModel]:
    """The config of that name. Raises UnknownNameError."""
    if name not in CONFIGS:
        raise unknown("config", name, CONFIGS)
    module, cls, _ = CONFIGS[name]
    found: type[BaseModel] = getattr(importlib.import_module(module), cls)
    return found


def schema(
    name: str | None = None,
    *,
    out: Path | None = None,
    json: Annotated[bool, Flag] = False,
) -> None:
    """Print the JSON schema of a config: every field, its kind, default and limits. Without NAME: which there are.

    Args:
        name: pretrain, metacog, decoder or layer.
        out: Write it to this file instead.
        json: For the list of names: print one JSON object. (A schema is one anyway.)
    """
    from gnomon.base import config as configs
    from gnomon.base.atomic import write_atomic

    if name is None:
        if out is not None:
            raise ConfigError(f"name the config whose schema goes to {out}: {', '.join(CONFIGS)}")
        if json:
            console.emit_json({"schemas": {key: use for key, (_, _, use) in CONFIGS.items()}})
        else:
            console.table("schemas", ("name", "of"), [(key, use) for key, (_, _, use) in CONFIGS.items()])
        return
    text = configs.schema(config_class(name))
    if out is None:
        console.result(text)
    else:
        write_atomic(out, text)
        console.say(f"schema of {name}: {out}")
