"""count: "Count a in: b a n a n a.", spaced letters from a small alphabet; the target is 0–60 % of them.

Levels: 4–6, 6–8, 9–12, 13–16, exactly 20 letters.
Space: at least 26 targets × strings over three other letters and the target, see `space`.
"""

from __future__ import annotations

from math import comb
from random import Random
from string import ascii_lowercase

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

LENGTH = {1: (4, 6), 2: (6, 8), 3: (9, 12), 4: (13, 16), 5: (20, 20)}
OTHERS = 3  # how many other letters a problem draws from
SHARE = 0.6


def _chunks(letters: list[str]) -> list[list[str]]:
    size = 5 if len(letters) > 8 else (len(letters) + 1) // 2
    return [letters[i : i + size] for i in range(0, len(letters), size)]


def _count(chunk: list[str], target: str, start: int, wrong: int = -1) -> str:
    """ "b0 a1 n1 a2": each letter with the count so far; at index `wrong` the count goes astray."""
    out = []
    for i, letter in enumerate(chunk):
        start += (letter == target) ^ (i == wrong)
        out.append(f"{letter}{start}")
    return " ".join(out)


class Count:
    """Counting one letter."""

    name = "count"

    def generate(self, rng: Random, level: int) -> Problem:
        """The number of hits is uniform, so no count is the safe guess."""
        n = rng.randint(*LENGTH[level])
        target, *others = rng.sample(ascii_lowercase, 1 + OTHERS)
        hits = rng.randint(0, int(SHARE * n))
        letters = [target] * hits + [rng.choice(others) for _ in range(n - hits)]
        rng.shuffle(letters)
        prompt = f"Count {target} in: {' '.join(letters)}."
        return Problem(self.name, level, prompt, str(hits), "integer", {"target": target, "letters": letters})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: a running count · decompose: each part from zero, then the sum · verify: old + new hits per part."""
        target, letters = str(problem.data["target"]), list(problem.data["letters"])
        chunks = _chunks(letters)
        hits = [chunk.count(target) for chunk in chunks]
        checked = []
        for i, chunk in enumerate(chunks):
            before = sum(hits[:i])
            slips = tuple(
                Slip(_count(chunk, target, before, j), f"missed {c}" if c == target else f"{c} is not {target}")
                for j, c in enumerate(chunk)
            )
            check = f"{before}+{hits[i]}={before + hits[i]}"
            checked.append(Step(_count(chunk, target, before), check, slips))
        merge = " ".join(f"{sum(hits[:i])}+{hits[i]}={sum(hits[: i + 1])}" for i in range(1, len(hits)))
        parts = Parts("parts", tuple((_count(chunk, target, 0),) for chunk in chunks), (merge,))
        return make_gold(problem, strategy, rng, steps=[s.text for s in checked], parts=parts, checked=checked)

    def space(self, level: int) -> int:
        """A lower bound: for the shortest length and its most hits, two fixed other letters drawn from 25."""
        n = LENGTH[level][0]
        hits = int(SHARE * n)
        return 26 * comb(25, 2) * comb(n, hits) * (2 ** (n - hits) - 2)


FAMILY: Family = Count()
