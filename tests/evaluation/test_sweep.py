"""The sweep with a toy decoder: equals direct decoding, reuses the uncapped pass, finds valleys and drops."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest

from gnomon.base.errors import DataError
from gnomon.evaluation.sweep import BUDGETS, Outcome, run_sweep

NEED = [0, 3, 4, 5, 20, 64, 100, 200]  # think tokens that each of eight problems needs under `steps`


def decode(strategy: str, row: int, budget: int | None) -> Outcome:
    """The slow way: a problem is right when its need was met; `direct` never thinks and is right on row 0 and 1."""
    if strategy == "direct":
        return Outcome(correct=row < 2, used=0)
    need = NEED[row]
    if budget is None or need <= budget:
        return Outcome(correct=True, used=need)
    return Outcome(correct=False, used=budget, closed=False)


class Toy:
    def __init__(self) -> None:
        self.cuts: list[tuple[str, tuple[int, ...], int]] = []

    def uncapped(self, strategy: str) -> list[Outcome]:
        return [decode(strategy, i, None) for i in range(len(NEED))]

    def cut_at(self, strategy: str, rows: Sequence[int], budget: int) -> list[Outcome]:
        self.cuts.append((strategy, tuple(rows), budget))
        return [decode(strategy, i, budget) for i in rows]


def test_equals_direct_runs_and_decodes_only_what_is_cut() -> None:
    toy, seen = Toy(), []
    sweep = run_sweep(
        ("direct", "steps"), toy.uncapped, toy.cut_at, on_point=lambda done, total: seen.append((done, total))
    )
    for k, strategy in enumerate(sweep.strategies):
        for b, budget in enumerate(BUDGETS):
            want = [decode(strategy, i, budget) for i in range(len(NEED))]
            assert sweep.correct[:, k, b].tolist() == [o.correct for o in want]
            assert sweep.used[:, k, b].tolist() == [o.used for o in want]
    assert all(s == "steps" for s, _, _ in toy.cuts)
    assert toy.cuts[1] == ("steps", (3, 4, 5, 6, 7), 4), "need 4 fits a budget of 4"
    assert seen[-1] == (16, 16)
    point = sweep.point("steps", 16)
    assert (point.accuracy, point.cut, point.n) == (0.5, 4, 8)
    assert point.accuracy_ci[0] < 0.5 < point.accuracy_ci[1]


def test_valleys_are_seen_against_no_thinking() -> None:
    toy = Toy()
    sweep = run_sweep(("direct", "steps"), toy.uncapped, toy.cut_at)
    assert sweep.no_think() == 0.25
    assert [(p.strategy, p.budget) for p in sweep.valleys()] == [("steps", 0)]
    assert sweep.budget_valleys() == []
    assert sweep.drops() == []
    alone = run_sweep(("steps",), toy.uncapped, toy.cut_at)
    assert alone.no_think() == 0.125
    assert alone.valleys() == []
    hull = sweep.frontier()
    assert hull[0] == (0.0, 0.25)
    assert hull[-1] == (sum(NEED) / 8, 1.0)


def test_drops_are_named() -> None:
    def worse(strategy: str) -> list[Outcome]:
        return [Outcome(correct=False, used=50) for _ in range(4)]

    sweep = run_sweep(("steps",), worse, lambda s, rows, b: [Outcome(b == 8, b, False) for _ in rows])
    assert sweep.drops() == [{"strategy": "steps", "from": 8, "to": 16, "drop": 1.0}]
    report = sweep.to_json()
    assert report["monotone"] is False
    assert report["points"][0]["cut"] == 4


def test_callbacks_that_cheat_are_refused() -> None:
    toy = Toy()
    with pytest.raises(DataError, match="cap was not kept"):
        run_sweep(("steps",), toy.uncapped, lambda s, rows, b: [Outcome(True, b + 1) for _ in rows])
    with pytest.raises(DataError, match="came back"):
        run_sweep(("steps",), toy.uncapped, lambda s, rows, b: [])
    with pytest.raises(DataError, match="at least one"):
        run_sweep(("steps",), lambda s: [], toy.cut_at)


def test_csv(tmp_path: Path) -> None:
    toy = Toy()
    run_sweep(("direct", "steps"), toy.uncapped, toy.cut_at).to_csv(tmp_path / "sweep.csv")
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == 16
    assert rows[-1]["budget"] == ""
    assert float(rows[-1]["accuracy"]) == 1.0
    assert rows[8 + 1]["budget"] == "4"
