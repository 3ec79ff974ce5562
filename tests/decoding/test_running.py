"""Running estimates, grants, the margin rule and scopes through the engine: nearer closes, never a broken wall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.decoding.test_engine import requests
from tests.decoding.tiny import ATOMIC, Tiny
from tests.own import Layer, Said
from torch import Tensor

from gnomon.base.errors import BudgetError, ConfigError
from gnomon.decoding.engine import Engine
from gnomon.decoding.scope import Ledger
from gnomon.decoding.slack import Margin, factory, rule
from gnomon.protocol.trace import Request, Trace

ENDLESS = {2: -30.0, 5: -30.0}
ASK = Request("r", (20, 21, 22), plan="steps", budget=20, max_answer_tokens=3)


class Running(Layer):
    """Says at every boundary what it was told to say; predicts `clipped` tokens."""

    reads_boundaries = True

    def __init__(self, upper: int = 3, confidence: float | None = 0.9, clipped: int = 30) -> None:
        self.upper, self.confidence, self.clipped = upper, confidence, clipped
        self.asked: list[int] = []

    def plan(self, taps: Tensor) -> list[Said]:
        return [Said(probs={"steps": 1.0})] * len(taps)

    def budget(self, taps: Tensor, plans: Sequence[str], predicted_plans: object = None) -> list[Said]:
        return [Said(predicted=float(self.clipped), clipped=self.clipped)] * len(taps)

    def after(self, taps: Tensor, plans: Sequence[str], used: object, calibrated: object = None) -> list[Said]:
        return [Said()] * len(taps)

    def running(self, taps: Tensor, plans: Sequence[str], used: Sequence[int], calibrated: object = None) -> list[Said]:
        self.asked += used
        return [Said(confidence=self.confidence, remaining=self.upper - 1.0, upper=self.upper)] * len(taps)


def boundaries(trace: Trace) -> list[int]:
    return [i + 1 for i, token in enumerate(trace.think_ids) if token in ATOMIC.boundary]


def test_a_running_estimate_lowers_the_cap_and_says_confidence() -> None:
    layer = Running(upper=2)
    backbone = Tiny("running", lean={**ENDLESS, 10: 2.0})
    (trace,) = Engine(backbone, ATOMIC, layer, running=True).run([replace(ASK, temperature=1.0)])
    first = boundaries(trace)[0]
    assert trace.used == first + 2 and trace.stop == "confidence" and trace.overshoot == 0
    assert [r[0] for r in trace.running] == layer.asked[: len(trace.running)] and trace.running[0] == (first, 1.0, 0.9)
    assert Trace.from_json(trace.to_json()) == trace
    every = Engine(backbone, ATOMIC, Running(upper=90), running=True, running_every=1)
    (often,) = every.run([replace(ASK, temperature=1.0)])
    (seldom,) = Engine(backbone, ATOMIC, Running(upper=90), running=True).run([replace(ASK, temperature=1.0)])
    assert [r[0] for r in often.running] == boundaries(often) and len(seldom.running) < len(often.running)
    off = Engine(backbone, ATOMIC, Running(upper=2)).run([replace(ASK, temperature=1.0)])[0]
    assert off.used == 20 and off.stop == "hard" and off.ids[: trace.think_span[1]] == trace.ids[: trace.think_span[1]]
    free = Engine(backbone, ATOMIC, Running(upper=2), running=True).run([replace(ASK, temperature=1.0, budget=None)])[0]
    assert free.stop == "limit" and free.running, "without a budget estimates are reported and change nothing"


def test_estimates_never_raise_a_cap_unless_a_grant_was_allowed_and_then_once() -> None:
    backbone = Tiny("grant", lean={**ENDLESS, 10: 2.5})
    layer = Running(upper=50, confidence=0.1, clipped=8)
    ask = replace(ASK, temperature=1.0, budget="predicted")
    (plain,) = Engine(backbone, ATOMIC, layer, running=True).run([ask])
    assert (plain.used, plain.granted, plain.budget_effective) == (8, 0, 8)
    (more,) = Engine(backbone, ATOMIC, layer, running=True).run([replace(ask, grant=5)])
    assert (more.used, more.granted, more.budget_effective, more.overshoot) == (13, 5, 13, 0)
    (asked,) = Engine(backbone, ATOMIC, layer, running=True).run([replace(ask, grant=50, budget=11)])
    assert asked.used == 11, "a grant stays within what was asked for"
    (sure,) = Engine(backbone, ATOMIC, Running(upper=50, confidence=0.9, clipped=8), running=True).run(
        [replace(ask, grant=5)]
    )
    assert sure.used == 8, "only where confidence is low"


def test_the_margin_rule_closes_where_the_tag_is_nearly_best_and_rules_have_teaching_names() -> None:
    backbone = Tiny("margin", lean={10: 1.0})
    asked = [replace(r, budget=40) for r in requests(30, "margin", greedy=True)]
    plain = Engine(backbone, ATOMIC).run(asked)
    closed = Engine(backbone, ATOMIC, rules=factory(Margin(threshold=100.0))).run(asked)
    for a, b in zip(plain, closed, strict=True):
        cut = [n for n in boundaries(a) if n < a.used]
        assert (b.used, b.stop) == ((cut[0], "confidence") if cut else (a.used, a.stop))
    with pytest.raises(ConfigError, match="slack"):
        rule("slak")


def test_scopes_draw_on_what_is_left() -> None:
    engine = Engine(Tiny("scope", lean=ENDLESS), ATOMIC)
    used: dict[str, list[int]] = {}
    for scope in ("turn", "tool_loop", "session"):
        ledger = Ledger(scope)  # type: ignore[arg-type]
        used[scope] = []
        for turn, tool in enumerate((False, True, False)):
            (trace,) = engine.run([ledger.open(replace(ASK, id=f"{turn}", budget=12), tool_result=tool)])
            ledger.charge(trace)
            used[scope].append(trace.used)
            assert trace.scope == scope == trace.report()["budget"]["scope"] and trace.overshoot == 0
    assert used == {"turn": [12, 12, 12], "tool_loop": [12, 0, 12], "session": [12, 0, 0]}
    with pytest.raises(BudgetError, match="write one of block, turn"):
        replace(ASK, scope="chat")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="spent must be a whole number from 0"):
        replace(ASK, spent=-1)
