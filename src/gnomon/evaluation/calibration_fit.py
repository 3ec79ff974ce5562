"""Fitting a calibration card from an uncapped greedy pass over the calibration split (decisions.md §4).

Order: plan threshold, conformal budget offsets, then the temperatures at the operating point that these two define,
then the running estimates inside it.
N problems · K plans · P size of g.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gnomon.base.errors import DataError
from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.running_fit import Boundaries, Closings, fit_running
from gnomon.evaluation.scaling import conformal_offset, fit_scale, quality
from gnomon.metacognition.calibration import (
    BudgetClip,
    Card,
    Domain,
    Fitted,
    Running,
    Shifts,
    Temperatures,
    best_value,
    clip_tokens,
    first_reaching,
    scaled,
    sigmoid,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995)


@dataclass(frozen=True)
class Uncapped:
    """The uncapped greedy pass of every plan over the calibration split.

    plans: order of the columns and of the plan head. plan_probs, budget_raw (log1p tokens), conf_before and conf_after
    (logits) float [N, K]; correct, closed bool [N, K]; used int [N, K]; state [N, K, C] of block `layer` at
    the think tag. Of one node boundary of each rollout: boundary_used, boundary_remaining (tokens, -1 where there is
    none), boundary_budget, boundary_conf (NaN there) [N, K]; None = not recorded. solve (logits) and cost (log1p
    tokens) [N, K] at the prompt; None = heads without values. The fields are those of
    `training.heads_fit.read_greedy`: `Uncapped(**read_greedy(heads, labels))`.
    """

    plans: tuple[str, ...]
    family: tuple[str, ...]
    plan_probs: Floats
    correct: Bools
    used: Ints
    closed: Bools
    budget_raw: Floats
    conf_before: Floats
    conf_after: Floats
    state: Floats
    level: tuple[int, ...] = ()
    answer_logprob: Floats | None = None
    layer: int = 0
    boundary_used: Ints | None = None
    boundary_remaining: Ints | None = None
    boundary_budget: Floats | None = None
    boundary_conf: Floats | None = None
    solve: Floats | None = None
    cost: Floats | None = None

    def __post_init__(self) -> None:
        shape = (len(self.family), len(self.plans))
        if not self.family:
            raise DataError("calibration needs at least one problem")
        for name in ("plan_probs", "correct", "used", "closed", "budget_raw", "conf_before", "conf_after"):
            if getattr(self, name).shape != shape:
                raise DataError(f"{name} must be {list(shape)}, got {list(getattr(self, name).shape)}")

    def at(self, plan: Ints) -> Callable[[NDArray[Any]], NDArray[Any]]:
        """A picker of one column per row: values [N, K] -> [N] under the plans [N]."""
        rows = np.arange(len(self.family))
        return lambda values: values[rows, plan]


# (rows, plan names, caps) -> (correct, confidence-after logit) of those problems cut at the cap.
CutDecode = Callable[[Ints, Sequence[str], Ints], tuple[Bools, Floats]]


def fit_plan_threshold(
    data: Uncapped, cost_order: Sequence[str], tolerance: float = 0.0, best_plan: Mapping[str, str] | None = None
) -> float:
    """The cheapest threshold whose accuracy reaches min(best fixed strategy per family, best threshold) − tolerance."""
    order = [data.plans.index(p) for p in cost_order]
    choices = [*np.linspace(0.3, 0.95, 27), 0.97, 0.98, 0.99, 0.995, 1.0]
    goal = best_fixed_accuracy(data, best_plan), tolerance
    return _cheapest(data, choices, lambda tau: first_reaching(data.plan_probs, order, tau), *goal)


def fit_plan_price(data: Uncapped, tolerance: float = 0.0, best_plan: Mapping[str, str] | None = None) -> float | None:
    """The price of a think token by the same rule as the threshold; None where the heads give no values."""
    solve, cost = data.solve, data.cost
    if solve is None or cost is None:
        return None
    prices = [0.0, *np.geomspace(1e-5, 2e-2, 67)]
    goal = best_fixed_accuracy(data, best_plan), tolerance
    return _cheapest(data, prices, lambda price: best_value(solve, cost, price), *goal)


def _cheapest(
    data: Uncapped, choices: Sequence[float], plan: Callable[[float], Ints], fixed: float, tolerance: float
) -> float:
    """Of these settings of a rule the one with the fewest tokens that is accurate enough beside `fixed`."""
    scored = []
    for setting in choices:
        pick = data.at(plan(float(setting)))
        scored.append((float(pick(data.correct).mean()), float(pick(data.used).mean()), float(setting)))
    goal = min(max(s[0] for s in scored), fixed) - tolerance
    return min((used, setting) for accuracy, used, setting in scored if accuracy >= goal - 1e-12)[1]


def best_fixed_accuracy(data: Uncapped, best_plan: Mapping[str, str] | None = None) -> float:
    """Accuracy with each family's fixed strategy; without one per family the best on these rows (so optimistic)."""
    names = np.asarray(data.family)
    if best_plan and set(data.family) <= set(best_plan):
        fixed = np.array([data.plans.index(best_plan[f]) for f in data.family], dtype=np.int64)
        return float(data.at(fixed)(data.correct).mean())
    return float(sum(data.correct[names == f].mean(0).max() * (names == f).mean() for f in set(data.family)))


