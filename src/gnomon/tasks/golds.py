"""Steps that can go wrong in several ways: one is drawn per trace, the node layout is `trace.py`'s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from gnomon.tasks.problem import Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold


@dataclass(frozen=True)
class Slip:
    """A plausible wrong version of a step and a few words that name the mistake.

    check: what the failing monitor writes after "fail" ("" = the same as the step's check).
    """

    text: str
    diagnosis: str
    check: str = ""


@dataclass(frozen=True)
class Step:
    """One step with the finer or independent computation that checks it, and the slips it invites."""

    text: str
    check: str
    slips: tuple[Slip, ...] = ()


@dataclass(frozen=True)
class Parts:
    """`decompose`: an outline, independent groups of steps, and the step(s) that merge them."""

    outline: str
    groups: tuple[tuple[str, ...], ...]
    merge: tuple[str, ...]


def _drawn(step: Step, rng: Random) -> Check:
    if not step.slips:
        return Check(step.text, step.check)
    slip = rng.choice(step.slips)
    return Check(step.text, step.check, slip.text, slip.diagnosis, slip.check)


def make_gold(
    problem: Problem, strategy: str, rng: Random, *, steps: Sequence[str], parts: Parts, checked: Sequence[Step]
) -> Gold:
    """The gold trace in `strategy`; UnknownNameError for a strategy that does not exist."""
    checks = [_drawn(step, rng) for step in checked] if strategy == "verify" else []
    return gold(problem, strategy, rng, Recipe(steps, parts.outline, parts.groups, parts.merge, checks))
