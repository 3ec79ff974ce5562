"""Values of `--key value` for fields that take more than one kind."""

from __future__ import annotations

from typing import Any

import pytest

from gnomon.interfaces.options import overrides
from gnomon.recipes.metacog import MetacogRunConfig


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steer.gate-layer", "2", 2),
        ("steer.gate-layer", "middle", "middle"),
        ("steer.gate-layer", "null", None),
        ("steer.adapter-layers", "all", "all"),
        ("steer.adapter-layers", "0,3", [0, 3]),
        ("steer.adapter-layers", "3", [3]),
        ("steer.adapter-layers", "[0, 1]", [0, 1]),
        ("steer.adapter-layers", "", []),
        ("strategies", "direct,steps", ["direct", "steps"]),
        ("stream", "12", "12"),
        ("max-think", "12", 12),
    ],
)
def test_a_value_becomes_what_its_field_takes(key: str, text: str, value: Any) -> None:
    found = overrides(MetacogRunConfig, [f"--{key}", text])
    assert found == {key.replace("-", "_"): value}
    MetacogRunConfig.model_validate({"steer": {key[6:].replace("-", "_"): value}} if key[:6] == "steer." else found)
