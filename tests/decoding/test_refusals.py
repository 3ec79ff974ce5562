"""Bad requests are refused when they are made, failures do not go on in silence, a scope may be larger than a turn."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.decoding.tiny import ATOMIC, TEXT, Tiny

from gnomon.base.errors import BudgetError, ConfigError, GnomonError, ModelError, TagError
from gnomon.decoding import sampling
from gnomon.decoding.engine import Engine
from gnomon.decoding.search import Votes, vote
from gnomon.decoding.slack import SlackStop, factory
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Chunk, Request, Trace

GOOD = Request("good", (20, 21), plan="steps", budget=6, max_answer_tokens=3)
LEAN = {2: 1.2, 4: 1.5, 5: 0.4}
ENDLESS = {2: -30.0, 5: -30.0}


@pytest.mark.parametrize(
    "bad",
    [
        {"spent": 1.5}, {"max_answer_tokens": 4.5}, {"n": 2.0}, {"n": 10**8}, {"temperature": "1"}, {"top_k": 2**63},
        {"temperature": 1e-38}, {"temperature": float("nan")}, {"prompt_ids": (1.5,)}, {"top_p": "all"}, {"n": True},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_at_once(bad: dict[str, Any]) -> None:
    with pytest.raises(GnomonError, match="given|ids"):
        replace(GOOD, **bad)


def test_lists_and_numpy_numbers_are_taken_as_what_they_are() -> None:
    request = Request("r", [np.int64(20), 21], plan="steps", budget=np.int64(6), max_answer_tokens=3)  # type: ignore[arg-type]
    assert request.prompt_ids == (20, 21) and type(request.budget) is int
    engine = Engine(Tiny("kinds", lean=LEAN), ATOMIC)
    assert engine.run([request])[0].ids == engine.run([replace(GOOD, id="r")])[0].ids


@pytest.mark.parametrize("field", ["prompt_ids", "think_prefix"])
@pytest.mark.parametrize("ident", [-1, 32, 10**6])
def test_ids_outside_the_vocabulary_are_refused_and_neighbours_decoded(field: str, ident: int) -> None:
    engine = Engine(Tiny("vocabulary", lean=LEAN), ATOMIC)
    refused: dict[str, GnomonError] = {}
    traces = engine.run([GOOD, replace(GOOD, id="bad", **{field: (20, ident)})], refused=refused)
    assert [t.id for t in traces] == ["good"] and f"id {ident}" in str(refused["bad"])


def test_a_prefix_is_judged_by_what_is_left_of_the_scope() -> None:
    engine = Engine(Tiny("left", context=400, lean=ENDLESS), ATOMIC)
    with pytest.raises(BudgetError, match="only 2 may be thought"):
        engine.check(replace(GOOD, budget=10, spent=8, think_prefix=(20,) * 6))
    (trace,) = engine.run([replace(GOOD, budget=10, spent=4, think_prefix=(20,) * 3)])
    assert (trace.budget_effective, trace.used, trace.overshoot) == (6, 6, 0)


def test_a_session_budget_may_be_larger_than_one_turn_has_room_for() -> None:
    engine = Engine(Tiny("large", lean=ENDLESS), ATOMIC)
    limit = engine.check(replace(GOOD, budget=None)).limit
    large = replace(GOOD, budget=1000)
    with pytest.raises(BudgetError, match="does not fit"):
        engine.check(large)
    (trace,) = engine.run([replace(large, scope="session")])
    assert (trace.used, trace.budget_effective, trace.budget_source) == (limit, limit, "limit")
    (rest,) = engine.run([replace(large, scope="session", spent=990)])
    assert rest.used == 10


def test_votes_with_a_total_use_all_of_it_in_a_scope_and_name_their_own_fault() -> None:
    engine = Engine(Tiny("total", lean=ENDLESS), ATOMIC, decode=lambda ids: " ".join(map(str, ids)))
    ask = replace(GOOD, budget=10, spent=4, temperature=1.0)
    (found,) = vote(engine, [ask], Votes(paths=5, rounds=0, total=20))
    assert [t.used for t in found.traces] == [4] * 5
    with pytest.raises(ConfigError, match="raise `total`"):
        vote(engine, [replace(ask, spent=0, think_prefix=(20, 21))], Votes(paths=5, rounds=0, total=5))


def test_a_raising_sink_stops_the_session_for_good() -> None:
    engine = Engine(Tiny("raise", lean=ENDLESS), ATOMIC)

    def sink(chunk: Chunk) -> None:
        if chunk.id == "b" and chunk.region == "think":
            raise KeyError("lost")

    session = engine.session(sink=sink)
    for name in "ab":
        session.submit(replace(GOOD, id=name))
    with pytest.raises(KeyError):
        while session.step():
            pass
    with pytest.raises(ConfigError, match="KeyError.*Open another session"):
        session.step()


def test_cancel_holds_for_the_request_that_was_there_and_leaves_nothing() -> None:
    engine = Engine(Tiny("again", lean=ENDLESS), ATOMIC)
    found: list[Trace] = []
    session = engine.session(on_trace=found.append)
    session.submit(replace(GOOD, id="a"))
    session.step()
    session.cancel("a")
    session.submit(replace(GOOD, id="a"))
    while session.step():
        pass
    assert sorted(t.finish for t in found) == ["length", "user"]
    for _ in range(100):
        session.cancel("a")
    assert not session._present


def test_a_run_inside_a_sink_leaves_the_outer_run_cancellable() -> None:
    engine = Engine(Tiny("nested", lean=ENDLESS), ATOMIC)
    inner: list[Trace] = []

    def sink(chunk: Chunk) -> None:
        if chunk.id == "outer" and not inner and chunk.region == "think":
            inner.extend(engine.run([replace(GOOD, id="inner")]))
        elif chunk.id == "outer" and chunk.region == "think":
            engine.cancel("outer")

    (trace,) = engine.run([replace(GOOD, id="outer", budget=30)], sink=sink)
    assert trace.finish == "user" and trace.used == 2 and inner[0].used == 6


def test_numbers_that_are_none_are_named_not_sampled() -> None:
    backbone = Tiny("nan", lean=LEAN)
    backbone.bias[22] = float("nan")
    with pytest.raises(ModelError, match=r"'good'.*NaN"):
        Engine(backbone, ATOMIC).run([GOOD])


def test_a_truncating_neighbour_does_not_touch_the_bits_of_a_row() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    keys = [11, 12, 13]
    plain = sampling.params([1.0, 0.7, 0.0], [0, 0, 0], [1.0, 1.0, 1.0], keys)
    mixed = sampling.params([1.0, 0.7, 0.0], [0, 5, 0], [1.0, 0.9, 1.0], keys)
    steps = np.arange(3, dtype=np.uint64)
    a, b = sampling.sample(logits, plain, steps), sampling.sample(logits, mixed, steps)
    for row in (0, 2):
        assert a[0][row] == b[0][row] and torch.equal(a[1][row], b[1][row])


def test_eased_tags_have_finite_log_probs_under_any_truncation() -> None:
    rules = factory(SlackStop(share=0.9, strength=30.0))
    asked = [
        replace(GOOD, id=str(i), budget=30, temperature=1.0, top_k=3 if i % 2 else 0, top_p=0.8, seed=i)
        for i in range(60)
    ]
    traces = Engine(Tiny("eased", lean={10: 2.0}), ATOMIC, rules=rules).run(asked)
    assert any(t.stop == "slack" for t in traces)
    assert all(np.isfinite(t.logprobs).all() for t in traces)


def test_an_answer_passes_its_cap_by_a_begun_tag_at_most() -> None:
    engine = Engine(Tiny("cap", lean={12: 2.5, 13: 2.5, 4: -30.0, 0: -30.0}), TEXT)
    asked = [replace(GOOD, id=str(i), temperature=1.2, seed=i, max_answer_tokens=2) for i in range(60)]
    traces = engine.run(asked)
    assert any(t.finish == "length" for t in traces)
    assert max(t.answer_tokens for t in traces) <= 2 + len(TEXT.end_answer) - 1


def test_contradicting_tags_are_refused_before_anything_is_decoded() -> None:
    with pytest.raises(TagError, match="already contains"):
        Engine(Tiny("tags"), replace(ATOMIC, transition=(16, 2)))
    with pytest.raises(TagError, match="could never be closed"):
        replace(ATOMIC, end_answer=(14, 2))
    with pytest.raises(TagError, match="cannot stand"):
        Engine(Tiny("tags"), TEXT).check(replace(GOOD, think_prefix=TEXT.answer))


def test_more_samples_than_slots_compute_a_long_prompt_once() -> None:
    backbone = Tiny("many-samples", context=220, lean=LEAN)
    tokens: list[int] = []
    plain = backbone.extend

    def counted(cache: Any, rows: Any, first: int = 0, **options: Any) -> Any:
        tokens.append(sum(map(len, rows)))
        return plain(cache, rows, first, **options)

    backbone.extend = counted  # type: ignore[method-assign]
    ask = replace(GOOD, prompt_ids=(20, 21, 22, 23) * 25, temperature=1.0, n=32)
    few = Engine(backbone, ATOMIC, max_batch=8).run([ask])
    assert sum(n >= 99 for n in tokens) == 1
    many = Engine(Tiny("many-samples", context=220, lean=LEAN), ATOMIC, max_batch=32).run([ask])
    assert [t.ids for t in few] == [t.ids for t in many]


def test_traces_may_be_trained_on_where_they_are_handed_over() -> None:
    weight = torch.nn.Parameter(torch.ones(1))

    def learn(trace: Trace) -> None:
        (weight * trace.used).sum().backward()

    layout: Layout = ATOMIC
    Engine(Tiny("learn", lean=ENDLESS), layout).run([GOOD], on_trace=learn)
    assert weight.grad is not None and float(weight.grad) == 6
