"""sort: "Sort 34 12 78.", distinct two-digit numbers, smallest first.

Levels: 3, 4, 5, 6, 8 numbers. Space (exact): 90!/(90-n)!, from 704,880 at level 1.
"""

from __future__ import annotations

from math import perm
from random import Random

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

SIZE = {1: 3, 2: 4, 3: 5, 4: 6, 5: 8}


def _list(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


def _chunk(ordered: list[int], start: int, size: int) -> Step:
    """The next few numbers in order, checked neighbour by neighbour (also against the last one before them)."""
    part = ordered[start : start + size]
    slips = []
    for i in range(len(part) - 1):
        x, y = part[i], part[i + 1]
        slips.append(Slip(_list([*part[:i], y, x, *part[i + 2 :]]), f"swap {y} {x}", f"{y}>{x}"))
    shifted = ordered[start + 1 : start + 1 + size]
    if len(shifted) == len(part):
        slips.append(Slip(_list(shifted), f"missed {part[0]}", f"{part[0]}<{shifted[0]}"))
    return Step(_list(part), "<".join(map(str, ordered[max(0, start - 1) : start + size])), tuple(slips))


class Sort:
    """Sorting short lists."""

    name = "sort"

    def generate(self, rng: Random, level: int) -> Problem:
        """A uniform sample without repetition from 10–99."""
        numbers = rng.sample(range(10, 100), SIZE[level])
        answer = _list(sorted(numbers))
        return Problem(self.name, level, f"Sort {_list(numbers)}.", answer, "exact", {"numbers": numbers})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: one tens digit after the other · decompose: two halves, merged · verify: neighbours compared."""
        numbers: list[int] = list(problem.data["numbers"])
        ordered, half = sorted(numbers), (len(numbers) + 1) // 2
        tens = sorted({n // 10 for n in numbers})
        steps = [f"{t}: {_list([n for n in ordered if n // 10 == t])}" for t in tens]
        groups = tuple((f"{_list(h)}: {_list(sorted(h))}",) for h in (numbers[:half], numbers[half:]))
        parts = Parts("halves", groups, (_list(ordered),))
        size = len(ordered) if len(ordered) <= 4 else half
        checked = [_chunk(ordered, start, size) for start in range(0, len(ordered), size)]
        return make_gold(problem, strategy, rng, steps=steps, parts=parts, checked=checked)

    def space(self, level: int) -> int:
        """Distinct texts of the level (exact)."""
        return perm(90, SIZE[level])


FAMILY: Family = Sort()
