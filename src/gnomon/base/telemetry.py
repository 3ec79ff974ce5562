"""Typed events and their sinks, metrics rows on disk, and progress with ETA on stderr.

Nothing here prints to stdout; `--json` output stays one object.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, Literal, Protocol, TypeVar

from gnomon.base.screen import Screen, harmless, screen

REDRAW: Final = 0.1  # seconds between two drawings of a live line
T = TypeVar("T")
Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class Event:
    """Something that happened: a slash name (`train/loss`, `checkpoint/saved`), a level, facts, wall time (s)."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    level: Level = "info"
    time: float = field(default_factory=time.time)


class Sink(Protocol):
    """Where events go."""

    def emit(self, event: Event) -> None:
        """Take one event; never raises on its content."""

    def close(self) -> None:
        """Flush and release; further events are an error of the caller."""


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON-able data: NaN and infinities become None and are named in an extra `nonfinite` list."""
    bad: list[str] = []
    clean = {str(key): _clean(value, str(key), bad) for key, value in values.items()}
    if bad:
        clean["nonfinite"] = bad
    return clean


def _clean(value: Any, path: str, bad: list[str]) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _clean(v, f"{path}.{k}", bad) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_clean(v, f"{path}.{i}", bad) for i, v in enumerate(items)]
    if isinstance(value, Path):
        return str(value)
    try:
        number = float(value)  # numpy and torch scalars too
    except (TypeError, ValueError, RuntimeError):
        return str(value)
    if math.isfinite(number):
        return number
    bad.append(path)
    return None


class JsonlWriter:
    """Appends JSON objects to a file, one line each, written whole and flushed at once.

    A torn last line, left by a crash, is cut off when the file is opened again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        _cut_torn_line(path)
        self._file: IO[bytes] = path.open("ab")

    def write(self, values: Mapping[str, Any]) -> None:
        """One row; non-finite numbers as `finite` says."""
        line = json.dumps(finite(values), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode("utf-8", "replace") + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close; twice is harmless."""
        if not self._file.closed:
            self._file.flush()
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()


def _cut_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb+") as file:
        end = file.seek(0, os.SEEK_END)
        start = max(0, end - 2**20)
        file.seek(start)
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(start + tail.rfind(b"\n") + 1)


class JsonlSink:
    """Events as rows {"time", "event", "level", …data} of a JSONL file."""

    def __init__(self, path: Path) -> None:
        self._writer = JsonlWriter(path)

    def emit(self, event: Event) -> None:
        self._writer.write({"time": event.time, "event": event.name, "level": event.level, **event.data})

    def close(self) -> None:
        self._writer.close()


class MemorySink:
    """Events in a list, for tests and notebooks."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        """Nothing to release."""


class ConsoleSink:
    """One short line per event on stderr; events below `level` are left out."""

    _order: tuple[Level, ...] = ("debug", "info", "warning", "error")

    def __init__(self, level: Level = "info", stream: IO[str] | None = None) -> None:
        self._least = self._order.index(level)
        self._stream = stream

    def emit(self, event: Event) -> None:
        if self._order.index(event.level) < self._least:
            return
        (Screen(self._stream) if self._stream else screen()).line(event_line(event))

    def close(self) -> None:
        """stderr stays open."""


def event_line(event: Event) -> str:
    """An event in one line: its name and facts, behind its level where that is a warning or an error."""
    facts = " ".join(f"{k}={_short(v)}" for k, v in event.data.items())
    mark = "" if event.level in ("debug", "info") else f"{event.level}: "
    return harmless(f"{mark}{event.name} {facts}".rstrip().replace("\n", " "))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Telemetry:
    """Sends every event to all sinks. Use as a context manager, or call `close`."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = list(sinks)

    def emit(self, name: str, /, level: Level = "info", **data: Any) -> Event:
        """Build an event and hand it to every sink."""
        event = Event(name, data, level)
        for sink in self.sinks:
            sink.emit(event)
        return event

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Progress:
    """A progress line with ETA on stderr: `with Progress("rollouts", total=600) as bar: bar.advance(8, "acc .71")`.

    On a terminal it is one live line; elsewhere, and in the run's log, a plain line about every `every` seconds.
    """

    def __init__(self, title: str, total: int | None = None, every: float = 15.0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self._every, self._quiet, self._screen = every, quiet, screen()
        self._start = self._last = self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        self._drawn = 0.0
        self._draw()
        return self

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more done; `note` replaces the text at the end of the line."""
        self.done += n
        self.note = self.note if note is None else note
        self._draw()
        if not self._quiet and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            eta = self.eta()
            self._say("" if eta is None else f", about {span(eta)} left")

    def eta(self) -> float | None:
        """Seconds to go at the mean speed so far; None while it is not known."""
        if not self.done or self.total is None:
            return None
        return (time.monotonic() - self._start) / self.done * max(0, self.total - self.done)

    def _draw(self) -> None:
        now = time.monotonic()
        if self._quiet or not self._screen.terminal or now - self._drawn < REDRAW:
            return
        self._drawn = now
        parts = [f"{self.title} {self._count()}"]
        if self.total:
            parts.append(self._screen.bar(self.done / self.total))
            parts.append(f"{self.done / self.total:4.0%}")
        eta = self.eta()
        left = "" if self.total is None else f", eta {'?' if eta is None else span(eta)}"
        parts += [span(now - self._start) + left, self.note]
        self._screen.live("  ".join(p for p in parts if p))

    def _count(self) -> str:
        return f"{self.done}" if self.total is None else f"{self.done}/{self.total}"

    def _say(self, rest: str, end: bool = False) -> None:
        text = f"{self.title}: {self._count()} in {span(time.monotonic() - self._start)}{rest} {self.note}".rstrip()
        if end or not self._screen.terminal:
            self._screen.line(text)
        else:
            self._screen.note(text)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._quiet:
            self._screen.live("")
            self.note = f"{self.note} {'(stopped)' if kind else 'done'}".strip()
            self._say("", end=True)


def span(seconds: float) -> str:
    """A time as people say it: `42 s`, `5:07 min`, `3:20 h`."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 6000 else f"{minutes // 60}:{minutes % 60:02d} h"


_NOTES: Final[tuple[tuple[str, str], ...]] = (
    ("train/loss", "loss {:.3f}"),
    ("train/tok_per_sec", "{:,.0f} tok/s"),
    ("data/wait_share", "data wait {:.1%}"),
    ("budget/used", "thinks {:.0f}"),
    ("budget/predicted", "of {:.0f}"),
    ("eval/logic_accuracy", "puzzles {:.0%}"),
)


def live_note(values: Mapping[str, Any]) -> str:
    """The numbers of a metrics row that the live line shows; `train/skipped` only when it is not zero."""
    found = [text.format(float(values[key])) for key, text in _NOTES if isinstance(values.get(key), (int, float))]
    if values.get("train/skipped"):
        found.append(f"skipped {values['train/skipped']:.0f}")
    return "  ".join(found)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file that may still be written to; lines that are no JSON object (torn ones) are left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def track(items: Iterable[T], title: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate with a progress bar on stderr."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()
