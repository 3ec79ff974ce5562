"""The engine on the shipped model: alone = in company, cached = full, engine = naive greedy, resumed = direct.

Tokens are equal except behind a step whose two best logits are closer than 1e-4; those rows are counted and few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.decoding.tiny import _draw
from torch import Tensor

from gnomon.base import seeds
from gnomon.decoding.engine import Engine
from gnomon.decoding.sampling import stream_key, uniforms
from gnomon.protocol.tags import STRATEGIES
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems

CLOSE = 1e-4


@pytest.fixture(scope="module")
def nano() -> Reasoner:
    return replace(Reasoner.load("nano"), decider=None)


@pytest.fixture(scope="module")
def asked(nano: Reasoner) -> list[Request]:
    """Mixed budgets, greedy and sampled, every strategy, all families."""
    out = []
    for i, problem in enumerate(problems("all", "test", "parity", 52)):
        r = seeds.rng("parity", i)
        sampled = i % 2 == 1
        out.append(
            nano.request(
                str(i),
                problem.prompt,
                plan=STRATEGIES[i // 2 % 4],
                budget=r.choice([0, 1, 6, 20, 60]),
                temperature=r.choice([0.6, 1.0, 1.3]) if sampled else 0.0,
                top_k=r.choice([0, 0, 5, 40]) if sampled else 0,
                top_p=r.choice([1.0, 1.0, 0.9, 0.7]) if sampled else 1.0,
                seed=i,
                max_answer_tokens=16,
            )
        )
    return out


@pytest.fixture(scope="module")
def traces(nano: Reasoner, asked: list[Request]) -> list[Trace]:
    return nano.engine(16).run(asked)


def full_logits(nano: Reasoner, trace: Trace) -> Tensor:
    """Logits [len(ids), V] in front of every id behind the prompt: one pass, no cache, no padding."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.ids]])
    with torch.no_grad():
        logits = nano.backbone.module(ids).logits[0]  # type: ignore[attr-defined]
    return logits[len(trace.prompt_ids) - 1 : -1]


def banned(nano: Reasoner, trace: Trace, at: int) -> list[int]:
    return sorted(nano.codec.layout.masked(at < trace.answer_span[0] - 1))


def gap(nano: Reasoner, trace: Trace, at: int) -> float:
    """Distance of the two best allowed logits in front of position `at`."""
    row = full_logits(nano, trace)[at].clone()
    row[banned(nano, trace, at)] = -torch.inf
    best = row.topk(2).values
    return float(best[0] - best[1])


def compare(nano: Reasoner, ours: Sequence[Trace], theirs: Sequence[Trace]) -> int:
    """Assert equality; returns how many rows part company at a near tie."""
    ties = 0
    for a, b in zip(ours, theirs, strict=True):
        if a.ids == b.ids:
            kept = slice(a.think_span[0] + max(a.resumed, b.resumed), None)
            assert (a.used, a.stop, a.finish, a.forced) == (b.used, b.stop, b.finish, b.forced)
            assert np.allclose(a.logprobs[kept], b.logprobs[kept], atol=1e-4)
            continue
        at = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)
        assert a.roles[at] == "sampled" and gap(nano, a, at) < CLOSE, (a.id, at)
        ties += 1
    return ties


def test_a_row_alone_equals_the_row_in_a_batch(nano: Reasoner, asked: list[Request], traces: list[Trace]) -> None:
    alone = nano.engine(1)
    ties = compare(nano, [alone.run([r])[0] for r in asked], traces)
    print(f"{len(asked)} rows, {ties} near ties")
    assert ties <= len(asked) // 20


def test_cached_steps_equal_one_full_forward_pass(nano: Reasoner, asked: list[Request], traces: list[Trace]) -> None:
    """Log-probs of all sampled tokens, recomputed in one pass at the same temperature, top-k and top-p.

    Their ratios, which importance weights of a trainer are made of, have mean 1 at every temperature.
    """
    checked = skipped = 0
    ratios: dict[float, list[float]] = {}
    for request, trace in zip(asked, traces, strict=True):
        logits = full_logits(nano, trace)
        for at, role in enumerate(trace.roles):
            if role == "sampled":
                want = recomputed(nano, request, trace, logits, at)
                checked, skipped = checked + 1, skipped + (want is None)
                assert want is None or abs(want - trace.logprobs[at]) < 1e-4, (trace.id, at)
                if want is not None:
                    ratios.setdefault(request.temperature, []).append(math.exp(want - trace.logprobs[at]))
            else:
                assert trace.logprobs[at] == 0.0
    print(f"{checked} log-probs, {skipped} of them at the edge of a truncation")
    assert checked > 300 and skipped <= checked // 50
    means = {heat: sum(found) / len(found) for heat, found in sorted(ratios.items())}
    print(f"mean ratio by temperature: {means}")
    assert set(means) == {0.0, 0.6, 1.0, 1.3} and all(abs(mean - 1.0) < 1e-3 for mean in means.values())


