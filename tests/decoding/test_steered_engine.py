"""The engine with a layer that acts: identity, a naive pass over every trace, company, resumption, states, policies."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import own
from tests.decoding.steered import Naive, fresh, heads_for, inside, judge, steered, text_decoder
from tests.decoding.test_engine import LEAN, TEXT_LEAN, requests
from tests.decoding.tiny import ATOMIC, TEXT, Tiny, _begun
from tests.training.test_thoughts import random_steerer

from gnomon.base import seeds
from gnomon.base.errors import ModelError
from gnomon.decoding.engine import Engine
from gnomon.metacognition.decide import BudgetDecision, Decider
from gnomon.metacognition.policy import GRID, Sampling
from gnomon.model.backbone import OwnBackbone
from gnomon.model.native import NativeBackbone, own_backbone, supported
from gnomon.model.steering import Steering
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems
from gnomon.training.thoughts import thought_of

BASES: dict[str, Any] = {
    "tiny atomic": lambda: (Tiny("steered", lean={**LEAN, 2: 0.4, 5: -1.0}), ATOMIC),
    "tiny text": lambda: (Tiny("steered", lean=TEXT_LEAN), TEXT),
    "own": lambda: (OwnBackbone(text_decoder()), TEXT),
    "own fast": lambda: (own_backbone(text_decoder()), TEXT),
    "own fast plain": lambda: (own_backbone(text_decoder(1)), TEXT),
}
EMPTY = frozenset({"direct"})


@functools.cache
def base(name: str) -> tuple[Any, Layout]:
    made: tuple[Any, Layout] = BASES[name]()
    return made


def asked(name: str, n: int) -> list[Request]:
    """As in test_engine, and some with several samples or a prediction; fewer for the slow base."""
    out, n = [], n // 2 if name.endswith("own") else n
    for i, request in enumerate(requests(n, f"steered {name}")):
        change: dict[str, Any] = {"n": 3} if i % 6 == 1 else {}
        change |= {"plan": "predicted", "budget": "predicted"} if i % 6 == 2 else {}
        out.append(replace(request, **change))
    return out


def pairs(found: list[Trace], given: list[Request]) -> list[tuple[Trace, Request]]:
    by = {r.id: r for r in given}
    return [(t, by[t.id]) for t in found]


def left_again(trace: Trace, layout: Layout) -> bool:
    """The model began an end tag of several tokens inside its thought, and left it."""
    tags = (layout.end_think, *layout.end_think_also)
    thought = trace.think_ids
    return any(
        _begun(thought[: at + 1], tags)[0] and trace.roles[trace.think_span[0] + at] == "sampled"
        for at in range(len(thought))
    )


@pytest.mark.parametrize("name", BASES)
def test_an_untrained_steerer_changes_no_bit(name: str) -> None:
    backbone, layout = base(name)
    heads, given = heads_for(backbone), asked(name, 24)
    bare, layer = (Engine(backbone, layout, d, max_batch=8).run(given) for d in (Decider(heads), fresh(heads)))
    assert bare == layer and sum(t.used for t in bare) > 50
    acts = Engine(backbone, layout, steered(heads), max_batch=8).run(given)
    assert sum(a.ids != b.ids or a.logprobs != b.logprobs for a, b in zip(acts, bare, strict=True)) > len(bare) / 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in BASES),
        *((name, {"gate_layer": None}) for name in ("tiny text", "own fast")),
        *((name, {"adapter_layers": (), "gate_layer": 0}) for name in ("tiny atomic", "own fast plain")),
    ],
)
def test_every_token_is_that_of_a_naive_pass(name: str, options: dict[str, Any]) -> None:
    """Caps that cut, transitions, tags begun and left, budget 0, empty blocks, samples, rows that come and go."""
    backbone, layout = base(name)
    decider, given = steered(heads_for(backbone), **options), asked(name, 20)
    naive, seen = Naive(backbone, layout, decider), Counter[str]()
    for closed in (frozenset[str](), EMPTY):
        made = replace(layout, empty_plans=closed)
        ask = given if not closed else [replace(r, plan="direct") for r in given[:4]]
        for trace, request in pairs(Engine(backbone, made, decider, max_batch=6).run(ask), ask):
            logits, _ = naive(trace)
            seen["drawn"] += judge(trace, request, logits, made)
            trained = thought_of(trace, made, decider.plans).inside[len(trace.prompt_ids) :]
            assert list(trained) == inside(trace, made), "training steers the same positions"
            seen[trace.stop] += 1
            seen["steered"] += sum(inside(trace, made))
            seen["left"] += left_again(trace, made)
            seen["empty"] += not trace.used
            seen["transition"] += bool(layout.transition) and trace.stop == "hard"
    assert seen["drawn"] > 150 and seen["steered"] > 40 and min(seen[c] for c in ("hard", "natural", "empty")) > 1
    if layout is TEXT:
        assert seen["left"] > 1 and seen["transition"] > 2


def test_the_naive_pass_notices_a_wrong_mask() -> None:
    """The oracle above can fail: an engine that does not steer is not what it computes."""
    backbone, layout = base("tiny text")
    heads, given = heads_for(backbone), asked("tiny text", 20)
    naive = Naive(backbone, layout, steered(heads))
    wrong = [
        (t, r) for t, r in pairs(Engine(backbone, layout, Decider(heads), max_batch=6).run(given), given) if t.used > 2
    ]
    caught = 0
    for trace, request in wrong:
        try:
            judge(trace, request, naive(trace)[0], layout)
        except AssertionError:
            caught += 1
    assert caught > 0.8 * len(wrong) > 4


@pytest.mark.skipif(not supported(text_decoder()), reason="no compiled kernel")
@pytest.mark.parametrize("name", ["own fast", "own fast plain"])
def test_alone_and_in_company_bit_for_bit(name: str) -> None:
    backbone, layout = base(name)
    assert isinstance(backbone, NativeBackbone)
    decider, given = steered(heads_for(backbone)), asked(f"company {name}", 24)
    together = Engine(backbone, layout, decider, max_batch=7).run(given)
    alone = Engine(backbone, layout, decider, max_batch=1)
    assert [t for r in given for t in alone.run([r])] == together
    # Neighbours that are not steered: half of the rows close at once.
    mixed = [replace(r, budget=0) if i % 2 else r for i, r in enumerate(given)]
    want = {(t.id, t.sample): t for t in together}
    for trace in Engine(backbone, layout, decider, max_batch=7).run(mixed):
        if int(trace.id.rsplit("-", 1)[1]) % 2 == 0:
            assert trace == want[trace.id, trace.sample]


@pytest.mark.parametrize("name", ["tiny text", "own"])
def test_alone_and_in_company_within_rounding(name: str) -> None:
    backbone, layout = base(name)
    decider, given = steered(heads_for(backbone)), asked(f"company {name}", 16)
    together = Engine(backbone, layout, decider, max_batch=6).run(given)
    alone = Engine(backbone, layout, decider, max_batch=1)
    for one, other in zip([t for r in given for t in alone.run([r])], together, strict=True):
        assert (one.ids, one.stop, one.used) == (other.ids, other.stop, other.used)
        assert np.allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", ["own", "own fast"])
def test_a_row_does_not_notice_whether_its_neighbours_are_steered(name: str) -> None:
    """decisions.md §7, within one bucket: the same shape of every step, the neighbours' thoughts closed or going on."""
    backbone, layout = base(name)
    decider = steered(heads_for(backbone))
    still = replace(layout, end_think=(1, 1, 1), end_think_also=(), end_answer=(1, 1, 2), eos=(3,))
    prompts = [tuple(seeds.rng("still", i).randrange(19, 32) for _ in range(9)) for i in range(4)]

    def run(budget: int) -> Trace:
        given = [
            Request(f"{i}", p, plan="steps", budget=budget, max_answer_tokens=50, temperature=1.0, use_prediction=False)
            for i, p in enumerate(prompts)
        ]
        given[0] = replace(given[0], budget=20, max_answer_tokens=15)  # the first to leave: four rows at every step
        engine = Engine(backbone, still, decider, max_batch=4)
        engine.masks[:, still.eos] = -torch.inf
        return engine.run(given)[0]

    want = run(20)
    assert want.used == 20 and all(run(budget) == want for budget in (0, 3, 11))


