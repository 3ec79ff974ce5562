"""Labels as decisions.md §3 defines them, and their round trip through a folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gnomon.base.errors import DataError
from gnomon.training.labels import LabelledProblem, LabelSet, Rollout, StrategyLabels, cache_folder

TAPS = np.zeros((2, 3), dtype=np.float32)


def rolls(right: str, used: list[int], closed: str = "") -> StrategyLabels:
    """right: 1/0 per rollout; closed likewise (default: all closed)."""
    marks = closed or "1" * len(right)
    return StrategyLabels(
        TAPS,
        tuple(
            Rollout(c == "1", u, 2, -0.5, k == "1", TAPS, greedy=i == 0)
            for i, (c, u, k) in enumerate(zip(right, used, marks, strict=True))
        ),
    )


def labelled(name: str, **strategies: StrategyLabels) -> LabelledProblem:
    return LabelledProblem(name, "chain", 1, TAPS, strategies)


def test_cheapest_solver_in_cost_order() -> None:
    a = labelled("a", direct=rolls("1110", [0] * 4), steps=rolls("1111", [9] * 4), verify=rolls("1111", [20] * 4))
    b = labelled("b", direct=rolls("1100", [0] * 4), steps=rolls("0111", [9] * 4), verify=rolls("1111", [4] * 4))
    c = labelled("c", direct=rolls("0000", [0] * 4), steps=rolls("0011", [9] * 4), verify=rolls("0000", [4] * 4))
    labels = LabelSet(("verify", "steps", "direct"), (a, b, c))
    assert labels.cost_order() == ("direct", "steps", "verify")
    assert labels.plan_labels() == ["direct", "steps", None], "the order of costs is the set's, not the problem's"
    assert labels.plan_labels(("verify", "steps", "direct")) == ["verify", "verify", None]
    arrays = labels.arrays()
    assert arrays.plan.tolist() == [2, 1, -1]
    unsolved = arrays.think_row == 2
    assert np.isnan(arrays.budget[unsolved]).all(), "no budget loss where nothing solves"
    assert arrays.share[unsolved].tolist() == [0.0, 0.5, 0.0], "confidence is still trained"
    assert len(arrays.correct) == 3 * 3 * 4
    assert labels.summary()["unsolved"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("right", "used", "closed", "want"),
    [
        ("1111", [10, 12, 14, 50], "1111", (13.0, False)),
        ("1101", [10, 12, 99, 14], "1111", (12.0, False)),
        ("1110", [10, 64, 64, 5], "1001", (64.0, True)),
        ("1000", [10, 64, 64, 64], "1000", (10.0, False)),
        ("0000", [10, 64, 64, 64], "1000", None),
    ],
)
def test_budget_label_is_the_median_of_correct_and_knows_censoring(
    right: str, used: list[int], closed: str, want: tuple[float, bool] | None
) -> None:
    assert rolls(right, used, closed).budget == want


def test_round_trip(tmp_path: Path, synthetic: object) -> None:
    labels = synthetic.make(7, seed=3)  # type: ignore[attr-defined]
    again = LabelSet.load(labels.save(tmp_path / "labels"))
    assert again.summary() == labels.summary()
    assert again.meta == labels.meta
    for name in ("prompt_taps", "think_taps", "budget", "end_taps", "used", "correct", "plan"):
        assert np.array_equal(getattr(again.arrays(), name), getattr(labels.arrays(), name), equal_nan=True), name
    assert again.problems[0].strategies["steps"].rollouts[0].greedy
    assert math.isnan(again.problems[0].prompt_logprob)


def same(a: Rollout, b: Rollout) -> bool:
    if a.boundary is None or b.boundary is None:
        return a.boundary is b.boundary
    return a.boundary[0] == b.boundary[0] and np.array_equal(a.boundary[1], b.boundary[1])


def test_boundaries_survive_the_disk_where_there_are_some(tmp_path: Path, synthetic: Any) -> None:
    labels = synthetic.make(7, seed=3, boundaries=True)
    again = LabelSet.load(labels.save(tmp_path))
    pairs = [
        pair
        for p, q in zip(labels.problems, again.problems, strict=True)
        for s in labels.strategies
        for pair in zip(p.strategies[s].rollouts, q.strategies[s].rollouts, strict=True)
    ]
    assert all(same(a, b) for a, b in pairs)
    assert {a.boundary is None for a, _ in pairs} == {True, False}, "direct has none, the others have one"
    for name, values in vars(labels.arrays().boundary).items():
        assert np.array_equal(values, getattr(again.arrays().boundary, name), equal_nan=True), name


def test_a_folder_from_before_there_were_boundaries_loads(tmp_path: Path, synthetic: Any) -> None:
    labels = synthetic.make(4, seed=3)
    labels.save(tmp_path)
    body = json.loads((tmp_path / "labels.json").read_text())
    body["version"] = 1
    for p in body["problems"]:
        p["rollouts"] = {s: [row[:6] for row in rows] for s, rows in p["rollouts"].items()}
    (tmp_path / "labels.json").write_text(json.dumps(body))
    again = LabelSet.load(tmp_path)
    assert again.summary() == labels.summary()
    data = again.arrays().boundary
    assert data.taps.shape == (0, 4, 24) and len(data.need) == len(data.row) == 0


def test_boundary_rows_say_what_is_still_to_come() -> None:
    def cell(*facts: tuple[bool, int, bool, int | None]) -> StrategyLabels:
        return StrategyLabels(
            TAPS,
            tuple(
                Rollout(right, used, 2, -0.5, closed, TAPS, n == 0, None if at is None else (at, TAPS + n))
                for n, (right, used, closed, at) in enumerate(facts)
            ),
        )

    direct = cell((True, 0, True, None))
    steps = cell((True, 20, True, 5), (False, 20, True, 5), (True, 64, False, 60), (True, 9, True, None))
    data = LabelSet(("direct", "steps"), (labelled("a", direct=direct, steps=steps),)).arrays().boundary
    assert np.expm1(data.need[[0, 2]]).round(4).tolist() == [15.0, 4.0] and np.isnan(data.need[1])
    assert data.used.tolist() == [5, 5, 60] and data.correct.tolist() == [1, 0, 1]
    assert data.censored.tolist() == [False, False, True]
    assert data.taps[:, 0, 0].tolist() == [0, 1, 2] and data.row.tolist() == [0, 0, 0]


def test_damage_is_named(tmp_path: Path, synthetic: object) -> None:
    with pytest.raises(DataError, match="interrupted"):
        LabelSet.load(tmp_path)
    synthetic.make(3, seed=3).save(tmp_path)  # type: ignore[attr-defined]
    body = json.loads((tmp_path / "labels.json").read_text())
    body["problems"].append(body["problems"][0])
    (tmp_path / "labels.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="damaged"):
        LabelSet.load(tmp_path)


def test_empty_or_incomplete_sets_are_refused() -> None:
    with pytest.raises(DataError, match="at least one"):
        LabelSet(("direct",), ())
    with pytest.raises(DataError, match="'a' has no rollouts for steps"):
        LabelSet(("direct", "steps"), (labelled("a", direct=rolls("1", [0])),))


def test_cache_folder_depends_on_every_fact(tmp_path: Path) -> None:
    facts = {"model": "abc", "tasks": ["chain"], "n": 600}
    assert cache_folder(tmp_path, facts) == cache_folder(tmp_path, dict(reversed(facts.items())))
    assert cache_folder(tmp_path, facts) != cache_folder(tmp_path, {**facts, "n": 601})
