"""What the speed benchmark counts, with a stand-in for the engine; its numbers are measured elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "benchmarks" / "decode.py"


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("bench_decode", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_decode", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


class Early:
    """An engine whose first row closes before its first think token and whose second closes after one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def run(self, asked: Any, sink: Any) -> list[Any]:
        traces = []
        for i, request in enumerate(asked):
            used = min(i, 1) if i < 2 else request.budget
            for _ in range(used):
                sink(SimpleNamespace(id=request.id, region="think"))
            traces.append(SimpleNamespace(used=used, overshoot=0))
        return traces


def test_a_row_that_closed_early_counts_for_what_it_thought(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "Engine", Early)
    work = decode.Work(tuple((1, 2) for _ in range(100)), (4,) * 100)
    run = decode.ours(None, decode.endless(64, 0), work, 32)
    assert run.useful == 98 * 4 + 1 == work.useful - 7 and 0.0 <= run.first <= run.seconds
    assert run.rate == pytest.approx(run.useful / run.seconds)


def test_ratios_are_of_useful_tokens_per_second(decode: Any) -> None:
    found = decode.pairs(lambda: decode.Run(2.0, 0.1, 100), lambda: decode.Run(4.0, 0.2, 400), 3)
    assert (found["ratio"], found["range"]) == (0.5, [0.5, 0.5])
    assert (found["ours_tok_s"], found["peer_tok_s"]) == (50.0, 100.0)
