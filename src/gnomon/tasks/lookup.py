"""Variable look-up chains: "a = 7. b = a. d = 3. What is b?"

Levels (hops = copies between the query and its value; distractors): 1: 1, 1 · 2: 2, 2 · 3: 3, 3 · 4: 5, 4 · 5: 8, 5.
From level 3 on the distractors hold a chain of their own. Assignments are shuffled; values 0–99.
Space: ordered choices of the letters times the values of the roots (the shuffles are not counted).
"""

from __future__ import annotations

from math import perm
from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HOPS = {1: 1, 2: 2, 3: 3, 4: 5, 5: 8}
DISTRACTORS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5}
CHAINED = {1: 0, 2: 0, 3: 1, 4: 2, 5: 3}


class _Lookup:
    name = "lookup"

    def generate(self, rng: Random, level: int) -> Problem:
        """A shuffled list of assignments and a question about the end of the longest chain."""
        hops, extra, chained = HOPS[level], DISTRACTORS[level], CHAINED[level]
        names = rng.sample(LETTERS, hops + 1 + extra)
        values = rng.sample(range(100), extra - chained + 1)
        chain, rest = names[: hops + 1], names[hops + 1 :]
        lines = [(chain[0], str(values[0]))] + [(b, a) for a, b in zip(chain, chain[1:], strict=False)]
        lines += [(rest[i + 1], rest[i]) for i in range(chained)]
        roots = [rest[0], *rest[chained + 1 :]]
        lines += [(name, str(value)) for name, value in zip(roots, values[1:], strict=True)]
        rng.shuffle(lines)
        prompt = " ".join(f"{a} = {b}." for a, b in lines) + f" What is {chain[-1]}?"
        data = {"lines": [list(line) for line in lines], "query": chain[-1]}
        return Problem(self.name, level, prompt, str(values[0]), "integer", data)

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """Follow the chain from the query back to its value, one look-up per step."""
        table = dict(problem.data["lines"])
        path = [problem.data["query"]]
        while path[-1] in table:
            path.append(table[path[-1]])
        steps = [f"{a} = {b}" for a, b in zip(path, path[1:], strict=False)]
        roots = [", ".join(f"{a} = {b}" for a, b in table.items() if b.isdigit())]
        others = [b for b in table.values() if b not in path]
        checks = []
        for a, b in zip(path, path[1:], strict=False):
            wrong = rng.choice(others) if others else ""
            checks.append(Check(f"{a} = {b}", f"{a} = {b}", f"{a} = {wrong}" if wrong else "", f"{wrong} is not {a}"))
        recipe = Recipe(steps, "values", [steps[:-1], roots], [f"{path[0]} = {path[-1]}"], checks)
        return gold(problem, strategy, rng, recipe)

    def space(self, level: int) -> int:
        """Ordered letters times root values: a lower bound."""
        letters = HOPS[level] + 1 + DISTRACTORS[level]
        return perm(26, letters) * perm(100, DISTRACTORS[level] - CHAINED[level] + 1)


FAMILY: Family = _Lookup()
