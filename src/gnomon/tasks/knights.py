"""Knights tell the truth, knaves lie: "Ann: I and Bob are knaves. Bob: Ann is a knave. Who is what: Ann, Bob?"

Levels: 1: 2 people, an opening "I and/or Bob ... knave" · 2: 2 people, also "the same"/"different" · 3: 3 people ·
4: 3 people with one "and"/"or" statement about two others · 5: 4 people, one such. Statements are shuffled.
Every puzzle is solved by deductions from one statement at a time, and brute force finds one solution only.
Space: distinct puzzles with the 12 names, counted low (levels 1 and 2 by enumeration of their forms).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import perm
from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

NAMES = ("Ann", "Eve", "Amy", "Zoe", "Ida", "Mia", "Bob", "Cid", "Dan", "Tom", "Max", "Leo")
PEOPLE = {1: 2, 2: 2, 3: 3, 4: 3, 5: 4}
Says = list  # [speaker, form, person, value, person, value]; JSON-able, True = knight
Types = dict[str, bool]


def _kind(value: bool) -> str:
    return "knight" if value else "knave"


def holds(statement: Says, types: Mapping[str, bool]) -> bool:
    """Whether what is said is true when people are of these types."""
    _, form, a, va, b, vb = statement
    left, right = types[a] == va, types[b] == vb
    return {"is": left, "and": left and right, "or": left or right, "same": types[a] == types[b],
            "different": types[a] != types[b]}[form]  # fmt: skip


def claim(statement: Says) -> str:
    """What is said, in words."""
    speaker, form, a, va, b, vb = statement
    who = "I" if a == speaker else a
    if form == "is":
        return f"{who} is a {_kind(va)}"
    if form in ("same", "different"):
        return f"{who} and {b} are {'the ' if form == 'same' else ''}{form}"
    if who == "I":
        return f"I {form} {b} {'are knaves' if form == 'and' else 'is a knave'}"
    return f"{a} is a {_kind(va)} {form} {b} is a {_kind(vb)}"


def forced(statement: Says, known: Types) -> Types:
    """Types of people of one statement that follow from it and what is known."""
    people = list(dict.fromkeys((statement[0], statement[2], statement[4])))
    fits = []
    for values in product((True, False), repeat=len(people)):
        types = dict(zip(people, values, strict=True))
        if all(known.get(p, v) == v for p, v in types.items()) and holds(statement, types) == types[statement[0]]:
            fits.append(types)
    return {p: fits[0][p] for p in people if p not in known and fits and all(f[p] == fits[0][p] for f in fits)}


def deduce(statements: list[Says]) -> list[tuple[str, bool, Says]]:
    """(person, type, statement it came from) in the order of deduction, by one statement at a time."""
    known: Types = {}
    found: list[tuple[str, bool, Says]] = []
    progress = True
    while progress:
        progress = False
        for statement in statements:
            for person, value in forced(statement, known).items():
                known[person], progress = value, True
                found.append((person, value, statement))
    return found


def solutions(people: list[str], statements: list[Says]) -> list[Types]:
    """Every assignment of types under which exactly the knights' statements are true."""
    every = [dict(zip(people, v, strict=True)) for v in product((True, False), repeat=len(people))]
    return [t for t in every if all(holds(s, t) == t[s[0]] for s in statements)]


def _draw(rng: Random, level: int, people: list[str]) -> list[Says]:
    start, *rest = rng.sample(people, len(people))
    form = rng.choice(("and", "or") if level == 1 else ("and", "or", "same", "different"))
    other = rest[0]
    out: list[Says] = [[start, form, start, False, other, False]]
    for i, speaker in enumerate(rest):
        a, b = rng.sample([p for p in people if p != speaker], 2) if len(people) > 2 else (start, start)
        compound = level >= 4 and i == len(rest) - 1
        va, vb = rng.random() < 0.5, rng.random() < 0.5
        out.append([speaker, rng.choice(("and", "or")), a, va, b, vb] if compound else [speaker, "is", a, va, a, va])
    return out


class _Knights:
    name = "knights"

    def generate(self, rng: Random, level: int) -> Problem:
        """Draw people and statements until single deductions solve the puzzle."""
        people = rng.sample(NAMES, PEOPLE[level])
        while True:
            statements = _draw(rng, level, people)
            if len(deduce(statements)) == len(people) and len(solutions(people, statements)) == 1:
                break
        rng.shuffle(statements)
        types = solutions(people, statements)[0]
        text = " ".join(f"{s[0]}: {claim(s)}." for s in statements)
        prompt = f"Knights tell the truth, knaves lie. {text} Who is what: {', '.join(people)}?"
        answer = ", ".join(f"{p} {_kind(types[p])}" for p in people)
        return Problem(self.name, level, prompt, answer, data={"people": people, "statements": statements})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: one person per deduction; decompose: each statement's content alone; verify: with the statement."""
        statements = [list(s) for s in problem.data["statements"]]
        found = deduce(statements)
        types = {person: value for person, value, _ in found}
        groups = []
        for s in statements:
            alone = forced(s, {})
            if alone:
                groups.append([", ".join(f"{p} {_kind(v)}" for p, v in alone.items())])
            elif s[1] == "is":
                groups.append([f"{s[0]} {'same' if s[3] else 'not'} {s[2]}"])
            else:
                groups.append([f"{s[0]} if {s[2]} {_kind(s[3])} {s[1]} {s[4]} {_kind(s[5])}"])
        checks, known = [], set()
        for person, value, s in found:
            known.add(person)
            start, flipped = f"{s[0]}: {claim(s)}, {person}", {**types, person: not value}
            ok, bad = (f"{'true' if holds(s, t) else 'false'} {_kind(t[s[0]])}" for t in (types, flipped))
            if s[0] not in known:
                ok, bad = "either way", "no way"
            checks.append(Check(f"{start} {_kind(value)}", ok, f"{start} {_kind(not value)}",
                                f"not {_kind(not value)}", bad))  # fmt: skip
        merge = [f"{p} {_kind(v)}" for p, v, _ in found]
        recipe = Recipe(merge, "each statement", groups, [", ".join(merge)], checks)
        return gold(problem, strategy, rng, recipe)

    def space(self, level: int) -> int:
        """Ordered names times the statements and their orders: exact for levels 1 and 2, low above."""
        return perm(12, PEOPLE[level]) * {1: 8, 2: 24, 3: 100, 4: 100, 5: 200}[level]


FAMILY: Family = _Knights()
