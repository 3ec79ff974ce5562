"""Every loss alone: known values, masks, censoring, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gnomon.base.errors import UnknownNameError
from gnomon.base.seeds import torch_generator
from gnomon.training import objectives
from gnomon.training.objectives import LossWeights

NAN = float("nan")


def test_plan_ce_ignores_unsolved_rows_and_repeats_over_layers() -> None:
    logits = torch.randn(4, 3, generator=torch_generator("ce"))
    target = torch.tensor([0, -1, 2, -1])
    want = F.cross_entropy(logits[[0, 2]], target[[0, 2]])
    assert torch.allclose(objectives.plan_ce(logits, target), want)
    layered = logits.unsqueeze(1).expand(4, 5, 3)
    assert torch.allclose(objectives.plan_ce(layered, target), want)
    empty = objectives.plan_ce(logits.requires_grad_(True), torch.full((4,), -1))
    assert empty.item() == 0.0
    assert empty.requires_grad


def test_budget_error_is_one_sided_for_censored_rows() -> None:
    pred = torch.tensor([1.0, 1.0, 5.0, 2.0], requires_grad=True)
    target = torch.tensor([3.0, 3.0, 3.0, NAN])
    censored = torch.tensor([False, True, True, False])
    loss = objectives.budget_error(pred, target, censored)
    assert loss.item() == pytest.approx((4.0 + 4.0 + 0.0) / 3)
    (grad,) = torch.autograd.grad(loss, pred)
    assert grad[0] < 0
    assert grad[1] < 0
    assert grad[2] == grad[3] == 0.0


def test_budget_error_over_layers_equals_the_mean_of_layers() -> None:
    pred = torch.randn(6, 3, generator=torch_generator("layers"))
    target = torch.tensor([0.0, 1.0, NAN, 2.0, 3.0, 4.0])
    cut = torch.tensor([True, False, False, True, False, False])
    want = torch.stack([objectives.budget_error(pred[:, k], target, cut) for k in range(3)]).mean()
    assert torch.allclose(objectives.budget_error(pred, target, cut), want)


def test_pinball_is_least_at_the_quantile() -> None:
    target = torch.arange(1.0, 101.0)
    losses = {v: float(objectives.budget_pinball(torch.full((100,), float(v)), target, 0.9)) for v in range(80, 101)}
    assert min(losses, key=losses.__getitem__) in (90, 91)
    assert float(objectives.budget_pinball(torch.tensor([5.0]), torch.tensor([3.0]), 0.9, torch.tensor([True]))) == 0.0


def test_confidence_bce_takes_shares_and_is_proper() -> None:
    target = torch.tensor([0.75, NAN])
    grid = torch.linspace(-3, 3, 601)
    losses = [float(objectives.confidence_bce(torch.tensor([float(x), 0.0]), target)) for x in grid]
    best = float(grid[losses.index(min(losses))])
    assert best == pytest.approx(math.log(3.0), abs=0.02)


def test_confidence_rank_wants_the_right_order() -> None:
    target = torch.tensor([1.0, 0.0, 0.9, NAN])
    good = objectives.confidence_rank(torch.tensor([5.0, -5.0, 5.0, 0.0]), target)
    bad = objectives.confidence_rank(torch.tensor([-5.0, 5.0, -5.0, 0.0]), target)
    assert float(good) < 0.01
    assert float(bad) > 9.0
    assert float(objectives.confidence_rank(torch.zeros(2), torch.tensor([0.5, 0.6]))) == 0.0


def test_layer_variance_is_zero_only_when_layers_agree() -> None:
    assert float(objectives.layer_variance(torch.ones(3, 4))) == 0.0
    assert float(objectives.layer_variance(torch.tensor([[0.0, 2.0]]))) == 1.0
    assert float(objectives.layer_variance(torch.zeros(0, 4))) == 0.0


def test_weighted_sums_and_logs_by_name() -> None:
    parts = {"plan": torch.tensor(2.0), "budget": torch.tensor(3.0), "conf_rank": torch.tensor(7.0)}
    total, row = objectives.weighted(parts, LossWeights(plan=0.5, budget=2.0, conf_rank=0.0))
    assert float(total) == 7.0
    assert row == {"loss/plan": 2.0, "loss/budget": 3.0, "loss/conf_rank": 7.0}
    with pytest.raises(UnknownNameError, match="did you mean 'budget'"):
        objectives.weighted({"budgt": torch.tensor(1.0)}, LossWeights())
