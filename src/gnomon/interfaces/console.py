"""What the command line writes: results on stdout, everything else on stderr; `--json` is one object on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gnomon.base.telemetry import Event, Progress, finite

if TYPE_CHECKING:
    from rich.console import Console

_resume = ""


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False)


def say(text: str = "") -> None:
    """One line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def emit_json(value: Mapping[str, Any]) -> None:
    """The one object of `--json`; numbers that are not finite become null and are named."""
    print(json.dumps(finite(value), ensure_ascii=False, allow_nan=False), flush=True)


def on_interrupt(hint: str) -> None:
    """What to tell after Ctrl-C from here on: what is saved and how to go on."""
    global _resume
    _resume = hint


def interrupt_hint() -> str:
    return _resume or "nothing was changed; run the command again"


class Stages:
    """Progress bars, one after the other: `count = stages("corpus", 600); count(8, "note")`. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Progress | None = None

    def __call__(self, title: str, total: int) -> Callable[..., None]:
        self.close()
        bar = self._bar = Progress(title, total, quiet=self._quiet).__enter__()

        def count(n: int = 1, note: str | None = None) -> None:
            bar.advance(n, note)

        return count

    def close(self, kind: type[BaseException] | None = None) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind)
            self._bar = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(kind)


class Narrator:
    """A sink that tells the events of a run in plain lines on stderr."""

    def emit(self, event: Event) -> None:
        line = _tell(event)
        if line:
            say(line)

    def close(self) -> None:
        """stderr stays open."""


def _tell(event: Event) -> str:
    data = dict(event.data)
    match event.name:
        case "eval/sample":
            s = data["sample"]
            mark = "right" if s["correct"] else "wrong"
            return (
                f"  [{s['task']} {s['level']}] {s['prompt']}\n"
                f"    -> {s['answer'] or '(nothing)'}   ({mark}; gold: {s['gold']}; thought {s['used']} tokens)"
            )
        case "eval/logic":
            return f"step {data['step']}: {data['correct']} of {data['n']} logic puzzles right, for example"
        case "checkpoint/saved":
            return f"step {data['step']}: saved {data['name']}"
        case "data/ready":
            return (
                f"data: {data['records']:,} records, {data['tokens']:,} tokens in {data['folder']}; "
                f"tokenizer: {data['tokenizer']}"
            )
        case "model/ready":
            return f"model: {data['preset']}, {data['parameters']:,} parameters"
        case "resume/from":
            return f"resuming behind step {data['step']} ({data['checkpoint']})"
        case "resume/changed":
            return f"  changed: {data['what']}"
    facts = " ".join(f"{k}={v}" for k, v in data.items())
    mark = "" if event.level in ("debug", "info") else f"{event.level}: "
    return f"{mark}{event.name} {facts}".rstrip()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
    """A table of results on stdout; numbers are right-aligned."""
    from rich.table import Table

    grid = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, caption=note or None)
    grid.caption_justify = "left"
    for i, name in enumerate(columns):
        numeric = all(isinstance(row[i], (int, float)) or row[i] is None for row in rows)
        grid.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(cell(value) for value in row))
    out().print(grid)


def cell(value: Any) -> str:
    """A value as a short text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    return str(value)
