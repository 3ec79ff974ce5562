"""Heads and card in C against their definition, for every shape that a config can ask for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gnomon.base.errors import ModelError
from gnomon.base.seeds import seed_torch, torch_generator
from gnomon.evaluation.calibration_fit import fit_domain
from gnomon.metacognition.calibration import (
    BudgetClip,
    Card,
    Fitted,
    Quality,
    Running,
    Shifts,
    Temperatures,
)
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.gate import FeedbackGate
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.native import NativeReader, available
from gnomon.metacognition.readers import TorchReader

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


def card_of(module: MetacogHeads, taps: torch.Tensor, price: float | None) -> Card:
    """A card with a number of its own in every place."""
    states = taps[:, 2].double().numpy()
    quality = Quality(n=10, ece=0.02, brier=0.1, auroc=0.9)
    plans = module.config.plans
    return Card(
        weights=module.fingerprint(),
        plans=plans,
        cost_order=plans[::-1],
        plan_threshold=0.6,
        plan_price=price,
        temperature=Temperatures(before=2.0, after=0.5),
        shift=Shifts(before=0.3, after=-0.2),
        budget_clip=BudgetClip(tested_offset=0.4, level=0.8, operating_offset=0.25, n=100),
        domain=fit_domain(states, [str(i % 7) for i in range(len(states))]).model_copy(update={"layer": 2}),
        fitted_plans=plans,
        running=Running(offset=0.3, level=0.95, temperature=1.5, shift=0.5, n=100),
        fitted=Fitted(dataset="all", stream="cal", n=10, before=quality, after=quality),
    )


@needs_compiler
@pytest.mark.parametrize("price", [None, 0.004])
@pytest.mark.parametrize("with_card", [True, False])
@pytest.mark.parametrize("options", SHAPES, ids=str)
def test_what_is_read_in_c_is_what_heads_and_card_say(
    options: dict[str, Any], with_card: bool, price: float | None
) -> None:
    module = heads(**options)
    taps = 300.0 + 3.0 * torch.randn(211, 5, 33, generator=torch_generator("native-taps"))
    module.trunk.mean.add_(300.0)
    card = card_of(module, taps, price) if with_card else None
    fast, slow = NativeReader(module, card), TorchReader(module, card)
    used = [11 * i for i in range(211)]
    plans = [i % module.config.n_plans for i in range(211)]
    said = [
        (fast.plan(taps), slow.plan(taps)),
        (fast.budget(taps, plans)[0], slow.budget(taps, plans)[0]),
        (fast.after(taps, used), slow.after(taps, used)),
    ]
    if card is not None:
        said.append((fast.running(taps, used), slow.running(taps, used)))
    for place, (got, want) in enumerate(said):
        a, b = np.asarray(got), np.asarray(want)
        whole = 0 if place == 0 else 1  # a chosen plan, a number of tokens: equal but for ties and roundings
        if place != 2:
            assert (np.abs(a[:, whole] - b[:, whole]) > 1).mean() <= 0.01 and (a[:, whole] != b[:, whole]).mean() < 0.02
            a, b = np.delete(a, whole, 1), np.delete(b, whole, 1)
        assert np.allclose(a, b, atol=2e-4, rtol=2e-4, equal_nan=True), place


@needs_compiler
def test_the_first_plan_in_cost_order_that_reaches_the_threshold_or_the_last() -> None:
    module = heads()
    taps = torch.randn(300, 5, 33, generator=torch_generator("native-thresholds"))
    for threshold in (1e-9, 0.3, 0.9, 1.0):
        card = card_of(module, taps, None).model_copy(update={"plan_threshold": threshold})
        got = [int(row[0]) for row in NativeReader(module, card).plan(taps)]
        assert got == [int(row[0]) for row in TorchReader(module, card).plan(taps)]
        assert threshold not in (1e-9, 1.0) or set(got) == {3 if threshold < 0.5 else 0}


@needs_compiler
def test_a_row_does_not_depend_on_its_company() -> None:
    module = heads(values=True)
    taps = torch.randn(6, 5, 33, generator=torch_generator("native-company"))
    fast = NativeReader(module, card_of(module, torch.randn(60, 5, 33), 0.01))
    used = [3, 9, 0, 40, 2, 7]
    plans = [0, 1, 2, 3, 0, 1]
    whole = fast.plan(taps), fast.budget(taps, plans)[0], fast.after(taps, used), fast.running(taps, used)
    for i in range(6):
        one, mine = taps[i : i + 1], used[i : i + 1]
        alone = fast.plan(one), fast.budget(one, plans[i : i + 1])[0], fast.after(one, mine), fast.running(one, mine)
        assert [said[0] for said in alone] == [said[i] for said in whole]
    assert fast.after(taps[::2], used[::2]) == [whole[2][i] for i in (0, 2, 4)], "strides are followed"
    with pytest.raises(ModelError, match=r"taps must be \[N, 5, 33\]"):
        fast.plan(taps[:, :4])


@needs_compiler
@pytest.mark.parametrize("with_card", [True, False])
def test_a_gate_in_c_is_the_module_s(with_card: bool) -> None:
    module = heads(values=True)
    taps = torch.randn(70, 5, 33, generator=torch_generator("native-gate"))
    card = card_of(module, taps, None) if with_card else None
    gate = FeedbackGate(module.config.proj_dim, 4, 33)
    plans = [i % 4 for i in range(70)]
    vectors = NativeReader(module, card, gate).budget(taps, plans)[1]
    assert vectors is not None and torch.equal(vectors, torch.ones(70, 33)), "the identity at initialisation"
    torch.nn.init.normal_(gate.out.weight)
    torch.nn.init.normal_(gate.out.bias)
    rows, got = NativeReader(module, card, gate).budget(taps, plans)
    want = TorchReader(module, card, gate).budget(taps, plans)[1]
    assert got is not None and want is not None and torch.allclose(got, want, atol=1e-4)
    assert float(got.min()) >= 0.5 and float(got.max()) <= 1.5 and float(got.std()) > 0.1
    other = NativeReader(module, card, gate).budget(taps, [(k + 1) % 4 for k in plans])[1]
    assert other is not None and not torch.allclose(got, other), "the plan is an input"
    plain = NativeReader(module, card).budget(taps, plans)[0]
    assert np.array_equal(rows, plain, equal_nan=True), "what is decided does not depend on the gate"
