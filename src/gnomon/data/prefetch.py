"""Steps made ready by a thread, so that the training step does not wait for its data."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gnomon.data.corpus import Source, StepData

LOOK: Final = 0.2  # seconds between two looks at whether the thread still lives, and for signals


class Prefetch:
    """A `Source` in front of another one, `depth` steps ahead of it.

    start: the first step that will be asked. prepare: what is made of a step in the thread too (`collate`, say); it
    stands in `prepared` when `step` returns. A cursor is the one of the step it came with, however far the thread is.
    An error is raised by the step that it belongs to. wait_seconds: how long the last `step` waited.
    """

    def __init__(
        self, source: Source, start: int = 0, depth: int = 2, prepare: Callable[[StepData], Any] | None = None
    ) -> None:
        self.source, self.depth, self._prepare = source, max(1, depth), prepare
        self.wait_seconds = 0.0
        self.prepared: Any = None
        self._next = start
        self._queue: queue.Queue[tuple[int, StepData | BaseException, Any]] = queue.Queue()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def step(self, number: int) -> StepData:
        began = time.monotonic()
        if self._thread is None or not self._next <= number <= self._next + self.depth:
            self._halt()
            self._begin(number)
        while True:
            at, found, made = self._get()
            self._next = at + 1
            if isinstance(found, BaseException):
                self._halt()
                self._next = at
                raise found
            if at == number:
                break
        self.prepared = made
        self.wait_seconds = time.monotonic() - began
        return found

    def seek(self, number: int, cursor: Mapping[str, Any]) -> None:
        self._halt()
        self.source.seek(number, cursor)
        self._next = number

    def close(self) -> None:
        """Join the thread and close the source; twice is harmless."""
        self._halt()
        self.source.close()

    def _get(self) -> tuple[int, StepData | BaseException, Any]:
        while True:
            try:
                return self._queue.get(timeout=LOOK)
            except queue.Empty:
                continue  # signals are heard here

    def _begin(self, number: int) -> None:
        self._next, self._stop = number, threading.Event()
        self._queue = queue.Queue(self.depth)
        args = (number, self._queue, self._stop)
        # A daemon: a second Ctrl-C ends the process without waiting for a slow disk.
        self._thread = threading.Thread(target=self._work, args=args, name="gnomon-prefetch", daemon=True)
        self._thread.start()

    def _work(self, number: int, ready: queue.Queue[Any], stop: threading.Event) -> None:
        while not stop.is_set():
            item: tuple[int, Any, Any]
            try:
                data = self.source.step(number)
                item = (number, data, self._prepare(data) if self._prepare else None)
            except BaseException as error:  # noqa: BLE001 - raised again by the step that it belongs to
                item = (number, error, None)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=LOOK)
                    break
                except queue.Full:
                    continue
            if isinstance(item[1], BaseException):
                return
            number += 1

    def _halt(self) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
