"""`validate`: configs, tokenizers, model folders and train/serve parity, checked before anything is spent on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from cyclopts import Parameter

from gnomon.base.errors import ConfigError, TagError
from gnomon.interfaces import console

Flag = Parameter(negative=())


def validate(
    what: str | None = None,
    *,
    model: str | None = None,
    config: Path | None = None,
    recipe: str | None = None,
    stop: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = (),
    json: Annotated[bool, Flag] = False,
) -> None:
    """Check a model folder (files, tags, padding, heads, parity) or a config file; exit code 2 with the reason.

    Args:
        what: A config file (.yaml, .toml, .json) or a model, as --config and --model.
        model: A shipped model (nano), smollm2, or a model folder.
        config: A YAML or TOML file.
        recipe: Which recipe the config is for: metacog or pretrain; by default the one that has more of its keys.
        stop: Custom stop sequences that must be one token each.
        json: Print one JSON object.
    """
    if what is not None and Path(what).suffix in (".yaml", ".yml", ".toml", ".json"):
        config = _one(config, Path(what))
    elif what is not None:
        model = _one(model, what)
    if (model is None) == (config is None):
        raise ConfigError("name one thing to check: a config file or a model (--config FILE, --model NAME)")
    checks = _config(config, recipe) if config is not None else _model(str(model), stop)
    if json:
        console.emit_json({"ok": True, "checks": [{"check": a, "found": b} for a, b in checks]})
        return
    console.table("valid", ("check", "found"), checks)


T = TypeVar("T")


def _one(flag: T | None, given: T) -> T:
    if flag is not None:
        raise ConfigError(f"{str(flag)!r} and {str(given)!r}: name one thing to check")
    return given


def _likely(path: Path) -> str:
    """The recipe whose config has most of the keys of the file; where none has more, metacog."""
    from gnomon.base import config as configs
    from gnomon.interfaces.commands.schema import config_class

    keys = configs.read_file(path).keys()
    known = {name: len(keys & config_class(name).model_fields.keys()) for name in ("metacog", "pretrain")}
    return max(known, key=lambda name: known[name])


def _config(path: Path, recipe: str | None) -> list[tuple[str, str]]:
    from gnomon.base import config as configs

    recipe = recipe or _likely(path)
    if recipe == "pretrain":
        from gnomon.recipes.pretrain_config import resolve

        resolve(path)
    elif recipe == "metacog":
        from gnomon.recipes.metacog import MetacogRunConfig

        configs.resolve(MetacogRunConfig, path)
    else:
        raise ConfigError(f"recipe {recipe!r} is unknown; write metacog or pretrain")
    return [(f"{recipe} config", str(path))]


def _model(name: str, stop: tuple[str, ...]) -> list[tuple[str, str]]:

    from gnomon.data.codec import OwnCodec
    from gnomon.data.tokenizer import check_atomic
    from gnomon.reasoner import Reasoner

    reasoner = Reasoner.load(name)
    found = [("files", f"{reasoner.folder}"), ("strategies", ", ".join(reasoner.codec.strategies))]
    if isinstance(reasoner.codec, OwnCodec):
        check_atomic(reasoner.codec.tokenizer, stop)
        found.append(("tags", "one token each"))
    else:
        if stop:
            raise TagError("custom stop sequences must be atomic, but this base matches tags as text")
        found.append(("tags", f"text: {len(reasoner.codec.layout.think)} + {len(reasoner.codec.layout.end_think)} ids"))
        found += [("note", note) for note in getattr(reasoner.codec, "notes", ())]
    layer = reasoner.decider
    card = None if layer is None else layer.card
    found.append(("metacognitive layer", "none" if layer is None else "calibrated" if card else "no calibration card"))
    prompts = [reasoner.codec.encode_prompt(text) for text in ("Compute 3 + 4.", "Sort 34 12 78 5.")]
    backbone, most = reasoner.backbone, max(map(len, prompts))
    whole = backbone.extend(backbone.new_cache(2, most), prompts).logits
    alone = [backbone.extend(backbone.new_cache(1, most), [p]).logits for p in prompts]
    assert whole is not None
    gap = max(float((whole[i] - one[0]).abs().max()) for i, one in enumerate(alone) if one is not None)
    if gap > 1e-2:
        raise ConfigError(f"a row alone and in a batch differ by {gap:.2g} in their logits; do not serve this")
    found.append(("row alone = row in batch", f"logits within {gap:.1e}"))
    return found
