"""Every loss alone: known values, masks, censoring, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from gnomon.base.errors import UnknownNameError
from gnomon.base.seeds import torch_generator
from gnomon.training import objectives
from gnomon.training.lm_objectives import LMLossWeights
from gnomon.training.objectives import LossWeights

NAN = float("nan")
DOUBLE = torch.float64


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch_generator("objectives", shape), dtype=DOUBLE).requires_grad_(True)


def log_softmax(row: list[float], k: int) -> float:
    top = max(row)
    return row[k] - top - math.log(sum(math.exp(x - top) for x in row))


def softmax(row: list[float]) -> list[float]:
    return [math.exp(log_softmax(row, k)) for k in range(len(row))]


def grad_of(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(loss, x)
    assert torch.isfinite(grad).all()
    return grad


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


def test_the_tables_of_weights_share_no_name() -> None:
    heads, base = LossWeights.model_fields, LMLossWeights.model_fields
    assert not set(heads) & set(base)
    parts = {"plan": torch.tensor(2.0), "answer_ce": torch.tensor(3.0), "style_entropy": torch.tensor(0.5)}
    total, row = objectives.weighted(parts, LossWeights(style_entropy=2.0), LMLossWeights(answer_ce=0.5))
    assert float(total) == 2.0 + 1.5 - 1.0, "a bonus is taken off"
    assert row == {"loss/plan": 2.0, "loss/answer_ce": 3.0, "loss/style_entropy": 0.5}
    with pytest.raises(UnknownNameError, match="unknown loss 'answer_ce'"):
        objectives.weighted(parts, LossWeights())
    with pytest.raises(UnknownNameError, match="did you mean 'answer_ce'"):
        objectives.weighted({"anser_ce": torch.tensor(1.0)}, LossWeights(), LMLossWeights())


@pytest.mark.parametrize("table", [LossWeights, LMLossWeights])
def test_weights_are_never_negative_and_names_are_known(table: type[LossWeights | LMLossWeights]) -> None:
    name = next(iter(table.model_fields))
    for bad in ({name: -1.0}, {"surprise": 1.0}):
        with pytest.raises(ValidationError):
            table(**bad)


def test_plan_and_policy_ce_against_loops() -> None:
    target = [2, -1, 0, 1, -1, 2]
    for loss in (objectives.plan_ce, objectives.policy_ce):
        logits = draw(6, 3)
        rows = logits.tolist()
        want = [-log_softmax(row, t) for row, t in zip(rows, target, strict=True) if t >= 0]
        got = loss(logits, torch.tensor(target))
        assert got.item() == pytest.approx(sum(want) / len(want), abs=1e-12)
        grad = grad_of(got, logits)
        for i, t in enumerate(target):
            if t < 0:
                assert not grad[i].any(), "no label, no loss"
            else:
                wrong = [g for k, g in enumerate(grad[i].tolist()) if k != t]
                assert grad[i, t] < 0 < min(wrong)
    none = objectives.policy_ce(draw(2, 5), torch.tensor([-1, -1]))
    assert none.item() == 0.0 and none.requires_grad
    masked = torch.tensor([[-math.inf, 1.0]], requires_grad=True)
    assert objectives.plan_ce(masked, torch.tensor([-1])).item() == 0.0, "0, not NaN, where a logit is masked"


def test_budget_losses_against_loops() -> None:
    target, cut = [0.5, NAN, 2.0, 3.0, -1.0], [False, False, True, True, False]
    pred = draw(5, 2)
    for q in (None, 0.2, 0.9):
        total, count = 0.0, 0
        for i, row in enumerate(pred.tolist()):
            for value in row:
                if math.isnan(target[i]):
                    continue
                gap = value - target[i]
                gap = min(gap, 0.0) if cut[i] else gap
                total += gap**2 if q is None else max(-q * gap, (1.0 - q) * gap)
                count += 1
        args = (pred, torch.tensor(target, dtype=DOUBLE))
        censored = torch.tensor(cut)
        got = objectives.budget_error(*args, censored) if q is None else objectives.budget_pinball(*args, q, censored)
        assert got.item() == pytest.approx(total / count, abs=1e-12)
        grad = grad_of(got, pred)
        assert not grad[1].any()
        for i in (0, 2, 3, 4):
            for value, g in zip(pred[i].tolist(), grad[i].tolist(), strict=True):
                assert g == 0.0 if cut[i] and value > target[i] else g * (value - target[i]) > 0


def test_confidence_losses_against_loops() -> None:
    logit, target = draw(5), [1.0, 0.25, NAN, 0.0, 0.3]
    x = logit.tolist()
    p = [1.0 / (1.0 + math.exp(-v)) for v in x]
    held = [i for i in range(5) if i != 2]
    want = -sum(target[i] * math.log(p[i]) + (1 - target[i]) * math.log(1 - p[i]) for i in held) / 4
    got = objectives.confidence_bce(logit, torch.tensor(target, dtype=DOUBLE))
    assert got.item() == pytest.approx(want, abs=1e-12)
    grad = grad_of(got, logit).tolist()
    assert grad[2] == 0.0 and all(grad[i] * (p[i] - target[i]) > 0 for i in held)
    pairs = [(i, j) for i in held for j in held if target[i] - target[j] > 0.25]
    assert pairs == [(0, 1), (0, 3), (0, 4), (4, 3)]
    want = sum(math.log1p(math.exp(x[j] - x[i])) for i, j in pairs) / len(pairs)
    got = objectives.confidence_rank(logit, torch.tensor(target, dtype=DOUBLE))
    assert got.item() == pytest.approx(want, abs=1e-12)
    grad = grad_of(got, logit).tolist()
    assert grad[0] < 0 and grad[1] > 0 and grad[2] == 0.0 and grad[3] > 0
    for loss in (objectives.confidence_bce, objectives.confidence_rank):
        empty = loss(draw(3), torch.full((3,), NAN, dtype=DOUBLE))
        assert empty.item() == 0.0 and empty.requires_grad


def test_layer_variance_against_loops() -> None:
    budgets = draw(4, 3)
    rows = budgets.tolist()
    want = sum(sum((v - sum(r) / 3) ** 2 for v in r) / 3 for r in rows) / 4
    got = objectives.layer_variance(budgets)
    assert got.item() == pytest.approx(want, abs=1e-12)
    grad = grad_of(got, budgets)
    assert ((budgets - budgets.mean(1, keepdim=True)) * grad > 0).all(), "every layer is drawn to its row's mean"


def test_over_budget_against_loops() -> None:
    need, cap = draw(6), [-3.0, NAN, 0.0, 3.0, -0.5, NAN]
    want = [max(0.0, v - c) for v, c in zip(need.tolist(), cap, strict=True) if not math.isnan(c)]
    assert any(want) and not all(want)
    got = objectives.over_budget(need, torch.tensor(cap, dtype=DOUBLE))
    assert got.item() == pytest.approx(sum(want) / 4, abs=1e-12)
    for v, c, g in zip(need.tolist(), cap, grad_of(got, need).tolist(), strict=True):
        assert g == (0.25 if v > c else 0.0), "below the cap and without one nothing is asked"
    layers = draw(3, 4)
    caps = torch.tensor([0.0, NAN, -9.0], dtype=DOUBLE)
    each = torch.stack([objectives.over_budget(layers[:, k], caps) for k in range(4)]).mean()
    assert torch.allclose(objectives.over_budget(layers, caps), each)
    empty = objectives.over_budget(need, torch.full((6,), NAN, dtype=DOUBLE))
    assert empty.item() == 0.0 and empty.requires_grad and not grad_of(empty, need).any()


def test_expected_need_moves_the_plan_and_never_the_costs() -> None:
    logits, cost = draw(3, 4), draw(4, 3)
    costs = cost.T
    want = [
        sum(p * c for p, c in zip(softmax(a), b, strict=True))
        for a, b in zip(logits.tolist(), costs.tolist(), strict=True)
    ]
    need = objectives.expected_need(logits, costs)
    assert need.tolist() == pytest.approx(want, abs=1e-12)
    loss = objectives.over_budget(need, torch.full((3,), -9.0, dtype=DOUBLE))
    to_logits, to_cost = torch.autograd.grad(loss, [logits, cost], allow_unused=True)
    assert to_cost is None
    at = torch.arange(3)
    assert (to_logits[at, costs.argmin(1)] < 0).all() and (to_logits[at, costs.argmax(1)] > 0).all()


def test_style_entropy_against_loops() -> None:
    logits = draw(5, 4)
    rows = [softmax(row) for row in logits.tolist()]
    mean = [sum(r[k] for r in rows) / 5 for k in range(4)]
    got = objectives.style_entropy(logits)
    assert got.item() == pytest.approx(-sum(p * math.log(p) for p in mean), abs=1e-12)
    assert torch.autograd.gradcheck(objectives.style_entropy, (logits,))


def test_style_entropy_is_largest_when_all_strategies_are_used_equally() -> None:
    sure = (1000.0 * torch.eye(4)).requires_grad_(True)
    assert objectives.style_entropy(sure).item() == pytest.approx(math.log(4)), "each problem surely, together evenly"
    assert objectives.style_entropy(torch.zeros(3, 4)).item() == pytest.approx(math.log(4))
    one = torch.tensor([[1000.0, 0.0, 0.0, 0.0]] * 3, requires_grad=True)
    collapsed = objectives.style_entropy(one)
    assert 0.0 <= collapsed.item() < 1e-6
    grad_of(collapsed, one)  # finite
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0]], dtype=DOUBLE, requires_grad=True)
    bonus, _ = objectives.weighted({"style_entropy": objectives.style_entropy(logits)}, LossWeights(style_entropy=1.0))
    grad = grad_of(bonus, logits)
    assert (grad[:, 0] > 0).all() and (grad[:, 1] < 0).all(), "descent takes from the strategy that is used most"
    empty = objectives.style_entropy(torch.zeros(0, 4, requires_grad=True))
    assert empty.item() == 0.0 and empty.requires_grad
