"""Fits recover what generated the data: temperature, coverage, threshold, domain."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gnomon.base.errors import DataError
from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.calibration_fit import (
    Uncapped,
    best_fixed_accuracy,
    fit_card,
    fit_domain,
    fit_operating,
    fit_plan_price,
    fit_plan_threshold,
)
from gnomon.evaluation.scaling import conformal_offset, fit_scale
from gnomon.metacognition.calibration import best_value, clip_tokens, sigmoid

PLANS = ("direct", "steps")


def uncapped(n: int, name: str, spread: float = 0.3) -> Uncapped:
    """Two plans. d: difficulty; direct is right when d < .5, steps nearly always; the head knows d up to noise."""
    g = numpy_generator("uncapped", name)
    d = g.random(n)
    p_direct = sigmoid(20 * (0.5 - d))
    correct = np.stack([g.random(n) < p_direct, g.random(n) < 0.97], 1)
    log_need = np.log1p(10 + 60 * d)
    used = np.stack([np.zeros(n), np.expm1(log_need + spread * g.normal(size=n))], 1).round().astype(np.int64)
    used[:, 1] = np.maximum(used[:, 1], 1)
    logit = np.stack([np.log(p_direct / (1 - p_direct)), np.full(n, math.log(0.97 / 0.03))], 1)
    return Uncapped(
        plans=PLANS,
        family=tuple(["f", "h"][i % 2] for i in range(n)),
        plan_probs=np.stack([p_direct, 1 - p_direct], 1),
        correct=correct,
        used=used,
        closed=np.ones((n, 2), dtype=bool),
        budget_raw=np.stack([np.zeros(n), log_need], 1),
        conf_before=3.0 * logit,
        conf_after=0.5 * logit,
        state=g.normal(size=(n, 2, 5)),
    )


@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("truth", [0.4, 1.0, 3.0])
def test_temperature_and_shift_are_recovered(truth: float, shift: float) -> None:
    g = numpy_generator("temperature", truth, shift)
    z = 2.0 * g.normal(size=20000)
    right = g.random(20000) < sigmoid(z + shift)
    temperature, found = fit_scale(z * truth, right)
    assert temperature == pytest.approx(truth, rel=0.05)
    assert found == pytest.approx(shift, abs=0.06)
    assert metrics.auroc(sigmoid(z), right) == pytest.approx(metrics.auroc(sigmoid(z * truth), right), abs=1e-6)


def test_scale_of_rows_of_one_kind_stays_finite() -> None:
    temperature, shift = fit_scale(np.linspace(0, 4, 50), np.ones(50))
    assert 0.05 <= temperature <= 20 and 0 < shift < 12
    with pytest.raises(DataError):
        fit_scale(np.array([]), np.array([]))


def test_conformal_coverage_is_within_binomial_bounds() -> None:
    g = numpy_generator("coverage")
    held = []
    for _ in range(300):
        raw = g.normal(3.0, 0.5, 800)
        used = np.maximum(np.expm1(raw + 0.4 * g.standard_t(4, 800)), 0).round().astype(np.int64)
        offset = conformal_offset(raw[:400], used[:400], 0.90)
        held.append(metrics.coverage(clip_tokens(raw[400:], offset), used[400:]))
    # 300 × 400 exchangeable rows; one run has sd ≈ sqrt(2 × .09 / 400) = .021, the mean of 300 ≈ .0012
    assert np.mean(held) == pytest.approx(0.90, abs=0.006)
    assert min(held) > 0.80


def test_operating_level_is_the_cheapest_that_loses_little() -> None:
    data = uncapped(3000, "op")
    plan = np.ones(3000, dtype=np.int64)
    strict, loose = fit_operating(data, plan, None, 0.005), fit_operating(data, plan, None, 0.25)
    assert strict.level >= 0.99
    assert loose.level == 0.8
    assert strict.loss <= 0.005
    assert loose.loss <= 0.25
    assert loose.caps.mean() < strict.caps.mean()


def test_cut_rows_are_decoded_again_where_that_is_possible() -> None:
    data = uncapped(2000, "cut")
    seen = []

    def cut(rows: np.ndarray, plans: object, caps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert (data.used[rows, 1] > caps).all()
        seen.append(len(rows))
        return data.correct[rows, 1], np.zeros(len(rows))

    point = fit_operating(data, np.ones(2000, dtype=np.int64), cut, 0.005)
    assert point.level == 0.5, "answers survive the cut here, so the cheapest level loses nothing"
    assert seen[0] == int((point.conf_after == 0.0).sum())


def test_threshold_buys_accuracy_only_where_it_is_needed() -> None:
    data = uncapped(4000, "tau")
    tau = fit_plan_threshold(data, PLANS, tolerance=0.02)
    strict = fit_plan_threshold(data, PLANS, tolerance=0.0)
    assert 0.3 <= tau <= strict <= 1.0
    free = Uncapped(**{**vars(data), "correct": np.ones_like(data.correct)})
    assert fit_plan_threshold(free, PLANS) == pytest.approx(0.3), "when all solve, the cheapest threshold wins"


def valued(n: int, name: str) -> Uncapped:
    """Heads with values: they know each plan's chance, and that `steps` is worse than `direct` in family "h"."""
    data = uncapped(n, name)
    g = numpy_generator("valued", name)
    chance = np.where(data.plan_probs > 0.5, 0.95, 0.05)
    chance[:, 1] = np.where(np.array(data.family) == "h", 0.4, 0.97)
    correct = g.random((n, 2)) < chance
    return Uncapped(
        **{**vars(data), "correct": correct, "solve": np.log(chance / (1 - chance)), "cost": data.budget_raw}
    )


