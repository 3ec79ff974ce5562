"""Baselines: look-up tables, scaling, fixed strategies, the constant frontier, the hull."""

from __future__ import annotations

import numpy as np
import pytest

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import LookUp, Scaled, best_strategy, constant_policies, tokens_at, upper_hull


def test_look_up_shrinks_and_falls_back() -> None:
    keys = [("a", 1)] * 50 + [("a", 2)] * 50 + [("b", 1)]
    table = LookUp.fit(keys, [1.0] * 50 + [0.0] * 50 + [1.0])
    got = table.predict([("a", 1), ("a", 2), ("a", 9), ("z", 1), ("b", 1)])
    assert got[0] > 0.97
    assert got[1] < 0.03
    assert got[2] == pytest.approx(0.5, abs=0.01)
    assert got[3] == pytest.approx(51 / 101)
    assert 0.6 < got[4] < 1.0, "one row is not believed outright"


def test_scaled_scores_are_calibrated_and_keep_their_order() -> None:
    generator = numpy_generator("scaled")
    score = generator.normal(size=4000) * 7 + 100
    right = generator.random(4000) < 1 / (1 + np.exp(-(score - 104) / 5))
    fit = Scaled.fit(score[:2000], right[:2000])
    prob = fit.predict(score[2000:])
    assert metrics.ece(prob, right[2000:]) < 0.04
    assert metrics.auroc(prob, right[2000:]) == pytest.approx(metrics.auroc(score[2000:], right[2000:]))
    assert np.isfinite(Scaled.fit([1.0, np.nan, 3.0], [0, 0, 1]).predict([np.nan])).all()
    assert np.isfinite(Scaled.fit([0.0, 1.0], [0, 1]).predict([5.0])).all(), "separable data must not diverge"


def test_best_strategy_per_family_prefers_cheap_on_ties() -> None:
    family = ["a", "a", "b", "b"]
    correct = np.array([[1, 1], [1, 1], [0, 1], [0, 1]], dtype=bool)
    used = np.array([[0, 9], [0, 9], [0, 9], [0, 9]])
    assert best_strategy(family, correct, used, ("direct", "steps")) == {"a": "direct", "b": "steps"}


def test_constant_policies_trace_the_frontier() -> None:
    family = ["easy"] * 100 + ["hard"] * 100
    correct = np.zeros((200, 2, 2), dtype=bool)  # [N, strategy, budget]
    tokens = np.zeros((200, 2, 2), dtype=np.int64)
    tokens[:, 1, 0], tokens[:, 1, 1] = 10, 40
    correct[:100] = True
    correct[100:150, 1, 0] = True
    correct[100:190, 1, 1] = True
    policies = constant_policies(family, correct, tokens)
    points = [(p.tokens, p.accuracy) for p in policies]
    assert (0.0, 0.5) in points
    assert (20.0, 0.95) in points
    assert policies[-1].choice == {"easy": (0, 0), "hard": (1, 1)}
    right, used = policies[-1].apply(family, correct, tokens)
    assert (right.mean(), used.mean()) == (0.95, 20.0)
    assert tokens_at(points, 0.95) == 20.0
    assert tokens_at(points, 0.96) is None


def test_upper_hull_and_interpolation() -> None:
    points = [(0.0, 0.2), (10.0, 0.3), (20.0, 0.8), (15.0, 0.1), (40.0, 0.9), (50.0, 0.85), (20.0, 0.7)]
    assert upper_hull(points) == [(0.0, 0.2), (20.0, 0.8), (40.0, 0.9)]
    assert tokens_at(points, 0.5) == pytest.approx(10.0)
    assert tokens_at(points, 0.1) == 0.0
    assert upper_hull([]) == []
