"""Stop requests from the outside: the first Ctrl-C or SIGTERM asks for a clean end, a second one ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Ends work that a signal has asked to end, before it has anything to save."""


class StopSignals:
    """`with StopSignals() as stop:` — `stop.requested` turns True at the first SIGINT or SIGTERM.

    From then on the former handlers are back, so that a second signal acts as if nobody listened. Outside the main
    thread, where Python delivers no signals, it listens to nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._former[number] = signal.signal(number, self._heard)
        return self

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        self._restore()
