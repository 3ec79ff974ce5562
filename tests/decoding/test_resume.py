"""Resumed thinking (`think_prefix`), and when a confidence counts as calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.decoding.test_engine import CASES, LEAN, Heads, requests
from tests.decoding.tiny import ATOMIC, Tiny

from gnomon.base import seeds
from gnomon.base.errors import BudgetError, TagError
from gnomon.decoding.engine import Engine
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Chunk, Request


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_a_resumed_request_ends_as_the_direct_one(layout: Layout, lean: dict[int, float]) -> None:
    """From any point of its own thinking, greedy and sampled, in a batch with rows that resume nothing."""
    engine = Engine(Tiny("resume", lean=lean), layout, max_batch=16)
    asked = requests(80, "resume")
    direct = engine.run(asked)
    again = []
    for request, trace in zip(asked, direct, strict=True):
        keep = seeds.rng("resume", request.id).randint(0, trace.used)  # a forced transition stands behind these
        again.append(replace(request, think_prefix=trace.think_ids[:keep]))
    assert sum(bool(r.think_prefix) for r in again) > 30 and not all(r.think_prefix for r in again)
    for request, want, got in zip(again, direct, engine.run(again, record_taps=True), strict=True):
        assert (got.ids, got.roles, got.think_span, got.answer_span) == (
            want.ids, want.roles, want.think_span, want.answer_span,
        )  # fmt: skip
        assert (got.used, got.forced, got.stop, got.finish) == (want.used, want.forced, want.stop, want.finish)
        start, n = got.think_span[0], len(request.think_prefix)
        assert got.resumed == n and got.logprobs[start : start + n] == (0.0,) * n
        kept = [i for i in range(len(got.ids)) if not start <= i < start + n]
        assert np.allclose(np.array(got.logprobs)[kept], np.array(want.logprobs)[kept], atol=1e-4)


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_a_cut_keeps_the_prefix_of_the_uncapped_thought(layout: Layout, lean: dict[int, float]) -> None:
    """What a sweep does: the first B think tokens of an uncapped greedy run under budget B = the direct run under B."""
    engine = Engine(Tiny("cut", lean=lean), layout, max_batch=16)
    asked = [replace(r, budget=None) for r in requests(40, "cut", greedy=True)]
    cuts, resumed = [], []
    for request, full in zip(asked, engine.run(asked), strict=True):
        for budget in (0, 1, 3, 8, 20):
            if full.used > budget:
                cuts.append(replace(request, budget=budget, use_prediction=False))
                resumed.append(replace(cuts[-1], think_prefix=full.think_ids[:budget]))
    assert len(cuts) > 60
    assert [t.ids for t in engine.run(resumed)] == [t.ids for t in engine.run(cuts)]


def test_states_are_read_at_the_think_tag_not_behind_the_prefix() -> None:
    backbone = Tiny("resume taps", lean=LEAN)
    request = Request("r", (20, 21, 22), plan="steps", budget=9, think_prefix=(25, 26))
    (trace,) = Engine(backbone, ATOMIC).run([request], record_taps=True)
    want = backbone.extend(backbone.new_cache(1, 5), [[*request.prompt_ids, 7, 1]], taps=True)
    assert trace.taps is not None and np.allclose(trace.taps["think"], want.taps[0].numpy(), atol=1e-4)
    assert trace.think_ids[:2] == (25, 26) and trace.used <= 9


def test_the_prefix_counts_and_is_streamed() -> None:
    seen: list[Chunk] = []
    engine = Engine(Tiny("count", lean={2: -30.0, 5: -30.0}), ATOMIC)
    (trace,) = engine.run([Request("r", (20,), plan="steps", budget=3, think_prefix=(25, 26))], sink=seen.append)
    assert (trace.used, trace.stop) == (3, "hard") and tuple(c.token for c in seen) == trace.ids
    full = replace(Request("r", (20,), plan="steps", budget=2), think_prefix=(25, 26))
    assert engine.run([full])[0].used == 2


def test_prefixes_that_cannot_be_kept_are_refused() -> None:
    engine = Engine(Tiny("refused", lean=LEAN), ATOMIC)
    ask = Request("r", (20,), plan="steps", budget=2, think_prefix=(25, 26, 27))
    with pytest.raises(BudgetError, match=r"think prefix has 3 tokens, but only 2"):
        engine.run([ask])
    for bad in (2, 5, 1, 3, 0):  # end tag, end of sequence, think tag, answer tag, padding
        with pytest.raises(TagError, match=f"holds id {bad}"):
            engine.run([replace(ask, think_prefix=(25, bad))])


def test_calibrated_needs_the_clipped_prediction_as_the_effective_cap() -> None:
    """decisions.md §4: the card holds at its own operating point only. The stub predicts 6 under `steps`."""
    heads = Heads()
    engine = Engine(Tiny("calibrated", lean={2: -30.0, 5: -30.0}), ATOMIC, metacog=heads)
    tight = Engine(Tiny("calibrated", lean={2: -30.0, 5: -30.0}), ATOMIC, metacog=heads, max_think=4)
    ask = Request("r", (20, 21), plan="steps")

    def facts(engine: Engine, request: Request) -> tuple[int, str, bool, bool, bool]:
        (trace,) = engine.run([request])
        told = heads.log["after"][-1][1]
        known = (trace.calibrated, trace.confidence_before is not None, told == [True])
        return trace.budget_effective, trace.budget_source, *known

    held = (True, True, True)
    assert facts(engine, ask) == (6, "predicted", *held)
    assert facts(engine, replace(ask, budget=50)) == (6, "predicted", *held)  # above the prediction: it decides
    assert facts(engine, replace(ask, budget=6)) == (6, "predicted", *held)
    lost = (False, False, False)
    assert facts(engine, replace(ask, budget=5)) == (5, "requested", *lost)
    assert facts(tight, ask) == (4, "limit", *lost)  # the limit holds the cap below the prediction
    assert facts(engine, replace(ask, think_prefix=(25,) * 8)) == (8, "predicted", *lost)  # thought before: above it
    assert facts(engine, replace(ask, think_prefix=(25,) * 5)) == (6, "predicted", *held)
