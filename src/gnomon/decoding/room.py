"""The answer reserve: what a request's context leaves for thinking, checked when the request is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gnomon.base.errors import BudgetError, TagError
from gnomon.decoding.budget import check_budget
from gnomon.protocol.layout import Layout
from gnomon.protocol.match import matcher

RESERVE_FLOOR = 32
RESERVE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Room:
    """What a request has: `limit` think tokens at most, `reserve` tokens kept for the answer, `overhead` for tags."""

    limit: int
    reserve: int
    overhead: int


def answer_reserve(room: int, raised: int | None = None) -> int:
    """Tokens kept for the answer out of `room`: max(32, 25 %), which a task may raise."""
    return max(RESERVE_FLOOR, math.ceil(RESERVE_SHARE * room), raised or 0)


def allot(context: int, prompt: int, overhead: int, budget: int | None, max_answer: int | None = None) -> Room:
    """Check a request when it is made. All arguments in tokens; `overhead` = tags and transition.

    Raises BudgetError, with the numbers, where the prompt or an explicit budget cannot hold beside the answer reserve.
    """
    check_budget(budget)
    if prompt >= context:
        raise BudgetError(f"the prompt has {prompt} tokens but the context holds {context}; shorten the prompt")
    room = context - prompt - overhead
    reserve = answer_reserve(max(0, room), max_answer)
    limit = room - reserve
    if limit < 0:
        raise BudgetError(
            f"no room to answer: context {context} - prompt {prompt} - tags {overhead} leaves {room} tokens, "
            f"but the answer reserve is {reserve}; shorten the prompt or lower max_answer_tokens"
        )
    if budget is not None and budget > limit:
        raise BudgetError(
            f"a budget of {budget} does not fit: context {context} - prompt {prompt} - tags {overhead} - "
            f"answer reserve {reserve} leaves {limit} think tokens; ask for at most {limit}, or none"
        )
    return Room(limit, reserve, overhead)


def check_prefix(prefix: tuple[int, ...], most: int, layout: Layout) -> None:
    """Refuse resumed think tokens that are more than `most`, or not the inside of one open block."""
    if len(prefix) > most:
        raise BudgetError(
            f"the think prefix has {len(prefix)} tokens, but only {most} may be thought; shorten it or ask for more"
        )
    stray = sorted(set(prefix) & {*layout.masked(True), *layout.eos})
    tags = (layout.end_think, *layout.end_think_also, layout.end_answer, *filter(None, (layout.answer,)))
    rule, state = matcher(*tags), 0
    for token in prefix:
        state = rule.step(state, token)
        if rule.hit[state] is not None:
            stray.append(token)
    if stray:
        raise TagError(
            f"the think prefix holds id {stray[0]}, which closes a block or cannot stand in one; "
            "give only what stands between the think tags"
        )