@pytest.mark.parametrize("name", BASES)
def test_a_resumed_thought_is_the_uncut_one(name: str) -> None:
    backbone, layout = base(name)
    decider = steered(heads_for(backbone))
    engine = Engine(backbone, layout, decider, max_batch=8)
    given = [replace(r, n=1) for r in asked(f"resume {name}", 30)]
    direct, again = engine.run(given), []
    for request, trace in zip(given, direct, strict=True):
        keep = seeds.rng("steered-resume", request.id).randint(0, trace.used)
        again.append(replace(request, think_prefix=trace.think_ids[:keep]))
    assert sum(bool(r.think_prefix) for r in again) > 4 and not all(r.think_prefix for r in again)
    for request, want, got in zip(again, direct, engine.run(again, record_taps=True), strict=True):
        n, start = len(request.think_prefix), got.think_span[0]
        assert (got.ids, got.used, got.stop, got.finish, got.resumed) == (
            want.ids, want.used, want.stop, want.finish, n,
        )  # fmt: skip
        kept = [i for i in range(len(got.ids)) if not start <= i < start + n]
        assert np.allclose(np.array(got.logprobs)[kept], np.array(want.logprobs)[kept], atol=1e-4)
        _, states = Naive(backbone, layout, decider)(got)
        assert close(got.taps["think"], states[start - 1])  # type: ignore[index]


