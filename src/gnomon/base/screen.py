"""The lower end of the console: lines that stay, and one live line under them, on stderr.

Lines also go, without colours, to every attached log file. A screen that is gone (a closed ssh session, a full pipe)
is no reason to stop a run: from then on only the logs are written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import unicodedata
from pathlib import Path
from typing import IO, Final, Literal

Colour = Literal["red", "green", "yellow", "cyan", "dim", "bold"]
_CODES: Final[dict[str, str]] = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "dim": "2", "bold": "1"}
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_BAR = re.compile("━+|#{2,}")


def paint(text: str, colour: Colour) -> str:
    """Text with colour codes; a screen without colours and the logs leave them out."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m"


def plain(text: str) -> str:
    """Text without colour codes."""
    return _ANSI.sub("", text)


def harmless(text: str) -> str:
    """Text of others (models, data) for a terminal: control characters, escapes among them, become `?`."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" else c for c in text)


class Screen:
    """stream: None = whatever sys.stderr is when something is written."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream, self._lock = stream, threading.RLock()
        self._live = ""
        self._logs: dict[Path, IO[str]] = {}

    @property
    def stream(self) -> IO[str] | None:
        return self._stream or sys.stderr

    @property
    def terminal(self) -> bool:
        """Whether a live line can be drawn."""
        try:
            return self.stream is not None and self.stream.isatty() and os.environ.get("TERM") != "dumb"
        except ValueError:  # closed
            return False

    @property
    def coloured(self) -> bool:
        return self.terminal and not os.environ.get("NO_COLOR")

    @property
    def logged(self) -> bool:
        """Whether anything listens to `note`."""
        return bool(self._logs)

    @property
    def width(self) -> int:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self.stream is not None:
                return os.get_terminal_size(self.stream.fileno()).columns or 80
        return shutil.get_terminal_size().columns

    def bar(self, share: float, cells: int = 16) -> str:
        """A bar of `cells` characters, filled up to `share` (0 to 1)."""
        full = round(max(0.0, min(1.0, share)) * cells)
        encoding = str(getattr(self.stream, "encoding", None) or "")
        return "━" * full + "·" * (cells - full) if "utf" in encoding.lower() else "#" * full + "." * (cells - full)

    def line(self, text: str = "") -> None:
        """A line (or several) that stays, above the live line."""
        with self._lock:
            shown = text if self.coloured else plain(text)
            self._write(("\r\x1b[K" if self._live else "") + shown + "\n" + self._live)
            self.note(text)

    def live(self, text: str) -> None:
        """Replace the live line; does nothing where there is no terminal. "" removes it."""
        if not self.terminal:
            return
        with self._lock:
            cut = harmless(text.replace("\n", " "))[: max(1, self.width - 1)]
            shown = _BAR.sub(lambda m: paint(m.group(), "green"), cut) if self.coloured else cut
            if shown != self._live:
                self._live = shown
                self._write("\r\x1b[K" + shown)

    def note(self, text: str) -> None:
        """A line for the logs alone."""
        with self._lock:
            for path, file in tuple(self._logs.items()):
                try:
                    file.write(plain(text) + "\n")
                    file.flush()
                except OSError:  # a full disk: the run has its own say about that
                    self._logs.pop(path)

    def attach(self, path: Path) -> None:
        """Copy every line to `path` from now on, behind what it holds."""
        with self._lock:
            if path not in self._logs:
                self._logs[path] = path.open("a", encoding="utf-8", errors="replace")

    def detach(self, path: Path) -> None:
        """Close a log; one that is not attached is no error."""
        with self._lock:
            file = self._logs.pop(path, None)
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, text: str) -> None:
        stream = self.stream
        if stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            stream.write(text)
            stream.flush()


_screen = Screen()


def screen() -> Screen:
    """The screen of this process."""
    return _screen
