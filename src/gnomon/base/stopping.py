"""Stop requests from the outside: the first Ctrl-C or SIGTERM asks for a clean end, a second one ends at once."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A terminal that goes away (a closed laptop, a lost connection) is no reason to stop; Windows has no such signal.
_HANG_UP = signal.SIGHUP if sys.platform != "win32" else None


class StopRequested(Exception):
    """Ends work that a signal has asked to end, before it has anything to save."""


class StopSignals:
    """`with StopSignals() as stop:` — `stop.requested` turns True at the first SIGINT or SIGTERM.

    From then on the former handlers are back, so that a second signal acts as if nobody listened. Outside the main
    thread, where Python delivers no signals, it listens to nothing. A terminal that goes away (SIGHUP) stops nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._heard)
            if _HANG_UP is not None and signal.getsignal(_HANG_UP) is signal.SIG_DFL:
                self._former[_HANG_UP] = signal.signal(_HANG_UP, signal.SIG_IGN)
        return self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore(*_SIGNALS)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._former:
                handler = self._former.pop(number)
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        self._restore(*self._former)
