"""The claims of a run as a table, each computed in that run with its interval and baseline, and the report page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gnomon.base.atomic import write_atomic
from gnomon.base.telemetry import finite
from gnomon.evaluation.plots import Mark
from gnomon.evaluation.records import EvalRecord
from gnomon.evaluation.report import ReportData, Table, interval, layer_tables, show, write_report
from gnomon.evaluation.sweep import Sweep
from gnomon.evaluation.training_report import training_report
from gnomon.recipes.metacog import MetacogRunConfig, Outcome

DATA_FILE: Final = "report.json"
_NANS: Final = ("answer_logprob", "prompt_logprob")
COLUMNS = ("claim", "measured", "95 % interval", "baseline", "n")
Row = tuple[str, str, str, str, str]


def claims(outcome: Outcome) -> list[Row]:
    """Rows of the last table; nothing in it comes from elsewhere than `outcome`."""
    s = outcome.summary
    base: Mapping[str, Any] = s["baselines"]
    n = str(s["n"])
    over = sum(max(0, r.used - r.budget_effective) for r in outcome.records if r.budget_effective is not None)
    rows: list[Row] = [
        ("think tokens beyond the cap", str(over), "–", "a cap is kept or not", n),
        ("accuracy, predicted plan and budget", show(s["accuracy"]), interval(s["accuracy_ci"]), _table_note(s), n),
    ]
    if outcome.sweep is not None and "predicted" in outcome.sweep.extra:
        rows += _policy_rows(outcome, n)
    for label, suffix, others in (
        ("after thinking", "", ("answer_probability", "trace_length", "family_level")),
        ("before thinking", "_before", ("family_level", "prompt_perplexity")),
    ):
        count = str(s[f"confidence_n{suffix}"])
        for name, key in (("AUROC", "auroc"), ("calibration error", "ece")):
            beside = ", ".join(f"{o.replace('_', ' ')} {show(base[o].get(key))}" for o in others if o in base)
            value = show(s[f"{key}{suffix}"])
            rows.append((f"confidence {label}: {name}", value, interval(s[f"{key}_ci{suffix}"]), beside, count))
    mean = base.get("budget_family_plan_mean", {})
    count = str(s["budget_n"])
    for name, key in (("pooled", "budget_corr"), ("within families", "budget_corr_within_task")):
        beside = f"(family, plan) mean {show(mean.get(key))}"
        rows.append((f"budget against need, {name}: r", show(s[key]), interval(s[f"{key}_ci"]), beside, count))
    rows.append(
        ("solutions in the 90 % budget", show(s["budget_coverage"]), interval(s["budget_coverage_ci"]), "0.90", count)
    )
    return rows


def _table_note(summary: Mapping[str, Any]) -> str:
    share = {k: v["n"] / summary["n"] for k, v in summary["by_plan"].items()}
    return "plans " + ", ".join(f"{k} {v:.0%}" for k, v in share.items())


def _policy_rows(outcome: Outcome, n: str) -> list[Row]:
    assert outcome.sweep is not None
    extra = outcome.sweep.extra
    mine, best = extra["predicted"], extra["best_fixed"]
    reach = [p["tokens"] for p in extra["constants"]["points"] if p["accuracy"] >= mine["accuracy"]]
    floor = outcome.sweep.budget_valleys()
    constant = f"best per-family constant at this accuracy {show(min(reach))}" if reach else "no constant reaches it"
    return [
        (
            "accuracy lost against the best fixed strategy per family",
            show(mine["loss"]),
            interval(mine["loss_ci"]),
            f"best fixed, unlimited {show(best['accuracy'])}",
            n,
        ),
        (
            "think tokens per problem",
            show(mine["tokens"]),
            f"{mine['token_share']:.0%} of best fixed",
            f"best fixed {show(best['tokens'])}; {constant}",
            n,
        ),
        ("budgets below no-think accuracy − 0.5 points", str(len(floor)), "–", f"of {len(outcome.sweep.budgets)}", n),
    ]


def write(outcome: Outcome, config: MetacogRunConfig, folder: Path, title: str) -> Path:
    """report.html, plots/*.png and sweep.csv in the run folder; returns the page."""
    if outcome.sweep is not None:
        outcome.sweep.to_csv(folder / "sweep.csv")
    heads = outcome.trained.heads_report
    facts = {
        "base": config.base,
        "tasks": config.tasks,
        "problems": f"{config.label_n} label, {config.calibration_n} calibration, {config.val_n} val, "
        f"{config.test_n} test",
        "stream, seed": f"{config.stream}, {config.seed}",
        "seconds": ", ".join(f"{k} {v:.0f}" for k, v in outcome.seconds.items()),
        "heads": f"{heads['parameters']:,} parameters, {heads['steps']} steps, {heads['seconds']:.0f} s",
    }
    phases, marks = _curves(outcome)
    data = ReportData(
        title,
        outcome.summary,
        outcome.records,
        outcome.sweep,
        heads["telemetry"].get("alpha_by_site", {}),
        heads["curve"],
        outcome.gates,
        (
            *_phases(outcome),
            *layer_tables(_stages(outcome)),
            Table("Labels", ("strategy", "accuracy", "think tokens", "cheapest solver"), _labels(heads)),
            Table("What this run shows", COLUMNS, claims(outcome), "Every number was computed in this run."),
        ),
        facts,
        phases=phases,
        phase_marks=marks,
    )
    write_atomic(folder / DATA_FILE, json.dumps(_plain(data)) + "\n")
    return write_report(folder, data)


def _plain(data: ReportData) -> dict[str, Any]:
    """What a report shows as JSON, so that `report RUN` can draw it again."""
    sweep = data.sweep
    return finite(
        {
            "title": data.title,
            "summary": data.summary,
            "records": [vars(r) for r in data.records],
            "sweep": None if sweep is None else sweep.to_json(),
            "alpha": data.alpha,
            "curves": list(data.curves),
            "phases": list(data.phases),
            "phase_marks": list(data.phase_marks),
            "gates": data.gates,
            "tables": [vars(t) for t in data.tables],
            "facts": data.facts,
        }
    )


def rewrite(folder: Path) -> Path:
    """Draw report.html of a run folder again: what a metacog or demo run measured, or a pretraining run's curves.

    Raises DataError where the run has left neither.
    """
    path = folder / DATA_FILE
    if path.is_file():
        body = json.loads(path.read_text(encoding="utf-8"))
        body.pop("nonfinite", None)
        records = [_record(r) for r in body.pop("records")]
        sweep = body.pop("sweep")
        tables = [Table(**t) for t in body.pop("tables")]
        return write_report(
            folder, ReportData(**body, records=records, tables=tables, sweep=Sweep.from_json(sweep) if sweep else None)
        )
    return write_report(folder, training_report(folder))


def _record(facts: Mapping[str, Any]) -> EvalRecord:
    """A stored record; JSON has no NaN, so a missing log-prob came back as None."""
    values: dict[str, Any] = {k: math.nan if v is None and k in _NANS else v for k, v in facts.items()}
    return EvalRecord(**values)


_WATCHED = (
    "loss/think_ce", "loss/answer_ce", "gate/rms", "gate/activity", "gate/coverage", "grad_norm", "alpha/entropy",
    "layers/plan_agreement", "layers/budget_var",
)  # fmt: skip


def _curves(outcome: Outcome) -> tuple[list[Mapping[str, Any]], list[Mark]]:
    """Steps of all rounds, one behind the other; a mark where a round begins."""
    rows, marks, last = list[Mapping[str, Any]](), list[Mark](), 0
    for told in outcome.phases:
        curve = told["fit"]["curve"]
        marks.append((last + 0.5, 1 + (told["phase"] != "B"), f"phase {told['phase']}"))
        rows += [{"step": last + r["step"], **{k: r[k] for k in _WATCHED if k in r}} for r in curve]
        last += int(curve[-1]["step"])
    return rows, marks


def _phases(outcome: Outcome) -> list[Table]:
    """What each round of phases B and C started from: the model's own rollouts, by kind and by level."""
    if not outcome.phases:
        return []
    levels = sorted({level for r in outcome.phases for level in r["think_rate_by_level"]})
    rows = []
    for r in outcome.phases:
        gauges = r["fit"]["telemetry"]
        rows.append(
            (
                f"{r['phase']}, round {r['round'] + 1}", r["correct"], r["valid"], r["empty"], r["truncated"],
                r["missing"], r["censored"], r["think_tokens_mean"], r["predicted_mean"],
                *(r["think_rate_by_level"].get(level) for level in levels),
                gauges.get("gate/rms"), gauges.get("gate/activity"), gauges.get("gate/coverage"),
            )
        )  # fmt: skip
    columns = (
        "phase", "right", "valid", "empty", "truncated", "no answer", "censored", "think tokens", "predicted",
        *(f"thinks, level {level}" for level in levels), "gate", "adapters open", "coverage",
    )  # fmt: skip
    note = "Rollouts as the round began; gate (distance from 1) and adapters (over think tokens) as it ended."
    return [Table("Phases", columns, rows, note)]


def _stages(outcome: Outcome) -> dict[str, Mapping[str, Any]]:
    """Gauges of the heads behind every round, on its labels, and at the end, on what the model does then."""
    rounds = {f"{r['phase']}, round {r['round'] + 1}": r["fit"]["telemetry"] for r in outcome.phases}
    return {**rounds, "at the end": outcome.trained.heads_report["telemetry"]}


def _labels(heads: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    labels = heads["labels"]
    rows = [(k, v["accuracy"], v["think_tokens_mean"], v["label"]) for k, v in labels["by_strategy"].items()]
    return [*rows, ("none solves it", None, None, labels["unsolved"])]