def recomputed(nano: Reasoner, request: Request, trace: Trace, logits: Tensor, at: int) -> float | None:
    """The log-prob of the token at `at`, the textbook way in float64; None where rounding decides what top-p keeps."""
    z = logits[at].double()
    z[banned(nano, trace, at)] = -torch.inf
    if request.temperature > 0:
        z = z / request.temperature
        if request.top_k:
            best = z.topk(request.top_k + 1).values
            if best[-2] - best[-1] < CLOSE:
                return None
            z[z < best[-2]] = -torch.inf
        if request.top_p < 1:
            order = z.argsort(descending=True)
            p = z.softmax(-1)[order]
            before = p.cumsum(-1) - p
            if float((before - request.top_p).abs().min()) < CLOSE:
                return None
            z[order[before >= request.top_p]] = -torch.inf
    return float(z.log_softmax(-1)[trace.ids[at]])


def test_the_engine_equals_naive_greedy_decoding(nano: Reasoner, asked: list[Request], traces: list[Trace]) -> None:
    """A full forward pass per token; the rule written out for one-token tags."""
    layout, ties, rows = nano.codec.layout, 0, 0
    end, close = layout.end_think[0], layout.end_answer[0]
    for request, trace in zip(asked, traces, strict=True):
        if request.temperature > 0 or int(request.budget or 0) > 20:
            continue
        rows += 1
        out, used, cap = [*layout.plan_ids(request.plan), *layout.think], 0, int(request.budget or 0)
        while used <= cap:
            token = greedy(nano, request, out, inside=True) if cap else end
            if token == end or token in layout.eos or used == cap:
                break
            out.append(token)
            used += 1
        out += [end, *layout.answer]
        for _ in range(int(request.max_answer_tokens or 0) + 1):
            token = greedy(nano, request, out, inside=False)
            out.append(token)
            if token == close or token in layout.eos:
                break
        if tuple(out[: len(trace.ids)]) != trace.ids:
            at = next(i for i, (x, y) in enumerate(zip(out, trace.ids, strict=False)) if x != y)
            assert gap(nano, trace, at) < CLOSE, (request.id, at)
            ties += 1
        else:
            assert trace.used == used and (trace.finish == "length" or len(out) == len(trace.ids))
    print(f"{rows} rows, {ties} near ties")
    assert rows >= 8 and ties <= 1, (rows, ties)


def greedy(nano: Reasoner, request: Request, out: list[int], inside: bool) -> int:
    with torch.no_grad():
        logits = nano.backbone.module(torch.tensor([[*request.prompt_ids, *out]])).logits[0, -1]  # type: ignore[attr-defined]
    return _draw(logits.double().numpy(), set(nano.codec.layout.masked(inside)), request, 0, 0)[0]


def test_sampled_tokens_follow_their_private_stream(nano: Reasoner, asked: list[Request], traces: list[Trace]) -> None:
    """At temperature alone the id is where the row's own uniform number falls in the full pass's distribution."""
    hits = misses = 0
    for request, trace in zip(asked, traces, strict=True):
        if request.temperature == 0 or request.top_k or request.top_p < 1:
            continue
        logits = full_logits(nano, trace)
        key = np.array([stream_key(request.seed, request.id, 0)], dtype=np.uint64)
        for at in [i for i, role in enumerate(trace.roles) if role == "sampled"]:
            z = logits[at].double()
            z[banned(nano, trace, at)] = -torch.inf
            cdf = (z / request.temperature).softmax(-1).cumsum(-1)
            u = uniforms(key, np.array([at - trace.think_span[0]], dtype=np.uint64))[0]
            near = float((cdf - u).abs().min())
            if int(torch.searchsorted(cdf, u, right=True)) == trace.ids[at]:
                hits += 1
            else:
                assert near < 1e-4, (request.id, at)
                misses += 1
    assert hits > 20 and misses <= hits // 20, (hits, misses)


def test_cuts_resumed_from_the_uncapped_thought_equal_direct_runs(nano: Reasoner) -> None:
    """What the sweep shares (decisions.md §7), on at least 100 cut rows: same answers and used counts."""
    items = problems("all", "test", "parity-sweep", 13)
    engine: Engine = nano.engine(32)
    full = [
        nano.request(f"{i}-{s}", p.prompt, plan=s, budget=80, use_prediction=False, max_answer_tokens=12)
        for i, p in enumerate(items)
        for s in ("steps", "verify", "decompose")
    ]
    direct, resumed = [], []
    for request, trace in zip(full, engine.run(full), strict=True):
        for budget in (1, 4, 8, 16, 32):
            if trace.used > budget:
                direct.append(replace(request, budget=budget))
                resumed.append(replace(direct[-1], think_prefix=trace.think_ids[:budget]))
    assert len(direct) >= 100
    ties = compare(nano, engine.run(resumed), engine.run(direct))
    print(f"{len(direct)} cut rows, {ties} parted at a top-2 gap below {CLOSE}")
    assert ties <= len(direct) // 50
