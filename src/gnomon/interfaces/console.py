"""What the command line writes: results on stdout, everything else on stderr; `--json` is one object on stdout."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from gnomon.base.screen import Colour, harmless, paint, screen
from gnomon.base.telemetry import Event, Progress, event_line, finite

if TYPE_CHECKING:
    from rich.console import Console

WIDE: Final = 160  # columns of a table that goes to a file or a pipe
_resume = ""


def out() -> Console:
    """The console for results."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def say(text: str = "") -> None:
    """One line for people, on stderr, above a live line, and in the log of an open run."""
    screen().line(text)


def emit_json(value: Mapping[str, Any]) -> None:
    """The one object of `--json`; numbers that are not finite become null and are named."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False)
    print(text, flush=True)
    screen().note(text)


def result(text: str) -> None:
    """A result that is text already, on stdout."""
    print(text.rstrip("\n"), flush=True)


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
            if bar.done >= total and self._bar is bar:  # say so now, not when the next one begins
                self.close()

        return count

    def close(self, kind: type[BaseException] | None = None) -> None:
        if self._bar is not None:
            self._bar.__exit__(kind)
            self._bar = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(kind)


SHOWN_PUZZLES: Final = 3
_LONGEST: Final = 300  # characters of a question, thought or answer on the console; samples/ has all of it


class Narrator:
    """A sink that tells the events of a run on stderr: puzzles in colour, warnings as lines of their own."""

    def __init__(self) -> None:
        self._puzzles: tuple[Any, int] = (None, 0)  # (step, puzzles shown of it)

    def emit(self, event: Event) -> None:
        if event.name == "eval/sample":
            step, shown = self._puzzles
            shown = shown + 1 if step == event.data.get("step") else 1
            self._puzzles = (event.data.get("step"), shown)
            if shown <= SHOWN_PUZZLES:
                say(puzzle(event.data["sample"]))
            return
        line = _tell(event)
        if event.level in ("warning", "error"):
            line = paint(line, "yellow" if event.level == "warning" else "red")
        if line:
            say(line)

    def close(self) -> None:
        """stderr stays open."""


def puzzle(sample: Mapping[str, Any]) -> str:
    """One puzzle of a mini-evaluation: question, thought, answer, gold, and whether it was right, in colour.

    sample: as `logic_check` gives it. Model text cannot move the cursor or change colours.
    """
    right = bool(sample["correct"])
    colour: Colour = "green" if right else "red"
    thought = _cut(str(sample.get("think") or "(none)"), _LONGEST // 2)
    kind = _cut(f"[{sample['task']} {sample['level']}]")
    answer, verdict = _cut(str(sample["answer"] or "(nothing)")), "right" if right else "wrong"
    lines = (
        f"  {paint(kind, 'cyan')} {_cut(str(sample['prompt']))}",
        paint(f"    thinks ({sample['used']} tokens): {thought}", "dim"),
        f"    answers {paint(answer, colour)}, gold {_cut(str(sample['gold']))}: {paint(verdict, colour)}",
    )
    return "\n".join(lines)


def _cut(text: str, most: int = _LONGEST) -> str:
    """Text of a model or of data in one harmless line."""
    line = " / ".join(part.strip() for part in harmless(text.replace("\t", " ")).splitlines() if part.strip())
    return line if len(line) <= most else line[: most - 1] + "…"


def _tell(event: Event) -> str:
    """An event in plain words; those without words of their own as name and facts."""
    data = dict(event.data)
    mark = f"{event.level}: " if event.level in ("warning", "error") else ""
    try:
        text = _words(event.name, data)
    except (KeyError, TypeError, ValueError):  # an event of this name with other facts
        text = None
    return event_line(event) if text is None else mark + harmless(text)


def _words(name: str, data: Mapping[str, Any]) -> str | None:
    match name:
        case "eval/logic":
            return f"step {data['step']}: {data['correct']} of {data['n']} logic puzzles right, for example"
        case "checkpoint/saved":
            return f"step {data['step']}: saved {data['name']}"
        case "checkpoint/skipped":
            return f"{data['name']} cannot be used: {data['why']}"
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
        case "tracker/failed":
            lost = f", {data['rows_dropped']} rows dropped" if data["rows_dropped"] else ""
            return f"tracker {data['tracker']} is given up ({data['why']}{lost}); the run and metrics.jsonl go on"
    return None


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
    if screen().logged:
        from rich.console import Console

        page = io.StringIO()
        Console(file=page, width=WIDE, highlight=False).print(grid)
        screen().note("\n".join(line.rstrip() for line in page.getvalue().splitlines()))


def cell(value: Any) -> str:
    """A value as a short text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if 0 < abs(value) < 0.001:
            return f"{value:.2g}"
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return f"[{value[0]:.3f}, {value[1]:.3f}]"
    return str(value)
