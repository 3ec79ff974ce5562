"""The budget rule, line by line, and the failures of other controllers (budget-rules.md), model-free."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import BudgetError, TagError
from gnomon.decoding.budget import Action, BudgetConfig, BudgetState
from gnomon.decoding.room import allot

THINK, END, EOS = 1, 2, 3
LONG = (7, 8, 9)  # an end tag of three tokens


def config(budget: int | None = None, **more: object) -> BudgetConfig:
    values: dict[str, object] = {"think": (THINK,), "end": (END,), "budget": budget, "eos": (EOS,)}
    return BudgetConfig(**{**values, **more})  # type: ignore[arg-type]


def opened(budget: int | None = None, **more: object) -> BudgetState:
    state = BudgetState(config(budget, **more))
    for token in state.config.think:
        state.advance(token, "forced")
    return state


def run(state: BudgetState, choices: list[int]) -> list[Action]:
    """Feed the model's choices until the block closes or the choices end."""
    actions = []
    for choice in choices:
        actions.append(state.step(choice))
        if state.phase == "closed":
            break
    return actions


# -- the counting rule ------------------------------------------------------------------------------------------
def test_budget_allows_exactly_n_and_the_next_is_forced() -> None:
    state = opened(3)
    actions = run(state, [10, 11, 12, 13, 14])
    assert [a.kind for a in actions] == ["continue"] * 3 + ["force"]
    assert actions[-1].token == END
    assert (state.used, state.forced, state.cause) == (3, 1, "hard")


def test_at_the_budget_the_models_own_end_tag_is_natural() -> None:
    state = opened(2)
    run(state, [10, 11, END])
    assert (state.used, state.forced, state.cause) == (2, 0, "natural")


def test_the_model_is_evaluated_at_the_budget_but_not_for_zero() -> None:
    state = opened(2)
    run(state, [10, 11])
    assert state.needs_choice
    assert not opened(0).needs_choice


def test_none_means_no_cap() -> None:
    state = opened(None)
    run(state, [10] * 5000)
    assert state.phase == "counting" and state.used == 5000 and state.left is None


def test_limit_is_the_cause_where_only_the_context_ends_the_block() -> None:
    state = opened(None, limit=4)
    run(state, [10] * 9)
    assert (state.used, state.cause) == (4, "limit")
    tight = opened(4, limit=4)
    run(tight, [10] * 9)
    assert tight.cause == "hard"


def test_tags_are_not_counted_and_closing_early_is_natural() -> None:
    state = opened(10, end=LONG)
    run(state, [20, 21, *LONG])
    assert (state.used, state.forced, state.cause) == (2, 0, "natural")


def test_prefilled_think_tokens_count() -> None:
    state = BudgetState(config(3))
    state.prefill((50, 51, THINK, 10, 11))
    assert (state.phase, state.used) == ("counting", 2)
    run(state, [12, 13])
    assert (state.used, state.cause) == (3, "hard")


def test_prefilled_beyond_the_budget_closes_at_once() -> None:
    state = BudgetState(config(1))
    state.prefill((THINK, 10, 11, 12))
    assert not state.needs_choice
    run(state, [13])
    assert (state.used, state.forced, state.cause) == (3, 1, "hard")


def test_tool_results_are_not_counted_but_reported_as_forced() -> None:
    state = opened(2)
    run(state, [10])
    for token in (60, END, 61):  # an end tag inside a tool result does not close
        state.advance(token, "tool")
    assert state.phase == "counting"
    assert (state.used, state.forced) == (1, 3)


def test_scope_block_grants_each_block_its_own_budget_and_session_keeps_it_over_turns() -> None:
    block = opened(2, scope="block")
    run(block, [10, 11, 12])
    block.step(THINK)
    run(block, [10, 11, 12])
    assert (block.used, block.total, block.cause) == (2, 4, "hard")
    session = opened(3, scope="session")
    run(session, [10, 11, END])
    session.new_turn()
    session.advance(THINK, "forced")
    run(session, [10, 11])
    assert (session.used, session.cause) == (3, "hard")
    turn = opened(3)
    run(turn, [10, 11, END])
    turn.new_turn()
    assert turn.used == 0


def test_an_eos_inside_the_block_closes_it_and_counts_as_natural() -> None:
    state = opened(5, end=LONG, transition=(30,))
    run(state, [10, EOS, EOS, EOS])
    assert (state.used, state.forced, state.cause) == (1, 3, "natural")


def test_an_eos_after_the_close_stops() -> None:
    state = opened(5)
    run(state, [END])
    assert state.next(EOS).kind == "stop"


