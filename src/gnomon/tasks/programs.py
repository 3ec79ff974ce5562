"""Short Python programs: predict what is printed, or (a third) find an input "so that this prints 14".

Levels = lines before the print: 1: 2 · 2: 3 · 3: 3 with `if` · 4: 4 with `for` · 5: 5 with `if` and `for`; programs
to invert have no `if`. Values stay in 0..99. Programs are operation lists (`oplist.py`); text is never
executed. Space: a lower bound, see `space`.
"""

from __future__ import annotations

import re
from random import Random

from gnomon.tasks.oplist import UNDO, Op, calc, run_op, show
from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.trace import Check, Recipe, gold

LINES = {1: 2, 2: 3, 3: 3, 4: 4, 5: 5}
_LITERAL = re.compile(r"-?(0|[1-9][0-9]{0,8})")


def check_input(problem: Problem, answer_text: str) -> bool:
    """Whether the answer, a strict decimal integer literal, makes the program of a find-input problem print its target.

    Any other text is False. Nothing is executed: the operation list of `problem.data` is interpreted.
    """
    text = answer_text.strip()
    if not _LITERAL.fullmatch(text):
        return False
    env = {"x": int(text)}
    for op in problem.data["ops"]:
        run_op(op, env)
    return env[problem.data["out"][0]] == problem.data["target"]


def _line(rng: Random, v: str, kind: str) -> Op:
    sign, n = rng.choice("++-"), rng.randint(1, 9)
    if kind == "for":
        return ["for", v, rng.randint(2, 4), sign, rng.randint(1, 5)]
    if kind == "if":
        return ["if", v, rng.randint(3, 15), sign, n]
    if rng.random() < 0.25:
        sign, n = "*", rng.randint(2, 3)
    return ["aug", v, sign, n] if rng.random() < 0.5 else ["let", v, v, sign, n]


def _extras(rng: Random, level: int, count: int, find: bool) -> list[str]:
    kinds = {3: ["if"], 4: ["for"], 5: ["for", "if"]}.get(level, [])
    kinds = [k for k in kinds if not (find and k == "if")]
    kinds += ["plain"] * (count - len(kinds))
    rng.shuffle(kinds)
    return kinds


def _states(ops: list[Op], env: dict[str, int]) -> list[tuple[str, int, list[str]]]:
    out = []
    for op in ops:
        work = run_op(op, env)
        out.append((op[1], env[op[1]], work))
    return out


class _Programs:
    name = "programs"

    def generate(self, rng: Random, level: int) -> Problem:
        """Draw a program until every value on the way is in 0..99."""
        find = rng.random() < 1 / 3
        while True:
            problem = self._find(rng, level) if find else self._predict(rng, level)
            if problem is not None:
                return problem

    def _predict(self, rng: Random, level: int) -> Problem | None:
        kinds = _extras(rng, level, LINES[level] - 2, False)
        ops: list[Op] = [["set", "x", rng.randint(0, 20)], ["set", "y", rng.randint(0, 20)]]
        ops += [_line(rng, rng.choice("xy"), kind) for kind in kinds]
        sign = rng.choice("++-")
        env: dict[str, int] = {}
        values = [value for _, value, _ in _states(ops, env)] + [calc(env["x"], sign, env["y"])]
        if not all(0 <= v <= 99 for v in values):
            return None
        body = "\n".join([*map(show, ops), f"print(x {sign} y)"])
        data = {"kind": "predict", "ops": ops, "out": ["x", sign, "y"]}
        return Problem(self.name, level, f"What does this print?\n{body}", str(values[-1]), "integer", data)

    def _find(self, rng: Random, level: int) -> Problem | None:
        start, kinds = rng.randint(0, 20), _extras(rng, level, LINES[level], True)
        ops = [_line(rng, "x", kind) for kind in kinds]
        states = _states(ops, {"x": start})
        if not all(0 <= value <= 99 for _, value, _ in states):
            return None
        target = states[-1][1]
        body = "\n".join([*map(show, ops), "print(x)"])
        data = {"kind": "find", "ops": ops, "out": ["x"], "target": target, "start": start}
        return Problem(self.name, level, f"Find x so that this prints {target}.\n{body}", str(start),
                       "program_input", data)  # fmt: skip

    def gold(self, problem: Problem, strategy: str, rng: Random) -> Gold:
        """predict: the state after every line; find: the state before every line, from the last."""
        recipe = _recipe_predict(problem, rng) if problem.data["kind"] == "predict" else _recipe_find(problem, rng)
        return gold(problem, strategy, rng, recipe)

    def space(self, level: int) -> int:
        """Find-input texts whose lines only add, times starting values: a lower bound."""
        return {1: 7000, 2: 100_000, 3: 100_000, 4: 10**6, 5: 10**7}[level]


