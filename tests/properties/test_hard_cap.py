"""The gate of issue 2: no request ever thinks more than its effective budget, whatever stands beside it.

Random requests on a random model of our own kind: batches of 1 to 64, mixed budgets with 0, 1, large, none and
predicted ones, greedy and sampled, ragged prompts, resumed thoughts. Everything is recounted from the ids.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests import own
from tests.own import Layer, Said
from torch import Tensor

from gnomon.base import seeds
from gnomon.decoding.engine import Engine
from gnomon.model.backbone import OwnBackbone
from gnomon.protocol.layout import Layout
from gnomon.protocol.tags import STRATEGIES
from gnomon.protocol.trace import Request, Trace

CONTEXT = 144


class Guesses(Layer):
    """A metacognitive layer that predicts anything from nothing to far above the context, out of the states."""

    def plan(self, taps: Tensor) -> list[Said]:
        return [Said(plan=STRATEGIES[int(x.abs().sum() * 1e3) % 4], probs={}) for x in taps]

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: Sequence[str] | None = None) -> list[Said]:
        guesses = [(0, 1, 2, 7, 30, 500)[int(x.abs().sum() * 1e3) % 6] for x in taps]
        return [Said(predicted=float(g), clipped=g) for g in guesses]

    def after(
        self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: Sequence[bool] | None = None
    ) -> list[Said]:
        return [Said() for _ in plans]


def make_request(name: str, number: int, vocab: int, layout: Layout) -> Request:
    r = seeds.rng("hard-cap", name, number)
    sampled = r.random() < 0.5
    ordinary = range(40, vocab)
    request = Request(
        f"{name}-{number}",
        tuple(r.choice(ordinary) for _ in range(r.randint(1, 60))),
        plan=r.choice([*STRATEGIES, "predicted"]),
        budget=0,
        temperature=r.choice([0.3, 0.8, 1.0, 1.6]) if sampled else 0.0,
        top_k=r.choice([0, 0, 1, 20]) if sampled else 0,
        top_p=r.choice([1.0, 0.95, 0.4]) if sampled else 1.0,
        seed=r.randrange(1000),
        max_answer_tokens=r.choice([1, 3, 8]),
        use_prediction=r.random() < 0.5,
    )
    limit = Engine(backbone(), layout).check(replace(request, plan="steps")).limit
    budget = r.choice([0, 0, 1, 1, 2, 3, r.randint(4, 24), limit - 1, limit, None, "predicted"])
    request = replace(request, budget=budget)
    most = budget if isinstance(budget, int) else limit
    if most and r.random() < 0.15:
        request = replace(request, think_prefix=tuple(r.choice(ordinary) for _ in range(r.randint(1, min(most, 12)))))
    return request


@functools.cache
def backbone() -> OwnBackbone:
    return OwnBackbone(own.decoder("hard-cap", context=CONTEXT, streams=1))


def overshoot(trace: Trace, request: Request, layout: Layout, limit: int) -> int:
    """Think tokens above the cap, recounted from the ids alone; other breaches fail here."""
    ids = list(trace.ids)
    start = ids.index(layout.think[0]) + 1
    end = ids.index(layout.end_think[0])
    used = end - start
    assert used == trace.used == trace.roles[start:end].count("sampled")
    assert ids.count(layout.end_think[0]) == ids.count(layout.think[0]) == 1  # no second block, no second end tag
    cap = request.budget if isinstance(request.budget, int) else limit
    assert trace.budget_effective <= max(cap, 0)
    return max(0, used - min(cap, trace.budget_effective))


def campaign(name: str, n: int) -> tuple[int, int, Counter[str]]:
    """Decode n random requests in random batches -> (requests, sum of overshoots, stop causes)."""
    layout = own.layout()
    vocab = backbone().vocab_size
    done, over, stops = 0, 0, Counter[str]()
    while done < n:
        r = seeds.rng("hard-cap-batch", name, done)
        batch = r.choice([1, 2, 3, 5, 8, 16, 31, 48, 64])
        size = min(n - done, batch * r.choice([1, 2]) if batch < 16 else batch)
        asked = [make_request(name, done + i, vocab, layout) for i in range(size)]
        engine = Engine(backbone(), layout, Guesses(), max_batch=batch)
        for request, trace in zip(asked, engine.run(asked), strict=True):
            limit = engine.check(request).limit
            over += overshoot(trace, request, layout, limit)
            assert trace.id == request.id and trace.overshoot == 0
            stops[trace.stop] += 1
        done += size
    return done, over, stops


def test_no_overshoot_in_a_few_hundred_requests() -> None:
    done, over, stops = campaign("fast", 400)
    assert (done, over) == (400, 0) and {"hard", "natural", "limit"} <= set(stops), stops


@pytest.mark.slow
def test_no_overshoot_in_ten_thousand_requests() -> None:
    done, over, stops = campaign("slow", 10_000)
    print(f"{done} requests, {over} think tokens above the cap; stops {dict(stops)}")
    assert (done, over) == (10_000, 0) and {"hard", "natural", "limit"} <= set(stops)


def test_the_recount_would_see_an_overshoot() -> None:
    """The gate can fail: a trace that thought one token more than it was allowed is counted."""
    layout = own.layout()
    request = Request("r", (50, 51), plan="steps", budget=3, max_answer_tokens=2, think_prefix=(60, 61, 62))
    (trace,) = Engine(backbone(), layout).run([request])
    assert overshoot(trace, request, layout, 9) == 0
    told = replace(trace, budget_effective=2)
    assert overshoot(told, replace(request, budget=2, think_prefix=()), layout, 9) == 1