def test_a_strategy_without_thinking_closes_naturally() -> None:
    state = opened(5)
    state.close_now()
    assert state.step(10) == Action("force", END)
    assert (state.used, state.cause) == (0, "natural")


def test_cancel_is_user() -> None:
    state = opened(5)
    run(state, [10])
    state.cancel()
    assert state.cause == "user" and state.next(10).kind == "stop"


def test_the_cap_only_falls() -> None:
    state = opened(6)
    assert state.lower_cap(4, "confidence") and not state.lower_cap(5, "slack") and not state.lower_cap(9, "loop")
    assert state.phase == "slack"
    run(state, [10] * 9)
    assert (state.used, state.cause) == (4, "confidence")


def test_a_cap_lowered_below_what_is_used_closes_next() -> None:
    state = opened(9)
    run(state, [10, 11, 12])
    state.lower_cap(1, "loop")
    assert not state.needs_choice
    run(state, [13])
    assert (state.used, state.cause) == (3, "loop")


def test_rewind_does_not_raise_the_cap() -> None:
    state = opened(9)
    mark = state.mark()
    run(state, [10, 11])
    state.lower_cap(3, "slack")
    state.rewind(mark)
    assert state.used == 0 and state.cap == 3


@pytest.mark.parametrize("budget", [-1, True, 2.5, "8"])
def test_budgets_that_are_no_budgets_are_refused(budget: object) -> None:
    with pytest.raises(BudgetError, match="given"):
        config(budget)  # type: ignore[arg-type]


def test_configs_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(BudgetError, match="scope"):
        config(1, scope="week")
    with pytest.raises(TagError, match="same ids"):
        config(1, end=(THINK,))
    with pytest.raises(TagError, match="at least one token"):
        config(1, end=())
    state = opened(0)
    state.next(5)
    with pytest.raises(BudgetError, match="must be forced"):
        state.advance(5)
    with pytest.raises(BudgetError, match="soft rule"):
        opened(3).lower_cap(1, "hard")  # type: ignore[arg-type]


# -- what went wrong elsewhere ----------------------------------------------------------------------------------
def test_failure_01_a_begun_end_tag_is_completed_not_restarted() -> None:
    state = opened(2, end=LONG)
    actions = run(state, [10, 11, 7, 10, 10])
    assert [a.token for a in actions] == [10, 11, 7, 8, 9]
    assert [a.kind for a in actions] == ["continue"] * 3 + ["force"] * 2
    assert (state.used, state.forced, state.cause) == (2, 2, "hard")


def test_failure_01_other_spellings_of_the_end_tag_close_and_are_completed() -> None:
    state = opened(2, end=LONG, end_also=((17, 9),))
    assert [a.token for a in run(state, [10, 11, 17, 10])] == [10, 11, 17, 9]
    natural = opened(5, end=LONG, end_also=((17, 9),))
    run(natural, [10, 17, 9])
    assert (natural.used, natural.cause) == (1, "natural")


def test_failure_02_a_transition_precedes_the_end_tag_and_does_not_hide_the_bare_one() -> None:
    state = opened(1, end=LONG, transition=(30, 31))
    assert [a.token for a in run(state, [10] * 9)] == [10, 30, 31, 7, 8, 9]
    assert (state.used, state.forced) == (1, 5)
    bare = opened(9, end=LONG, transition=(30, 31))
    run(bare, [10, *LONG])
    assert bare.cause == "natural"
    with pytest.raises(TagError, match="already contains"):
        config(1, end=LONG, transition=(30, *LONG))


def test_failure_03_a_second_block_draws_on_what_is_left() -> None:
    state = opened(5)
    run(state, [10, 11, 12, END])
    state.step(40)
    state.step(THINK)
    assert state.open and state.left == 2
    run(state, [10, 11, 12, 13])
    assert (state.used, state.blocks, state.cause) == (5, 2, "hard")
    state.step(THINK)
    assert not state.needs_choice  # a third one closes at once


def test_failure_04_an_end_tag_of_an_old_turn_in_the_prompt_changes_nothing() -> None:
    state = BudgetState(config(2))
    state.prefill((50, THINK, 10, 11, 12, END, 51, END, 52))
    assert (state.phase, state.used) == ("idle", 0)
    state.advance(THINK, "forced")
    run(state, [10, 11, 12])
    assert (state.used, state.cause) == (2, "hard")


