"""Family relations: "Ann is the mother of Bob. Bob is the father of Cid. What is Ann to Cid?"

Levels: 1: one link asked backwards, or two of parent/child links · 2: two links (siblings too) · 3: three links ·
4: three links, a distractor · 5: four links, a distractor. Sentences are shuffled from level 3 on.
A relation is a pair (generations up from the second person, then down); the table is closed, siblings are full ones.
Space: ordered names times link kinds that the table can fold.
"""

from __future__ import annotations

from itertools import product
from math import perm
from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

WOMEN = ("Ann", "Eve", "Amy", "Zoe", "Ida", "Mia")
MEN = ("Bob", "Cid", "Dan", "Tom", "Max", "Leo")
Rel = tuple[int, int]
WORDS: dict[Rel, tuple[str, str]] = {
    (1, 0): ("mother", "father"), (0, 1): ("daughter", "son"), (1, 1): ("sister", "brother"),
    (2, 0): ("grandmother", "grandfather"), (0, 2): ("granddaughter", "grandson"), (2, 1): ("aunt", "uncle"),
    (1, 2): ("niece", "nephew"), (2, 2): ("cousin", "cousin"), (3, 0): ("great grandmother", "great grandfather"),
    (0, 3): ("great granddaughter", "great grandson"), (3, 1): ("great aunt", "great uncle"),
    (1, 3): ("great niece", "great nephew"),
}  # fmt: skip
LINKS: tuple[Rel, ...] = ((1, 0), (0, 1), (1, 1))
COUNT = {1: 2, 2: 2, 3: 3, 4: 3, 5: 4}


def compose(first: Rel, second: Rel) -> Rel | None:
    """x first y, y second z -> x ? z; None where it is not one word of the table."""
    (u1, d1), (u2, d2) = first, second
    if d2 == 0:
        result = (u2 + u1, d1)
    elif u1 == 0:
        result = (u2, d2 + d1)
    elif first == (1, 1):
        result = second
    elif second == (1, 1):
        result = first
    else:
        return None
    return result if result in WORDS else None


def fold(rels: list[Rel]) -> list[Rel] | None:
    """Relations of the first person to each next one, or None where a prefix leaves the table."""
    out = [rels[0]]
    for rel in rels[1:]:
        step = compose(out[-1], rel)
        if step is None:
            return None
        out.append(step)
    return out


def _word(rel: Rel, name: str) -> str:
    return WORDS[rel][0 if name in WOMEN else 1]


def _chains(level: int) -> list[list[Rel]]:
    """Link kinds whose fold, and the folds of whose two halves, are words of the table and agree."""
    kinds = LINKS[:2] if level == 1 else LINKS
    good = []
    for combo in product(kinds, repeat=COUNT[level]):
        rels, half = list(combo), (COUNT[level] + 1) // 2
        vertical = [rel for rel in rels if rel != (1, 1)]
        if ((1, 0), (0, 1)) in zip(vertical, vertical[1:], strict=False):  # two parents of one child
            continue
        whole, right = fold(rels), fold(rels[half:])
        if whole and right and compose(whole[half - 1], right[-1]) == whole[-1]:
            good.append(rels)
    return good


CHAINS = {level: _chains(level) for level in COUNT}


class _Kinship:
    name = "kinship"

    def generate(self, rng: Random, level: int) -> Problem:
        """A chain of relatives and a question about its ends."""
        people = rng.sample(WOMEN + MEN, COUNT[level] + 2)
        back = level == 1 and rng.random() < 0.4
        rels = [rng.choice(LINKS)] if back else rng.choice(CHAINS[level])
        chain = [(people[i], rel, people[i + 1]) for i, rel in enumerate(rels)]
        lines = list(chain)
        if level >= 4:
            end, other = rng.choice(people[1 : len(rels)]), people[-1]
            options: list[tuple[str, Rel, str]] = [(other, (0, 1), end), (end, (1, 0), other), (other, (1, 1), end)]
            lines.append(rng.choice(options))
        if level >= 3:
            rng.shuffle(lines)
        if back:
            x, z, rel = people[1], people[0], (rels[0][1], rels[0][0])
        else:
            x, z, rel = people[0], people[len(rels)], (fold(rels) or rels)[-1]
        story = " ".join(f"{a} is the {_word(r, a)} of {b}." for a, r, b in lines)
        data = {"chain": [[a, list(r), b] for a, r, b in chain], "back": back}
        return Problem(self.name, level, f"{story} What is {x} to {z}?", _word(rel, x), data=data)

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """Fold link by link; decompose folds two halves; verify counts generations up and down."""
        chain = [(a, (r[0], r[1]), b) for a, r, b in problem.data["chain"]]

        def says(a: str, rel: Rel, b: str) -> str:
            return f"{a} {_word(rel, a)} {b}"

        def check(a: str, rel: Rel, b: str) -> Check:
            wrong = rng.choice([r for r in WORDS if r != rel and abs(sum(r) - sum(rel)) <= 1])
            return Check(says(a, rel, b), f"up {rel[0]} down {rel[1]}", says(a, wrong, b), f"not {_word(wrong, a)}")

        links = [says(*link) for link in chain]
        first, rels = chain[0][0], [rel for _, rel, _ in chain]
        if problem.data["back"]:
            (a, (up, down), b) = chain[0]
            steps = [says(b, (down, up), a)]
            groups, merge = [[links[0]], [f"{b} {'woman' if b in WOMEN else 'man'}"]], steps
            checks = [check(*chain[0]), check(b, (down, up), a)]
        else:
            folded = [(first, rel, link[2]) for rel, link in zip(fold(rels) or rels, chain, strict=True)]
            steps = [says(*x) for x in folded]
            half = (len(rels) + 1) // 2
            right = fold(rels[half:]) or []
            tail = [says(chain[half][0], rel, link[2]) for rel, link in zip(right, chain[half:], strict=True)]
            groups, merge = [steps[:half], tail], [steps[-1]]
            checks = [check(*folded[0])]
            for link, x in zip(chain[1:], folded[1:], strict=True):
                checks += [check(*link), check(*x)]
        return gold(problem, strategy, rng, Recipe(steps, "two parts", groups, merge, checks))

    def space(self, level: int) -> int:
        """Ordered names times chains of link kinds: a lower bound (shuffles and distractors are not counted)."""
        return perm(12, COUNT[level] + 1) * len(CHAINS[level])


FAMILY: Family = _Kinship()