def close(got: Any, want: torch.Tensor) -> bool:
    return bool(np.allclose(got, want.numpy(), atol=1e-4 * float(want.abs().max())))


@pytest.mark.parametrize("name", BASES)
def test_without_a_thought_nothing_differs_from_the_base(name: str) -> None:
    """Budget 0, with and without a forced transition, and strategies with an empty block; in steered company."""
    backbone, layout = base(name)
    heads, layout = heads_for(backbone), replace(layout, empty_plans=EMPTY)
    given = asked(f"empty {name}", 12)
    ask = [replace(r, plan="direct") if i % 3 == 0 else replace(r, budget=0) for i, r in enumerate(given)]
    ask = [replace(r, plan="steps") if i % 3 == 2 else r for i, r in enumerate(ask)]
    company = [replace(r, id=f"{r.id} thinks", plan="steps", budget=15) for r in given]
    engine = Engine(backbone, layout, steered(heads), max_batch=5)
    bare = Engine(backbone, layout, Decider(heads), max_batch=5)
    assert engine.run(ask) == bare.run(ask)
    exact = isinstance(backbone, NativeBackbone)
    found = {(t.id, t.sample): t for t in engine.run([*ask, *company], record_taps=True)}
    for trace in bare.run(ask, record_taps=True):
        got = found[trace.id, trace.sample]
        assert got.used == 0 and (got == trace if exact else got.ids == trace.ids), trace.id
        for site, state in trace.taps.items():  # type: ignore[union-attr]
            other = got.taps[site]  # type: ignore[index]
            assert np.array_equal(state, other) if exact else np.allclose(state, other, atol=1e-4), site


