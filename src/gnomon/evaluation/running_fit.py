"""Fitting running estimates: an upper bound of the tokens still needed, and confidence, at node boundaries (row C8).

R rows: one boundary of one greedy rollout each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.scaling import conformal_offset, fit_scale, quality
from gnomon.metacognition.calibration import NO_BOUND, Running, scaled

LEAST: Final = 40  # rows, and solved rows, of a fold below which there is nothing to promise
MIN_LEVEL: Final = 0.95
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Boundaries:
    """What the heads said at boundaries, beside what came of the rollout.

    problem: its number; used, remaining: think tokens before and after the boundary, without a cap; budget_raw
    log1p(tokens) and conf_raw (logit): read there. solved: correct and closed by the model, so that `remaining` is a
    need; correct: at the operating point. budget_before, conf_before: the same two read at the think tag. All [R].
    """

    problem: Ints
    used: Ints
    remaining: Ints
    budget_raw: Floats
    conf_raw: Floats
    solved: Bools
    correct: Bools
    budget_before: Floats
    conf_before: Floats

    def where(self, held: Bools) -> Boundaries:
        """The rows at which held [R] is true."""
        return Boundaries(*(getattr(self, f.name)[held] for f in fields(self)))


@dataclass(frozen=True)
class Closings:
    """Confidence logits conf_raw at boundaries beside `right`: closed there, the answer is right.

    problem: its number. All [T]; plans: those of the thoughts. whole_raw, whole_right [U]: logits before thinking under
    these plans, and what came of the whole thoughts, without a cap.
    """

    problem: Ints
    conf_raw: Floats
    right: Bools
    plans: tuple[str, ...]
    whole_raw: Floats
    whole_right: Bools

    def where(self, held: Bools) -> Closings:
        """The rows at which held [T] is true."""
        return replace(self, problem=self.problem[held], conf_raw=self.conf_raw[held], right=self.right[held])


def fit_running(
    rows: Boundaries, level: float, closings: Closings | None = None
) -> tuple[Running | None, dict[str, Any] | None]:
    """Offset and scale from all rows; the numbers reported come from two folds of problems, each read by the other's.

    level: of the operating clip; the bound covers max(level, 0.95) of the needs, because a cap that falls at every
    boundary takes the least of several bounds. closings: with them confidence is that of closing at the boundary, and
    its scale and its numbers come from these rows alone, however few solved rows there are. `missing` in the report
    says what was not calibrated, for want of how many rows. (None, None) with too few rows and no closings.
    """
    rows = rows.where(np.isfinite(rows.budget_raw) & np.isfinite(rows.conf_raw))
    level = max(level, MIN_LEVEL)
    side = _folds(rows.problem)
    halves = [rows.where(side == k) for k in (0, 1)]
    fewest = min(int(half.solved.sum()) for half in halves)
    if fewest < LEAST:
        if closings is None:
            return None, None
        # What is still needed stays open; whether closing here is right is another question with rows of its own.
        found = Running(offset=NO_BOUND, level=level, temperature=1.0, shift=0.0, n=0)
        lack = f"remainder not calibrated: {fewest} of {LEAST} solved rows in a fold"
        return _closing(found, {"n": len(side), "n_solved": int(rows.solved.sum()), "missing": [lack]}, closings)
    upper, prob = np.zeros(len(side), dtype=np.int64), np.zeros(len(side))
    for k in (0, 1):
        other = _fit(halves[1 - k], level)
        upper[side == k] = other.upper(halves[k].budget_raw)
        prob[side == k] = other.confidence(halves[k].conf_raw)
    found, report = _fit(rows, level), _report(rows, upper, prob, level)
    return (found, report) if closings is None else _closing(found, report, closings)


def _folds(problem: Ints) -> Ints:
    """0 or 1 per row, the same for all rows of a problem."""
    names = np.unique(problem)
    fold = np.zeros(len(names), dtype=np.int64)
    fold[numpy_generator("running-folds").permutation(len(names))] = np.arange(len(names)) % 2
    return fold[np.searchsorted(names, problem)]


def _closing(found: Running, report: dict[str, Any], closings: Closings) -> tuple[Running | None, dict[str, Any]]:
    """The same bounds with the confidence of closing at the boundary; unknown (no plans) with too few labels.

    None where there is neither bound nor confidence.
    """
    side, prob = _folds(closings.problem), np.zeros(len(closings.problem))
    halves = [closings.where(side == k) for k in (0, 1)]
    fewest = min(min(int(half.right.sum()), int((~half.right).sum())) for half in halves)
    if fewest < LEAST // 2:
        lack = f"confidence of closing not calibrated: {fewest} of {LEAST // 2} right or wrong trial answers in a fold"
        told = {"n_closing": len(prob), "ece": None, "brier": None, "auroc": None}
        return found if found.n else None, {**report, **told, "missing": [*report["missing"], lack]}
    for k in (0, 1):
        prob[side == k] = scaled(halves[k].conf_raw, *fit_scale(halves[1 - k].conf_raw, halves[1 - k].right))
    temperature, shift = fit_scale(closings.conf_raw, closings.right)
    heat, offset = fit_scale(closings.whole_raw, closings.whole_right)
    whole = {
        "temperature": temperature, "shift": shift, "closing_plans": closings.plans, "whole_temperature": heat,
        "whole_shift": offset,
    }  # fmt: skip
    told = {"n_closing": len(prob), **quality(prob, closings.right).model_dump(include={"ece", "brier", "auroc"})}
    return found.model_copy(update=whole), {**report, **told, "auroc_before": None}


def _fit(rows: Boundaries, level: float) -> Running:
    temperature, shift = fit_scale(rows.conf_raw, rows.correct)
    return Running(
        offset=conformal_offset(rows.budget_raw[rows.solved], rows.remaining[rows.solved], level),
        level=level,
        temperature=temperature,
        shift=shift,
        n=int(rows.solved.sum()),
    )


def _report(rows: Boundaries, upper: Ints, prob: Floats, level: float) -> dict[str, Any]:
    """Numbers of the two folds, each beside what was known before thinking.

    error: mean |log1p| of the remaining tokens on solved rows; error_before: of the first prediction minus used.
    """
    held = rows.solved
    need = np.log1p(rows.remaining[held])
    first = np.log1p(np.maximum(np.expm1(np.minimum(rows.budget_before[held], 16.0)) - rows.used[held], 0.0))
    reached = quality(prob, rows.correct)
    return {
        "missing": [],
        "n": len(prob),
        "n_solved": int(held.sum()),
        "level": level,
        "coverage": metrics.coverage(upper[held], rows.remaining[held]),
        "upper_mean": float(upper[held].mean()),
        "remaining_mean": float(rows.remaining[held].mean()),
        "error": float(np.abs(rows.budget_raw[held] - need).mean()),
        "error_before": float(np.abs(first - need).mean()),
        **reached.model_dump(include={"ece", "brier", "auroc"}),
        "auroc_before": quality(rows.conf_before, rows.correct).auroc,
    }
