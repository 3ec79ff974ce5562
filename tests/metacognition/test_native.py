"""The heads in C against MetacogHeads, for every shape that a config can ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gnomon.base.errors import ModelError
from gnomon.base.seeds import numpy_generator, seed_torch, torch_generator
from gnomon.evaluation.calibration_fit import fit_domain
from gnomon.metacognition.config import SITES, MetacogConfig
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.native import NativeDistance, NativeHeads, available

SHAPES: list[dict[str, Any]] = [
    {},
    {"aggregator": "mean"},
    {"layers": (0, 3), "plans": ("direct", "steps")},
    {"proj_dim": 7, "width": 19, "experts_per_layer": 3},
    {"values": True},
    {"values": True, "proj_dim": 3, "plans": ("steps",)},
]


def heads(**options: Any) -> MetacogHeads:
    """Random heads: nothing is left at its start value."""
    seed_torch("native-heads", str(options))
    made = MetacogHeads(MetacogConfig(n_layers=5, hidden_size=33, **options))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.trunk.mean.normal_()
    made.trunk.scale.uniform_(0.5, 2.0)
    return made.eval()


needs_compiler = pytest.mark.skipif(not available(heads()), reason="no C compiler on this machine")


@needs_compiler
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_native_heads_equal_the_module(options: dict[str, Any]) -> None:
    module = heads(**options)
    fast = NativeHeads(module)
    taps = 3.0 * torch.randn(9, 5, 33, generator=torch_generator("native-taps"))
    used = torch.arange(9.0) * 11
    for site in range(len(SITES)):
        with torch.no_grad():
            want = module(taps, torch.full((9,), site), used)
        got = fast(taps, site, used)
        for a, b in ((got.plan_logits, want.plan_logits), (got.budget_raw, want.budget_raw)):
            assert np.allclose(a, b.numpy(), atol=1e-4, rtol=1e-4)
        assert np.allclose(got.conf_raw, want.conf_raw.numpy(), atol=1e-4, rtol=1e-4)
        assert np.allclose(got.g, want.g.numpy(), atol=1e-4, rtol=1e-4)
        for a, c in ((got.solve_logits, want.solve_logits), (got.cost_raw, want.cost_raw)):
            assert (a is None) == (c is None) == (not options.get("values"))
            assert a is None or c is None or np.allclose(a, c.numpy(), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_native_distance_equals_the_card_s() -> None:
    g = numpy_generator("native-distance")
    states = 300.0 + 40.0 * g.normal(size=(400, 24))
    domain = fit_domain(states, [str(i % 7) for i in range(400)])
    fresh = 300.0 + 90.0 * g.normal(size=(50, 24))
    assert np.allclose(NativeDistance(domain)(fresh), domain.distance(fresh), rtol=1e-3)


@needs_compiler
def test_a_row_does_not_depend_on_its_company_and_used_defaults_to_zero() -> None:
    fast = NativeHeads(heads())
    taps = torch.randn(6, 5, 33, generator=torch_generator("native-company"))
    whole = fast(taps, 1)
    for i in range(6):
        one = fast(taps[i : i + 1], 1, torch.zeros(1))
        assert all(a is None or np.array_equal(a[0], b[i]) for a, b in zip(one, whole, strict=True))
    with pytest.raises(ModelError, match=r"taps must be \[N, 5, 33\]"):
        fast(taps[:, :4], 1)
