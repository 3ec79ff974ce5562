"""The soft layer: what each rule says where, how a close is called, and that no rule can move the wall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, UnknownNameError
from gnomon.decoding.budget import BudgetConfig, BudgetState, SoftCause
from gnomon.decoding.slack import (
    AnswerProbability,
    FixedCut,
    Look,
    LoopGuard,
    Margin,
    SlackStop,
    SoftRule,
    SoftView,
    Sure,
    consult,
    factory,
    leaned,
    replay,
    rule,
)
from gnomon.protocol.trace import Request

THINK, END, NODE = 1, 2, 10
LONG = (7, 8, 9)
VIEW = SoftView(used=0, cap=None, boundary=False, margin=math.nan, last=-1)


def opened(end: tuple[int, ...] = (END,), **more: object) -> BudgetState:
    state = BudgetState(BudgetConfig(think=(THINK,), end=end, **more))  # type: ignore[arg-type]
    state.advance(THINK, "forced")
    return state


def decode(state: BudgetState, rules: Sequence[SoftRule], logits: Sequence[dict[int, float]]) -> list[int]:
    """Greedy decoding over given logits, as the engine wires it; a token that is not named has logit 0."""
    written: list[int] = []
    for scores in logits:
        if not state.open:
            break
        tag, last = state.tag_next, written[-1] if written else -1
        margin = max([*scores.values(), 0.0]) - scores.get(tag, 0.0)
        look = consult(rules, SoftView.of(state, last == NODE, margin, last))
        if look.cause is not None:
            state.lower_cap(state.used, look.cause)
        biased = {**scores, tag: scores.get(tag, 0.0) + look.bias}
        choice = max(biased, key=lambda t: biased[t])
        if leaned(look, margin, choice, tag):
            state.lean()
        written.append(state.step(choice).token)
    return written


def steady(n: int, gap: float, every: int = 4) -> list[dict[int, float]]:
    """n positions that want another token `gap` logits more than the end tag; every so many ends a node."""
    return [{NODE if at % every == every - 1 else 20 + at % 5: gap, END: 0.0, LONG[0]: 0.0} for at in range(n)]


# -- SlackStop ------------------------------------------------------------------------------------------------------
def test_the_ramp_is_linear_in_the_last_share_and_only_at_boundaries() -> None:
    slack = SlackStop(share=0.25, strength=8.0).fresh()
    at = lambda used, boundary=True: slack.look(replace(VIEW, used=used, cap=100, boundary=boundary))  # noqa: E731
    assert [at(used)[0] for used in (0, 74, 75, 80, 90, 99)] == pytest.approx([0, 0, 0, 1.6, 4.8, 7.68])
    assert at(99, boundary=False) == (0.0, None)
    assert at(100) == (0.0, None)  # at the cap the cut follows, and keeps its own cause
    assert slack.look(replace(VIEW, used=99, boundary=True)) == (0.0, None)  # no cap, no ramp


def test_an_eased_close_comes_before_the_cap_and_is_called_slack() -> None:
    state = opened(budget=40)
    decode(state, [SlackStop(0.5, 8.0).fresh()], steady(100, gap=3.0))
    assert (state.cause, state.used, state.forced) == ("slack", 28, 0)
    plain = opened(budget=40)
    decode(plain, [], steady(100, gap=3.0))
    assert (plain.cause, plain.used) == ("hard", 40)


def test_a_model_that_does_not_give_in_meets_the_wall_where_it_stood() -> None:
    state = opened(budget=40)
    decode(state, [SlackStop(1.0, 8.0).fresh()], steady(100, gap=50.0))
    assert (state.cause, state.used, state.cap) == ("hard", 40, 40)


def test_a_close_of_its_own_under_a_bias_stays_natural() -> None:
    state = opened(budget=10)
    decode(state, [SlackStop(1.0, 8.0).fresh()], [*steady(3, 3.0), {NODE: 9.0}, {END: 5.0, 20: 4.0}])
    assert (state.cause, state.used) == ("natural", 4)


def test_a_tag_of_several_tokens_is_eased_to_its_end_and_called_slack() -> None:
    state = opened(LONG, budget=20)
    wants = [{NODE: 3.0}] * 15 + [{20: 3.0}] * 9  # behind the boundary nothing but the bias completes the tag
    decode(state, [SlackStop(0.5, 8.0).fresh()], wants)
    assert (state.cause, state.used, state.forced) == ("slack", 14, 0)


def test_a_tag_that_the_model_began_away_from_a_boundary_is_not_completed_for_it() -> None:
    """`3 < 4` begins like a tag: the bias must not turn it into one."""
    state = opened(LONG, budget=20)
    rules = [SlackStop(1.0, 30.0).fresh()]
    written = decode(state, rules, [*[{20: 9.0}] * 12, {7: 9.0}, *[{20: 9.0}] * 5])
    assert written == [20] * 12 + [7] + [20] * 5 and state.open and state.used == 18


# -- cause accounting -----------------------------------------------------------------------------------------------
def test_lean_names_the_close_only_if_its_token_is_part_of_the_tag() -> None:
    state = opened(LONG, budget=30)
    state.lean()
    for token in (7, 8, 20):  # left again
        state.step(token)
    assert state.used == 3
    for token in LONG:  # and later its own
        state.step(token)
    assert (state.cause, state.used) == ("natural", 3)
    again = opened(LONG, budget=30)
    for at, token in enumerate((7, 7, 8, 9)):  # the second 7 begins the tag, the leaned one is an ordinary token
        if at == 0:
            again.lean()
        again.step(token)
    assert (again.cause, again.used) == ("natural", 1)
    inside = opened(LONG, budget=30)
    inside.step(7)
    inside.lean("confidence")
    inside.step(8)
    inside.step(9)
    assert (inside.cause, inside.used) == ("confidence", 0)


def test_a_leaned_tag_that_the_cap_completes_keeps_the_cause_of_the_cap() -> None:
    state = opened(LONG, budget=1)
    state.step(20)
    state.lean()
    state.step(7)
    state.step(20)
    state.step(20)
    assert (state.cause, state.used, state.forced) == ("hard", 1, 2)


def test_lean_survives_clone_and_rewind_and_ends_with_the_block() -> None:
    state = opened(LONG, budget=9)
    state.lean()
    state.step(7)
    mark, twin = state.mark(), state.clone()
    state.step(20)
    state.rewind(mark)
    for each in (state, twin):
        each.step(8)
        each.step(9)
        assert each.cause == "slack"
        each.step(THINK)
        each.step(20)
        for token in LONG:
            each.step(token)
        assert each.cause == "natural"
    state.lean()  # no block is open: nothing to lean on
    state.step(THINK)
    for token in LONG:
        state.step(token)
    assert state.cause == "natural"


def test_a_lean_whose_token_never_came_is_forgotten() -> None:
    cut = opened(LONG, budget=5, scope="block")
    cut.step(20)
    cut.lower_cap(0, "loop")
    cut.lean()
    for _ in LONG:  # the guard closes; the leaned token was not written
        cut.step(7)
    assert cut.cause == "loop" and cut.forced == 3
    state = opened(LONG, budget=5)
    state.lean()
    state.advance(60, "tool")
    for token in LONG:
        state.step(token)
    assert state.cause == "natural"


def test_a_forced_close_leaves_no_lean_to_the_next_block() -> None:
    state = opened(budget=9, scope="block")
    state.lean()
    state.close_now()
    state.step(20)
    state.step(THINK)
    state.step(END)
    assert (state.blocks, state.cause) == (2, "natural")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60),
)
def test_lean_agrees_with_looking_back(end: tuple[int, ...], stream: list[tuple[int, bool]]) -> None:
    state = opened(end if end != (THINK,) else (3,))
    seen: list[tuple[int, bool]] = []
    for token, lean in stream:
        if not state.open:
            break
        if lean:
            state.lean()
        state.step(token)
        seen.append((token, lean))
    if state.phase == "closed":
        tag = seen[len(seen) - state.tag_length :]
        assert state.cause == ("slack" if any(lean for _, lean in tag) else "natural")


def test_leaned_is_exact_for_greedy_and_needs_bias_and_the_tag() -> None:
    look = Look(2.0, None)
    assert leaned(look, 1.5, END, END) and not leaned(look, 0.0, END, END)
    assert not leaned(look, 1.5, 20, END) and not leaned(Look(0.0, None), 1.5, END, END)
    assert leaned(look, math.nan, END, END)  # nobody knows: censored, never natural


def test_tag_next_follows_the_begun_tag() -> None:
    state = opened(LONG, budget=9, end_also=((17, 9),))
    assert state.tag_next == 7
    state.step(7)
    assert state.tag_next == 8
    state.step(17)
    assert state.tag_next == 9
    state.step(20)
    assert state.tag_next == 7


# -- margin, cut, loop ----------------------------------------------------------------------------------------------
def test_margin_closes_at_the_first_boundary_that_is_nearly_ready() -> None:
    gaps = [5.0, 0.5, 0.5, 5.0, 3.0, 0.9, 0.5]
    logits = [{NODE if at in (0, 3, 4) else 20: gap, END: 0.0} for at, gap in enumerate(gaps)]
    state = opened(budget=30)
    written = decode(state, [Margin(1.0).fresh()], logits)
    assert written == [NODE, END] and (state.cause, state.used) == ("confidence", 1)
    strict = opened(budget=30)
    decode(strict, [Margin(0.1).fresh()], logits)
    assert strict.open
    assert Margin().look(replace(VIEW, boundary=True)) == (0.0, None)  # NaN is no small margin


def test_margin_leaves_the_models_own_close_natural() -> None:
    state = opened(budget=30)
    decode(state, [Margin(1.0).fresh()], [{NODE: 5.0}, {END: 5.0, 20: 4.9}])
    assert (state.cause, state.used, state.forced) == ("natural", 1, 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 12), st.lists(st.sampled_from([END, NODE, 20, 21]), max_size=30))
def test_a_fixed_cut_writes_what_the_hard_cut_writes(n: int, stream: list[int]) -> None:
    logits = [{token: 9.0} for token in stream]
    soft, hard = opened(budget=20, transition=(30,)), opened(budget=n, transition=(30,))
    assert decode(soft, [FixedCut(n).fresh()], logits) == decode(hard, [], logits)
    assert (soft.used, soft.cap if soft.cause == "slack" else n) == (hard.used, n)
    assert {"hard": "slack"}.get(hard.cause or "", hard.cause) == soft.cause  # type: ignore[call-overload]


def loops(tokens: Sequence[int], config: LoopGuard) -> int | None:
    """Tokens written when the guard closes."""
    guard = config.fresh()
    for at, token in enumerate(tokens):
        if guard.look(replace(VIEW, used=at + 1, last=token))[1] == "loop":
            return at + 1
    return None


def slow_loop(tokens: Sequence[int], config: LoopGuard) -> int | None:
    """The same by looking back at everything, every time."""
    for n in range(1, len(tokens) + 1):
        for p in range(1, config.period + 1):
            size = max(config.least, p * config.repeats)
            tail = tokens[n - size : n] if n >= size else []
            if tail and all(tail[i] == tail[i - p] for i in range(p, size)):
                return n
    return None


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.integers(0, 2), max_size=12),
    st.lists(st.integers(0, 2), min_size=1, max_size=7),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(2, 4),
    st.integers(2, 14),
)
def test_the_loop_guard_agrees_with_looking_back(
    head: list[int], piece: list[int], times: int, period: int, repeats: int, least: int
) -> None:
    tokens, config = head + piece * times, LoopGuard(period, repeats, least)
    assert loops(tokens, config) == slow_loop(tokens, config)


def test_the_loop_guard_knows_loops_from_repetition_with_a_meaning() -> None:
    config = LoopGuard()
    piece = [5, 6, 5, 5, 7, 6]  # no token stands alone in its period
    assert loops([1, 2, 3, *piece * 40], config) == 3 + 48
    assert loops([4] * 47, config) is None and loops([4] * 48, config) == 48
    long = list(range(40))
    assert loops(long * 5, config) == 120
    r = seeds.rng("loop-guard")
    assert loops([r.randrange(60) for _ in range(5000)], config) is None
    state = opened(budget=500)
    decode(state, [LoopGuard().fresh()], [{20 + at % 3: 9.0} for at in range(500)])
    assert (state.cause, state.used) == ("loop", 48)


class _Compared(int):
    looks = 0

    def __eq__(self, other: object) -> bool:
        _Compared.looks += 1
        return int.__eq__(self, other)  # type: ignore[arg-type]

    __hash__ = int.__hash__


def test_the_cost_of_every_rule_is_constant_in_the_length_of_the_trace() -> None:
    guard, costs = LoopGuard(period=24).fresh(), []
    r = seeds.rng("loop-cost")
    tokens = [r.randrange(8) for _ in range(500)]
    for _ in range(4):
        _Compared.looks = 0
        for at, token in enumerate(tokens):
            guard.look(replace(VIEW, used=at, last=_Compared(token)))
        costs.append(_Compared.looks)
    assert costs[1] == costs[2] == costs[3] and 24 * 500 <= costs[1] <= 25 * 500


# -- all together ---------------------------------------------------------------------------------------------------
class Pusher:
    """A rule that wants the opposite."""

    wants_margin, wants_answer, wants_confidence = False, False, False

    def __init__(self, bias: float) -> None:
        self.bias = bias

    def look(self, view: SoftView) -> tuple[float, SoftCause | None]:
        return self.bias, None


def test_a_rule_cannot_push_the_close_away() -> None:
    assert consult([Pusher(-5.0)], VIEW) == (0.0, None)
    assert consult([Pusher(math.nan), Pusher(1.0), Pusher(3.0), Pusher(-9.0)], VIEW) == (3.0, None)
    state = opened(budget=6)
    decode(state, [Pusher(-1e9), Pusher(-math.inf)], [{END: 0.1}] * 9)
    assert (state.cause, state.used) == ("natural", 0)


def test_every_rule_is_asked_even_behind_one_that_closes() -> None:
    guard = LoopGuard(1, 2, 2).fresh()
    cut = FixedCut(0)
    assert consult([cut, guard], replace(VIEW, last=4)).cause == "slack"
    assert consult([guard], replace(VIEW, last=4)).cause == "loop"


@settings(max_examples=150, deadline=None)
@given(
    budget=st.integers(0, 24),
    end=st.sampled_from([(END,), LONG]),
    seed=st.integers(0, 10**6),
    names=st.lists(st.sampled_from(["slack", "margin", "loop", "cut"]), max_size=4),
)
def test_the_wall_stands_whatever_the_rules_say(budget: int, end: tuple[int, ...], seed: int, names: list[str]) -> None:
    r = seeds.rng("wall", seed)
    values = {
        "slack": {"share": 1.0},
        "margin": {},
        "loop": {"least": 4, "period": 3, "repeats": 2},
        "cut": {"tokens": 9},
    }
    rules = [rule(name, **values[name]).fresh() for name in names]
    logits = [{r.choice([END, NODE, 7, 8, 9, 20]): r.random() * 9, NODE: 1.0} for _ in range(60)]
    state, free = opened(end, budget=budget), opened(end, budget=budget)
    decode(state, rules, logits)
    decode(free, [], logits)
    assert state.used <= free.used <= budget and state.cap is not None and state.cap <= budget
    if not names:
        assert state.mark() == free.mark()


def test_names_and_values_teach() -> None:
    assert rule("slack", share=0.2, strength=4.0) == SlackStop(0.2, 4.0)
    assert rule("cut", tokens=5) == FixedCut(5) and rule("loop") == LoopGuard()
    with pytest.raises(UnknownNameError, match="did you mean 'margin'"):
        rule("margins")
    with pytest.raises(UnknownNameError, match="value of rule 'slack' 'shar'; did you mean 'share'"):
        rule("slack", shar=0.2)
    with pytest.raises(ConfigError, match=r"'cut' needs tokens; write rule\('cut', tokens=…\)"):
        rule("cut")
    for name, bad in (
        ("slack", {"share": "half"}), ("margin", {"threshold": None}),
        ("slack", {"share": 0}), ("slack", {"share": 1.1}), ("slack", {"strength": math.inf}),
        ("slack", {"strength": -1.0}), ("margin", {"threshold": -0.1}), ("margin", {"threshold": math.nan}),
        ("cut", {"tokens": -1}), ("cut", {"tokens": True}), ("cut", {"tokens": 2.5}), ("loop", {"period": 0}),
        ("loop", {"repeats": 1}), ("loop", {"least": 2.0}), ("answer", {"threshold": 0.0}),
        ("sure", {"threshold": -0.1}), ("sure", {"threshold": 1.1}), ("sure", {"gap": 1.5}),
        ("sure", {"gap": math.nan}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"rule '{name}': {next(iter(bad))} must be .* given"):
            rule(name, **bad)


def test_a_factory_gives_every_sample_its_own_rules_and_refuses_what_no_engine_can_keep() -> None:
    make = factory(LoopGuard(1, 2, 2), Margin(0.5))
    request = Request("r", (1,))
    one, two = make(request), make(request)
    one[0].look(replace(VIEW, last=4))
    assert two[0].look(replace(VIEW, last=4)) == (0.0, None) and one[0].look(replace(VIEW, last=4))[1] == "loop"
    assert [each.wants_margin for each in one] == [False, True]
    with pytest.raises(ConfigError, match=r"AnswerProbability needs a trial answer.*replay"):
        factory(AnswerProbability(0.8))


def test_replay_measures_rules_on_recorded_thoughts() -> None:
    margins, answers = [5.0, 4.0, 3.0, 2.0, 1.0, 0.5], [0.1, 0.2, 0.85, 0.3, 0.9, 0.95]
    views = [
        SoftView(used, 10, used % 2 == 0, margins[used], 20 + used, answer=answers[used]) for used in range(6)
    ]  # boundaries at 0, 2, 4
    assert replay(AnswerProbability(0.8), views) == (2, "confidence")
    assert replay(AnswerProbability(0.89), views) == (4, "confidence")
    assert replay(Margin(0.9), views) is None and replay(Margin(3.0), views) == (2, "confidence")
    assert replay(FixedCut(3), views) == (3, "slack")
    assert replay(SlackStop(1.0, 3.0), views) == (4, "slack")  # 3 · 4/10 ≥ 1


def test_sure_closes_where_thinking_on_promises_no_more() -> None:
    said = {2: 0.5, 4: 0.87, 5: 0.3, 7: 0.93, 9: 0.99}
    views = [SoftView(used, 20, False, 5.0, 7, confidence=said.get(used, math.nan), promise=0.95) for used in range(12)]
    for gap, at in ((0.5, 2), (0.1, 4), (0.02, 7), (0.0, 9), (-0.03, 9)):
        assert replay(Sure(gap), views) == (at, "confidence")
    assert replay(Sure(-0.05), views) is None, "so much more than was promised it never says"
    assert replay(Sure(1.0, 0.9), views) == (7, "confidence") and replay(Sure(0.5, 0.6), views) == (4, "confidence")
    hopeless = [replace(v, promise=0.4) for v in views]
    assert replay(Sure(0.0), hopeless) == (2, "confidence"), "nor does it think on where that is in vain"
    for name in ("confidence", "promise"):
        assert replay(Sure(1.0), [replace(v, **{name: math.nan}) for v in views]) is None
