"""Configs: files, overrides, unknown keys, dumps that read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import Field

from gnomon.base.config import Config, differences, dump_yaml, parse_value, resolve, schema
from gnomon.base.errors import ConfigError, UnknownNameError


class Optim(Config):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    name: str = "muon"


class Top(Config):
    steps: int = 10
    optim: Optim = Optim()
    note: str | None = None


@pytest.mark.parametrize(
    ("suffix", "text"), [("toml", "steps = 20\n[optim]\nlr = 0.5\n"), ("yaml", "steps: 20\noptim: {lr: 5e-1}\n")]
)
def test_defaults_file_overrides_in_that_order(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"c.{suffix}"
    path.write_text(text.replace("5e-1", "0.5"))
    config, origins = resolve(Top, path, ["optim.lr=3e-4", "note=hello"])
    assert (config.steps, config.optim.lr, config.optim.name, config.note) == (20, 3e-4, "muon", "hello")
    assert origins == {"steps": str(path), "optim.lr": "override", "note": "override"}


def test_preset_below_file() -> None:
    config, origins = resolve(Top, base={"steps": 5, "optim": {"lr": 0.1}}, overrides={"optim.lr": 0.2})
    assert (config.steps, config.optim.lr) == (5, 0.2)
    assert origins == {"steps": "preset", "optim.lr": "override"}


@pytest.mark.parametrize(
    ("override", "hint"), [("step=3", "steps"), ("optim.lrr=1", "optim.lr"), ("optm.lr=1", "optim")]
)
def test_unknown_key_suggests_the_nearest(override: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{hint}'"):
        resolve(Top, overrides=[override])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("steps=many", "steps"),
        ("optim.lr=-1", "optim.lr"),
        ("optim.lr=.nan", "optim.lr"),
        ("optim.lr=.inf", "optim.lr"),
        ("steps", "key=value"),
        ("=3", "key=value"),
        ("a..b=3", "key=value"),
        ("steps=[1", "quote it"),
    ],
)
def test_bad_values_are_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(Top, overrides=[override])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.yaml", "steps: 1\nsteps: 2\n", "twice"),
        ("a.yaml", "- 1\n", "list"),
        ("a.toml", "steps = \n", "cannot be read"),
        ("a.ini", "", ".toml, .yaml"),
        ("a.yaml", "x: !!python/object/apply:os.system ['true']\n", "cannot be read"),
        ("a.yaml", "1: 2\n", "no text"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=told):
        resolve(Top, tmp_path / name)
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(Top, tmp_path / "none.yaml")


def test_dump_is_complete_and_reads_back(tmp_path: Path) -> None:
    config, _ = resolve(Top, overrides=["optim.lr=1e-9", "note='yes it is: true'"])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_yaml(config))
    assert set(yaml.safe_load(path.read_text())) == {"steps", "optim", "note"}
    assert resolve(Top, path)[0] == config


def test_schema_and_differences() -> None:
    assert json.loads(schema(Top))["additionalProperties"] is False
    found = differences({"a": 1, "o": {"x": 1}}, {"a": 1, "o": {"x": 2}, "b": 3})
    assert found == {"b": (None, 3), "o.x": (1, 2)}


def test_values() -> None:
    assert [parse_value(t) for t in ("3e-4", "1_000", "true", "null", "[1, 2]", "gym:x", "e", "1e")] == [
        3e-4, 1000, True, None, [1, 2], "gym:x", "e", "1e",
    ]  # fmt: skip


def test_one_named_field_of_a_part_leaves_the_part_s_own_defaults_alone() -> None:
    class Inner(Config):
        size: int = 1
        rate: float = 0.5
        deep: tuple[int, ...] = ()

    class Outer(Config):
        part: Inner = Inner(size=7, deep=(1,))
        other: Inner = Inner()

    found, origins = resolve(Outer, None, {"part.rate": 0.25, "other.size": 3})
    assert found == Outer(part=Inner(size=7, rate=0.25, deep=(1,)), other=Inner(size=3))
    assert set(origins) == {"part.rate", "other.size"}
    assert resolve(Outer, None, {"part": {"size": 2}})[0].part == Inner(size=2, deep=(1,))
