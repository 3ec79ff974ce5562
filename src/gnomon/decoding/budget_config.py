"""The rule that the budget controller keeps for one request: tags as ids, caps, scope. Checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from gnomon.base.errors import BudgetError, TagError
from gnomon.protocol.match import matcher
from gnomon.protocol.tags import StopCause
from gnomon.protocol.trace import Scope


@dataclass(frozen=True, slots=True)
class BudgetConfig:
    """The rule for one request.

    think, end: ids of the start and end tag (one or several tokens). end_also: other spellings that close as well.
    budget: hard cap in think tokens that was asked for (None: none). predicted: the clipped prediction, a cap too, and
    the only one that `BudgetState.grant` may exceed. limit: what the context leaves; reaching it is `limit`.
    scope: what the budget covers. transition: ids forced before the end tag at a cut. lead: ids that a template adds
    behind the start tag. eos: ids that end the sequence.
    Raises BudgetError / TagError on values that cannot be kept.
    """

    think: tuple[int, ...]
    end: tuple[int, ...]
    budget: int | None = None
    limit: int | None = None
    scope: Scope = "turn"
    transition: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    end_also: tuple[tuple[int, ...], ...] = ()
    predicted: int | None = None

    def __post_init__(self) -> None:
        check_budget(self.budget)
        check_budget(self.limit)
        check_budget(self.predicted)
        if self.scope not in get_args(Scope):
            raise BudgetError(f"unknown budget scope {self.scope!r}; write one of {', '.join(get_args(Scope))}")
        if not self.think or not self.end:
            raise TagError(f"start and end tag need at least one token; given {self.think!r} and {self.end!r}")
        if self.think == self.end:
            raise TagError(f"start and end tag are the same ids {self.think!r}; a block could never be closed")
        rule, state = matcher(self.end, *self.end_also), 0
        for token in self.transition + self.end[:-1]:
            state = rule.step(state, token)
            if rule.hit[state] is not None:
                raise TagError(
                    f"the transition {self.transition!r} already contains the end tag {self.end!r}; "
                    "leave the tag out, it is appended"
                )

    @property
    def cap(self) -> int | None:
        """The binding number of think tokens, None when there is none."""
        given = [n for n in (self.budget, self.predicted, self.limit) if n is not None]
        return min(given) if given else None

    @property
    def cap_cause(self) -> StopCause:
        """What a close at the cap is called: `hard`, or `limit` where only the context ends the block."""
        return "hard" if self.cap is not None and self.cap in (self.budget, self.predicted) else "limit"


def check_budget(budget: object) -> None:
    """Refuse what is not None or a whole number ≥ 0."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"a budget is a whole number of think tokens or none; given {budget!r}")
    if budget < 0:
        raise BudgetError(f"a budget cannot be negative; given {budget}. Write 0 to answer without thinking.")