@pytest.mark.parametrize("name", BASES)
def test_states_are_those_of_a_naive_pass(name: str) -> None:
    """At the prompt and the think tag the base's own; at the end tag those that remember a steered thought."""
    backbone, layout = base(name)
    heads = heads_for(backbone)
    decider, given = steered(heads), [replace(r, budget=12, plan="steps", n=1) for r in asked(f"taps {name}", 10)]
    differ = 0
    for trace in Engine(backbone, layout, decider, max_batch=4).run(given, record_taps=True):
        assert trace.taps is not None and set(trace.taps) == {"prompt", "think", "end"}
        _, states = Naive(backbone, layout, decider)(trace)
        _, plain = Naive(backbone, layout, None)(trace)
        begin, end = trace.think_span[0], trace.answer_span[0] - len(layout.answer)
        assert close(trace.taps["think"], states[begin - 1]) and torch.equal(states[begin - 1], plain[begin - 1])
        assert close(trace.taps["end"], states[end - 1])
        differ += trace.used > 0 and not close(trace.taps["end"], plain[end - 1])
        cache = backbone.new_cache(1, len(trace.prompt_ids))
        out = backbone.extend(cache, [trace.prompt_ids], logits="none", taps=True)
        assert close(trace.taps["prompt"], out.taps[0])
    assert differ > 2


# -- decoding policies ------------------------------------------------------------------------------------------------
def with_policy(backbone: Any, entry: int, acts: bool = True) -> Decider:
    heads = heads_for(backbone, policy=5)
    assert heads.policy_head is not None
    with torch.no_grad():
        heads.policy_head[-1].bias.zero_()  # type: ignore[union-attr]
        heads.policy_head[-1].bias[entry] = 9.0  # type: ignore[index, union-attr]
    return steered(heads) if acts else Decider(heads)


@pytest.mark.parametrize("acts", [True, False])
@pytest.mark.parametrize("name", ["tiny atomic", "tiny text", "own fast"])
def test_a_policy_holds_inside_the_thought_and_nowhere_else(name: str, acts: bool) -> None:
    backbone, layout = base(name)
    decider, given = with_policy(backbone, 4, acts), asked(f"policy {name}", 16)
    assert GRID[4] == Sampling(1.0, 0.9) and decider.modulates
    think = {"temperature": 1.0, "top_p": 0.9}
    naive = Naive(backbone, layout, decider if acts else None)
    drawn = answers = 0
    plain = {(t.id, t.sample): t for t in Engine(backbone, layout, decider, max_batch=5).run(given)}
    changed = 0
    for trace, request in pairs(Engine(backbone, layout, decider, max_batch=5, modulate=True).run(given), given):
        drawn += judge(trace, request, naive(trace)[0], layout, think)
        answers += request.temperature == 0 and trace.answer_tokens > 0
        changed += trace.ids != plain[trace.id, trace.sample].ids
        if not trace.used and trace.stop == "hard":
            assert trace.ids == plain[trace.id, trace.sample].ids, "answers are sampled as asked"
    assert drawn > 100 and answers > 2 and changed > 6


def test_without_a_policy_or_unasked_nothing_changes() -> None:
    backbone, layout = base("own fast")
    given = asked("unasked", 16)
    says, identity = with_policy(backbone, 4), with_policy(backbone, 0)
    want = Engine(backbone, layout, identity, max_batch=5).run(given)
    assert Engine(backbone, layout, identity, max_batch=5, modulate=True).run(given) == want
    assert Engine(backbone, layout, says, max_batch=5).run(given) == want, "modulate is off by default"
    bare = Decider(heads_for(backbone))
    assert not Engine(backbone, layout, bare, modulate=True).modulate, "heads that learned none have none"


class Some(Decider):
    """Has a policy for about every second prompt."""

    wild = True

    def policy(self, taps: torch.Tensor, plans: Any) -> list[Sampling | None]:
        return [Sampling(1.4, 0.8) if self.wild and bool(row[-1, 0] > 0) else None for row in taps]