def test_failure_05_a_block_opened_by_the_template_or_the_model_is_seen() -> None:
    template = BudgetState(config(2, lead=(13,)))
    template.prefill((50, THINK, 13))
    assert (template.phase, template.used, template.forced) == ("counting", 0, 0)
    run(template, [13, 10, 11])  # a sampled newline is an ordinary token
    assert (template.used, template.cause) == (2, "hard")
    model = BudgetState(config(1, think=(1, 4)))
    for choice in (50, 1, 4):
        model.step(choice)
    assert model.phase == "counting"
    run(model, [10, 10])
    assert model.used == 1


def test_failure_06_zero_is_zero_and_n_is_n() -> None:
    for n in range(6):
        state = opened(n)
        run(state, [10] * 20)
        assert (state.used, state.cause) == (n, "hard")


def test_failure_07_states_share_nothing() -> None:
    rule = config(2)
    one, two = BudgetState(rule), BudgetState(rule)
    for state in (one, two):
        state.advance(THINK, "forced")
    run(one, [10, 10, 10])
    assert one.phase == "closed" and two.phase == "counting" and two.used == 0 and two.forced == 0


def test_failure_08_advance_alone_counts_what_step_counts() -> None:
    """A fast path that only reports tokens cannot lose count: what it did shows in `used`."""
    stepped, told = opened(None, end=LONG), opened(None, end=LONG)
    for token in [10, 7, 8, 10, 7, 7, 8, 9]:
        stepped.step(token)
        told.advance(token)
    assert stepped.mark() == told.mark() and stepped.used == 5 and stepped.phase == "closed"


def test_failure_09_a_second_end_tag_is_masked_in_the_answer() -> None:
    single = opened(5)
    run(single, [10, END])
    assert single.banned() == (END,)
    long = opened(5, end=LONG)
    run(long, [10, *LONG])
    assert long.banned() == ()
    long.step(7)
    long.step(8)
    assert long.banned() == (9,)
    assert opened(5).banned() == ()


def test_failure_10_every_forced_token_is_named_for_the_model_and_the_parser() -> None:
    state = opened(0, end=LONG, transition=(30,))
    actions = run(state, [10] * 9)
    assert [a.token for a in actions] == [30, *LONG] and state.forced == len(actions)


def test_failure_11_the_soft_layer_cannot_move_the_wall() -> None:
    state = opened(4)
    for cap in (5000, 4, 1000):
        assert not state.lower_cap(cap, "slack")
    run(state, [10] * 50)
    assert (state.used, state.cause) == (4, "hard")


def test_failure_14_a_budget_that_starves_the_answer_is_refused_with_numbers() -> None:
    room = allot(context=512, prompt=100, overhead=12, budget=None)
    assert (room.limit, room.reserve) == (300, 100)
    assert allot(512, 100, 12, 300).limit == 300
    with pytest.raises(BudgetError, match=r"301 does not fit.*512.*100.*12.*reserve 100.*leaves 300"):
        allot(512, 100, 12, 301)
    assert allot(100, 10, 10, None).reserve == 32
    assert allot(512, 100, 12, None, max_answer=200).limit == 200
    with pytest.raises(BudgetError, match="no room to answer"):
        allot(60, 40, 5, None)
    with pytest.raises(BudgetError, match="the prompt has 600 tokens but the context holds 512"):
        allot(512, 600, 12, None)


class _Counted(int):
    looks = 0

    def __hash__(self) -> int:
        _Counted.looks += 1
        return int.__hash__(self)


def test_failure_16_the_cost_of_a_token_does_not_grow_with_the_trace() -> None:
    state = opened(None, end=LONG)
    costs = []
    for _ in range(3):
        _Counted.looks = 0
        for _ in range(1000):
            state.step(_Counted(10))
        costs.append(_Counted.looks)
    assert costs[0] == costs[1] == costs[2] <= 1000 * 8


def test_failure_18_a_prefilled_closed_block_leaves_the_answer_open() -> None:
    state = BudgetState(config(5))
    state.prefill((50, THINK, 10, END), turn_start=1)
    assert (state.phase, state.used, state.cause) == ("closed", 1, "natural")
    assert not state.open and END in state.banned()


def test_failure_19_used_forced_and_total_agree_with_a_recount() -> None:
    state = opened(4, end=LONG)
    tokens = [(a.token, a.kind) for a in run(state, [7, 10, 7, 8, 11, 10, 10, 10])]
    assert tokens == [(7, "continue"), (10, "continue"), (7, "continue"), (8, "continue"), (9, "force")]
    assert state.used == state.total == 2 and state.forced == 1 and state.cause == "hard"


def test_failure_20_the_effective_cap_is_readable() -> None:
    state = opened(7, limit=5)
    assert state.cap == 5 and state.left == 5 and state.cap_cause == "limit"


