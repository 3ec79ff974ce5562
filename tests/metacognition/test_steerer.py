"""Gate and adapters as a part of the layer: what a config may say, identity at init, size, gauges, fingerprint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.decoding.steered import heads_for
from tests.decoding.tiny import Tiny
from tests.training.test_thoughts import random_steerer

from gnomon.base.errors import ModelError
from gnomon.base.seeds import seed_torch, torch_generator
from gnomon.metacognition.config import THINK_SITE, MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.readers import TorchReader
from gnomon.metacognition.steerer import SteerConfig, Steerer, telemetry
from gnomon.model.steering import Steer

N, L, C = 6, 2, 16


@pytest.fixture
def heads() -> MetacogHeads:
    return heads_for(Tiny())


@pytest.fixture
def taps() -> torch.Tensor:
    return torch.randn(N, L, C, generator=torch_generator("steerer-taps"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_layer": 30}, "gate_layer names 30, but the blocks of this base are 0 to 29"),
        ({"gate_layer": -1}, "gate_layer names -1, but the blocks"),
        ({"gate_layer": "last"}, "gate_layer 'last' is no block; give a number below 30, \"middle\" or null"),
        ({"adapter_layers": "first"}, "adapter_layers 'first' are no blocks; give numbers below 30 or \"all\""),
        ({"adapter_layers": (3, 31)}, "adapter_layers names 31, but the blocks of this base are 0 to 29"),
        ({"adapter_layers": (4, 2, 4)}, "adapter_layers names 4 more than once, .* each at most once"),
        ({"gate_layer": None, "adapter_layers": ()}, "neither gate nor adapters does nothing; leave it out"),
    ],
)
def test_blocks_that_are_not_there_are_taught(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SteerConfig(**options).resolved(30)
    with pytest.raises(ModelError, match=message):
        Steerer(SteerConfig(**options), MetacogConfig(n_layers=30, hidden_size=8))


def test_configs_are_strict_and_words_become_numbers() -> None:
    for bad in ({"rank": 0}, {"rnak": 8}, {"adapter_layers": 3}, {"gate_layer": 1.5}):
        with pytest.raises(ValidationError):
            SteerConfig(**bad)
    found = SteerConfig().resolved(5)
    assert found == SteerConfig(gate_layer=2, adapter_layers=(0, 1, 2, 3, 4)) == found.resolved(5)
    assert SteerConfig(adapter_layers=(3, 0, 2)).resolved(4).adapter_layers == (0, 2, 3)
    body = SteerConfig(gate_layer=None, adapter_layers=(1, 0), rank=3).resolved(2).model_dump(mode="json")
    assert SteerConfig.model_validate(body).resolved(2) == SteerConfig(gate_layer=None, adapter_layers=(0, 1), rank=3)


@pytest.mark.parametrize("options", [{}, {"gate_layer": None}, {"adapter_layers": ()}, {"adapter_layers": (1,)}])
def test_the_identity_at_initialisation_and_only_there(
    heads: MetacogHeads, taps: torch.Tensor, options: dict[str, Any]
) -> None:
    seed_torch("identity")
    plans = ["direct", "steps"] * 3
    x = torch.randn(2, 3, C, generator=torch_generator("identity"))
    at = torch.tensor([[0, 0, -1], [-1, 1, 1]])
    for made, same in (
        (Steerer(SteerConfig(**options), heads.config), True),
        (random_steerer(heads, **options), False),
    ):
        said = [d.gate for d in Decider(heads, None, made).budget(taps, plans)]
        read = heads(taps, torch.full((N,), THINK_SITE), torch.zeros(N))
        vectors = made.vectors(read.g, torch.tensor([0, 1] * 3), read.conf_raw).detach()
        if made.gate is None:
            assert said == [None] * N and torch.equal(vectors, torch.ones(N, C))
        else:
            assert torch.allclose(torch.stack(said), vectors, atol=1e-6)  # type: ignore[arg-type]
            assert torch.equal(vectors, torch.ones(N, C)) is same
            assert 0.5 < float(vectors.min()) <= float(vectors.max()) < 1.5
        steer = Steer(made.steering(), vectors, at)
        touched = [k for k in range(L) if not torch.equal(steer(k, x), x)]
        assert touched == ([] if same else made.steering().layers)


def test_the_gate_hears_plan_and_confidence_and_both_readers_say_the_same(
    heads: MetacogHeads, taps: torch.Tensor
) -> None:
    made = random_steerer(heads)
    decider = Decider(heads, None, made)
    direct, steps = ([d.gate for d in decider.budget(taps, [plan] * N)] for plan in ("direct", "steps"))
    assert all(not torch.equal(a, b) for a, b in zip(direct, steps, strict=True))  # type: ignore[arg-type]
    slow = TorchReader(heads, None, made.gate).budget(taps, [1] * N)[1]
    assert slow is not None and torch.allclose(torch.stack(steps), slow, atol=1e-5)  # type: ignore[arg-type]
    g, sure = torch.randn(2, 8, generator=torch_generator("g")), torch.tensor([-3.0, 3.0])
    one = made.vectors(g[:1].expand(2, 8), torch.tensor([0, 0]), sure)
    assert not torch.equal(one[0], one[1])
    sure.requires_grad_()
    g.requires_grad_()
    (got, none) = torch.autograd.grad(
        made.vectors(g, torch.tensor([0, 1]), sure).sum(), [g, sure], allow_unused=True
    )  # fmt: skip
    assert none is None and float(got.abs().max()) > 0, "confidence is a fact to the gate, g is learned through"


def test_what_a_layer_decides_does_not_depend_on_its_steerer(heads: MetacogHeads, taps: torch.Tensor) -> None:
    plans = ["steps", "direct"] * 3
    bare, acts = Decider(heads), Decider(heads, None, random_steerer(heads))
    assert acts.plan(taps) == bare.plan(taps) and acts.after(taps, plans, [3] * N) == bare.after(taps, plans, [3] * N)
    assert [d._replace(gate=None) for d in acts.budget(taps, plans)] == bare.budget(taps, plans)
    assert bare.steering is None and acts.steering is not None and acts.steering.layers == [0, 1]


def test_a_steerer_is_small_beside_its_base() -> None:
    """SmolLM2-135M: 30 blocks of 576 channels, 134,515,008 parameters."""
    config = MetacogConfig(n_layers=30, hidden_size=576, values=True, policy=5)
    layer = {"heads": MetacogHeads(config), "steerer": Steerer(SteerConfig(), config)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in layer.items()}
    adapters, gate = 30 * (2 * 8 * 576 + 576 + 1), (64 + 4 + 1 + 1) * 576
    assert sizes["steerer"] == adapters + gate == 334_110
    share = sum(sizes.values()) / 134_515_008
    print(f"heads {sizes['heads']:,} + steerer {sizes['steerer']:,} parameters = {share:.2%} of SmolLM2-135M")
    assert share <= 0.01


def test_gauges_are_finite_and_say_what_happened(heads: MetacogHeads) -> None:
    x, at = torch.randn(2, 4, C, generator=torch_generator("gauges")), torch.tensor([[0, 0, 0, -1], [-1, 1, 1, -1]])

    def gauges(made: Steerer, noise: torch.Generator | None = None) -> dict[str, float]:
        vectors = made.vectors(torch.randn(2, 8, generator=torch_generator("g")), torch.tensor([0, 1]), torch.zeros(2))
        steer = Steer(made.steering(), vectors, at, noise=noise, record=True)
        for k in range(L):
            steer(k, x)
        assert all(len(z) == len(gate) == 5 for z, gate in steer.seen.values())
        return telemetry(vectors, steer.seen)

    seed_torch("gauges")
    fresh = gauges(Steerer(SteerConfig(), heads.config))
    assert (fresh["gate/rms"], fresh["gate/coverage"]) == (0.0, 1.0)
    assert fresh["gate/activity"] == pytest.approx(1.2 / (1 + np.exp(-2.0)) - 0.1)
    acts = gauges(random_steerer(heads))
    assert 0 < acts["gate/rms"] <= acts["gate/rms_max"] < 0.5
    shut = random_steerer(heads)
    assert shut.adapters is not None
    with torch.no_grad():
        shut.adapters.bias.fill_(-40.0)
    assert gauges(shut)["gate/coverage"] == gauges(shut)["gate/activity"] == 0.0
    drawn = gauges(random_steerer(heads), torch_generator("noise"))
    only = gauges(random_steerer(heads, adapter_layers=()))
    assert set(only) == {"gate/rms", "gate/rms_max"} and set(drawn) == set(fresh)
    assert all(np.isfinite(v) for g in (fresh, acts, drawn, only) for v in g.values())
    nobody = Steer(shut.steering(), torch.ones(1, C), torch.full((2, 4), -1), record=True)
    assert torch.equal(nobody(0, x), x) and not nobody.seen
    assert all(np.isfinite(v) for v in telemetry(torch.ones(1, C), nobody.seen).values())


def test_the_fingerprint_knows_every_weight_and_the_config(heads: MetacogHeads) -> None:
    made = random_steerer(heads)
    prints = {made.fingerprint(), random_steerer(heads, rank=3).fingerprint()}
    assert random_steerer(heads).fingerprint() in prints and len(prints) == 2
    for parameter in made.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
        prints.add(made.fingerprint())
    assert len(prints) == 2 + len(list(made.parameters()))
