"""What the speed benchmarks count, with a stand-in for the engine; their numbers are measured elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gnomon.decoding.slack import Sure
from gnomon.reasoner import Reasoner

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, f"bench_{name}", module)  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("decode", monkeypatch)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Any:
    return script("train", monkeypatch)


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


def setting(train: Any, **changes: Any) -> Any:
    shape = {"preset": "micro", "vocab": 1024, "rows": 2, "length": 32, "steps": 2, "device": "cpu",
             "precision": "fp32", "compile": False}  # fmt: skip
    return train.Setting(**{**shape, **changes})


def test_both_sides_of_the_training_benchmark_count_the_same_tokens(train: Any) -> None:
    """Two steps of 2 x 32 tokens behind the two that are not counted."""
    s = setting(train)
    full = train.FullRows(s)
    ours = train.ours(s, 1, full, packed=False)
    theirs = train.trainer(s, [{"input_ids": row, "labels": row} for row in full.ids], s.rows)
    assert ours.tokens == theirs.tokens == 2 * 2 * 32
    assert ours.seconds > ours.waited >= 0 and theirs.seconds > 0
    assert ours.rate == pytest.approx(128 / ours.seconds)


def test_padding_counts_for_nothing(train: Any) -> None:
    """The peer's records are padded to the longest of a batch; useful tokens are real ids."""
    records = [{"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1)} for n in (3, 9) * 8]
    batch = train.padded(records[:2])
    assert batch["input_ids"].tolist()[0] == [1, 2, 3, *[0] * 6]
    assert batch["labels"].tolist()[0] == [1, 2, 3, *[-100] * 6]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 9]
    run = train.trainer(setting(train), records, 4, train.padded)
    assert 4 * 2 * 3 <= run.tokens <= 4 * 2 * 9 and run.tokens % 6 == 0


def test_records_are_packed_for_ours(train: Any, tmp_path: Path) -> None:
    s = setting(train, length=256)
    bins = train.task_records(tmp_path, 60)
    peer = train.for_peer(bins())
    assert len(peer) == 60 and all(len(r["input_ids"]) == len(r["labels"]) for r in peer)
    assert 0 < sum(int((r["labels"] != -100).sum()) for r in peer) < sum(len(r["input_ids"]) for r in peer)
    source = train.BinSource(bins(), s.rows, s.length, "bench-train", s.vocab)
    wanted = train.packed_tokens(source, s)
    run = train.ours(s, 4, train.BinSource(bins(), s.rows, s.length, "bench-train", s.vocab), packed=True)
    assert run.tokens == pytest.approx(wanted * s.steps, abs=s.steps) and wanted > 0.8 * s.rows * s.length


def test_the_peer_is_as_large_as_our_plain_net(train: Any) -> None:
    s = setting(train, preset="nano")
    ours = sum(p.numel() for p in train.Decoder(train.preset("nano", 1024, streams=1)).parameters())
    theirs = train.llama(s)
    assert sum(p.numel() for p in theirs.parameters()) == pytest.approx(ours, rel=0.01)
    assert train.flops_per_token(s) == pytest.approx(6 * (ours - 160 * 1024) + 6 * 6 * 160 * 32, rel=1e-3)


def test_training_ratios_are_of_equal_rounds(train: Any) -> None:
    left, right = [train.Run(1.0, 300), train.Run(2.0, 400)], [train.Run(1.0, 100), train.Run(1.0, 100)]
    assert train.ratio(left, right) == {"ratio": 2.5, "range": [2.0, 3.0], "rounds": 2}


def test_the_arms_of_the_mhc_study_have_as_many_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    study = script("study_mhc", monkeypatch)
    nets = {arm: study.Decoder(study.shape(arm, 1024)) for arm in study.ARMS}
    sizes = {arm: sum(p.numel() for p in net.parameters()) for arm, net in nets.items()}
    assert max(sizes.values()) - min(sizes.values()) < 0.001 * sizes["plain"]
    skip = study.Skip(nets["skip"].config)
    with torch.no_grad():
        for name, p in nets["skip"].named_parameters():
            if name.endswith("out.weight"):
                p.normal_(std=0.1, generator=study.seeds.torch_generator("study", name))
    ids = torch.arange(20)[None]
    plain = nets["skip"](ids, want_states=True)
    assert torch.equal(nets["skip"](ids, steer=skip).logits, plain.logits)  # it begins as the plain net
    skip.factor.data.fill_(0.5)
    wanted = plain.states[3] + 0.5 * plain.states[1]
    found = nets["skip"](ids, want_states=True, steer=skip)
    assert torch.allclose(found.states[3], wanted, atol=1e-5)
    found.logits.sum().backward()
    assert skip.factor.grad.abs().min() > 0


def test_the_mhc_study_pairs_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = script("study_mhc", monkeypatch)
    runs = {f"mhc-{s}": {"loss": 1.0 + 0.1 * s} for s in range(3)} | {
        f"plain-{s}": {"loss": loss} for s, loss in enumerate((1.1, 1.3, 1.5, 9.0))
    }
    found = study.compared(runs, "mhc", "plain")
    assert found["gaps"] == pytest.approx([-0.1, -0.2, -0.3])  # seed 3 has no partner
    assert found["mean"] == pytest.approx(-0.2)
    half = 4.303 * 0.1 / 3**0.5
    assert found["ci"] == pytest.approx([-0.2 - half, -0.2 + half])
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)  # t = 3.464 with two degrees of freedom
    assert study.summary(runs)["loss"]["plain"] == pytest.approx(3.225)


def test_a_rule_is_measured_beside_what_it_saves(decode: Any) -> None:
    """One that never closes saves nothing, one that closes at the first read saves; both have their seconds."""
    layer = sys.modules["layer"]
    reasoner = Reasoner.load("nano")
    decider, asked = layer.closing(reasoner.decider), layer.thoughts(reasoner, 8)
    never = layer.rule_cost(reasoner, decider, Sure(-1.0, 1.0), 8, asked, 3)
    assert (never["saved"], never["closed"]) == (0.0, 0.0) and never["reads"] > 1
    early = layer.rule_cost(reasoner, decider, Sure(1.0), 8, asked, 3)
    assert early["saved"] > 0.3 and early["closed"] > 0.3 and early["reads"] < never["reads"]
    assert all(x["pairs"] == 3 and min(x["seconds"]) > 0 for x in (never, early))
