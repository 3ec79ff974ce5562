"""The budget rule of budget-rules.md, line by line, model-free. What failed elsewhere: test_failures.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.base.errors import BudgetError, TagError
from gnomon.decoding.budget import Action, BudgetConfig, BudgetState

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