def test_a_price_beats_a_threshold_where_the_dear_plan_is_not_the_better_one() -> None:
    data = valued(4000, "price")
    assert fit_plan_price(uncapped(50, "none"), 0.0) is None, "heads without values keep the threshold"
    price = fit_plan_price(data, tolerance=0.003)
    assert price is not None
    card, report = fit_card(data, PLANS, weights="w", dataset="d", stream="s", plan_tolerance=0.003)
    assert card.plan_price == report["plan_price"] == price
    fresh = valued(4000, "price-test")
    rows = np.arange(4000)
    assert fresh.solve is not None and fresh.cost is not None
    chosen = (
        best_value(fresh.solve, fresh.cost, 0.0),
        card.choose_plan(fresh.plan_probs),
        card.choose_plan(fresh.plan_probs, fresh.solve, fresh.cost),
    )
    free_of_charge, by_threshold, priced = (fresh.correct[rows, k].mean() for k in chosen)
    assert free_of_charge > by_threshold + 0.03
    assert free_of_charge > best_fixed_accuracy(fresh) + 0.01, "it may choose per problem, which no fixed plan can"
    assert abs(priced - best_fixed_accuracy(fresh)) < 0.03
    assert fresh.used[rows, chosen[2]].mean() < fresh.used[rows, chosen[0]].mean()
    free = Uncapped(**{**vars(data), "correct": np.ones_like(data.correct)})
    assert fit_plan_price(free) == pytest.approx(2e-2), "when all solve, the highest price wins"
    assert (best_value(fresh.solve, fresh.cost, 10.0) == 0).all(), "at an absurd price nobody thinks"


def test_domain_flags_few_at_home_and_most_abroad() -> None:
    g = numpy_generator("domain")
    mix = g.normal(size=(12, 12))
    home = g.normal(size=(600, 12)) @ mix + 4.0 * np.eye(12)[g.integers(0, 3, 600)] @ mix
    domain = fit_domain(home[:400], ["a"] * 400)
    flagged = (domain.distance(home[400:]) > domain.threshold).mean()
    assert flagged <= 0.04
    abroad = g.normal(size=(200, 12)) @ mix + 12.0 * mix[5]
    assert (domain.distance(abroad) > domain.threshold).mean() >= 0.9
    with pytest.raises(DataError):
        fit_domain(home[:3], ["a"] * 3)


def test_card_repairs_confidence_and_its_clip_covers_new_rows() -> None:
    data, fresh = uncapped(3000, "card"), uncapped(3000, "fresh")
    card, report = fit_card(data, PLANS, weights="w", dataset="toy", stream="cal", best_plan={"f": "steps"})
    assert card.temperature.before == pytest.approx(3.0, rel=0.2)
    assert card.temperature.after == pytest.approx(0.5, rel=0.2)
    assert report["unscaled"]["before"]["ece"] > card.fitted.before.ece
    assert card.fitted_plans == PLANS
    held = fresh.correct[:, 1]
    assert metrics.coverage(
        card.clip_budget(fresh.budget_raw[held, 1], "tested"), fresh.used[held, 1]
    ) == pytest.approx(0.9, abs=0.03)
    plan = card.choose_plan(fresh.plan_probs)
    right = fresh.at(plan)(fresh.correct)
    assert metrics.ece(card.confidence(fresh.at(plan)(fresh.conf_before), "before"), right) < 0.04
    assert report["accuracy_uncapped"] >= report["accuracy_best_fixed"] - 1e-9


def test_the_report_compares_with_the_fixed_plans_of_the_fit() -> None:
    data, best = uncapped(400, "fixed"), {"f": "steps", "h": "direct"}
    _, report = fit_card(data, PLANS, weights="w", dataset="toy", stream="cal", best_plan=best)
    assert report["accuracy_best_fixed"] == best_fixed_accuracy(data, best) < best_fixed_accuracy(data)


def test_shapes_are_checked() -> None:
    data = uncapped(10, "shape")
    with pytest.raises(DataError, match=r"budget_raw must be \[10, 2\]"):
        Uncapped(**{**vars(data), "budget_raw": data.budget_raw[:, :1]})
