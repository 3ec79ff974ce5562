"""Load a TOML or YAML file into a pydantic model, apply `key=value`, refuse unknown keys with the nearest name.

Configs are frozen pydantic models beside their consumer; this module only reads, overrides, dumps and describes them.
"""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from gnomon.base.errors import ConfigError, unknown

MAX_FILE_BYTES = 4 * 2**20


class Config(BaseModel):
    """Base of every config: frozen, complete, unknown keys refused, values validated at birth."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


C = TypeVar("C", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """YAML without surprises: duplicate keys are errors and `3e-4` is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"key {key!r} on line {key_node.start_mark.line + 1} is no text; write a name")
        if key in found:
            raise ConfigError(f"key {key!r} appears twice (line {key_node.start_mark.line + 1}); keep one")
        found[key] = loader.construct_object(value_node, deep=True)
    return found


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _number_or_text(text: str) -> Any:
    """YAML 1.1 reads `3e-4` as a text; read it as the number that was meant."""
    try:
        return float(text) if any(c in text for c in "eE") and any(c.isdigit() for c in text) else text
    except ValueError:
        return text


def parse_value(text: str) -> Any:
    """The value of a `key=value` override, by the YAML rules: `3e-4`, `true`, `[1, 2]`, `null`, or plain text."""
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"value {text!r} cannot be read: {error}; quote it") from None
    return _number_or_text(value) if isinstance(value, str) else value


def read_file(path: Path) -> dict[str, Any]:
    """A TOML, YAML or JSON file as a nested dictionary. Raises ConfigError that names the file and the place."""
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"config file {str(path)!r} is above {MAX_FILE_BYTES} bytes")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            value: Any = tomllib.loads(text)
        elif path.suffix in (".yaml", ".yml", ".json"):
            value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        else:
            raise ConfigError(f"config file {str(path)!r} ends in {path.suffix!r}; write .toml, .yaml or .json")
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"config file {str(path)!r} holds a {type(value).__name__}; write `key: value` lines")
    return value


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []


def check_keys(model: type[BaseModel], values: Mapping[str, Any], prefix: str = "") -> None:
    """Raise UnknownNameError, with the nearest name, for the first key that `model` does not have (nested too)."""
    for key, value in values.items():
        if key not in model.model_fields:
            raise unknown("key", prefix + key, [prefix + k for k in model.model_fields])
        inner = _models_in(model.model_fields[key].annotation)
        if isinstance(value, Mapping) and len(inner) == 1:
            check_keys(inner[0], value, f"{prefix}{key}.")


def merge(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of `values` with the dotted `key` set."""
    head, _, rest = key.partition(".")
    below = values.get(head)
    if not rest:
        return {**values, head: value}
    return {**values, head: merge(below if isinstance(below, Mapping) else {}, rest, value)}


def parse_override(text: str) -> tuple[str, Any]:
    """`optim.lr=3e-4` -> ("optim.lr", 0.0003). Raises ConfigError when there is no `=`."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip() or "" in key.strip().split("."):
        raise ConfigError(f"override {text!r} is not of the form key=value, for example optim.lr=3e-4")
    return key.strip(), parse_value(raw)


def resolve(
    model: type[C],
    file: Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    base: Mapping[str, Any] | None = None,
) -> tuple[C, dict[str, str]]:
    """(config, provenance): defaults, then `base`, then `file`, then `overrides` (`key=value` texts or a mapping).

    provenance: dotted key -> where its non-default value came from (`preset`, the file, `override`).
    Raises ConfigError with the key, what was given and what is allowed.
    """
    values: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    pairs = overrides.items() if isinstance(overrides, Mapping) else [parse_override(o) for o in overrides]
    layers: list[tuple[str, dict[str, Any]]] = [("preset", flatten(base or {}))]
    if file is not None:
        layers.append((str(file), flatten(read_file(file))))
    layers.append(("override", flatten(dict(pairs))))
    for origin, flat in layers:
        for key, value in flat.items():
            values = merge(values, key, value)
            provenance[key] = origin
    check_keys(model, values)
    return validate(model, values), provenance


def validate(model: type[C], values: Mapping[str, Any]) -> C:
    """`model` from a mapping; every problem in one ConfigError, one line per key."""
    check_keys(model, values)
    try:
        return model.model_validate(_on_defaults(model, values))
    except ValidationError as error:
        raise ConfigError(f"{model.__name__}: " + "\n  ".join(faults(error))) from None


def faults(error: ValidationError) -> list[str]:
    """What is wrong, one line a key: `temperature.before: Input should be greater than 0; given '-1.0'`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(p) for p in item["loc"])
        given = "" if item["type"] == "missing" or not key else f"; given {str(item['input'])[:80]!r}"
        lines.append(f"{key or '(all)'}: {item['msg'].removeprefix('Value error, ')}{given}")
    return lines


def _on_defaults(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values laid over the model's own defaults: one field of a part that is named leaves its other fields alone."""
    found = dict(values)
    for name, given in values.items():
        field = model.model_fields.get(name)
        if field is None or not isinstance(field.default, BaseModel) or not isinstance(given, Mapping):
            continue
        under = flatten(field.default.model_dump(exclude_unset=True))
        merged: dict[str, Any] = {}
        for key, value in (*under.items(), *flatten(_on_defaults(type(field.default), given)).items()):
            merged = merge(merged, key, value)
        found[name] = merged
    return found


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; an empty mapping stays a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found.update(flatten(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def dump(config: BaseModel) -> dict[str, Any]:
    """Every value of a config as JSON-able data."""
    return config.model_dump(mode="json")


def dump_yaml(config: BaseModel) -> str:
    """Every value of a config as YAML text, fields in their declared order; reads back to the same config."""
    return yaml.safe_dump(dump(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def schema(model: type[BaseModel]) -> str:
    """JSON schema of a config, as text."""
    return json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of every value that differs; None where a side lacks it. For resume reports."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
