"""The gate of issue 3: a crowd of requests that join, leave and are cancelled at any step, tags of one to five tokens.

Random requests on a random two-layer model of a small vocabulary, so that tags are begun and broken all the time. What
was thought and answered is found again by looking back at the ids, without the controller and without its matcher.
"""

from __future__ import annotations

import functools
from collections import Counter
from random import Random

import pytest

from gnomon.base import seeds
from gnomon.decoding.engine import Engine
from gnomon.model.backbone import OwnBackbone
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.model.native import own_backbone
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace

VOCAB, CONTEXT = 40, 150
Tag = tuple[int, ...]


@functools.cache
def backbone() -> OwnBackbone:
    seeds.seed_torch("crowd")
    return own_backbone(
        Decoder(DecoderConfig(vocab_size=VOCAB, channels=32, layers=2, heads=2, streams=1, context=CONTEXT))
    )


def inside(ids: Tag, tag: Tag) -> bool:
    return any(ids[i : i + len(tag)] == tag for i in range(len(ids)))


def random_layout(r: Random) -> Layout:
    """Tags over six symbols that often share a beginning; none contains another."""
    while True:
        tags: list[Tag] = [tuple(r.randrange(1, 7) for _ in range(r.randint(1, 5))) for _ in range(5)]
        if r.random() < 0.5:
            tags[3] = (*tags[1][:-1], 7)
        if not any(inside(a, b) for a in tags for b in tags if a is not b):
            break
    think, end, answer, end_answer, also = tags
    return Layout(
        think=think,
        end_think=end,
        answer=answer,
        end_answer=end_answer,
        plans={"steps": tuple(r.randrange(10, VOCAB) for _ in range(r.randint(0, 3))), "direct": ()},
        eos=(8,),
        pad=0,
        end_think_also=(also,) if r.random() < 0.3 else (),
        transition=(9, 9) if r.random() < 0.3 else (),
        empty_plans=frozenset({"direct"}) if r.random() < 0.3 else frozenset(),
    )


def random_request(r: Random, ident: str) -> Request:
    sampled = r.random() < 0.6
    return Request(
        ident,
        tuple(r.randrange(10, VOCAB) for _ in range(r.randint(1, 30))),
        plan=r.choice(("steps", "steps", "direct")),
        budget=r.choice((0, 1, 2, 3, r.randint(4, 30), None)),
        temperature=r.choice((0.5, 1.0, 2.0)) if sampled else 0.0,
        top_k=r.choice((0, 0, 5)) if sampled else 0,
        top_p=r.choice((1.0, 0.8)) if sampled else 1.0,
        seed=r.randrange(100),
        n=r.choice((1, 1, 1, 2, 3)),
        max_answer_tokens=r.choice((1, 3, 6)),
    )


def judge(trace: Trace, layout: Layout, cap: int, seen: Counter[str]) -> None:
    """Everything again from the ids; raises on a breach."""
    seen[trace.stop] += 1
    if trace.finish == "user" and not trace.ids:
        seen["never begun"] += 1
        return
    ends = (layout.end_think, *layout.end_think_also)
    start = len(layout.plans[trace.plan]) + len(layout.think)
    ids, body = trace.ids, trace.ids[start:]
    assert ids[:start] == layout.plans[trace.plan] + layout.think
    closed = next((n for n in range(1, len(body) + 1) for t in ends if body[max(0, n - len(t)) : n] == t), None)
    if closed is None:
        assert trace.finish == "user"
        assert trace.roles[start:].count("sampled") <= cap + max(map(len, ends)) - 1
        return
    tag = max(len(t) for t in ends if body[:closed][-len(t) :] == t)
    thought = [role for role in trace.roles[start : start + closed - tag] if role == "sampled"]
    assert len(thought) == trace.used <= min(cap, trace.budget_effective), (trace.used, cap)
    for stray in (layout.answer, layout.end_answer):
        assert not inside(body[: closed - tag], stray), "a tag stands inside the thought"
    rest = body[closed:]
    if trace.finish != "user" or rest:
        assert rest[: len(layout.answer)] == layout.answer[: len(rest)]
    answer = rest[len(layout.answer) :]
    for stray in (*ends, layout.think, layout.answer):
        assert not inside(answer, stray), "a tag stands inside the answer"
    ended = [
        n for n in range(1, len(answer) + 1) if answer[max(0, n - len(layout.end_answer)) : n] == layout.end_answer
    ]
    assert not ended or ended == [len(answer)], "decoding went on behind the answer"
    assert (trace.finish == "end") == bool(ended)


def campaign(name: str, n: int) -> tuple[int, Counter[str]]:
    """n requests -> (traces, what was met). Requests join between steps, some are cancelled, waiting or running."""
    done, seen, traces = 0, Counter[str](), 0
    while done < n:
        r = seeds.rng("crowd", name, done)
        layout = random_layout(r)
        engine = Engine(backbone(), layout, max_batch=r.choice((1, 2, 5, 16, 48)))
        found: list[Trace] = []
        session = engine.session(on_trace=found.append)
        size = min(n - done, 250)
        waiting = [random_request(r, f"{name}-{done + i}") for i in range(size)]
        caps, samples, gone = {}, 0, set[str]()
        for request in waiting:
            room = engine.check(request)
            caps[request.id] = room.limit if request.budget is None else int(request.budget)
            samples += request.n
        queue, submitted = list(waiting), list[str]()
        while queue or session.pending or session.rows:
            for _ in range(min(len(queue), r.choice((0, 0, 1, 2, 12)))):
                request = queue.pop()
                session.submit(request)
                submitted.append(request.id)
            if submitted and r.random() < 0.05:
                gone.add(r.choice(submitted[-20:]))
                session.cancel(submitted[-1] if r.random() < 0.5 else next(iter(gone)))
                gone.add(submitted[-1])
            session.step()
        assert len(found) == samples, "every sample comes back once"
        assert len({(t.id, t.sample) for t in found}) == samples
        for trace in found:
            assert trace.finish != "user" or trace.id in gone
            judge(trace, layout, caps[trace.id], seen)
        done, traces = done + size, traces + samples
    return traces, seen


def test_a_crowd_of_two_thousand_keeps_every_budget() -> None:
    traces, seen = campaign("fast", 2000)
    assert traces > 2500 and min(seen[k] for k in ("natural", "hard", "limit", "user", "never begun")) > 0, seen


@pytest.mark.slow
def test_a_crowd_of_a_hundred_thousand_keeps_every_budget() -> None:
    traces, seen = campaign("slow", 100_000)
    print(f"{traces} traces of 100,000 requests, no breach; {dict(seen)}")


def test_the_judge_sees_a_breach() -> None:
    """The gate can fail: the same trace under a smaller cap, and with an end tag in its answer, is convicted."""
    layout = random_layout(seeds.rng("crowd", "judge"))
    request = Request("r", (20, 21), plan="steps", budget=9, temperature=1.0, max_answer_tokens=4)
    (trace,) = Engine(backbone(), layout).run([request])
    judge(trace, layout, 9, Counter())
    assert trace.used > 1
    with pytest.raises(AssertionError):
        judge(trace, layout, trace.used - 1, Counter())
    bad = list(trace.ids) + list(layout.end_think)
    with pytest.raises(AssertionError):
        judge(
            Trace(**{**vars_of(trace), "ids": tuple(bad), "roles": trace.roles + ("sampled",) * len(layout.end_think)}),
            layout, 9, Counter(),
        )  # fmt: skip


def vars_of(trace: Trace) -> dict[str, object]:
    return {name: getattr(trace, name) for name in trace.__dataclass_fields__}
