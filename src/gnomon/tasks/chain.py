"""chain: running sums, "Compute 34 + 27 - 15.". No running total is below zero.

Levels: 1 two-digit ± one-digit · 2 then one more one-digit term · 3, 4, 5 = 3, 4, 6 two-digit terms.
Space: level 1 exactly 90·9·2 = 1,620; above, at least the all-plus problems (90·81, 90³, 90⁴, 90⁶).
"""

from __future__ import annotations

from random import Random

from gnomon.tasks.golds import Parts, Slip, Step, make_gold
from gnomon.tasks.problem import Family, Gold, Problem

TERMS = {1: (2, 1), 2: (3, 1), 3: (3, 2), 4: (4, 2), 5: (6, 2)}  # level -> number of terms, digits after the first
SPACE = {1: 1_620, 2: 7_290, 3: 90**3, 4: 90**4, 5: 90**6}


def digit_check(a: int, b: int) -> str:
    """a + b column by column from the ones, b of either sign, a + b >= 0: "4+7=11 3+2+1=6"."""
    sign, b, carry, out = ("-" if b < 0 else "+"), abs(b), 0, []
    while True:
        x, y = a % 10, b % 10
        a, b = a // 10, b // 10
        used, extra = carry, f"{sign}1" if carry else ""
        if sign == "+":
            value = x + y + used
            carry = value // 10
        else:
            carry = int(x - y - used < 0)
            x += 10 * carry
            value = x - y - used
        out.append(f"{x}{sign}{y}{extra}={value}")
        if (b == 0 and carry == 0) or (a == 0 and b == 0):
            return " ".join(out)


def slips(a: int, b: int) -> tuple[Slip, ...]:
    """Plausible wrong results of a + b: a lost carry or borrow, ones or tens off by one."""
    right = a + b
    lost = (a % 10 + b >= 10) if 0 <= b < 10 else (a % 10 + abs(b) % 10 >= 10 if b > 0 else a % 10 < abs(b) % 10)
    wrong = [(right + 1, "ones"), (right - 1, "ones")]
    if lost:
        wrong += [(right - 10, "carry"), (right - 10, "carry")] if b > 0 else [(right + 10, "borrow")] * 2
    else:
        wrong += [(right + 10, "tens")]
    return tuple(Slip(f"{a}{b:+d}={value}", why) for value, why in wrong if value >= 0)


def _running(digits: list[int], terms: list[int]) -> str:
    """Digits of one place added up, each with the sign of its term (zeros too): "4+7=11 11-0=11"."""
    total, out = digits[0], []
    for digit, term in zip(digits[1:], terms[1:], strict=False):
        out.append(f"{total}{'-' if term < 0 else '+'}{abs(digit)}={total + digit}")
        total += digit
    return " ".join(out) or str(total)


class Chain:
    """Chained addition and subtraction."""

    name = "chain"

    def generate(self, rng: Random, level: int) -> Problem:
        """Signed terms; a term that would take the total below zero is added instead."""
        count, digits = TERMS[level]
        low, high = (1, 9) if digits == 1 else (10, 99)
        terms = [rng.randint(10, 99)]
        for _ in range(count - 1):
            term = rng.randint(low, high)
            terms.append(-term if rng.random() < 0.5 and sum(terms) >= term else term)
        text = str(terms[0]) + "".join(f" {'-' if t < 0 else '+'} {abs(t)}" for t in terms[1:])
        return Problem(self.name, level, f"Compute {text}.", str(sum(terms)), "integer", {"terms": terms})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: one operation each · decompose: tens and ones apart · verify: columns with carries."""
        terms: list[int] = list(problem.data["terms"])
        pairs = [(sum(terms[:i]), term) for i, term in enumerate(terms) if i]
        steps = [f"{a}{b:+d}={a + b}" for a, b in pairs]
        tens = [(abs(t) // 10) * (-1 if t < 0 else 1) for t in terms if abs(t) >= 10]
        ones = [(abs(t) % 10) * (-1 if t < 0 else 1) for t in terms]
        merge = f"{10 * sum(tens)}{sum(ones):+d}={sum(terms)}"
        checked = [Step(text, digit_check(a, b), slips(a, b)) for text, (a, b) in zip(steps, pairs, strict=True)]
        parts = Parts("tens ones", ((_running(tens, terms),), (_running(ones, terms),)), (merge,))
        return make_gold(problem, strategy, rng, steps=steps, parts=parts, checked=checked)

    def space(self, level: int) -> int:
        """Distinct texts of the level (exact for level 1, a lower bound above)."""
        return SPACE[level]


FAMILY: Family = Chain()
