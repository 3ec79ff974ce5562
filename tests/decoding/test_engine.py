"""The engine against a slow oracle, alone against in company, and its refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.decoding.tiny import ATOMIC, TEXT, Expected, Tiny, oracle
from tests.own import Layer, Said
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import BudgetError, ConfigError, GnomonError, UnknownNameError
from gnomon.decoding.engine import Engine
from gnomon.decoding.session import Session
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Chunk, Request, Trace

LEAN = {2: 1.2, 4: 1.5, 5: 0.4}
TEXT_LEAN = {12: 1.5, 13: 1.5, 2: 1.0, 4: 1.2, 18: 0.5, 0: 0.3}
CASES = [(ATOMIC, LEAN), (TEXT, TEXT_LEAN)]


def requests(n: int, name: str, greedy: bool | None = None) -> list[Request]:
    """Random requests: ragged prompts, budgets with 0, 1, large and none, greedy and sampled."""
    out = []
    for i in range(n):
        r = seeds.rng("engine-test", name, i)
        sampled = r.random() < 0.6 if greedy is None else not greedy
        out.append(
            Request(
                id=f"{name}-{i}",
                prompt_ids=tuple(r.randrange(19, 32) for _ in range(r.randint(1, 40))),
                plan=r.choice(["direct", "steps"]),
                budget=r.choice([0, 1, 2, 3, 5, 8, 13, 21, 40, None]),
                temperature=r.choice([0.5, 1.0, 1.4]) if sampled else 0.0,
                top_k=r.choice([0, 0, 3, 8]) if sampled else 0,
                top_p=r.choice([1.0, 0.9, 0.5]) if sampled else 1.0,
                seed=r.randrange(5),
                max_answer_tokens=r.choice([1, 4, 12]),
            )
        )
    return out


def agree(trace: Trace, want: Expected) -> None:
    assert list(trace.ids) == want.ids
    assert np.allclose(trace.logprobs, want.logprobs, atol=1e-4)
    assert (trace.used, trace.forced, trace.stop, trace.finish) == (want.used, want.forced, want.stop, want.finish)


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_engine_equals_the_naive_oracle(layout: Layout, lean: dict[int, float], greedy: bool) -> None:
    backbone = Tiny("oracle", lean=lean)
    engine = Engine(backbone, layout, max_batch=8)
    asked = requests(24, f"oracle-{greedy}", greedy)
    for request, trace in zip(asked, engine.run(asked), strict=True):
        room = engine.check(request)
        agree(trace, oracle(backbone, layout, request, room.limit, int(request.max_answer_tokens or 0)))


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_a_row_alone_equals_the_row_in_a_batch(layout: Layout, lean: dict[int, float]) -> None:
    backbone = Tiny("alone", lean=lean)
    asked = requests(40, "alone")
    together = Engine(backbone, layout, max_batch=16).run(asked)
    alone = Engine(backbone, layout, max_batch=1)
    for request, trace in zip(asked, together, strict=True):
        (single,) = alone.run([request])
        assert single.ids == trace.ids and single.stop == trace.stop
        assert np.allclose(single.logprobs, trace.logprobs, atol=1e-4)


def test_rows_without_a_budget_do_not_notice_budgeted_neighbours() -> None:
    backbone = Tiny("neighbours", lean=LEAN)
    free = [replace(r, budget=None) for r in requests(6, "free")]
    capped = [replace(r, budget=i % 3) for i, r in enumerate(requests(10, "capped"))]
    mixed = [x for pair in zip(free, capped, strict=False) for x in pair] + capped[6:]
    lone = {t.id: t for t in Engine(backbone, ATOMIC, max_batch=16).run(free)}
    for trace in Engine(backbone, ATOMIC, max_batch=16).run(mixed):
        if trace.id in lone:
            assert trace.ids == lone[trace.id].ids and trace.think_ids == lone[trace.id].think_ids


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_no_overshoot_and_no_leak_in_five_hundred_requests(layout: Layout, lean: dict[int, float]) -> None:
    engine = Engine(Tiny("many", lean=lean), layout, max_batch=32)
    asked = requests(500, "many")
    traces = engine.run(asked)
    causes = set()
    for request, trace in zip(asked, traces, strict=True):
        trace.check()
        causes.add((trace.stop, trace.finish))
        assert trace.overshoot == 0 and trace.id == request.id
        if request.budget is not None:
            assert trace.budget_effective == request.budget and trace.used <= int(request.budget)
        sampled = [r == "sampled" for r in trace.roles[trace.think_span[0] : trace.think_span[1]]]
        assert sum(sampled) == trace.used  # the controller's count equals a recount of the trace
        assert (trace.stop in ("hard", "limit")) <= (trace.forced > 0)
        assert trace.answer_tokens <= int(request.max_answer_tokens or 0) + len(layout.end_answer) - 1
        for tag in (layout.end_think, layout.think):
            assert not contains(trace.answer_ids, tag)
        assert not contains(trace.think_ids, layout.end_think)
    assert {stop for stop, _ in causes} >= {"hard", "natural"} and {f for _, f in causes} == {"end", "eos", "length"}


def contains(ids: Sequence[int], tag: Sequence[int]) -> bool:
    return any(tuple(ids[i : i + len(tag)]) == tuple(tag) for i in range(len(ids)))


def test_unlimited_reaches_the_limit_and_says_so() -> None:
    backbone = Tiny("limit", lean={2: -30.0, 5: -30.0})
    engine = Engine(backbone, ATOMIC)
    (trace,) = engine.run([Request("r", (20, 21), plan="steps", budget=None)])
    limit = engine.check(Request("r", (20, 21), plan="steps", budget=None)).limit
    assert (trace.used, trace.stop, trace.budget_source) == (limit, "limit", "limit")
    capped = Engine(backbone, ATOMIC, max_think=7).run([Request("r", (20, 21), plan="steps", budget=None)])[0]
    assert (capped.used, capped.stop) == (7, "limit") and capped.ids[:9] == trace.ids[:9]


def test_an_eos_inside_the_block_closes_it_naturally() -> None:
    backbone = Tiny("eos", lean={5: 60.0})
    (trace,) = Engine(backbone, ATOMIC).run([Request("r", (20, 21), plan="steps", budget=9)])
    assert (trace.stop, trace.used, trace.forced) == ("natural", 0, 1)
    assert trace.ids == (7, 1, 2, 3, 5) and trace.finish == "eos" and not trace.answered


def test_empty_plans_close_at_once_without_being_cut() -> None:
    layout = replace(ATOMIC, empty_plans=frozenset({"direct"}))
    (trace,) = Engine(Tiny("empty", lean=LEAN), layout).run([Request("r", (20,), plan="direct", budget=None)])
    assert (trace.stop, trace.used, trace.ids[:4]) == ("natural", 0, (6, 1, 2, 3))


def test_equal_prompts_share_the_prefill_and_samples_differ() -> None:
    backbone = Tiny("share", lean=LEAN)
    request = Request("r", (20, 21, 22), plan="steps", budget=20, temperature=1.2, n=6)
    traces = Engine(backbone, ATOMIC).run([request, replace(request, id="s", n=2)])
    assert backbone.widths[:2] == [1, 8]
    assert [(t.id, t.sample) for t in traces] == [("r", i) for i in range(6)] + [("s", 0), ("s", 1)]
    assert len({t.ids for t in traces}) > 3
    again = Engine(Tiny("share", lean=LEAN), ATOMIC, max_batch=3).run([request])
    assert [t.ids for t in again] == [t.ids for t in traces[:6]]


def test_refusals_come_with_numbers_and_leave_neighbours_unharmed() -> None:
    engine = Engine(Tiny("refuse", lean=LEAN), ATOMIC)
    good = Request("good", (20, 21), plan="steps", budget=4)
    big = Request("big", (20,) * 20, plan="steps", budget=500)
    long = Request("long", (20,) * 200, plan="steps", budget=4)
    with pytest.raises(BudgetError, match=r"'big'.*500 does not fit.*context 160 - prompt 20"):
        engine.run([good, big])
    with pytest.raises(BudgetError, match="the prompt has 200 tokens but the context holds 160"):
        engine.run([long])
    refused: dict[str, GnomonError] = {}
    traces = engine.run([big, good, long], refused=refused)
    assert sorted(refused) == ["big", "long"] and [t.ids for t in traces] == [t.ids for t in engine.run([good])]
    with pytest.raises(ConfigError, match="no trained heads"):
        engine.run([Request("p", (20,))])
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        engine.run([replace(good, plan="stepps")])
    for bad in ({"budget": -1}, {"budget": True}, {"budget": "lots"}):
        with pytest.raises(BudgetError):
            replace(good, **bad)


def test_cancel_stops_one_request_and_says_user() -> None:
    engine = Engine(Tiny("cancel", lean={2: -30.0, 5: -30.0}), ATOMIC)
    seen: list[Chunk] = []

    def sink(chunk: Chunk) -> None:
        seen.append(chunk)
        if chunk.id == "a" and chunk.region == "think":
            engine.cancel("a")

    asked = [Request(i, (20, 21), plan="steps", budget=10, max_answer_tokens=3) for i in "ab"]
    a, b = engine.run(asked, sink=sink)
    assert (a.stop, a.finish, a.used, a.answer_tokens) == ("user", "user", 1, 0)
    assert b.used == 10 and b.ids == engine.run(asked)[1].ids
    assert tuple(c.token for c in seen if c.id == "b") == b.ids


class Heads(Layer):
    """Says what its taps say, so that a wrong row or position shows."""

    def __init__(self) -> None:
        self.log: dict[str, list[Any]] = {"plan": [], "budget": [], "after": []}

    def plan(self, taps: Tensor) -> list[Said]:
        self.log["plan"].append(taps.clone())
        return [Said(plan="steps" if row.sum() > 0 else "direct", probs={"steps": 1.0}) for row in taps]

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None) -> list[Said]:
        assert len(plans) == len(predicted_plans or []) == len(taps)
        return [Said(predicted=6.4, clipped=6 if plan == "steps" else 2) for plan in plans]

    def after(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[Said]:
        self.log["after"].append((list(used), list(calibrated or [])))
        assert len(plans) == len(used) == len(taps)
        return [Said(raw=float(u)) for u in used]


def test_predictions_bind_but_never_above_request_or_limit() -> None:
    heads = Heads()
    engine = Engine(Tiny("heads", lean={2: -30.0, 5: -30.0}), ATOMIC, metacog=heads)
    ask = lambda name, budget, **k: Request(name, (20, 21, 22), plan="steps", budget=budget, **k)  # noqa: E731
    traces = engine.run(
        [
            ask("p", "predicted"),
            ask("low", 3),
            ask("high", 50),
            ask("fixed", 9, use_prediction=False),
            ask("none", None),
        ]
    )
    got = [(t.budget_effective, t.budget_source, t.used) for t in traces]
    limit = engine.check(ask("none", None)).limit
    assert got[:4] == [(6, "predicted", 6), (3, "requested", 3), (6, "predicted", 6), (9, "requested", 9)]
    assert got[4] == (limit, "limit", limit)
    assert [t.calibrated for t in traces] == [True, False, True, False, False]
    assert all(t.confidence_after_raw == t.used for t in traces)
    report = traces[2].report()
    assert report["budget"] == {
        "requested": 50, "predicted": 6.4, "effective": 6, "used": 6, "forced": 1, "source": "predicted",
        "scope": "turn",
    }  # fmt: skip
    assert report["stop"] == "hard" and report["confidence"] == {"before": 0.5, "after": 0.5, "calibrated": True}


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_taps_are_read_at_the_last_prompt_token_the_think_tag_and_the_end_tag(
    layout: Layout, lean: dict[int, float]
) -> None:
    backbone = Tiny("taps", lean=lean)
    asked = requests(20, "taps")
    traces = Engine(backbone, layout, max_batch=8).run(asked, record_taps=True)
    for trace in traces:
        tag = next(n for n in range(1, 4) if trace.answer_span[0] - n - len(layout.answer) == trace.think_span[1])
        ends = {"prompt": 0, "think": trace.think_span[0], "end": trace.think_span[1] + tag}
        for site, n in ends.items():
            ids = [*trace.prompt_ids, *trace.ids[:n]]
            want = backbone.extend(backbone.new_cache(1, len(ids)), [ids], taps=True)
            assert trace.taps is not None and trace.taps[site].dtype == np.float32
            assert np.allclose(trace.taps[site], want.taps[0].numpy(), atol=1e-4), (trace.id, site)


def test_states_are_read_only_where_a_row_needs_them() -> None:
    backbone = Tiny("cost", lean={2: -30.0, 5: -30.0})
    asked = [Request(str(i), (20, 21), plan="steps", budget=12, max_answer_tokens=5) for i in range(4)]
    Engine(backbone, ATOMIC).run(asked, record_taps=True)
    assert backbone.tapped == 3
    Engine(backbone, ATOMIC).run(asked)
    assert backbone.tapped == 3


def test_boundaries_are_recorded_with_the_tokens_used() -> None:
    backbone = Tiny("boundary", lean={10: 1.5})
    (trace,) = Engine(backbone, ATOMIC).run(
        [Request("r", (20, 21), plan="steps", budget=12, temperature=1.0)], record_boundaries=True
    )
    places = [i + 1 for i, token in enumerate(trace.think_ids) if token in ATOMIC.boundary]
    assert places and [used for used, _ in trace.boundaries or []] == places


class Late:
    """A sink that submits waiting requests while others are decoded."""

    def __init__(self, waiting: list[Request]) -> None:
        self.waiting, self.tokens = waiting, 0
        self.session: Session | None = None

    def __call__(self, chunk: Chunk) -> None:
        self.tokens += 1
        if self.waiting and self.tokens % 7 == 0:
            assert self.session is not None
            self.session.submit(self.waiting.pop())


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_rows_that_join_between_steps_equal_the_rows_alone(layout: Layout, lean: dict[int, float]) -> None:
    backbone = Tiny("join", lean=lean)
    asked = requests(60, "join")
    sink, found = Late(asked[3:]), dict[str, Trace]()
    session = Engine(backbone, layout, max_batch=5).session(sink=sink, on_trace=lambda t: found.update({t.id: t}))
    sink.session = session
    for request in asked[:3]:
        session.submit(request)
    while session.step() or sink.waiting:
        if not session.rows and sink.waiting:
            session.submit(sink.waiting.pop())
    assert session.cache is not None and len(found) == len(asked)
    alone = Engine(backbone, layout, max_batch=1)
    for request in asked:
        (single,) = alone.run([request])
        assert single.ids == found[request.id].ids and single.stop == found[request.id].stop
        assert np.allclose(single.logprobs, found[request.id].logprobs, atol=1e-4)


def test_short_rows_do_not_wait_for_long_ones() -> None:
    backbone = Tiny("leave", lean={2: -30.0, 5: -30.0})
    asked = [Request(str(i), (20, 21), plan="steps", budget=2 if i % 4 else 90, max_answer_tokens=1) for i in range(16)]
    Engine(backbone, ATOMIC, max_batch=4).run(asked)
    assert len(backbone.widths) < 150, "the four long ones run side by side; waves in order would need 4 x 90 steps"
    order: list[str] = []
    session = Engine(backbone, ATOMIC, max_batch=4).session(on_trace=lambda t: order.append(t.id))
    for request in [asked[0], *(r for r in asked if r.budget == 2)]:
        session.submit(request)
    while session.step():
        pass
    assert order[-1] == "0", "every short one overtakes the long one that was there first"


def test_cancelled_rows_that_wait_are_finished_without_decoding() -> None:
    backbone = Tiny("cancel-wait", lean=LEAN)
    found: list[Trace] = []
    session = Engine(backbone, ATOMIC, max_batch=1).session(on_trace=found.append)
    for name in "abc":
        session.submit(Request(name, (20, 21), plan="steps", budget=3, max_answer_tokens=2))
    session.cancel("b")
    while session.step():
        pass
    assert [(t.id, t.finish, t.stop) for t in found if t.id == "b"] == [("b", "user", "user")]
    assert {t.id for t in found} == set("abc") and all(t.used == 0 for t in found if t.id == "b")
    session.submit(Request("b", (20, 21), plan="steps", budget=3, max_answer_tokens=2))
    while session.step():
        pass
    assert found[-1].id == "b" and found[-1].finish != "user", "a name is free again once its request has gone"
