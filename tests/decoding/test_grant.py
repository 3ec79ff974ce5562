"""The bounded extra grant: the one way in which a cap may rise (decisions.md §4), model-free."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.decoding.test_slack import END, LONG, THINK, opened

from gnomon.base.errors import BudgetError
from gnomon.decoding.budget import BudgetConfig, BudgetState, SoftCause


def test_a_grant_exceeds_the_prediction_once_and_never_request_or_limit() -> None:
    state = opened(budget=20, predicted=6, limit=30)
    assert state.cap == 6 and state.cap_cause == "hard"
    assert state.grant(4, 100) and (state.cap, state.granted) == (10, 4)
    assert not state.grant(4, 100) and state.cap == 10  # at most once
    for _ in range(30):
        state.step(20)
    assert (state.used, state.cause) == (10, "hard")
    for values, ceiling, cap, cause in (
        ({"budget": 8}, 100, 8, "hard"), ({"limit": 7}, 100, 7, "limit"), ({"budget": 8, "limit": 8}, 100, 8, "hard"),
        ({}, 9, 9, "hard"), ({}, 100, 26, "hard"),
    ):  # fmt: skip
        bounded = opened(predicted=6, **values)
        assert bounded.grant(20, ceiling) and (bounded.cap, bounded.cap_cause) == (cap, cause)


def test_a_grant_needs_an_open_block_and_a_predicted_cap() -> None:
    assert not opened(budget=6).grant(4, 100)  # asked for, not predicted
    assert not opened(budget=6, predicted=6).grant(4, 100) and not opened(budget=5, predicted=6).grant(4, 100)
    assert not opened().grant(4, 100)
    closed = BudgetState(BudgetConfig(think=(THINK,), end=(END,), predicted=6))
    assert not closed.grant(4, 100)
    forcing = opened(LONG, predicted=0)
    forcing.next(20)
    assert not forcing.grant(4, 100) and forcing.cap == 0
    assert not opened(predicted=6).grant(0, 100) and not opened(predicted=6).grant(3, 6)
    unused = opened(predicted=6)
    unused.grant(0, 100)
    assert unused.granted == 0 and unused.grant(1, 100)  # what raised nothing was none
    with pytest.raises(BudgetError, match="negative"):
        opened(predicted=6).grant(-1, 100)


def test_a_grant_undoes_an_estimate_but_not_a_guard() -> None:
    estimated = opened(predicted=9)
    estimated.lower_cap(3, "confidence")
    assert estimated.grant(2, 100) and (estimated.cap, estimated.cap_cause) == (5, "confidence")
    guards: tuple[SoftCause, ...] = ("loop", "slack", "user")
    for cause in guards:
        state = opened(predicted=9)
        state.lower_cap(3, cause)
        assert not state.grant(2, 100) and state.cap == 3


def test_a_rewind_gives_no_second_grant_and_takes_none_back() -> None:
    state = opened(predicted=6)
    mark = state.mark()
    state.grant(3, 100)
    state.step(20)
    state.rewind(mark)
    assert (state.cap, state.granted) == (9, 3) and not state.grant(3, 100)
    session = opened(predicted=6, scope="session")
    session.grant(3, 100)
    session.new_turn()
    session.advance(THINK, "forced")
    assert session.cap == 9 and not session.grant(3, 100)


@settings(max_examples=300, deadline=None)
@given(
    predicted=st.integers(0, 12),
    budget=st.one_of(st.none(), st.integers(0, 20)),
    limit=st.one_of(st.none(), st.integers(0, 20)),
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("step"), st.sampled_from([END, 20, 20, 20, THINK])),
            st.tuples(st.just("lower"), st.integers(0, 20)),
            st.tuples(st.just("grant"), st.integers(0, 9)),
            st.tuples(st.just("rewind"), st.just(0)),
        ),
        max_size=60,
    ),
)
def test_the_cap_only_falls_but_for_one_bounded_grant(
    predicted: int, budget: int | None, limit: int | None, moves: list[tuple[str, int]]
) -> None:
    state = opened(predicted=predicted, budget=budget, limit=limit)
    first, grants, mark = state.cap, 0, state.mark()
    assert first is not None
    for kind, value in moves:
        before = state.cap
        assert before is not None
        if kind == "step":
            state.step(value)
        elif kind == "lower":
            state.lower_cap(value, "confidence")
        elif kind == "rewind":
            state.rewind(mark)
        elif state.grant(value, 15):
            grants += 1
            assert before < state.cap <= before + value  # type: ignore[operator]
            assert state.cap <= min(n for n in (15, budget, limit) if n is not None)  # type: ignore[operator]
            continue
        assert state.cap <= before  # type: ignore[operator]
    assert grants <= 1 and state.used <= first + state.granted