@dataclass(frozen=True)
class OperatingPoint:
    """Clip level in use, its offset, and what decoding under it gives: caps, correct, conf_after [N]."""

    level: float
    offset: float
    caps: Ints
    correct: Bools
    conf_after: Floats
    loss: float


def fit_operating(data: Uncapped, plan: Ints, cut: CutDecode | None, tolerance: float = 0.005) -> OperatingPoint:
    """The cheapest clip level that loses at most `tolerance` accuracy against no cap, at the same plans [N].

    Without `cut` a row that would be cut counts as wrong (pessimistic) and keeps its uncapped confidence.
    """
    pick = data.at(plan)
    raw, used, right, after = (pick(v) for v in (data.budget_raw, data.used, data.correct, data.conf_after))
    fit_raw, fit_used = _needs(data, plan)
    best: OperatingPoint | None = None
    for level in LEVELS:
        offset = conformal_offset(fit_raw, fit_used, level)
        caps = clip_tokens(raw, offset)
        over = np.flatnonzero(used > caps)
        correct, logit = right.copy(), after.copy()
        correct[over] = False
        if cut is not None and len(over):
            correct[over], logit[over] = cut(over, [data.plans[int(k)] for k in plan[over]], caps[over])
        loss = float(right.mean() - correct.mean())
        best = OperatingPoint(level, offset, caps, correct, logit, loss)
        if loss <= tolerance + 1e-12:
            break
    assert best is not None
    return best


def _needs(data: Uncapped, plan: Ints, enough: int = 200) -> tuple[Floats, Ints]:
    """Predictions and needs of correct, naturally closed solutions that think (plan ≠ direct, where there are any).

    Of the chosen plans, because coverage is promised for those; of all plans when they give fewer than `enough` rows.
    """
    held = data.correct & data.closed
    thinking = np.array([p != "direct" for p in data.plans])
    if held[:, thinking].any():
        held = held & thinking
    chosen = held & (np.arange(len(data.plans)) == plan[:, None])
    held = chosen if int(chosen.sum()) >= enough else held
    return data.budget_raw[held], data.used[held]


def fit_domain(
    states: Floats,
    groups: Sequence[str],
    layer: int = 0,
    quantile: float = 0.99,
    shrink: float = 0.01,
    seed: int = 0,
) -> Domain:
    """Centres per group, one shared shrunk covariance; the threshold from distances measured across two folds.

    states [M, C] of block `layer`; groups [M] (family and plan). In-sample distances would be too short, hence folds.
    """
    names, g = np.asarray(groups), np.asarray(states, dtype=np.float64)
    if len(g) < 4:
        raise DataError(f"the domain of a card needs at least 4 rows, got {len(g)}")
    fold = numpy_generator("domain-folds", seed).permutation(len(g)) % 2
    far = np.zeros(len(g))
    for side in (0, 1):
        centres, precision = _gaussian(g[fold != side], names[fold != side], shrink)
        far[fold == side] = _as_domain(centres, precision, 1.0, layer).distance(g[fold == side])
    rank = min(len(far), math.ceil((len(far) + 1) * quantile))
    centres, precision = _gaussian(g, names, shrink)
    return _as_domain(centres, precision, max(float(np.sort(far)[rank - 1]), 1e-6), layer)


def _groups(data: Uncapped, least: int = 10) -> list[str]:
    """family/plan per problem and plan; groups too small for a centre of their own are pooled per plan."""
    fine = [(f, p) for f in data.family for p in data.plans]
    counts = Counter(fine)
    return [f"{f}/{p}" if counts[f, p] >= least else f"*/{p}" for f, p in fine]


def _gaussian(g: Floats, names: NDArray[Any], shrink: float) -> tuple[Floats, Floats]:
    centres = np.stack([g[names == k].mean(0) for k in np.unique(names)])
    which = np.searchsorted(np.unique(names), names)
    gap = g - centres[which]
    cov = gap.T @ gap / len(g)
    cov = (1.0 - shrink) * cov + shrink * np.eye(g.shape[1]) * (np.trace(cov) / g.shape[1] + 1e-9)
    return centres, np.linalg.inv(cov)


def _as_domain(centres: Floats, precision: Floats, threshold: float, layer: int) -> Domain:
    def rows(x: Floats) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(float(f"{v:.6g}") for v in row) for row in x)

    return Domain(layer=layer, centres=rows(centres), precision=rows(precision), threshold=threshold)