def test_failure_21_a_cut_never_says_natural() -> None:
    for soft in ("slack", "confidence", "loop"):
        state = opened(9)
        state.lower_cap(2, soft)  # type: ignore[arg-type]
        run(state, [10] * 5)
        assert state.cause == soft
    cut = opened(2)
    run(cut, [10] * 5)
    assert cut.cause == "hard"


# -- properties over random streams -----------------------------------------------------------------------------
tags = st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple)
streams = st.lists(st.integers(0, 5), max_size=120)
budgets = st.one_of(st.none(), st.integers(0, 12))


def _recount(tokens: list[tuple[int, str]], end: tuple[int, ...]) -> int:
    """Think tokens of one closed or running block by looking back: all sampled tokens but those of the end tag."""
    ids = [t for t, _ in tokens]
    closed = len(ids) >= len(end) and tuple(ids[-len(end) :]) == end
    body = tokens[: len(ids) - len(end)] if closed else tokens
    return sum(1 for _, kind in body if kind == "continue")


@settings(max_examples=400, deadline=None)
@given(end=tags, transition=st.lists(st.integers(6, 8), max_size=3).map(tuple), budget=budgets, stream=streams)
def test_no_stream_overshoots_and_a_recount_agrees(
    end: tuple[int, ...], transition: tuple[int, ...], budget: int | None, stream: list[int]
) -> None:
    state = BudgetState(BudgetConfig(think=(9,), end=end, budget=budget, transition=transition))
    state.advance(9, "forced")
    tokens: list[tuple[int, str]] = []
    for choice in stream:
        action = state.step(choice)
        tokens.append((action.token, action.kind))
        if state.phase == "closed":
            break
    assert budget is None or state.used <= budget
    assert state.forced == sum(kind == "force" for _, kind in tokens)
    ids = [t for t, _ in tokens]
    for at in range(len(end), len(ids)):  # no complete end tag before the close
        assert tuple(ids[at - len(end) : at]) != end
    if state.phase == "closed":
        assert tuple(ids[-len(end) :]) == end
        assert state.used == _recount(tokens, end)
        assert (state.cause == "natural") == (state.forced == 0)
        if state.cause == "hard":
            begun = len(end) - min(state.forced, len(end))
            assert budget is not None and budget - begun < state.used + 1
    elif budget is not None:
        assert len([1 for _, k in tokens if k == "continue"]) <= budget + len(end) - 1


@settings(max_examples=300, deadline=None)
@given(end=tags, budget=budgets, stream=streams, soft=st.lists(st.integers(0, 14), max_size=4))
def test_many_blocks_in_a_turn_share_one_budget_whatever_the_soft_layer_does(
    end: tuple[int, ...], budget: int | None, stream: list[int], soft: list[int]
) -> None:
    state = BudgetState(BudgetConfig(think=(4,), end=end, budget=budget))
    caps = list(soft)
    for at, choice in enumerate(stream):
        if at % 17 == 5 and caps:
            state.lower_cap(caps.pop(), "slack")
        before = state.used
        cap = state.cap
        action = state.step(choice)
        assert state.used == before or cap is None or state.used <= cap
        assert action.kind != "stop"
        assert budget is None or state.used <= budget
    assert state.used == state.total


@settings(max_examples=300, deadline=None)
@given(end=tags, budget=budgets, stream=streams, cut=st.integers(0, 120))
def test_clone_and_rewind_change_nothing(end: tuple[int, ...], budget: int | None, stream: list[int], cut: int) -> None:
    state = BudgetState(BudgetConfig(think=(4,), end=end, budget=budget))
    for choice in stream[:cut]:
        state.step(choice)
    mark, twin = state.mark(), state.clone()
    first = [state.step(c) for c in stream[cut:]]
    end_mark = state.mark()
    assert twin.mark() == mark
    assert [twin.step(c) for c in stream[cut:]] == first and twin.mark() == end_mark
    state.rewind(mark)
    assert [state.step(c) for c in stream[cut:]] == first and state.mark() == end_mark


@settings(max_examples=200, deadline=None)
@given(end=tags, budget=st.integers(0, 12), stream=streams)
def test_a_smaller_budget_is_a_prefix_of_a_larger_one(end: tuple[int, ...], budget: int, stream: list[int]) -> None:
    """For the same choices, the sampled part under B is the beginning of the sampled part without a cap."""
    outputs = []
    for cap in (budget, None):
        state = BudgetState(BudgetConfig(think=(9,), end=end, budget=cap))
        state.advance(9, "forced")
        outputs.append([a.token for a in run(state, stream) if a.kind == "continue"])
    assert outputs[1][: len(outputs[0])] == outputs[0]
