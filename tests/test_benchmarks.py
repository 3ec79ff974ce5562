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
    monkeypatch.syspath_prepend(FILE.parent)
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


class Stepper:
    """Stands for llama.cpp: a row's next id is the sum of the ids that its sequence holds."""

    slots = 2

    def __init__(self) -> None:
        self.held: dict[int, list[int]] = {}
        self.steps: list[int] = []

    def step(self, rows: Any) -> list[int]:
        self.steps.append(len(rows))
        for row in rows:
            held = self.held.setdefault(row.sequence, [])
            assert row.at == len(held)
            held.extend(row.ids)
        return [sum(self.held[row.sequence]) for row in rows]

    def share(self, source: int, sequence: int) -> None:
        assert sequence not in self.held
        self.held[sequence] = list(self.held[source])

    def drop(self, sequence: int) -> None:
        del self.held[sequence]


def test_llama_cpp_gets_the_next_request_as_soon_as_a_sequence_is_free(decode: Any) -> None:
    model = Stepper()
    work = decode.Work(((1,), (2, 3), (5,), (7, 1)), (1, 3, 0, 2))
    made, firsts = decode.llamacpp.continuous(model, work.prompts, work.budgets)
    assert made == [[1], [5, 10, 20], [], [8, 16]] and len(firsts) == 3
    assert model.steps == [2, 2, 2] and model.held == {}  # 3 tokens beside 2 + 1
    run = decode.llama_cpp(model, work)
    assert run.useful == 6 and 0.0 <= run.first <= run.seconds


def test_llama_cpp_computes_what_all_prompts_begin_with_once(decode: Any) -> None:
    model = Stepper()
    made, _ = decode.llamacpp.continuous(model, ((1, 2), (1, 2, 3), (9,), (1, 2, 5)), (1, 2, 0, 1))
    assert made == [[3], [6, 12], [], [8]]  # the last id of a prompt is never shared: it makes the first token
    assert model.steps == [1, 2, 2] and model.held == {}


def test_without_llama_cpp_there_is_a_reason(decode: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(decode.llamacpp, "MODULE", "no_such_module")
    file, why = decode.llamacpp.available(tmp_path)
    assert file is None and "pip install llama-cpp-python" in why
    with decode.llamacpp.opened(file, ((1,),), (1,), 1, 1) as found:
        assert found == ({}, {}, {})
    monkeypatch.setattr(decode.llamacpp, "MODULE", "json")
    assert decode.llamacpp.available(tmp_path) == (tmp_path, "")
    assert decode.llamacpp.available(None)[1]
