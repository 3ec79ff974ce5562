"""The report of a training run from its folder alone: curves, what happened, what the model wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

from gnomon.base.errors import DataError
from gnomon.base.run_facts import facts as run_facts
from gnomon.base.telemetry import read_rows, span
from gnomon.evaluation.report import ReportData, Table, show

MOST_ROWS: Final = 1500  # of a curve; more would not be seen
MOST_EVENTS: Final = 200
SAMPLES: Final = 12
# Events that are marked in the curves: name -> (colour index of plots.COLOURS, word for the legend).
MARKS: Final[dict[str, tuple[int, str]]] = {
    "checkpoint/saved": (2, "saved"),
    "resume/from": (0, "resumed"),
    "train/rolled_back": (4, "rolled back"),
    "control/ack": (3, "command"),
}
_QUIET: Final = ("eval/sample",)  # shown as samples


def training_report(folder: Path) -> ReportData:
    """What `gnomon report` shows of a training run. Raises DataError when nothing was measured yet."""
    rows = by_step(read_rows(folder / "metrics.jsonl"))
    if not rows:
        raise DataError(f"{folder} has measured nothing yet: no row in metrics.jsonl")
    events = read_rows(folder / "events.jsonl")
    known = run_facts(folder, checksums=False)
    return ReportData(
        folder.name,
        curves=thinned(rows),
        marks=[
            (step, *MARKS[e["event"]]) for e in events if e.get("event") in MARKS and (step := _step(e)) is not None
        ],
        tiles=tiles(rows, known),
        tables=[t for t in (_samples(folder), _events(events), _checkpoints(known), _changed(known)) if t.rows],
        facts={k: str(v) for k, v in _made(known).items() if v},
    )


def by_step(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of their steps; of rows for one step the last one holds (those before were undone)."""
    found = {int(r["step"]): dict(r) for r in rows if isinstance(r.get("step"), (int, float))}
    return [found[step] for step in sorted(found)]


def thinned(rows: Sequence[Mapping[str, Any]], most: int = MOST_ROWS) -> list[Mapping[str, Any]]:
    """At most about `most` rows, evenly spread; rows with rare values (evaluations) and the last one all stay."""
    every = max(1, -(-len(rows) // most))
    common = max((len(r) for r in rows[:1]), default=0)
    return [r for i, r in enumerate(rows) if i % every == 0 or len(r) > common or i == len(rows) - 1]


def tiles(rows: Sequence[Mapping[str, Any]], known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, label) at the head of the page."""
    last = rows[-1]
    losses = [r["train/loss"] for r in rows[-50:] if isinstance(r.get("train/loss"), (int, float))]
    rates = [r["train/tok_per_sec"] for r in rows if isinstance(r.get("train/tok_per_sec"), (int, float))]
    checks = [r["eval/logic_accuracy"] for r in rows if isinstance(r.get("eval/logic_accuracy"), (int, float))]
    total = known.get("total")
    found = [(str(known["state"]), "state"), (f"{last['step']:,}" + (f" of {total:,}" if total else ""), "steps")]
    if losses:
        found.append((show(sum(losses) / len(losses)), f"loss, mean of the last {len(losses)}"))
    if isinstance(last.get("tokens"), (int, float)):
        found.append((f"{last['tokens'] / 1e6:.2f} M", "tokens"))
    if rates:
        found.append((f"{median(rates):,.0f}", "tokens a second, median"))
    waits = [r["data/wait_share"] for r in rows if isinstance(r.get("data/wait_share"), (int, float))]
    if waits:
        found.append((f"{100 * sum(waits) / len(waits):.2f} %", "of the time waiting for data"))
    if checks:
        found.append((f"{100 * checks[-1]:.0f} %", f"puzzles right, last of {len(checks)} checks"))
    if last.get("train/skipped") is not None:
        found.append((f"{last['train/skipped']:.0f}", "steps skipped"))
    return found


def _step(event: Mapping[str, Any]) -> float | None:
    step = event.get("step")
    return step if isinstance(step, (int, float)) and not isinstance(step, bool) else None


def _samples(folder: Path) -> Table:
    """Puzzles of the last check, and how the first of them was answered in earlier ones."""
    files = sorted(folder.glob("samples/step-*.jsonl"), key=lambda p: _number(p.stem))
    rows: list[tuple[Any, ...]] = []
    if files:
        checks = [(_number(path.stem), read_rows(path)) for path in files]
        step, newest = checks[-1]
        rows += [_sample(step, s) for s in newest[:SAMPLES]]
        spread = checks[:-1][:: max(1, len(checks) // 4)]
        rows = [_sample(at, found[0]) for at, found in spread if found] + rows
    note = "The last check in full, before it the first puzzle of some earlier checks. All of them: samples/."
    columns = ("step", "puzzle", "thought", "think tokens", "answer", "gold", "right")
    return Table("What it wrote", columns, rows, note)


def _number(stem: str) -> int:
    digits = stem.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1


def _sample(step: int, row: Mapping[str, Any]) -> tuple[Any, ...]:
    puzzle = f"[{row.get('task', '?')} {row.get('level', '?')}] {row.get('prompt', '')}"
    right = "yes" if row.get("correct") else "no"
    texts = (_short(str(row.get(k) or "–")) for k in ("think", "answer", "gold"))
    think, answer, gold = texts
    return str(step), _short(puzzle), think, str(row.get("used", "–")), answer, gold, right


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _events(events: Sequence[Mapping[str, Any]]) -> Table:
    """Everything that happened, the newest kept where there is too much; steps that were skipped in a row as one."""
    told = [e for e in events if e.get("event") not in _QUIET]
    start = float(told[0].get("time", 0.0)) if told else 0.0
    rows = []
    for event in told[-MOST_EVENTS:]:
        data = {k: v for k, v in event.items() if k not in ("time", "event", "level", "step", "nonfinite")}
        text = ", ".join(f"{k} {v if isinstance(v, str) else json.dumps(v)}" for k, v in data.items())
        level = event.get("level", "info")
        when = span(max(0.0, float(event.get("time", start)) - start))
        step = _step(event)
        rows.append((when, "" if step is None else f"{step:g}", str(event.get("event")), str(level), _short(text, 240)))
    left = len(told) - len(rows)
    note = f"Time since the first event. {left} earlier ones are in events.jsonl." if left else "Time since the first."
    return Table("What happened", ("after", "step", "event", "level", "facts"), rows, note)


def _checkpoints(known: Mapping[str, Any]) -> Table:
    rows = [
        (c["name"] + (" (latest)" if c["latest"] else ""), f"{c['bytes'] / 2**20:.1f} MB", c["whole"])
        for c in known["checkpoints"]
    ]
    note = "Names and sizes checked; `gnomon runs show` reads every byte."
    return Table("Checkpoints", ("name", "size", "whole"), rows, note)


def _changed(known: Mapping[str, Any]) -> Table:
    rows = [(key, str(value), origin) for key, (value, origin) in known["changed"].items()]
    return Table("Fields that are not the default", ("field", "value", "from"), rows)


def _made(known: Mapping[str, Any]) -> dict[str, Any]:
    start = known.get("started")
    return {
        "command": " ".join(known.get("command") or ()),
        "seed": known.get("seed"),
        "commit": known.get("commit"),
        "last started": datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%d %H:%M UTC") if start else None,
        "versions": ", ".join(f"{k} {v}" for k, v in (known.get("versions") or {}).items()),
        "error": known.get("error"),
    }