def fit_card(
    data: Uncapped,
    cost_order: Sequence[str],
    *,
    weights: str,
    dataset: str,
    stream: str,
    best_plan: Mapping[str, str] | None = None,
    cut: CutDecode | None = None,
    tolerance: float = 0.005,
    plan_tolerance: float = 0.0,
    min_plan_rows: int = 20,
    closings: Closings | None = None,
) -> tuple[Card, dict[str, Any]]:
    """Fit everything on one calibration split.

    weights: fingerprint of the heads; cost_order: from the training labels; best_plan: per family, chosen on val.
    Confidence counts as calibrated only under plans with at least `min_plan_rows` chosen rows here (or all plans that
    were chosen, when none has as many). closings: of heads that say whether closing at a boundary is right. Returns the
    card and a report with the numbers before and after scaling.
    """
    tau, price, plan = _fit_choice(data, cost_order, plan_tolerance, best_plan)
    point = fit_operating(data, plan, cut, tolerance)
    fit_raw, fit_used = _needs(data, plan)
    before, after = data.at(plan)(data.conf_before), point.conf_after
    (t_before, b_before), (t_after, b_after) = (fit_scale(x, point.correct) for x in (before, after))
    chosen = {data.plans[k]: int((plan == k).sum()) for k in range(len(data.plans))}
    fitted = [p for p, n in chosen.items() if n >= min_plan_rows] or [p for p, n in chosen.items() if n]
    running, measured = _running(data, plan, point, closings)
    card = Card(
        weights=weights,
        plans=data.plans,
        cost_order=tuple(cost_order),
        plan_threshold=tau,
        plan_price=price,
        temperature=Temperatures(before=t_before, after=t_after),
        shift=Shifts(before=b_before, after=b_after),
        budget_clip=_clip(point, fit_raw, fit_used),
        domain=fit_domain(data.state.reshape(-1, data.state.shape[-1]), _groups(data), data.layer),
        fitted_plans=tuple(fitted),
        best_plan=dict(best_plan or {}),
        running=running,
        fitted=Fitted(
            dataset=dataset,
            stream=stream,
            n=len(plan),
            before=quality(scaled(before, t_before, b_before), point.correct),
            after=quality(scaled(after, t_after, b_after), point.correct),
        ),
    )
    report = _report(data, plan, point, chosen, best_plan) | {
        "plan_threshold": tau,
        "plan_price": price,
        "running": measured,
        "clip_coverage": metrics.coverage(card.clip_budget(fit_raw, "tested"), fit_used),
        "unscaled": {
            name: quality(sigmoid(x), point.correct).model_dump() for name, x in (("before", before), ("after", after))
        },
    }
    return card, report


def _clip(point: OperatingPoint, raw: Floats, used: Ints) -> BudgetClip:
    return BudgetClip(
        tested_offset=conformal_offset(raw, used, 0.90),
        level=point.level,
        operating_offset=point.offset,
        n=len(used),
    )


def _fit_choice(
    data: Uncapped, cost_order: Sequence[str], tolerance: float, best_plan: Mapping[str, str] | None
) -> tuple[float, float | None, Ints]:
    """(threshold, price, the plans [N] that the card will choose)."""
    tau = fit_plan_threshold(data, cost_order, tolerance, best_plan)
    price = fit_plan_price(data, tolerance, best_plan)
    if price is not None and data.solve is not None and data.cost is not None:
        return tau, price, best_value(data.solve, data.cost, price)
    return tau, None, first_reaching(data.plan_probs, [data.plans.index(p) for p in cost_order], tau)


def _running(
    data: Uncapped, plan: Ints, point: OperatingPoint, closings: Closings | None, enough: int = 200
) -> tuple[Running | None, dict[str, Any] | None]:
    """Running estimates at boundaries that the operating point reaches; of all plans where these are too few."""
    used, remaining, budget, conf = (
        data.boundary_used, data.boundary_remaining, data.boundary_budget, data.boundary_conf,
    )  # fmt: skip
    if used is None or remaining is None or budget is None or conf is None:
        return None, None
    chosen = np.arange(len(data.plans)) == plan[:, None]
    held = (used >= 0) & chosen & (used <= point.caps[:, None])
    outcome = np.where(chosen, point.correct[:, None], data.correct)
    held = held if int(held.sum()) >= enough else used >= 0
    rows = Boundaries(
        problem=np.nonzero(held)[0], used=used[held], remaining=remaining[held], budget_raw=budget[held],
        conf_raw=conf[held], solved=(data.correct & data.closed)[held], correct=outcome[held],
        budget_before=data.budget_raw[held], conf_before=data.conf_before[held],
    )  # fmt: skip
    return fit_running(rows, point.level, closings)


def _report(
    data: Uncapped, plan: Ints, point: OperatingPoint, chosen: Mapping[str, int], best_plan: Mapping[str, str] | None
) -> dict[str, Any]:
    pick = data.at(plan)
    return {
        "plan_share": {k: n / len(plan) for k, n in chosen.items()},
        "accuracy_uncapped": float(pick(data.correct).mean()),
        "accuracy": float(point.correct.mean()),
        "accuracy_best_fixed": best_fixed_accuracy(data, best_plan),
        "clip_level": point.level,
        "clip_loss": point.loss,
        "think_tokens_mean": float(np.minimum(pick(data.used), point.caps).mean()),
    }
