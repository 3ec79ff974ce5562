"""Soft rules through the engine: they ease or close single rows, and neither the wall nor a neighbour moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.decoding.test_engine import CASES, LEAN, requests
from tests.decoding.test_sure import Closing
from tests.decoding.tiny import ATOMIC, Tiny

from gnomon.decoding.budget import SoftCause
from gnomon.decoding.engine import Engine
from gnomon.decoding.slack import LoopGuard, RuleConfig, Rules, SlackStop, SoftRule, SoftView, rule
from gnomon.protocol.layout import Layout
from gnomon.protocol.trace import Request

STUBBORN = {2: -3.0, 5: -30.0, 10: 2.0, 11: 2.0}  # ends nodes often, blocks hardly ever


def only(ids: Sequence[str], *configs: RuleConfig) -> Rules:
    """These rules for these requests, none for the others."""
    return lambda request: [config.fresh() for config in configs] if request.id in ids else ()


def ask(rows: int, budget: int = 30, **more: object) -> list[Request]:
    base = Request("", (20, 21), plan="steps", budget=budget, max_answer_tokens=3)
    return [replace(base, id=f"r{i}", prompt_ids=(20 + i % 9, 21, 22), **more) for i in range(rows)]  # type: ignore[arg-type]


def test_an_eased_close_is_slack_comes_early_and_cuts_nothing() -> None:
    backbone, asked = Tiny("ease", lean=STUBBORN), ask(12)
    plain = Engine(backbone, ATOMIC).run(asked)
    eased = Engine(backbone, ATOMIC, rules=only([r.id for r in asked], SlackStop(0.6, 20.0))).run(asked)
    hard = [(p, e) for p, e in zip(plain, eased, strict=True) if p.stop == "hard"]
    assert len(hard) > 6
    for before, after in hard:
        assert before.used == 30 and after.stop in ("slack", "hard") and after.used <= 30
        assert before.think_ids[: after.used] == after.think_ids, "up to the close it is the same thought"
        if after.stop == "slack":
            assert after.forced == 0 and after.used > 12 and after.think_ids[-1] in ATOMIC.boundary
            assert not after.closed_naturally and after.report()["stop"] == "slack"
    assert sum(after.stop == "slack" for _, after in hard) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_neighbours_of_a_softened_row_do_not_notice(temperature: float) -> None:
    backbone, asked = Tiny("beside", lean=STUBBORN), ask(12, temperature=temperature)
    soft = [r.id for r in asked[::2]]
    configs = (SlackStop(0.9, 25.0), LoopGuard(4, 2, 4))
    mixed = Engine(backbone, ATOMIC, rules=only(soft, *configs)).run(asked)
    plain = Engine(backbone, ATOMIC).run(asked)
    alone = Engine(backbone, ATOMIC, max_batch=1, rules=only(soft, *configs)).run(asked)
    for got, want, single in zip(mixed, plain, alone, strict=True):
        assert got.ids == single.ids and got.stop == single.stop
        if got.id not in soft:
            assert got.ids == want.ids and np.allclose(got.logprobs, want.logprobs, atol=1e-4)
    assert any(got.stop in ("slack", "loop") for got in mixed)


@pytest.mark.parametrize(("layout", "lean"), CASES, ids=["atomic", "text"])
def test_whatever_the_rules_the_wall_stands_and_nothing_leaks(layout: Layout, lean: dict[int, float]) -> None:
    layout = replace(layout, boundary=frozenset(range(19, 26)))
    configs = [SlackStop(1.0, 6.0), rule("margin", threshold=0.5), LoopGuard(3, 2, 3), rule("cut", tokens=9)]
    asked = requests(64, "soft")
    number = {r.id: i for i, r in enumerate(asked)}
    chosen = lambda request: [c.fresh() for i, c in enumerate(configs) if number[request.id] >> i & 1]  # noqa: E731
    traces = Engine(Tiny("soft", lean=lean), layout, max_batch=16, rules=chosen).run(asked)
    stops = set()
    for request, trace in zip(asked, traces, strict=True):
        trace.check()
        stops.add(trace.stop)
        assert trace.overshoot == 0 and (request.budget is None or trace.used <= int(request.budget))
        if number[request.id] & 8:
            assert trace.used <= 9
        sampled = [role for role in trace.roles[slice(*trace.think_span)] if role == "sampled"]
        assert len(sampled) == trace.used
        n = len(layout.end_think)
        assert all(trace.answer_ids[i : i + n] != layout.end_think for i in range(len(trace.answer_ids)))
    assert stops >= {"natural", "hard", "confidence"} and stops & {"slack", "loop"}


def test_every_sample_has_rules_of_its_own() -> None:
    """A guard that one sample has filled must not close another; every sample asks the factory once."""
    made: list[SoftRule] = []

    def rules(request: Request) -> list[SoftRule]:
        made.append(LoopGuard(2, 2, 6).fresh())
        return [made[-1]]

    backbone = Tiny("own rules", lean=LEAN)
    (request,) = ask(1, temperature=1.2, n=6)
    together = Engine(backbone, ATOMIC, rules=rules).run([request])
    assert len(made) == 6
    apart = Engine(backbone, ATOMIC, max_batch=1, rules=rules).run([request])
    assert [t.ids for t in together] == [t.ids for t in apart]


class Seen:
    """A rule that keeps what it was shown."""

    wants_answer = False

    def __init__(self, margin: bool, confidence: bool) -> None:
        self.wants_margin, self.wants_confidence, self.views = margin, confidence, list[SoftView]()

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        self.views.append(view)
        return 0.0, None


def test_what_no_rule_wants_is_not_computed() -> None:
    """Margins only for rules that read them; a rule of confidence alone is asked only where one was read."""
    backbone, asked = Tiny("wants", lean=STUBBORN), ask(4)
    made = {r.id: Seen(margin=i == 0, confidence=i == 2) for i, r in enumerate(asked)}
    mixed = {r.id: [made[r.id]] + ([Seen(False, False)] if i == 2 else []) for i, r in enumerate(asked)}
    made["r3"].wants_confidence = True
    Engine(backbone, ATOMIC, Closing({4: 0.6}), rules=lambda request: mixed[request.id]).run(asked)
    weighs, plain, both, seldom = (made[r.id].views for r in asked)
    assert len(weighs) > 20 and all(v.margin >= 0 for v in weighs) and any(v.boundary for v in weighs)
    assert len(plain) > 20 and all(math.isnan(v.margin) for v in plain)
    assert len(both) > 20, "with a rule beside it that sees every position, so does the other"
    read = [v.used for v in both if not math.isnan(v.confidence)]
    assert read and all(not math.isnan(v.confidence) for v in seldom) and 0 < len(seldom) < 20


def test_a_push_without_a_margin_leans_only_where_the_tag_was_not_the_choice() -> None:
    """A rule may push without reading the margin; whose close it was is told all the same."""

    class Push(Seen):
        def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
            return (1e-6 if view.used < 6 else 60.0), None

    asked = ask(8)
    traces = Engine(Tiny("push", lean={2: 6.0}), ATOMIC, rules=lambda request: [Push(False, False)]).run(asked)
    assert {"natural"} <= {t.stop for t in traces if t.used < 6} and all(t.used <= 7 for t in traces)
    late = Engine(Tiny("push", lean=STUBBORN), ATOMIC, rules=lambda request: [Push(False, False)]).run(asked)
    assert {t.stop for t in late if t.used >= 6} == {"slack"}
