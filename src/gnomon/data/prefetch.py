"""Steps made ready by a thread, so that the training step does not wait for its data."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from gnomon.base.stopping import StopRequested

if TYPE_CHECKING:
    from gnomon.data.corpus import Source, StepData

LOOK: Final = 0.2  # seconds between two looks for a reason to stop
LEAVE: Final = 3.0  # seconds that `close` gives a thread which waits for a network


class Prefetch:
    """A `Source` in front of another one, `depth` steps ahead of it.

    start: the first step that will be asked. prepare: what is made of a step in the thread too (`collate`, say); it
    stands in `prepared` when `step` returns. A cursor is the one of the step it came with, however far the thread is.
    An error is raised by the step that it belongs to. wait_seconds: how long the last `step` waited. stop: looked at
    while a step waits; when it turns true (a signal came, and the network is silent) `step` raises StopRequested.
    """

    def __init__(
        self,
        source: Source,
        start: int = 0,
        depth: int = 2,
        prepare: Callable[[StepData], Any] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        self.source, self.depth, self._prepare, self.stop = source, max(1, depth), prepare, stop
        self.wait_seconds = 0.0
        self.prepared: Any = None
        self._next = start
        self._queue: queue.Queue[tuple[int, StepData | BaseException, Any]] = queue.Queue()
        self._ended = threading.Event()
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
        """Join the thread and close the source; twice is harmless. A thread that hangs in the source is left behind,
        and with it the open source: it dies with the process."""
        if self._halt(LEAVE):
            self.source.close()

    def _get(self) -> tuple[int, StepData | BaseException, Any]:
        while True:
            try:
                return self._queue.get(timeout=LOOK)
            except queue.Empty:
                if self.stop is not None and self.stop():
                    raise StopRequested("asked to stop while waiting for data") from None

    def _begin(self, number: int) -> None:
        self._next, self._ended = number, threading.Event()
        self._queue = queue.Queue(self.depth)
        args = (number, self._queue, self._ended)
        # A daemon: a second Ctrl-C ends the process without waiting for a slow disk.
        self._thread = threading.Thread(target=self._work, args=args, name="gnomon-prefetch", daemon=True)
        self._thread.start()

    def _work(self, number: int, ready: queue.Queue[Any], ended: threading.Event) -> None:
        while not ended.is_set():
            item: tuple[int, Any, Any]
            try:
                data = self.source.step(number)
                item = (number, data, self._prepare(data) if self._prepare else None)
            except BaseException as error:  # noqa: BLE001 - raised again by the step that it belongs to
                item = (number, error, None)
            while not ended.is_set():
                try:
                    ready.put(item, timeout=LOOK)
                    break
                except queue.Full:
                    continue
            if isinstance(item[1], BaseException):
                return
            number += 1

    def _halt(self, timeout: float | None = None) -> bool:
        """End the thread; False when it did not end in time."""
        if self._thread is None:
            return True
        self._ended.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            return False
        self._thread = None
        return True
