"""summarise(): the schema of `evaluate --json`, uncapped rows only for budgets, baselines on the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from gnomon.base.errors import DataError
from gnomon.evaluation.records import EvalRecord, summarise

Make = Callable[[int, str], list[EvalRecord]]
PROMISED = (
    "n, unique_n, accuracy, accuracy_ci, think_tokens_mean, leakage_rate, answered_rate, violation_rate, budget_corr, "
    "budget_corr_within_task, budget_coverage, ece, brier, auroc, ece_before, brier_before, auroc_before, baselines, "
    "by_task, by_plan, by_level"
)


def test_schema_and_known_values(records_of: Make) -> None:
    records = records_of(1500, "test")
    summary = summarise(records, records_of(1500, "cal"), draws=60)
    assert [k for k in PROMISED.split(", ") if k not in summary] == []
    json.loads(json.dumps(summary, allow_nan=False))
    assert summary["unique_n"] == 1497
    assert summary["accuracy"] == pytest.approx(sum(r.correct for r in records) / 1500)
    assert summary["violation_rate"] == 0.0
    assert summary["budget_coverage"] == pytest.approx(0.91, abs=0.03)  # .90, and whole tokens
    assert summary["budget_corr"] > 0.9
    assert 0.8 < summary["budget_corr_within_task"] < summary["budget_corr"]
    assert summary["budget_corr_ci"][0] < summary["budget_corr"] < summary["budget_corr_ci"][1]
    assert not summary["budget_coverage_enough_rows"]
    assert summary["by_task"]["sort"]["n"] == 500
    assert set(summary["by_level"]) == {"1", "2", "3", "4", "5"}
    assert summary["by_plan"]["direct"]["think_tokens_mean"] == 0.0


def test_baselines_are_beside_the_heads(records_of: Make) -> None:
    summary = summarise(records_of(1500, "test"), records_of(1500, "cal"), draws=60)
    found = summary["baselines"]
    for name in ("family_level", "trace_length", "answer_probability"):
        assert set(found[name]) >= {"auroc", "auroc_ci", "ece", "brier"}
    assert summary["auroc_before"] > found["family_level"]["auroc"] + 0.02
    assert found["family_level"]["ece"] < 0.09
    assert summary["budget_corr"] > found["budget_family_plan_level_mean"]["budget_corr"]
    assert "ece" not in summarise(records_of(300, "test"), draws=10)["baselines"]["trace_length"]


def test_budgets_are_judged_on_the_uncapped_pass_only(records_of: Make) -> None:
    records = records_of(400, "test")
    blind = [replace(r, needed=None) for r in records]
    summary = summarise(blind, draws=10)
    assert summary["budget_corr"] is None
    assert summary["budget_coverage"] is None
    censored = [replace(r, needed_closed=False) for r in records]
    assert summarise(censored, draws=10)["budget_n"] == 0
    assert summarise(records, draws=10)["budget_n"] == sum(r.needed_correct and r.plan != "direct" for r in records)


def test_unknown_confidence_is_left_out_and_counted(records_of: Make) -> None:
    records = [replace(r, conf_before=None) if i % 2 else r for i, r in enumerate(records_of(400, "test"))]
    summary = summarise(records, draws=10)
    assert (summary["confidence_n_before"], summary["confidence_n"]) == (200, 400)


def test_violations_leaks_and_empty_answers_are_counted(records_of: Make) -> None:
    records = records_of(100, "test")
    broken = [replace(r, used=(r.budget_effective or 0) + 1, leaked=True, answered=False) for r in records[:10]]
    summary = summarise(broken + records[10:], draws=10)
    assert (summary["violation_rate"], summary["leakage_rate"], summary["answered_rate"]) == (0.1, 0.1, 0.9)
    with pytest.raises(DataError):
        summarise([])
