"""strings: named operations on spaced letters, "Take d k a f. Reverse it. What is left?".

Levels: 4 letters, 1 operation · 5 letters, 1–2 · 7 letters, 2 · 9 letters, 3 · 12 letters, 3. The letters differ.
Space: at least 7 · 26!/(26-n)! texts (one of seven operations), 2,511,600 at level 1.
"""

from __future__ import annotations

from collections.abc import Callable
from math import perm
from random import Random
from string import ascii_lowercase

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

SHAPE = {1: (4, 1, 1), 2: (5, 1, 2), 3: (7, 2, 2), 4: (9, 3, 3), 5: (12, 3, 3)}  # letters, fewest and most operations
OPERATIONS: dict[str, Callable[[list[str]], list[str]]] = {
    "Reverse it.": lambda s: s[::-1],
    "Swap the first and last.": lambda s: [s[-1], *s[1:-1], s[0]],
    "Drop the first.": lambda s: s[1:],
    "Drop the last.": lambda s: s[:-1],
    "Move the first to the end.": lambda s: [*s[1:], s[0]],
    "Move the last to the front.": lambda s: [s[-1], *s[:-1]],
    "Double the last.": lambda s: [*s, s[-1]],
}
UNDO = {  # pairs that cancel are never drawn one after the other
    "Reverse it.": "Reverse it.",
    "Swap the first and last.": "Swap the first and last.",
    "Move the first to the end.": "Move the last to the front.",
    "Move the last to the front.": "Move the first to the end.",
    "Double the last.": "Drop the last.",
}
MIDDLE = "*"  # stands for the letters that only a reversal touches


def _checked(result: list[str]) -> Step:
    """A result, checked with the place of every letter; the slips swap two letters or lose one."""
    slips = []
    for i in range(len(result) - 1):
        x, y = result[i], result[i + 1]
        if x != y:
            slips.append(Slip(" ".join([*result[:i], y, x, *result[i + 2 :]]), f"swap {y} {x}"))
            slips.append(Slip(" ".join(result[:i] + result[i + 1 :]), f"lost {x}"))
    return Step(" ".join(result), " ".join(f"{c}{i}" for i, c in enumerate(result, start=1)), tuple(slips))


def _parts(letters: list[str], names: list[str], final: list[str]) -> Parts:
    """k operations can only reach k letters at each end; the middle is at most reversed."""
    k = len(names)
    middle = letters[k:-k]
    inner = [" ".join(middle)]
    if names.count("Reverse it.") % 2:
        inner.append(" ".join(middle[::-1]))
    ends = [*letters[:k], MIDDLE, *letters[-k:]]
    outer = [" ".join(ends)]
    for name in names:
        ends = OPERATIONS[name](ends)
        outer.append(" ".join(ends))
    return Parts("middle ends", (tuple(inner), tuple(outer)), (" ".join(final),))


class Strings:
    """String manipulation, letter by letter."""

    name = "strings"

    def generate(self, rng: Random, level: int) -> Problem:
        """Uniform letters and operations; an operation never undoes the one before it."""
        n, fewest, most = SHAPE[level]
        letters = rng.sample(ascii_lowercase, n)
        names: list[str] = []
        for _ in range(rng.randint(fewest, most)):
            allowed = [name for name in OPERATIONS if not names or UNDO.get(names[-1]) != name]
            names.append(rng.choice(allowed))
        result = letters
        for name in names:
            result = OPERATIONS[name](result)
        prompt = f"Take {' '.join(letters)}. {' '.join(names)} What is left?"
        return Problem(self.name, level, prompt, " ".join(result), "exact", {"letters": letters, "operations": names})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: one operation each · decompose: middle and ends apart · verify: the place of every letter."""
        letters, names = list(problem.data["letters"]), list(problem.data["operations"])
        result, checked = letters, []
        for name in names:
            result = OPERATIONS[name](result)
            checked.append(_checked(result))
        parts = _parts(letters, names, result)
        return make_gold(problem, strategy, rng, steps=[s.text for s in checked], parts=parts, checked=checked)

    def space(self, level: int) -> int:
        """A lower bound on the distinct texts of the level: one operation of seven."""
        return len(OPERATIONS) * perm(26, SHAPE[level][0])


FAMILY: Family = Strings()
