"""Invented rules that only the examples tell: "zi bo: m k t -> t k m. zi bo: a d -> d a. zi bo: f g -> ?"

Levels: 1: a map of letters, the asked one is in an example · 2: a map, two letters asked · 3: one of 4 list rules
(lists of 2–4) · 4: one of 7 (3–5) · 5: one of 10 (4–6). Three examples by default; `with_examples` rebuilds the
problem with 0–3. Space: ordered query letters and names times rules (other letters of the examples not counted).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import perm
from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = ("zi", "bo", "ka", "lu", "me", "ro", "ti", "vu", "pa", "do")
RULES: dict[str, Callable[[list[int]], list[int]]] = {
    "reverse": lambda x: x[::-1],
    "first": lambda x: x[:1],
    "last": lambda x: x[-1:],
    "last twice": lambda x: [*x, x[-1]],
    "drop first": lambda x: x[1:],
    "drop last": lambda x: x[:-1],
    "swap ends": lambda x: [x[-1], *x[1:-1], x[0]],
    "first to end": lambda x: [*x[1:], x[0]],
    "last to front": lambda x: [x[-1], *x[:-1]],
    "first twice": lambda x: [x[0], *x],
}  # on positions 0..n-1
POOL = {3: 4, 4: 7, 5: 10}
SIZES = {3: (2, 4), 4: (3, 5), 5: (4, 6)}


def _apply(rule: str, letters: list[str]) -> list[str]:
    return [letters[i] for i in RULES[rule](list(range(len(letters))))]


def with_examples(problem: Problem, k: int) -> Problem:
    """The same question with k examples (0–3); those that it cannot be answered without are kept first."""
    name, query, examples = problem.data["name"], problem.data["query"], problem.data["examples"]
    order = [*problem.data["key"], *(i for i in range(len(examples)) if i not in problem.data["key"])]
    shown = [examples[i] for i in sorted(order[:k])]
    parts = [f"{name}: {' '.join(a)} -> {' '.join(b)}." for a, b in shown]
    return replace(problem, prompt=" ".join([*parts, f"{name}: {' '.join(query)} -> ?"]))


def without_examples(problem: Problem) -> Problem:
    """The bare question: its answer is then a guess."""
    return with_examples(problem, 0)


class _Rules:
    name = "rules"

    def generate(self, rng: Random, level: int) -> Problem:
        """Three examples of a hidden rule and a query that they settle."""
        name = " ".join(rng.sample(SYLLABLES, 2))
        if level <= 2:
            source, target = rng.sample(LETTERS, 3 * level), rng.sample(LETTERS, 3 * level)
            table = dict(zip(source, target, strict=True))
            groups = [source[i * level : (i + 1) * level] for i in range(3)]
            key = rng.sample(range(3), level)
            query, rule = [rng.choice(groups[i]) for i in key], "map"
            examples = [[g, [table[s] for s in g]] for g in groups]
            answer = [table[s] for s in query]
        else:
            names, key = list(RULES)[: POOL[level]], []
            while True:
                rule = rng.choice(names)
                lists = [rng.sample(LETTERS, rng.randint(*SIZES[level])) for _ in range(4)]
                examples, query = [[x, _apply(rule, x)] for x in lists[:3]], lists[3]
                fits = [r for r in names if all(_apply(r, a) == b for a, b in examples)]
                answer = _apply(rule, query)
                if all(_apply(r, query) == answer for r in fits):
                    break
        data = {"name": name, "rule": rule, "examples": examples, "query": query, "key": sorted(key)}
        return with_examples(Problem(self.name, level, "", " ".join(answer), data=data), 3)

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """Name the rule, apply it; decompose by letter or by numbered place; verify against the first example."""
        rule, query, answer = problem.data["rule"], problem.data["query"], problem.answer
        if rule == "map":
            table = {a: b for xs, ys in problem.data["examples"] for a, b in zip(xs, ys, strict=True)}
            pairs = [f"{s} -> {table[s]}" for s in query]
            others = [b for s, b in table.items() if s not in query]
            wrong = [f"{s} -> {rng.choice(others)}" for s in query]
            checks = [Check(p, p, w, f"not {w[-1]}") for p, w in zip(pairs, wrong, strict=True)]
            groups = [[p] for p in pairs] if len(pairs) > 1 else [["map letter"], pairs]
            recipe = Recipe(["map", *([answer] if len(pairs) > 1 else pairs)], "each letter", groups, [answer], checks)
            return gold(problem, strategy, rng, recipe)
        places = [f"{i + 1} {letter}" for i, letter in enumerate(query)]
        moved = " ".join(_apply(rule, places))
        source, target = (" ".join(x) for x in problem.data["examples"][0])
        misnamed = rng.choice([r for r in list(RULES)[: POOL[problem.level]] if r != rule])
        slipped = " ".join(_apply(misnamed, query))
        checks = [
            Check(rule, f"{source} -> {target}", misnamed, f"not {misnamed}"),
            Check(" ".join(places), f"{len(places)}"),
            Check(answer, moved, slipped, f"{misnamed} not {rule}"),
        ]
        recipe = Recipe([rule, answer], "rule, places", [[rule], [" ".join(places)]], [moved], checks)
        return gold(problem, strategy, rng, recipe)

    def space(self, level: int) -> int:
        """Names times query letters times rules: a lower bound."""
        names = perm(len(SYLLABLES), 2)
        if level <= 2:
            return names * perm(26, level) * perm(25, level)
        return names * perm(26, SIZES[level][0]) * POOL[level]


FAMILY: Family = _Rules()
