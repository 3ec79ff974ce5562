"""Boolean expressions: "Evaluate: ( True and not False ) or False"

Levels: 1: one operator over 2–4 terms · 2–5: binary trees of depth 2, 3, 3 (4–8 leaves), 4 (5–10 leaves), fully
bracketed. `not` stands before a term or a bracket. Space: exact for levels 1–3, a bound above.
"""

from __future__ import annotations

from random import Random

from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

Tree = list  # ["leaf", negated, value] or ["and" | "or", negated, child, child, ...]; JSON-able
DEPTH = {2: 2, 3: 3, 4: 3, 5: 4}
MAX_LEAVES = {2: 4, 3: 5, 4: 8, 5: 10}
MIN_LEAVES = {2: 3, 3: 4, 4: 6, 5: 6}


def _word(value: bool) -> str:
    return "True" if value else "False"


def _leaf(rng: Random) -> Tree:
    return ["leaf", rng.random() < 0.25, rng.random() < 0.5]


def _tree(rng: Random, depth: int) -> Tree:
    if depth == 0:
        return _leaf(rng)
    children = [_tree(rng, depth - 1), _tree(rng, rng.randrange(depth))]
    rng.shuffle(children)
    return [rng.choice(("and", "or")), rng.random() < 0.15, *children]


def _leaves(tree: Tree) -> int:
    return 1 if tree[0] == "leaf" else sum(_leaves(child) for child in tree[2:])


def _value(tree: Tree) -> bool:
    if tree[0] == "leaf":
        return tree[2] != tree[1]
    values = [_value(child) for child in tree[2:]]
    return (all(values) if tree[0] == "and" else any(values)) != tree[1]


def _show(tree: Tree, top: bool = False) -> str:
    if tree[0] == "leaf":
        body = _word(tree[2])
    else:
        body = f" {tree[0]} ".join(_show(child) for child in tree[2:])
        body = body if top and not tree[1] else f"( {body} )"
    return f"not {body}" if tree[1] else body


def _innermost(tree: Tree) -> list[Tree]:
    if tree[0] == "leaf":
        return []
    if all(child[0] == "leaf" for child in tree[2:]):
        return [tree]
    return [pair for child in tree[2:] for pair in _innermost(child)]


def _reduce(tree: Tree) -> Tree:
    """Every innermost bracket becomes its value; a `not` before it stays for the next round, a lone one is applied."""
    if tree[0] == "leaf":
        return tree
    if all(child[0] == "leaf" for child in tree[2:]):
        return ["leaf", tree[1], _value(tree) != tree[1]]
    return [tree[0], tree[1], *(_reduce(child) for child in tree[2:])]


def _rounds(tree: Tree) -> list[Tree]:
    rounds = [tree]
    while rounds[-1][0] != "leaf":
        rounds.append(_reduce(rounds[-1]))
    if rounds[-1][1]:
        rounds.append(["leaf", False, _value(rounds[-1])])
    return rounds


def _pair(tree: Tree) -> str:
    plain = [tree[0], False, *tree[2:]]
    return f"{_show(plain, top=True)} is {_word(_value(plain))}"


def _check(before: Tree, after: Tree, rng: Random) -> Check:
    """One round of `verify`: every innermost bracket by itself; the monitor writes the expression anew."""
    texts = [_pair(p) for p in _innermost(before)]
    if not texts:
        return Check(f"{_show(before)} is {_show(after)}", _show(after))
    bad = rng.randrange(len(texts))
    left, _, value = texts[bad].rpartition(" ")
    slipped = f"{left} {'False' if value == 'True' else 'True'}"
    wrong = ", ".join(slipped if i == bad else t for i, t in enumerate(texts))
    return Check(", ".join(texts), _show(after, top=True), wrong, f"not {slipped.rpartition(' ')[2]}", texts[bad])


def _sides(tree: Tree) -> list[Tree]:
    """The two sides; a row of three or four terms is cut after the second."""
    if len(tree) == 4:
        return list(tree[2:])
    rest = tree[4] if len(tree) == 5 else [tree[0], False, *tree[4:]]
    return [[tree[0], False, tree[2], tree[3]], rest]


class _Boolean:
    name = "boolean"

    def generate(self, rng: Random, level: int) -> Problem:
        """A random expression of the level's depth and size."""
        if level == 1:
            tree = [rng.choice(("and", "or")), False, *(_leaf(rng) for _ in range(rng.choice((2, 3, 3, 4, 4))))]
        else:
            tree = _tree(rng, DEPTH[level])
            while not MIN_LEAVES[level] <= _leaves(tree) <= MAX_LEAVES[level]:
                tree = _tree(rng, DEPTH[level])
            tree[1] = False
        return Problem(self.name, level, f"Evaluate: {_show(tree, top=True)}", _word(_value(tree)), data={"tree": tree})

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """steps: all innermost brackets at once; decompose: the sides alone; verify: every bracket by itself."""
        tree = problem.data["tree"]
        rounds = _rounds(tree)
        steps = [_show(t, top=True) for t in rounds[1:]]
        sides = [[_show(t, top=True) for t in _rounds(child)] for child in _sides(tree)]
        final = f" {tree[0]} ".join(side[-1] for side in sides) + f" is {problem.answer}"
        checks = []
        for before, after in zip(rounds, rounds[1:], strict=False):
            checks.append(_check(before, after, rng))
        return gold(problem, strategy, rng, Recipe(steps, "each side", sides, [final], checks))

    def space(self, level: int) -> int:
        """Exact for levels 1–3, a lower bound above."""
        return {1: 2 * (16 + 64 + 256), 2: 2 * (64 * 64 + 2 * 64 * 4), 3: 819_200, 4: 10**7, 5: 10**9}[level]


FAMILY: Family = _Boolean()
