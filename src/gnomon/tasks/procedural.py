"""Drawing problems: stream = hash(task, level, stream, split, index, attempt), split = hash of the problem's text.

A generator draws until its text falls into the wanted split, so splits are disjoint by construction, whatever the
streams. Family modules are named by import string and loaded when first used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final, Protocol, cast, runtime_checkable

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, DataError, unknown
from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.splits import SHARES, check_split, split_of

LEVELS: Final = (1, 2, 3, 4, 5)
MAX_ATTEMPTS: Final = 1000
REGISTRY: Final[dict[str, str]] = {
    "chain": "gnomon.tasks.chain:FAMILY",
    "multiply": "gnomon.tasks.multiply:FAMILY",
    "sort": "gnomon.tasks.sort:FAMILY",
    "count": "gnomon.tasks.count:FAMILY",
    "lookup": "gnomon.tasks.lookup:FAMILY",
    "boolean": "gnomon.tasks.boolean:FAMILY",
    "knights": "gnomon.tasks.knights:FAMILY",
    "kinship": "gnomon.tasks.kinship:FAMILY",
    "calendar": "gnomon.tasks.dates:FAMILY",
    "strings": "gnomon.tasks.letters:FAMILY",
    "programs": "gnomon.tasks.programs:FAMILY",
    "belief": "gnomon.tasks.belief:FAMILY",
    "rules": "gnomon.tasks.rules:FAMILY",
}


@functools.cache
def family(name: str) -> Family:
    """The built-in family `name`; UnknownNameError with the nearest name otherwise."""
    if name not in REGISTRY:
        raise unknown("task", name, [*REGISTRY, "all"])
    module, _, attribute = REGISTRY[name].partition(":")
    return cast(Family, getattr(importlib.import_module(module), attribute))


def draw(task: str | Family, level: int, split: str, stream: str, index: int) -> Problem:
    """Problem number `index` of a stream: the same arguments give the same problem, on every machine.

    Raises ConfigError for a level that is not 1–5, DataError when no text of the split turns up.
    """
    maker = family(task) if isinstance(task, str) else task
    check_split(split)
    if level not in LEVELS:
        raise ConfigError(f"level {level!r} of task {maker.name!r} does not exist; levels are 1–5")
    for attempt in range(MAX_ATTEMPTS):
        problem = maker.generate(seeds.rng(maker.name, level, stream, split, index, attempt), level)
        if split_of(problem.prompt) == split:
            return replace(problem, task=maker.name, level=level, split=split, stream=stream, index=index)
    raise DataError(
        f"task {maker.name!r} level {level} gave no {split} problem in {MAX_ATTEMPTS} attempts; its space of "
        f"{maker.space(level)} texts has about {int(maker.space(level) * SHARES[split])} in this split: "
        f"use another level or split"
    )


@runtime_checkable
class Source(Protocol):
    """Anything that problems come from: a family, a reasoning-gym dataset, a file."""

    @property
    def name(self) -> str:
        """`chain`, `gym:chain_sum`, `file:stem`."""

    @property
    def levels(self) -> tuple[int, ...]:
        """The levels that it offers, from easy to hard."""

    def draw(self, level: int, split: str, stream: str, index: int) -> Problem:
        """Problem number `index` of a (level, split, stream)."""

    def capacity(self, level: int, split: str) -> int | None:
        """How many distinct problems there are, or None when it is not known."""


@dataclass(frozen=True)
class FamilySource:
    """A procedural family as a Source; it also writes gold traces."""

    family: Family
    levels: tuple[int, ...] = LEVELS

    @property
    def name(self) -> str:
        return self.family.name

    def draw(self, level: int, split: str, stream: str, index: int) -> Problem:
        return draw(self.family, level, split, stream, index)

    def capacity(self, level: int, split: str) -> int | None:
        return int(self.family.space(level) * SHARES[split])

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        return self.family.gold(problem, strategy, rng)


def resolve_tasks(spec: str | Sequence[str]) -> list[Source]:
    """Sources of `all`, `chain,count`, `gym:chain_sum`, `path.jsonl` or a comma list / sequence of these.

    Raises UnknownNameError with the nearest name, and what gym and file sources raise.
    """
    names = [n.strip() for n in spec.split(",")] if isinstance(spec, str) else list(spec)
    if not any(names):
        raise ConfigError(f"no task named; write `all` or some of: {', '.join(REGISTRY)}, gym:NAME, FILE.jsonl")
    found: dict[str, Source] = {}
    for name in names:
        if name == "all":
            found.update({n: FamilySource(family(n)) for n in REGISTRY})
        elif name.startswith("gym:"):
            from gnomon.tasks.gym import GymSource

            found[name] = GymSource(name.removeprefix("gym:"))
        elif name.endswith(".jsonl"):
            from gnomon.tasks.files import FileSource

            found[name] = FileSource(Path(name))
        else:
            found[name] = FamilySource(family(name))
    return list(found.values())


def _sources(tasks: str | Sequence[str] | Sequence[Source]) -> list[Source]:
    if isinstance(tasks, str):
        return resolve_tasks(tasks)
    names = [t for t in tasks if isinstance(t, str)]
    return resolve_tasks(names) if len(names) == len(tasks) else [t for t in tasks if not isinstance(t, str)]


def problems(
    tasks: str | Sequence[str] | Sequence[Source],
    split: str,
    stream: str,
    n: int,
    levels: Sequence[int] = LEVELS,
) -> list[Problem]:
    """`n` problems: tasks in turn with equal weight, levels uniform within a task; a longer list extends a shorter.

    Raises ConfigError when a task is asked for more problems than its split has distinct texts in these levels. A
    small level may repeat items before that (a stream draws with replacement); `evaluate` reports `unique_n`.
    """
    return [source.draw(level, split, stream, index) for source, level, index in _cells(tasks, split, n, levels)]


def check_room(tasks: str | Sequence[str] | Sequence[Source], split: str, n: int, levels: Sequence[int]) -> None:
    """Raise what `problems` would where there are too few of them; nothing is drawn."""
    _cells(tasks, split, n, levels)


def _cells(
    tasks: str | Sequence[str] | Sequence[Source], split: str, n: int, levels: Sequence[int]
) -> list[tuple[Source, int, int]]:
    """(source, level, index) of every problem."""
    check_split(split)
    if n < 1:
        raise ConfigError(f"n = {n}; ask for at least one problem")
    cells: list[tuple[Source, int, int]] = []
    sources = _sources(tasks)
    offered = [tuple(x for x in s.levels if x in levels) for s in sources]
    for source, mine in zip(sources, offered, strict=True):
        if not mine:
            raise ConfigError(f"task {source.name!r} has levels {source.levels}, none of the asked {tuple(levels)}")
    wanted: dict[tuple[int, int], int] = {}
    for i in range(n):
        turn, who = divmod(i, len(sources))
        level = offered[who][(turn + who) % len(offered[who])]
        index = wanted.get((who, level), 0)
        wanted[who, level] = index + 1
        cells.append((sources[who], level, index))
    for who, source in enumerate(sources):
        count = sum(c for (w, _), c in wanted.items() if w == who)
        rooms = [source.capacity(level, split) for level in offered[who]]
        if None not in rooms and count > sum(r or 0 for r in rooms):
            each = ", ".join(f"level {x}: {r}" for x, r in zip(offered[who], rooms, strict=True))
            raise ConfigError(
                f"task {source.name!r} has {sum(r or 0 for r in rooms)} distinct {split} problems ({each}), but "
                f"n = {n} asks for {count} of them; use a smaller n, other levels, or more tasks"
            )
    return cells