def test_neighbours_of_a_row_with_a_policy_are_unharmed() -> None:
    backbone, layout = base("own fast")
    heads, given = heads_for(backbone, policy=2), asked("beside", 20)
    some, nobody = Some(heads), Some(heads)
    nobody.wild = False
    runs = [
        Engine(backbone, layout, d, max_batch=6, modulate=True).run(given, record_taps=True) for d in (some, nobody)
    ]
    assert isinstance(backbone, NativeBackbone)
    wild = 0
    for a, b in zip(*runs, strict=True):
        if a.taps["think"][-1, 0] > 0:  # type: ignore[index]
            wild += a.ids != b.ids
        else:
            assert a == b
    assert 2 < wild < len(runs[0])


# -- contracts --------------------------------------------------------------------------------------------------------
class Silent(Decider):
    """Steers with a gate and says no vector."""

    def budget(self, *args: Any) -> list[BudgetDecision]:
        return [d._replace(gate=None) for d in super().budget(*args)]


def test_a_gate_without_a_vector_is_told() -> None:
    backbone, layout = base("own fast")
    heads = heads_for(backbone)
    engine = Engine(backbone, layout, Silent(heads, None, random_steerer(heads)))
    with pytest.raises(ModelError, match=r"multiplies block 1 but `budget` gave no gate vector for 1 of 1 rows"):
        engine.run([Request("a", (20, 21), plan="steps", budget=9)])


def test_steering_goes_where_the_base_computes() -> None:
    made = random_steerer(heads_for(Tiny())).steering()
    assert made.on("cpu") is made, "a compiled base copies weights that it has not met"
    moved = made.on("meta")
    assert isinstance(moved, Steering) and moved.gate_layer == made.gate_layer and moved.layers == made.layers
    assert all(t.device.type == "meta" and t.shape == o.shape
               for k, a in moved.adapters.items() for t, o in zip(a, made.adapters[k], strict=True))  # fmt: skip


# -- the shipped model ------------------------------------------------------------------------------------------------
@functools.cache
def nano() -> Reasoner:
    return Reasoner.load("nano")


def ask_nano(n: int) -> list[Request]:
    out = []
    for i, problem in enumerate(problems("all", "val", "steered-engine", n, (1, 2))):
        r = seeds.rng("steered-nano", i)
        sampled = i % 2 == 1
        out.append(
            nano().request(
                str(i), problem.prompt, plan=("steps", "verify", "decompose", "direct")[i % 4],
                budget=r.choice([0, 2, 6, 15]), temperature=0.9 if sampled else 0.0, seed=i, max_answer_tokens=8,
                n=2 if i % 5 == 1 else 1,
            )
        )  # fmt: skip
    return out


def test_nano_untrained_is_itself_and_a_random_steerer_is_the_naive_one() -> None:
    reasoner = nano()
    assert reasoner.decider is not None
    heads, card, given = reasoner.decider.heads, reasoner.decider.card, ask_nano(9)
    layout = reasoner.codec.layout
    seeds.seed_torch("fresh")
    plain, layer, acts = (
        replace(reasoner, decider=Decider(heads, card, s)).engine(6).run(given)
        for s in (None, fresh(heads).steerer, random_steerer(heads))
    )
    assert plain == layer != acts
    decider, drawn = Decider(heads, None, random_steerer(heads)), 0
    for trace, request in pairs(acts, given):
        logits, _ = Naive(reasoner.backbone, layout, decider)(trace)
        drawn += judge(trace, request, logits, layout)
    assert drawn > 80


def test_own_decoder_with_atomic_tags() -> None:
    """The tests' own tiny decoder under the shipped tokenizer."""
    layout = own.layout()
    for made in (OwnBackbone(own.decoder()), own_backbone(own.decoder())):
        heads = heads_for(made)
        given = [replace(r, plan="steps" if r.plan == "predicted" else r.plan) for r in asked("atomic", 8)]
        engines = [Engine(made, layout, d, max_batch=4) for d in (Decider(heads), fresh(heads))]
        assert engines[0].run(given) == engines[1].run(given)
        decider = steered(heads)
        for trace, request in pairs(Engine(made, layout, decider, max_batch=4).run(given), given):
            judge(trace, request, Naive(made, layout, decider)(trace)[0], layout)
