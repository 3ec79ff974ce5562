"""Steps from a thread: the same ones, with their own cursors, errors where they belong, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.test_stream import over_the_wire, row, same, source, write

from gnomon.base.errors import DataError
from gnomon.base.stopping import StopRequested
from gnomon.data import prefetch
from gnomon.data.corpus import Bins, BinSource, PackedRow, StepData, collate, write_bin
from gnomon.data.encode import Encoded
from gnomon.data.prefetch import Prefetch
from gnomon.data.tokenizer import Tokenizer


class Counter:
    """A source that notes what is asked of it; step `bad` fails."""

    fingerprint = "counter"

    def __init__(self, bad: int = 10**9, pause: float = 0.0) -> None:
        self.bad, self.pause, self.asked, self.closed, self.base = bad, pause, list[int](), False, 0

    def step(self, number: int) -> StepData:
        self.asked.append(number)
        time.sleep(self.pause)
        if number >= self.bad:
            raise DataError(f"step {number} is broken")
        ids = np.asarray([number + self.base], dtype=np.int32)
        return StepData((PackedRow(ids, np.ones(1, np.uint8), (1,)),), 4, {"behind": number})

    def seek(self, number: int, cursor: Mapping[str, Any]) -> None:
        self.base = int(cursor["base"])

    def close(self) -> None:
        self.closed = True


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "gnomon-prefetch"]


def test_text_behind_a_thread_is_the_same_text(tok: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [row(i) for i in range(150)])
    plain, ahead = source(tok, path), Prefetch(source(tok, path), depth=3)
    steps = [plain.step(k) for k in range(30)]
    for k in range(20):
        same(ahead.step(k), steps[k])  # cursors too: of the consumed step, not of the prefetched one
        assert ahead.wait_seconds >= 0
    ahead.seek(7, over_the_wire(steps[6].cursor))
    same(ahead.step(7), steps[7])
    same(ahead.step(9), steps[9])  # one passed over
    same(ahead.step(29), steps[29])  # and many
    same(ahead.step(3), steps[3])
    assert ahead.fingerprint == plain.fingerprint
    again = Prefetch(source(tok, path), start=12)
    again.seek(12, over_the_wire(steps[11].cursor))
    same(again.step(12), steps[12])
    ahead.close()
    again.close()
    assert not threads()


def test_bins_behind_a_thread_and_batches_made_there(tmp_path: Path) -> None:
    write_bin(tmp_path, "train", (Encoded([5 + i % 9] * 20, [1] * 20) for i in range(100)), {})
    plain = BinSource(Bins(tmp_path), 4, 64, "s", 100)
    where: list[str] = []

    def batch(data: StepData) -> Any:
        where.append(threading.current_thread().name)
        return collate(data.rows, data.length)

    ahead = Prefetch(BinSource(Bins(tmp_path), 4, 64, "s", 100), prepare=batch)
    for k in range(20):
        same(ahead.step(k), plain.step(k))
        assert ahead.prepared.ids.equal(collate(plain.step(k).rows, 64).ids)
    ahead.close()
    assert set(where) == {"gnomon-prefetch"}


def test_an_error_belongs_to_its_step() -> None:
    ahead = Prefetch(Counter(bad=3), depth=2)
    for k in range(3):
        assert ahead.step(k).cursor == {"behind": k}
    for _ in range(2):  # asked again, it says so again
        with pytest.raises(DataError, match="step 3 is broken"):
            ahead.step(3)
    ahead.close()
    assert not threads()

    def fails(data: StepData) -> None:
        raise KeyError("prepare")

    with pytest.raises(KeyError, match="prepare"):
        Prefetch(Counter(), prepare=fails).step(0)
    assert not threads()


def test_it_runs_ahead_by_its_depth_and_no_further() -> None:
    inner = Counter()
    ahead = Prefetch(inner, depth=2)
    ahead.step(0)
    time.sleep(0.3)
    assert inner.asked == [0, 1, 2, 3]  # two ready, one in the hand
    began = time.monotonic()
    ahead.seek(50, {"base": 1000})
    assert time.monotonic() - began < 2
    found = ahead.step(50)
    assert found.rows[0].ids.tolist() == [1050] and found.cursor == {"behind": 50}
    ahead.close()
    ahead.close()
    assert inner.closed and not threads()


def test_a_step_that_takes_longer_than_its_data_never_waits() -> None:
    ahead = Prefetch(Counter(pause=0.01), depth=2)
    ahead.step(0)
    assert ahead.wait_seconds > 0.005
    waits = []
    for k in range(1, 8):
        time.sleep(0.05)
        ahead.step(k)
        waits.append(ahead.wait_seconds)
    assert sorted(waits)[3] < 0.005
    ahead.close()


def test_a_request_to_stop_is_heard_while_a_network_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "LEAVE", 0.2)
    answer, asked = threading.Event(), False

    class Silent(Counter):
        def step(self, number: int) -> StepData:
            answer.wait(30)
            return super().step(number)

    inner = Silent()
    ahead = Prefetch(inner, stop=lambda: asked)
    asked = True
    began = time.monotonic()
    with pytest.raises(StopRequested, match="waiting for data"):
        ahead.step(0)
    ahead.close()
    assert time.monotonic() - began < 3 and not inner.closed
    answer.set()
    ahead.close()
    assert inner.closed and not threads()


LOOP = """
import sys, time
from gnomon.base.stopping import StopSignals
from gnomon.data.prefetch import Prefetch

class Slow:
    def step(self, number):
        time.sleep(float(sys.argv[1]))

    def close(self):
        print("closing", flush=True)

ahead = Prefetch(Slow())
with StopSignals() as stop:
    print("ready", flush=True)
    k = 0
    while not stop.requested:
        ahead.step(k)
        k += 1
ahead.close()
"""


@pytest.mark.parametrize(
    ("pause", "signals", "code", "end"), [("0.01", 1, 0, "closing"), ("60", 2, -signal.SIGINT, "")]
)
def test_ctrl_c_ends_a_loop_that_waits(pause: str, signals: int, code: int, end: str) -> None:
    """The first one ends behind the step; a second one does not wait for data that never comes."""
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, pause],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    for _ in range(signals):
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
    began = time.monotonic()
    out, _ = child.communicate(timeout=30)
    assert time.monotonic() - began < 5 and out.strip() == end
    assert child.returncode in (code, 1 if signals == 2 else code)  # 1: Python's own traceback of KeyboardInterrupt
