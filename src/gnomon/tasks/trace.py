"""How families write gold traces: one recipe in, the nodes of any strategy out (decisions.md §1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from gnomon.base.errors import unknown
from gnomon.protocol.graph import Node
from gnomon.protocol.tags import STRATEGIES
from gnomon.tasks.problem import Gold, Problem

SLIP_RATE = 0.25


@dataclass(frozen=True)
class Check:
    """One verified step: its text, what the monitor re-computes, and a plausible wrong version ("" = cannot slip).

    fail: what the monitor finds at the wrong version ("" = `check`). why: the diagnosis.
    """

    text: str
    check: str
    wrong: str = ""
    why: str = ""
    fail: str = ""


@dataclass(frozen=True)
class Recipe:
    """A problem's thinking in three grains.

    steps: S texts. outline, groups, merge: P text, independent lists of S texts, S texts after them (first merges).
    checks: the steps of `verify`.
    """

    steps: Sequence[str]
    outline: str
    groups: Sequence[Sequence[str]]
    merge: Sequence[str]
    checks: Sequence[Check]


def verified(checks: Sequence[Check], rng: Random) -> list[Node]:
    """S, M per check; with probability SLIP_RATE one check slips first: S (slip), M fail, D, repaired S, M ok."""
    able = [i for i, c in enumerate(checks) if c.wrong and c.wrong != c.text]
    slip = rng.choice(able) if able and rng.random() < SLIP_RATE else -1
    nodes: list[Node] = []
    for i, c in enumerate(checks):
        if i == slip:
            nodes += [Node("S", c.wrong, slip=True), Node("M", f"fail {c.fail or c.check}".strip()), Node("D", c.why)]
        nodes += [Node("S", c.text), Node("M", f"ok {c.check}".strip())]
    return nodes


def grouped(outline: str, groups: Sequence[Sequence[str]], merge: Sequence[str]) -> list[Node]:
    """P, then each group as a chain of S without a parent, then `merge`, whose first S has every group as parent."""
    nodes = [Node("P", outline)]
    ends = []
    for group in groups:
        nodes += [Node("S", text, () if i == 0 else None) for i, text in enumerate(group)]
        ends.append(len(nodes))
    return nodes + [Node("S", text, tuple(ends) if i == 0 else None) for i, text in enumerate(merge)]


def gold(problem: Problem, strategy: str, rng: Random, recipe: Recipe) -> Gold:
    """The gold trace of `recipe` in `strategy`; every strategy but `direct` ends with an empty A node."""
    if strategy == "direct":
        nodes: list[Node] = []
    elif strategy == "steps":
        nodes = [Node("S", text) for text in recipe.steps]
    elif strategy == "decompose":
        nodes = grouped(recipe.outline, recipe.groups, recipe.merge)
    elif strategy == "verify":
        nodes = verified(recipe.checks, rng)
    else:
        raise unknown("strategy", strategy, STRATEGIES)
    return Gold(strategy, (*nodes, Node("A")) if nodes else (), problem.answer)
