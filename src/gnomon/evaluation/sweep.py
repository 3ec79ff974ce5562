"""Quality against budget: 8 budgets × strategies, greedy, from one uncapped pass per strategy (decisions.md §7).

For a budget B that a row does not exceed the result is the uncapped one; for a smaller B the prefix is kept and only
the answer is decoded again, which the caller does through a callback. No model in this file.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gnomon.base.errors import DataError
from gnomon.evaluation.baselines import upper_hull
from gnomon.evaluation.metrics import Interval, wilson

BUDGETS: Final[tuple[int | None, ...]] = (0, 4, 8, 16, 32, 64, 128, None)
VALLEY_TOLERANCE: Final = 0.005


@dataclass(frozen=True)
class Outcome:
    """One decode of one problem. used: think tokens; closed: the model closed the block itself; answered: non-empty."""

    correct: bool
    used: int
    closed: bool = True
    answered: bool = True


@dataclass(frozen=True)
class Point:
    """One strategy under one budget (None = unlimited); cut: rows whose thinking was closed by force (censored)."""

    strategy: str
    budget: int | None
    n: int
    accuracy: float
    accuracy_ci: Interval
    tokens: float
    cut: int
    answered: float


@dataclass(frozen=True)
class Sweep:
    """Points in order (strategy, budget); correct, used [N, K, B] for paired comparisons.

    extra: named policies to draw beside the curves: {accuracy, accuracy_ci, tokens} for one point (such as
    "predicted"), {points: [{tokens, accuracy}, …]} for a curve; "fixed:NAME" repeats a strategy and is not drawn.
    """

    strategies: tuple[str, ...]
    budgets: tuple[int | None, ...]
    points: tuple[Point, ...]
    correct: NDArray[np.bool_]
    used: NDArray[np.int64]
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)

    def point(self, strategy: str, budget: int | None) -> Point:
        """The point of one strategy under one budget."""
        return self.points[self.strategies.index(strategy) * len(self.budgets) + self.budgets.index(budget)]

    def frontier(self) -> list[tuple[float, float]]:
        """Upper hull of all (mean think tokens, accuracy)."""
        return upper_hull([(p.tokens, p.accuracy) for p in self.points])

    def no_think(self) -> float:
        """Accuracy without thinking: `direct`, unlimited, where it was swept, else the best strategy at budget 0."""
        if "direct" in self.strategies:
            return self.point("direct", self.budgets[-1]).accuracy
        return max(self.point(s, self.budgets[0]).accuracy for s in self.strategies)

    def valleys(self, tolerance: float = VALLEY_TOLERANCE) -> list[Point]:
        """Points whose accuracy is below the no-think accuracy by more than the tolerance."""
        floor = self.no_think() - tolerance
        return [p for p in self.points if p.accuracy < floor]

    def budget_valleys(self, tolerance: float = VALLEY_TOLERANCE) -> list[int | None]:
        """Budgets at which no strategy reaches the no-think accuracy minus the tolerance."""
        floor = self.no_think() - tolerance
        return [b for b in self.budgets if max(self.point(s, b).accuracy for s in self.strategies) < floor]

    def drops(self, tolerance: float = VALLEY_TOLERANCE) -> list[dict[str, Any]]:
        """Places where more budget means less accuracy: {strategy, from, to, drop}, per strategy."""
        found = []
        for s in self.strategies:
            for lo, hi in zip(self.budgets, self.budgets[1:], strict=False):
                drop = self.point(s, lo).accuracy - self.point(s, hi).accuracy
                if drop > tolerance:
                    found.append({"strategy": s, "from": lo, "to": hi, "drop": drop})
        return found

    def to_json(self) -> dict[str, Any]:
        """What `sweep --json` prints."""
        return {
            "n": int(self.correct.shape[0]),
            "strategies": list(self.strategies),
            "budgets": list(self.budgets),
            "points": [vars(p) | {"accuracy_ci": list(p.accuracy_ci)} for p in self.points],
            "frontier": [list(p) for p in self.frontier()],
            "no_think_accuracy": self.no_think(),
            "valleys": [{"strategy": p.strategy, "budget": p.budget, "accuracy": p.accuracy} for p in self.valleys()],
            "budget_valleys": self.budget_valleys(),
            "monotone": not self.drops(),
            "drops": self.drops(),
            "policies": self.extra,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Sweep:
        """The points and policies of what `to_json` gave, for drawing; single outcomes are not kept there."""
        points = [Point(**{**p, "accuracy_ci": tuple(p["accuracy_ci"])}) for p in body["points"]]
        shape = (0, len(body["strategies"]), len(body["budgets"]))
        return cls(
            strategies=tuple(body["strategies"]),
            budgets=tuple(body["budgets"]),
            points=tuple(points),
            correct=np.zeros(shape, dtype=np.bool_),
            used=np.zeros(shape, dtype=np.int64),
            extra=dict(body["policies"]),
        )

    def to_csv(self, path: Path) -> None:
        """One row per point; `budget` is empty for unlimited."""
        names = ["strategy", "budget", "n", "accuracy", "ci_low", "ci_high", "think_tokens_mean", "cut", "answered"]
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(names)
            for p in self.points:
                budget = "" if p.budget is None else p.budget
                writer.writerow([p.strategy, budget, p.n, p.accuracy, *p.accuracy_ci, p.tokens, p.cut, p.answered])


# (strategy) -> one Outcome per problem, uncapped.
Uncapped = Callable[[str], Sequence[Outcome]]
# (strategy, rows, budget) -> Outcomes of those problems cut at `budget` think tokens; each used more before.
CutAt = Callable[[str, Sequence[int], int], Sequence[Outcome]]


def run_sweep(
    strategies: Sequence[str],
    uncapped: Uncapped,
    cut_at: CutAt,
    budgets: Sequence[int | None] = BUDGETS,
    on_point: Callable[[int, int], object] | None = None,
    shortens: bool = False,
) -> Sweep:
    """Sweep all budgets for all strategies over one list of problems that the callbacks know.

    shortens: a budget may also shorten thoughts that it does not cut (soft rules that read it); all that think are cut.
    on_point(done, total) after every point. Raises DataError when a callback returns the wrong number of rows or a
    cut row exceeds its budget.
    """
    points: list[Point] = []
    correct, used = [], []
    total = len(strategies) * len(budgets)
    for strategy in strategies:
        full = list(uncapped(strategy))
        if not full:
            raise DataError("a sweep needs at least one problem")
        for budget in budgets:
            rows = full if budget is None else _capped(strategy, full, budget, cut_at, shortens)
            right = np.array([r.correct for r in rows])
            tokens = np.array([r.used for r in rows], dtype=np.int64)
            points.append(_point(strategy, budget, rows))
            correct.append(right)
            used.append(tokens)
            if on_point is not None:
                on_point(len(points), total)
    shape = (len(strategies), len(budgets), -1)
    return Sweep(
        strategies=tuple(strategies),
        budgets=tuple(budgets),
        points=tuple(points),
        correct=np.stack(correct).reshape(shape).transpose(2, 0, 1),
        used=np.stack(used).reshape(shape).transpose(2, 0, 1),
    )


def _capped(
    strategy: str, full: Sequence[Outcome], budget: int, cut_at: CutAt, shortens: bool = False
) -> list[Outcome]:
    over = [i for i, row in enumerate(full) if row.used > (0 if shortens else budget)]
    again = list(cut_at(strategy, over, budget)) if over else []
    if len(again) != len(over):
        raise DataError(f"{strategy} at budget {budget}: {len(over)} rows to cut, {len(again)} came back")
    worst = max((r.used for r in again), default=0)
    if worst > budget:
        raise DataError(f"{strategy} at budget {budget}: a row used {worst} think tokens; the cap was not kept")
    rows = list(full)
    for i, row in zip(over, again, strict=True):
        rows[i] = row
    return rows


def _point(strategy: str, budget: int | None, rows: Sequence[Outcome]) -> Point:
    n, right = len(rows), sum(r.correct for r in rows)
    return Point(
        strategy=strategy,
        budget=budget,
        n=n,
        accuracy=right / n,
        accuracy_ci=wilson(right, n),
        tokens=sum(r.used for r in rows) / n,
        cut=sum(not r.closed for r in rows),
        answered=sum(r.answered for r in rows) / n,
    )
