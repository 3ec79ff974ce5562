"""Typed events and their sinks, metrics rows on disk, and progress with ETA on stderr.

Nothing here prints to stdout; `--json` output stays one object.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol, TypeVar

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
        stream = self._stream or sys.stderr
        facts = " ".join(f"{k}={_short(v)}" for k, v in event.data.items())
        mark = "" if event.level in ("debug", "info") else f"{event.level}: "
        stream.write(f"{mark}{event.name} {facts}".rstrip() + "\n")
        stream.flush()

    def close(self) -> None:
        """stderr stays open."""


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
    """A progress bar with ETA on stderr: `with Progress("rollouts", total=600) as bar: bar.advance(8, "acc .71")`.

    On a terminal it is one live line (rich); elsewhere a plain line about every `every` seconds, so logs stay short.
    """

    def __init__(self, title: str, total: int | None = None, every: float = 15.0, quiet: bool = False) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self._every, self._quiet = every, quiet
        self._start = self._last = time.monotonic()
        self._bar: Any = None
        self._row: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if not self._quiet and sys.stderr.isatty():
            from rich import progress as rp
            from rich.console import Console

            self._bar = rp.Progress(
                rp.TextColumn("{task.description}"), rp.BarColumn(), rp.MofNCompleteColumn(),
                rp.TimeElapsedColumn(), rp.TextColumn("eta"), rp.TimeRemainingColumn(),
                rp.TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._row = self._bar.add_task(self.title, total=self.total, note="")
            self._bar.start()
        return self

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more done; `note` replaces the text at the end of the line."""
        self.done += n
        self.note = self.note if note is None else note
        if self._bar is not None:
            self._bar.update(self._row, advance=n, note=self.note)
        elif not self._quiet and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._line()

    def eta(self) -> float | None:
        """Seconds to go at the mean speed so far; None while it is not known."""
        if not self.done or self.total is None:
            return None
        return (time.monotonic() - self._start) / self.done * max(0, self.total - self.done)

    def _line(self, end: str = "") -> None:
        eta = self.eta()
        of = "" if self.total is None else f"/{self.total}"
        left = "" if end or eta is None else f", about {eta:.0f} s left"
        spent = time.monotonic() - self._start
        sys.stderr.write(f"{self.title}: {self.done}{of} in {spent:.0f} s{left} {self.note}{end}".rstrip() + "\n")
        sys.stderr.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self._quiet:
            self._line(" (stopped)" if kind else " done")


def track(items: Iterable[T], title: str, total: int | None = None, quiet: bool = False) -> Iterator[T]:
    """Iterate with a progress bar on stderr."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.advance()
