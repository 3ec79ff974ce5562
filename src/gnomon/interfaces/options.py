"""Values that people type: budgets, level lists, and `--key value` overrides of a config."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from gnomon.base.config import merge, parse_value
from gnomon.base.errors import BudgetError, ConfigError, nearest, unknown

if TYPE_CHECKING:
    from pydantic import BaseModel

    from gnomon.decoding.slack import Rules

Budget = int | Literal["predicted"] | None


def budget(text: str) -> Budget:
    """`predicted` (or auto), `none`, or a whole number of think tokens."""
    word = text.strip().lower()
    if word in ("predicted", "auto"):
        return "predicted"
    if word == "none":
        return None
    try:
        value = int(word)
    except ValueError:
        hint = nearest(word, ("predicted", "auto", "none"))
        meant = f"; did you mean {hint!r}?" if hint else ""
        raise BudgetError(f"budget {text!r} is no whole number, `predicted` or `none`{meant}") from None
    if value < 0:
        raise BudgetError(f"a budget cannot be negative; given {value}. Write 0 to answer without thinking.")
    return value


def rules(text: str) -> Rules | None:
    """`slack:share=0.2,loop` -> soft rules for every sample, None for an empty text."""
    from gnomon.decoding.slack import factory, rule

    configs = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, *values = part.split(":")
        found = {}
        for value in values:
            key, equals, number = value.partition("=")
            if not equals:
                raise ConfigError(f"rule {part!r} cannot be read; write name:key=value, such as slack:share=0.2")
            found[key.strip()] = parse_value(number.strip())
        configs.append(rule(name.strip(), **found))
    return factory(*configs) if configs else None


def levels(text: str) -> tuple[int, ...]:
    """`1-5`, `4,5` or `3` as levels."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"levels {text!r} cannot be read; write 1-5, 4,5 or 3")
        found += range(int(first), int(last or first) + 1)
    wrong = sorted(set(found) - {1, 2, 3, 4, 5})
    if wrong or not found:
        raise ConfigError(f"levels {text!r}: levels are 1 to 5" + (f", given {wrong[0]}" if wrong else ""))
    return tuple(dict.fromkeys(found))


def check_plan(name: str) -> str:
    """A strategy, `predicted` or `best`."""
    from gnomon.protocol.tags import STRATEGIES

    name = "predicted" if name == "auto" else name
    if name not in (*STRATEGIES, "predicted", "best"):
        raise unknown("plan", name, (*STRATEGIES, "predicted", "best"))
    return name


def check_draw(tasks: str, split: str, n: int, chosen: Sequence[int]) -> None:
    """Refuse unknown tasks, splits and an n above what there is, before anything slow is imported."""
    from gnomon.tasks.procedural import resolve_tasks
    from gnomon.tasks.splits import check_split

    check_split(split)
    if n < 1:
        raise ConfigError(f"n = {n}; ask for at least one problem")
    for source in resolve_tasks(tasks):
        if not set(source.levels) & set(chosen):
            raise ConfigError(f"task {source.name!r} has levels {source.levels}, none of the asked {tuple(chosen)}")


def keys(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> annotation of every value of a config, nested ones included."""
    from pydantic import BaseModel

    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found.update(keys(kind, f"{prefix}{name}."))
        else:
            found[prefix + name] = kind
    return found


def overrides(
    model: type[BaseModel], tokens: Sequence[str], flags: Sequence[str] = (), aliases: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`--optim.lr 3e-4 --compile --corpus.tasks chain,count` as {dotted key: value}.

    flags: options that the command itself takes (for suggestions). aliases: short key -> dotted key.
    Raises UnknownNameError with the nearest option, ConfigError for a missing value.
    """
    known, found = keys(model), dict[str, Any]()
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"{token!r} belongs to no option; values follow their key: --steps 100")
        name, equals, text = token[2:].partition("=")
        key = name.replace("-", "_")
        key = (aliases or {}).get(key, key)
        if key not in known:
            options = [*known, *(aliases or {}), *flags]
            raise unknown("option", f"--{name}", [f"--{k.replace('_', '-')}" for k in options])
        if not equals:
            if rest and not rest[0].startswith("--"):
                text = rest.pop(0)
            elif known[key] is bool:
                text = "true"
            else:
                raise ConfigError(f"--{name} has no value; write --{name} VALUE")
        found[key] = as_kind(known[key], parse_value(text), text)
    return found


def as_kind(kind: Any, value: Any, text: str) -> Any:
    """A parsed value for a field: lists may be written with commas ("" is none), texts stay as they were typed.

    Where a field takes a number or a text, what reads as a number is one; where it takes numbers or a text, a word is
    the text.
    """
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if value is None and type(None) in options:
        return None
    if any(typing.get_origin(o) in (tuple, list) or o in (tuple, list) for o in options):
        found = value
        if not isinstance(found, list):
            found = [parse_value(part.strip()) for part in text.split(",") if part.strip()]
        return text if str in options and any(isinstance(part, str) for part in found) else found
    return text if str in options and type(value) not in options else value


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as a nested mapping."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        found = merge(found, key, value)
    return found
