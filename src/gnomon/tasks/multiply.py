"""multiply: "Multiply 34 by 7." (or "Multiply 7 by 34."), written multiplication from the right with carries.

Levels: 1 two digits × 2–5 · 2 two digits × 2–9 · 3 three × one digit · 4 two × two digits · 5 three × two digits.
Factors of two sizes come in either order. Space (exact): 720 · 1,440 · 14,400 · 8,100 · 162,000.
"""

from __future__ import annotations

from random import Random

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

RANGES = {  # level -> range of each factor, both ends included
    1: ((10, 99), (2, 5)),
    2: ((10, 99), (2, 9)),
    3: ((100, 999), (2, 9)),
    4: ((10, 99), (10, 99)),
    5: ((100, 999), (10, 99)),
}


def _digits(n: int) -> list[int]:
    return [int(c) for c in reversed(str(n))]


def _row(a: int, d: int) -> Step:
    """a × one digit: "5*7=35 4*7+3=31 3*7+3=24 2415", checked as "35 28+3=31 21+3=24"."""
    carry, work, check = 0, [], []
    for x in _digits(a):
        value = x * d + carry
        work.append(f"{x}*{d}+{carry}={value}" if carry else f"{x}*{d}={value}")
        check.append(f"{x * d}+{carry}={value}" if carry else str(value))
        carry = value // 10
    right, body = a * d, " ".join(work)
    wrong = [Slip(f"{body} {right + 10}", "tens"), Slip(f"{body} {right + 1}", "ones")]
    if right >= 100:
        wrong.append(Slip(f"{body} {right - 100}", "hundreds"))
    return Step(f"{body} {right}", " ".join(check), tuple(wrong))


def _columns(low: int, high: int) -> Step:
    """low + 10·high by columns; the ones digit of `low` is copied: "1+0=1 4+9=13 2+6+1=9 9315"."""
    carry, work, rest = 0, [], low // 10
    for y in _digits(high):
        x, rest = rest % 10, rest // 10
        value = x + y + carry
        work.append(f"{x}+{y}+1={value}" if carry else f"{x}+{y}={value}")
        carry = value // 10
    right, body = low + 10 * high, " ".join(work)
    wrong = (Slip(f"{body} {right + 10}", "tens"), Slip(f"{body} {right + 100}", "hundreds"))
    return Step(f"{body} {right}", f"{low // 10}+{high}={right // 10}", wrong)


class Multiply:
    """Products of small numbers."""

    name = "multiply"

    def generate(self, rng: Random, level: int) -> Problem:
        """Both factors uniform in the level's ranges; factors of two sizes come in either order."""
        a, b = (rng.randint(*bounds) for bounds in RANGES[level])
        x, y = (a, b) if rng.random() < 0.5 or RANGES[level][0] == RANGES[level][1] else (b, a)
        return Problem(self.name, level, f"Multiply {x} by {y}.", str(a * b), "integer", {"a": a, "b": b})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: a row per digit, then columns · decompose: products by place · verify: products, carries."""
        a, b = int(problem.data["a"]), int(problem.data["b"])
        checked = [_row(a, d) for d in _digits(b)]
        if b >= 10:
            checked.append(_columns(a * (b % 10), a * (b // 10)))
        return make_gold(
            problem, strategy, rng, steps=[s.text for s in checked], parts=self._parts(a, b), checked=checked
        )

    def _parts(self, a: int, b: int) -> Parts:
        places = [d * 10**i for i, d in enumerate(_digits(a))][::-1]
        outline = "hundreds tens ones" if a >= 100 else "tens ones"
        if b < 10:
            groups = tuple((f"{p}*{b}={p * b}",) for p in places)
            return Parts(outline, groups, (self._sum(places, b),))
        rows = tuple((" ".join(f"{p}*{d}={p * d}" for p in places), self._sum(places, d)) for d in (b // 10, b % 10))
        return Parts(outline, rows, (_columns(a * (b % 10), a * (b // 10)).text,))

    def _sum(self, places: list[int], d: int) -> str:
        return "+".join(str(p * d) for p in places) + f"={sum(places) * d}"

    def space(self, level: int) -> int:
        """Distinct texts of the level (exact)."""
        (a, b), (c, d) = RANGES[level]
        return (b - a + 1) * (d - c + 1) * (1 if (a, b) == (c, d) else 2)


FAMILY: Family = Multiply()