def _slip(before: int, sign: str, n: int, rng: Random) -> int:
    """A wrong but plausible result; of a product one that can be divided again."""
    right = calc(before, sign, n)
    near = (right - n, right + n) if sign == "*" else (right - 1, right + 1, right + 10)
    return rng.choice([value for value in near if value >= 0])


def _sum_check(head: str, work: list[str], times: int, rng: Random) -> Check:
    """A step of sums, checked by taking the whole change back: "13 + 8 = 21" by "21 - 8 = 13"."""
    first, last = work[-times].split(), work[-1].split()
    before, sign, n, after = int(last[0]), last[1], int(last[2]), int(last[4])
    wrong = _slip(before, sign, n, rng)
    start, change = int(first[0]), n * times
    text = f"{head} {', '.join(work)}".strip()

    def back(value: int) -> str:
        return f"{value} {UNDO[sign]} {change} = {value // n if sign == '*' else calc(value, UNDO[sign], change)}"

    return Check(text, back(after), text[: text.rindex(" ")] + f" {wrong}", f"not {start}", back(wrong))


def _recipe_predict(problem: Problem, rng: Random) -> Recipe:
    env: dict[str, int] = {}
    ops, sign = problem.data["ops"], problem.data["out"][1]
    states = _states(ops, env)
    final = f"{env['x']} {sign} {env['y']} = {problem.answer}"
    steps = [f"{v} = {value}" for v, value, _ in states] + [problem.answer]
    groups = [[", ".join(work) for v, _, work in states if v == name] for name in "xy"]
    checks = []
    for op, (v, value, work) in zip(ops, states, strict=True):
        if op[0] == "set" or work[-1].endswith("False"):
            checks.append(Check(work[0], "") if op[0] == "set" else Check(f"{v} {work[0]}", f"{v} = {value}"))
        else:
            checks.append(_sum_check(v, work, op[2] if op[0] == "for" else 1, rng))
    return Recipe(steps, "x and y", groups, [final], [*checks, _sum_check("", [final], 1, rng)])


def _recipe_find(problem: Problem, rng: Random) -> Recipe:
    ops, start = problem.data["ops"], problem.data["start"]
    values = [start] + [value for _, value, _ in _states(ops, {"x": start})]
    steps, sums, undos, checks = [], [], [], []
    for op, before, after in reversed(list(zip(ops, values, values[1:], strict=False))):
        sign, n = op[-2], op[-1] * (op[2] if op[0] == "for" else 1)
        text, wrong = f"{after} {UNDO[sign]} {n} =", before + rng.choice([d for d in (-1, 1, 10) if before + d >= 0])
        steps.append(f"x = {before}")
        sums.append(f"{text} {before}")
        undos.append([f"{UNDO[sign]} {n}"])
        checks.append(Check(f"{text} {before}", f"{before} {sign} {n} = {after}", f"{text} {wrong}", f"not {after}",
                            f"{wrong} {sign} {n} = {calc(wrong, sign, n)}"))  # fmt: skip
    return Recipe(steps, "undo each line", undos, sums, checks)


FAMILY: Family = _Programs()
