"""Metrics against scikit-learn and against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.fixture
def rows() -> tuple[np.ndarray, np.ndarray]:
    generator = numpy_generator("metric-rows")
    prob = np.round(generator.random(700), 2)  # rounding makes ties
    return prob, generator.random(700) < prob


def test_against_scikit_learn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    prob, right = rows
    assert metrics.auroc(prob, right) == pytest.approx(sklearn_metrics.roc_auc_score(right, prob), abs=1e-12)
    assert metrics.brier(prob, right) == pytest.approx(sklearn_metrics.brier_score_loss(right, prob), abs=1e-12)
    inside = np.clip(prob, 1e-7, 1 - 1e-7)
    assert metrics.log_loss(prob, right) == pytest.approx(sklearn_metrics.log_loss(right, inside), abs=1e-9)


def test_ece_of_equal_mass_bins_by_hand() -> None:
    prob = [0.1] * 5 + [0.9] * 5
    right = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert metrics.ece(prob, right, bins=2) == pytest.approx(0.5 * 0.1 + 0.5 * 0.3)
    assert [n for *_, n in metrics.reliability(np.arange(25) / 25, np.ones(25), bins=10)] == [3] * 5 + [2] * 5
    assert metrics.ece([0.7], [1]) == pytest.approx(0.3)
    assert math.isnan(metrics.ece([], []))


def test_auroc_extremes() -> None:
    assert metrics.auroc([0.1, 0.9], [0, 1]) == 1.0
    assert metrics.auroc([0.9, 0.1], [0, 1]) == 0.0
    assert metrics.auroc([0.5, 0.5, 0.5], [0, 1, 1]) == 0.5
    assert math.isnan(metrics.auroc([0.5], [1]))


def test_text_metrics() -> None:
    assert metrics.exact_match("The  cat.", "cat")
    assert not metrics.exact_match("cats", "cat")
    assert metrics.token_f1("red blue blue", "blue green") == pytest.approx(2 * 1 / 5)
    assert metrics.token_f1("", "") == 1.0
    assert metrics.token_f1("", "x") == 0.0


def test_within_task_correlation_sees_through_a_family_look_up() -> None:
    generator = numpy_generator("within")
    group = np.repeat(["a", "b", "c"], 200)
    level = np.repeat([5.0, 50.0, 400.0], 200)
    need = level * np.exp(0.3 * generator.normal(size=600))
    lookup = level * np.exp(0.3 * generator.normal(size=600))  # knows the family, nothing else
    assert metrics.budget_corr(lookup, need) > 0.95
    assert abs(metrics.budget_corr_within(lookup, need, group)) < 0.12
    assert metrics.budget_corr_within(need, need, group) == pytest.approx(1.0)


def test_budget_errors_coverage_and_violations() -> None:
    assert metrics.budget_errors([1, 2, 3], [1, 4, 13])["median_abs_error"] == 2.0
    assert metrics.coverage([10, 10, 10, 10], [10, 11, 3, 0]) == 0.75
    assert metrics.violation_rate([3, 5, 6], [4, 5, 5]) == pytest.approx(1 / 3)


def test_wilson_known_value_and_coverage() -> None:
    low, high = metrics.wilson(45, 50)
    assert (low, high) == (pytest.approx(0.7864, abs=1e-4), pytest.approx(0.9565, abs=1e-4))
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(50, 50)[1] == 1.0
    generator = numpy_generator("wilson")
    draws = generator.binomial(80, 0.85, 2000)
    held = np.mean([lo <= 0.85 <= hi for lo, hi in (metrics.wilson(int(k), 80) for k in draws)])
    assert 0.93 <= held <= 0.97


def test_bootstrap_interval_is_about_the_standard_error() -> None:
    values = numpy_generator("boot").normal(size=400)
    low, high = metrics.bootstrap(lambda v: float(v.mean()), values, draws=800)
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.12)
    assert metrics.bootstrap(lambda v: float(v.mean()), values, draws=50) == metrics.bootstrap(
        lambda v: float(v.mean()), values, draws=50
    )


def test_paired_difference_uses_the_pairing() -> None:
    generator = numpy_generator("paired-test")
    base = generator.random(500) < 0.6
    better = base | (generator.random(500) < 0.05)
    mean, (low, high) = metrics.paired_difference(better, base)
    assert mean == pytest.approx(better.mean() - base.mean())
    assert 0.0 < low < mean < high < 0.05
