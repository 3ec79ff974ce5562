"""EvalRecord: what one evaluated request leaves behind; summarise(): the object that `evaluate --json` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gnomon.base.errors import DataError
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import LookUp, Scaled, answer_probability_score, trace_length_score

MIN_COVERAGE_ROWS = 2000


@dataclass(frozen=True)
class EvalRecord:
    """One request.

    budget_predicted: tokens before clipping; budget_clipped: at the operating level; budget_tested: at 90 %;
    budget_effective: None = no cap; conf_before, conf_after: calibrated probability, None when unknown;
    answer_logprob: mean per answer token. From the uncapped pass over the same problem and plan: needed (think
    tokens, None when there was no such pass), needed_correct, needed_closed.
    """

    prompt_id: str
    task: str
    level: int
    plan: str
    correct: bool
    used: int
    stop: str
    answered: bool
    leaked: bool = False
    forced: int = 0
    answer_tokens: int = 0
    budget_predicted: float | None = None
    budget_clipped: int | None = None
    budget_tested: int | None = None
    budget_effective: int | None = None
    conf_before: float | None = None
    conf_after: float | None = None
    answer_logprob: float = math.nan
    prompt_logprob: float = math.nan
    needed: int | None = None
    needed_correct: bool = False
    needed_closed: bool = False


@dataclass(frozen=True)
class ConfidenceBaselines:
    """Baselines fitted on the calibration split; `predict` gives probabilities per name for other records."""

    family_level: LookUp
    scaled: dict[str, Scaled] = field(default_factory=dict)

    @classmethod
    def fit(cls, records: Sequence[EvalRecord]) -> ConfidenceBaselines:
        """records: the calibration split, decoded at the operating point."""
        correct = [r.correct for r in records]
        table = LookUp.fit([(r.task, r.level) for r in records], correct)
        scores = _scores(records)
        return cls(table, {name: Scaled.fit(score, correct) for name, score in scores.items()})

    def predict(self, records: Sequence[EvalRecord]) -> dict[str, metrics.Floats]:
        """name -> probabilities [N]: family_level, trace_length, answer_probability, prompt_perplexity."""
        scores = _scores(records)
        found = {"family_level": self.family_level.predict([(r.task, r.level) for r in records])}
        return found | {name: fit.predict(scores[name]) for name, fit in self.scaled.items() if name in scores}


def _scores(records: Sequence[EvalRecord]) -> dict[str, metrics.Floats]:
    scores = {
        "trace_length": trace_length_score([r.used for r in records]),
        "answer_probability": answer_probability_score([r.answer_logprob for r in records]),
    }
    prompt = np.array([r.prompt_logprob for r in records])
    if np.isfinite(prompt).any():
        scores["prompt_perplexity"] = prompt
    return scores


def summarise(
    records: Sequence[EvalRecord], calibration: Sequence[EvalRecord] | None = None, draws: int = 300
) -> dict[str, Any]:
    """The `evaluate --json` object (issue 2, decisions.md §7). NaN becomes None.

    calibration: records of the calibration split on which the baselines are fitted; without it `baselines` holds only
    rank scores (AUROC). budget_corr and budget_coverage use correct, naturally closed rows of the uncapped pass with
    plan ≠ direct. Raises DataError without records.
    """
    if not records:
        raise DataError("nothing to summarise: no record was evaluated")
    n, right = len(records), sum(r.correct for r in records)
    capped = [r for r in records if r.budget_effective is not None]
    summary: dict[str, Any] = {
        "n": n,
        "unique_n": len({r.prompt_id for r in records}),
        "accuracy": right / n,
        "accuracy_ci": list(metrics.wilson(right, n)),
        "think_tokens_mean": _mean([r.used for r in records]),
        "answer_tokens_mean": _mean([r.answer_tokens for r in records]),
        "leakage_rate": _mean([r.leaked for r in records]),
        "answered_rate": _mean([r.answered for r in records]),
        "censored_n": sum(r.stop not in ("natural",) for r in records),
        "violation_rate": metrics.violation_rate([r.used for r in capped], [r.budget_effective or 0 for r in capped])
        if capped
        else 0.0,
        "stop": {c: sum(r.stop == c for r in records) for c in sorted({r.stop for r in records})},
        "think_rate_by_level": metrics.mode_rates([r.used > 0 for r in records], [r.level for r in records]),
        "blocks": metrics.block_states([r.used for r in records], [r.stop != "natural" for r in records]),
        "sharpness": {
            name: metrics.sharpness([p for p in values if p is not None])
            for name, values in (
                ("before", [r.conf_before for r in records]),
                ("after", [r.conf_after for r in records]),
            )
        },
    }
    summary.update(_budget(records, draws))
    summary.update(_confidence(records, draws))
    summary["baselines"] = _baselines(records, calibration, draws)
    summary["by_task"] = _table(records, lambda r: r.task)
    summary["by_plan"] = _table(records, lambda r: r.plan)
    summary["by_level"] = _table(records, lambda r: str(r.level))
    cleaned = _clean(summary)
    assert isinstance(cleaned, dict)
    return cleaned


def _budget(records: Sequence[EvalRecord], draws: int) -> dict[str, Any]:
    rows = [
        r
        for r in records
        if r.needed is not None
        and r.needed_correct
        and r.needed_closed
        and r.plan != "direct"
        and r.budget_predicted is not None
    ]
    predicted = np.array([r.budget_predicted for r in rows], dtype=np.float64)
    need = np.array([r.needed for r in rows], dtype=np.float64)
    group = np.array([r.task for r in rows])
    covered = [r for r in rows if r.budget_tested is not None]
    inside = sum(int(r.needed or 0) <= int(r.budget_tested or 0) for r in covered)
    return {
        "budget_n": len(rows),
        "budget_corr": metrics.budget_corr(predicted, need),
        "budget_corr_ci": list(metrics.bootstrap(metrics.budget_corr, predicted, need, draws=draws)),
        "budget_corr_within_task": metrics.budget_corr_within(predicted, need, group),
        "budget_corr_within_task_ci": list(
            metrics.bootstrap(metrics.budget_corr_within, predicted, need, group, draws=draws)
        ),
        "budget_coverage": inside / len(covered) if covered else math.nan,
        "budget_coverage_ci": list(metrics.wilson(inside, len(covered))) if covered else [math.nan, math.nan],
        "budget_coverage_enough_rows": len(covered) >= MIN_COVERAGE_ROWS,
        **{f"budget_{k}": v for k, v in metrics.budget_errors(predicted, need).items()},
    }


def _confidence(records: Sequence[EvalRecord], draws: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for suffix, name in (("", "conf_after"), ("_before", "conf_before")):
        rows = [r for r in records if getattr(r, name) is not None]
        prob, correct = [getattr(r, name) for r in rows], [r.correct for r in rows]
        out[f"confidence_n{suffix}"] = len(rows)
        out |= {f"{k}{suffix}": v for k, v in _quality(prob, correct, draws).items()}
    return out


def _quality(prob: Sequence[float], correct: Sequence[bool], draws: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, function in (("ece", metrics.ece), ("brier", metrics.brier), ("auroc", metrics.auroc)):
        out[name] = function(prob, correct)
        out[f"{name}_ci"] = list(metrics.bootstrap(function, np.asarray(prob), np.asarray(correct), draws=draws))
    return out


def _baselines(records: Sequence[EvalRecord], calibration: Sequence[EvalRecord] | None, draws: int) -> dict[str, Any]:
    """Confidence baselines on the same rows; with a calibration split also the (family, plan) budget mean."""
    correct = [r.correct for r in records]
    if not calibration:
        return {
            name: {"auroc": metrics.auroc(np.nan_to_num(score, nan=-1e9), correct)}
            for name, score in _scores(records).items()
        }
    fitted = ConfidenceBaselines.fit(calibration)
    out: dict[str, Any] = {
        name: _quality(list(map(float, prob)), correct, draws) for name, prob in fitted.predict(records).items()
    }
    usable = [r for r in calibration if r.needed is not None and r.needed_correct and r.needed_closed]
    rows = [r for r in records if r.needed is not None and r.needed_correct and r.needed_closed and r.plan != "direct"]
    if usable and rows:
        table = LookUp.fit([(r.task, r.plan) for r in usable], [math.log1p(r.needed or 0) for r in usable])
        guess = np.expm1(table.predict([(r.task, r.plan) for r in rows]))
        need = np.array([r.needed for r in rows], dtype=np.float64)
        finer = LookUp.fit([(r.task, r.plan, r.level) for r in usable], [math.log1p(r.needed or 0) for r in usable])
        fine = np.expm1(finer.predict([(r.task, r.plan, r.level) for r in rows]))
        group = np.array([r.task for r in rows])
        for name, values in (("budget_family_plan_mean", guess), ("budget_family_plan_level_mean", fine)):
            out[name] = {
                "budget_corr": metrics.budget_corr(values, need),
                "budget_corr_within_task": metrics.budget_corr_within(values, need, group),
                **metrics.budget_errors(values, need),
            }
    return out


def _table(records: Sequence[EvalRecord], key: Callable[[EvalRecord], str]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name in sorted({key(r) for r in records}):
        rows = [r for r in records if key(r) == name]
        right = sum(r.correct for r in rows)
        table[name] = {
            "accuracy": right / len(rows),
            "n": len(rows),
            "accuracy_ci": list(metrics.wilson(right, len(rows))),
            "think_tokens_mean": _mean([r.used for r in rows]),
        }
    return table


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(np.asarray(values, dtype=np.float64))) if len(values) else math.nan


def _clean(value: Any) -> Any:
    """JSON-able copy: NaN and infinity become None, numpy numbers plain ones."""
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
