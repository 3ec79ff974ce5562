"""report.html: one self-contained page per run (charts inline as PNG, no script, no network) and the PNGs beside it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gnomon.evaluation import plots
from gnomon.evaluation.records import EvalRecord
from gnomon.evaluation.sweep import Sweep

_STYLE = """
:root { color-scheme:light; --ink:#1f2430; --muted:#6b7280; --line:#e6e8ee; --card:#fff; --back:#f6f7fa; }
* { box-sizing:border-box; }
body { margin:0; background:var(--back); color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
main { max-width:1040px; margin:0 auto; padding:32px 20px 64px; }
h1 { font-size:27px; margin:0 0 4px; letter-spacing:-.01em; }
h2 { font-size:18px; margin:0 0 10px; }
p.lead, .note { color:var(--muted); margin:0 0 14px; }
.note { font-size:13.5px; margin:8px 0 0; }
section, .tile { background:var(--card); border:1px solid var(--line); border-radius:12px; }
section { padding:20px 22px; margin:18px 0; overflow-x:auto; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:12px; margin:20px 0; }
.tile { padding:14px 16px; }
.tile b { display:block; font-size:23px; letter-spacing:-.02em; }
.tile span { color:var(--muted); font-size:13px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:14px; }
th, td { border-bottom:1px solid var(--line); padding:6px 12px 6px 0; }
th { text-align:left; color:var(--muted); font-weight:600; border-bottom-width:2px; }
td.n, th.n { text-align:right; }
img { max-width:100%; height:auto; display:block; margin:0 auto; }
.ok { color:#20794f; font-weight:600; }
.bad { color:#b3362f; font-weight:600; }
"""


@dataclass(frozen=True)
class Table:
    """A table of the report; cells are text or numbers, a bool is shown as met / not met."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class ReportData:
    """What a report shows; parts that are missing are left out.

    summary: of `summarise`; alpha: mean weight per layer for each site; curves: rows of a training log;
    marks: steps to mark in the curves; phases, phase_marks: the same of phases B and C; tiles: (value, label) at the
    head, behind those of the summary;
    gates: of the side adapters over one thought (plots.gates_by_token);
    facts: lines of provenance (command, seed, model, machine); tables: shown after the charts.
    """

    title: str
    summary: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[EvalRecord] = ()
    sweep: Sweep | None = None
    alpha: Mapping[str, Sequence[float]] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    gates: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    marks: Sequence[plots.Mark] = ()
    phases: Sequence[Mapping[str, Any]] = ()
    phase_marks: Sequence[plots.Mark] = ()
    tiles: Sequence[tuple[str, str]] = ()


_GAUGES = (
    ("alpha/min", "alpha, min"), ("alpha/mean", "mean"), ("alpha/max", "max"), ("alpha/entropy", "entropy, nats"),
    ("layers/plan_agreement", "plan agreement"), ("layers/budget_var", "variance of budgets"),
)  # fmt: skip


def layer_tables(stages: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Telemetry of the heads (`gauges`) by stage of training: layer weights, per-layer plans and budgets (row C3)."""
    told = {name: each for name, each in stages.items() if "alpha/entropy" in each}
    if not told:
        return []
    rows = [(name, *(each.get(key) for key, _ in _GAUGES)) for name, each in told.items()]
    note = (
        "At the think tag, plans at the prompt. Entropy: log of the number of layers = all alike. Agreement: share of "
        "layers whose plan is the chosen one. Variance: over layers, of log1p(tokens)."
    )
    tables = [Table("Layers", ("heads", *(title for _, title in _GAUGES)), rows, note)]
    *_, (last, each) = told.items()
    if each.get("agreement_by_layer"):
        cells = list(enumerate(each["agreement_by_layer"]))
        tables.append(Table(f"Plan agreement by layer, {last}", ("layer", "agrees with the chosen plan"), cells))
    return tables


def write_report(folder: Path, data: ReportData) -> Path:
    """Write plots/*.png and report.html into a folder; returns the page.

    Raises ConfigError, naming the extra, when matplotlib is missing.
    """
    plots.pyplot()
    shots = folder / "plots"
    shots.mkdir(parents=True, exist_ok=True)
    body = [_head(data)]
    for name, title, note, draw in _charts(data):
        image = plots.png(draw())
        (shots / f"{name}.png").write_bytes(image)
        code = base64.b64encode(image).decode()
        text = f'<p class="note">{html.escape(note)}</p>' if note else ""
        body.append(
            f'<section id="{name}"><img alt="{html.escape(title)}" src="data:image/png;base64,{code}">{text}</section>'
        )
    body += [_table(t) for t in (*_summary_tables(data), *data.tables)]
    if data.facts:
        body.append(_table(Table("How it was made", ("what", "value"), list(data.facts.items()))))
    page = folder / "report.html"
    partial = page.with_suffix(".partial")
    partial.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(data.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(body)
        + "\n</main></body></html>\n",
        encoding="utf-8",
    )
    partial.replace(page)
    return page


def _charts(data: ReportData) -> list[tuple[str, str, str, Callable[[], Any]]]:
    charts: list[tuple[str, str, str, Callable[[], Any]]] = []
    if data.sweep is not None:
        sweep = data.sweep
        valleys = len(sweep.valleys())
        note = "Bars: 95 % Wilson intervals. " + (
            "No point lies below the accuracy without thinking − 0.5 points."
            if not valleys
            else f"{valleys} of {len(sweep.points)} points lie below the accuracy without thinking − 0.5 points."
        )
        charts.append(("quality_vs_budget", "Quality against budget", note, lambda: plots.quality_vs_budget(sweep)))
    if any(r.needed is not None for r in data.records):
        note = "Correct solutions with a strategy that thinks, need measured without a cap. Logarithmic above 8."
        draw = lambda: plots.predicted_vs_needed(data.records)  # noqa: E731 - a named thunk per chart
        charts.append(("predicted_vs_needed", "Predicted against needed", note, draw))
    if any(r.conf_after is not None or r.conf_before is not None for r in data.records):
        note = "Ten bins of equal mass; bars: 95 % Wilson intervals. On the diagonal, what is said is what happens."
        charts.append(("reliability", "Reliability diagram", note, lambda: plots.reliability(data.records)))
    if data.alpha:
        charts.append(("alpha_by_layer", "Layer weights", "", lambda: plots.alpha_by_layer(data.alpha)))
    if data.gates:
        note = f"Gate factors of this thought are {data.gates['reach']:.2f} away from 1 (root mean square)."
        charts.append(("gates_by_token", "Side adapters", note, lambda: plots.gates_by_token(data.gates)))
    if data.curves:
        charts.append(
            ("training_curves", "Training curves", "", lambda: plots.training_curves(data.curves, data.marks))
        )
    if data.phases:
        note = "Steps of all rounds, one behind the other; dotted: a round begins with rollouts and labels of its own."
        charts.append(("phase_curves", "Phases", note, lambda: plots.training_curves(data.phases, data.phase_marks)))
    return charts


def _head(data: ReportData) -> str:
    s = data.summary
    wanted = (
        ("accuracy", "accuracy", True),
        ("think_tokens_mean", "think tokens, mean", False),
        ("budget_corr", "budget correlation", False),
        ("budget_coverage", "coverage of the 90 % clip", True),
        ("auroc", "AUROC after thinking", False),
        ("ece", "ECE after thinking", False),
    )
    tiles = []
    for key, label, percent in wanted:
        if s.get(key) is None:
            continue
        value = f"{100 * s[key]:.1f} %" if percent else show(s[key])
        low, high = (s.get(f"{key}_ci") or (None, None))[:2]
        scale = 100 if percent else 1
        if low is not None and high is not None:
            label += f" [{show(low * scale)}, {show(high * scale)}]"
        tiles.append(f'<div class="tile"><b>{value}</b><span>{html.escape(label)}</span></div>')
    tiles += [
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>'
        for value, label in data.tiles
    ]
    count = f"{s['n']} problems ({s['unique_n']} distinct)" if s else ""
    grid = f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""
    return f'<h1>{html.escape(data.title)}</h1><p class="lead">{count}</p>{grid}'


def _summary_tables(data: ReportData) -> list[Table]:
    s, tables = data.summary, []
    for key, title in (("by_task", "By task"), ("by_plan", "By strategy"), ("by_level", "By level")):
        if s.get(key):
            cells = [
                (name, v["n"], v["accuracy"], interval(v["accuracy_ci"]), v["think_tokens_mean"])
                for name, v in s[key].items()
            ]
            tables.append(Table(title, (key[3:], "n", "accuracy", "95 %", "think tokens"), cells))
    baselines = s.get("baselines") or {}
    rows: list[tuple[Any, ...]] = [
        ("confidence after thinking", s.get("auroc"), interval(s.get("auroc_ci")), s.get("ece"), s.get("brier"))
    ]
    before = (s.get("auroc_before"), interval(s.get("auroc_before_ci")), s.get("ece_before"), s.get("brier_before"))
    rows.append(("confidence before thinking", *before))
    rows += [
        (name.replace("_", " "), v.get("auroc"), interval(v.get("auroc_ci")), v.get("ece"), v.get("brier"))
        for name, v in baselines.items()
        if "auroc" in v
    ]
    if s:
        note = "Baselines are fitted on the calibration split; family level is a look-up table."
        tables.append(Table("Confidence against baselines", ("", "AUROC", "95 %", "ECE", "Brier"), rows, note))
    budget = [(n.replace("_", " "), v["budget_corr"], v["budget_corr_within_task"], v["median_abs_error"])
              for n, v in baselines.items() if "budget_corr" in v]  # fmt: skip
    if budget:
        ours = (s.get("budget_corr"), s.get("budget_corr_within_task"), s.get("budget_median_abs_error"))
        columns = ("", "correlation", "within task", "median |error|")
        tables.append(Table("Budget against look-up tables", columns, [("budget head", *ours), *budget]))
    return tables


def _table(table: Table) -> str:
    numeric = [all(isinstance(r[i], (int, float, type(None))) for r in table.rows) for i in range(len(table.columns))]
    head = "".join(f"<th{_class(n)}>{html.escape(c)}</th>" for c, n in zip(table.columns, numeric, strict=True))
    rows = "".join(
        "<tr>" + "".join(f"<td{_class(n)}>{_cell(v)}</td>" for v, n in zip(row, numeric, strict=True)) + "</tr>"
        for row in table.rows
    )
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f"<section><h2>{html.escape(table.title)}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{note}</section>"
    )


def _class(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return '<span class="ok">met</span>' if value else '<span class="bad">not met</span>'
    return html.escape(show(value))


def show(value: Any) -> str:
    """A cell as text: whole numbers as they are, others with three significant places, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, float):
        if math.isnan(value):
            return "–"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return str(value)


def interval(pair: Sequence[float | None] | None) -> str:
    """An interval as text; a dash when there is none."""
    if pair is None or any(v is None for v in pair):
        return "–"
    return f"[{show(pair[0])}, {show(pair[1])}]"
