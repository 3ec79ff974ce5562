"""chain, multiply, sort, count, calendar, strings: answers against oracles that read only the prompt; golds."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable, Iterator

import pytest

from gnomon.base import seeds
from gnomon.base.errors import UnknownNameError
from gnomon.protocol.graph import Node, from_text, resolve, to_text
from gnomon.protocol.tags import STRATEGIES
from gnomon.tasks.problem import Family, Gold, Problem
from gnomon.tasks.procedural import family
from gnomon.tasks.trace import SLIP_RATE
from gnomon.tasks.verifiers import verify

NAMES = ("chain", "multiply", "sort", "count", "calendar", "strings")
LEVELS = (1, 2, 3, 4, 5)
DRAWS = 200
CELLS = [(name, level) for name in NAMES for level in LEVELS]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()


def numbers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", text)]


def chain(prompt: str) -> str:
    terms = [int(s + n) for s, n in re.findall(r"([+-]?)\s*(\d+)", prompt)]
    assert all(sum(terms[:i]) >= 0 for i in range(len(terms)))
    return str(sum(terms))


def calendar(prompt: str) -> str:
    named = re.findall("|".join(DAYS), prompt)
    day = DAYS.index(named[0]) if named else 0
    if prompt.startswith("What date"):
        n, month, start = re.fullmatch(r"What date is (\d+) days? after (\w+) (\d+)\?", prompt).groups()  # type: ignore
        date = read_date(f"{month} {start}") + datetime.timedelta(days=int(n))
        return f"{date:%B} {date.day}"
    if " is a " in prompt:
        first, second = (read_date(d) for d in re.findall(r"[A-Z][a-z]+ \d+", prompt))
        assert second > first
        return DAYS[(day + (second - first).days) % 7]
    told, asked = prompt.split(". ")
    away = {"Today": 0, "Tomorrow": 1, "Yesterday": -1, "In": 2, "2": -2}[told.split()[0]]
    n = numbers(asked)[0] * (-1 if "ago" in asked else 1)
    return DAYS[(day - away + n) % 7]


def read_date(text: str) -> datetime.date:
    return datetime.datetime.strptime(f"{text} 2023", "%B %d %Y").date()


def strings(prompt: str) -> str:
    letters = re.match(r"Take ((?:\w )*\w)\. ", prompt)
    assert letters
    s = letters[1].replace(" ", "")
    for name in prompt[letters.end() :].removesuffix(" What is left?").rstrip(".").split(". "):
        last = len(s) - 1
        order = {
            "Reverse it": list(range(last, -1, -1)),
            "Swap the first and last": [last, *range(1, last), 0],
            "Drop the first": list(range(1, last + 1)),
            "Drop the last": list(range(last)),
            "Move the first to the end": [*range(1, last + 1), 0],
            "Move the last to the front": [last, *range(last)],
            "Double the last": [*range(last + 1), last],
        }[name]
        s = "".join(s[i] for i in order)
    return " ".join(s)


def count(prompt: str) -> str:
    target, letters = re.fullmatch(r"Count (\w) in: ((?:\w )*\w)\.", prompt).groups()  # type: ignore
    return str(letters.split().count(target))


ORACLES: dict[str, Callable[[str], str]] = {
    "chain": chain,
    "multiply": lambda p: str(numbers(p)[0] * numbers(p)[1]),
    "sort": lambda p: " ".join(map(str, sorted(numbers(p)))),
    "count": count,
    "calendar": calendar,
    "strings": strings,
}
# Sizes that the issue and the family files freeze: how many items the prompt names.
SIZES: dict[str, tuple[Callable[[str], int], list[tuple[int, int]]]] = {
    "chain": (lambda p: len(numbers(p)), [(2, 2), (3, 3), (3, 3), (4, 4), (6, 6)]),
    "multiply": (lambda p: sum(len(str(n)) for n in numbers(p)), [(3, 3), (3, 3), (4, 4), (4, 4), (5, 5)]),
    "sort": (lambda p: len(set(numbers(p))), [(3, 3), (4, 4), (5, 5), (6, 6), (8, 8)]),
    "count": (lambda p: len(p.split(": ")[1].split()), [(4, 6), (6, 8), (9, 12), (13, 16), (20, 20)]),
    "calendar": (
        lambda p: max(numbers(p)) if " is a " not in p else months_apart(p),
        [(1, 13), (14, 60), (1, 31), (1, 2), (3, 11)],
    ),
    "strings": (lambda p: len(p.split(".")[0].split()) - 1, [(4, 4), (5, 5), (7, 7), (9, 9), (12, 12)]),
}


def months_apart(prompt: str) -> int:
    first, second = (read_date(d).month for d in re.findall(r"[A-Z][a-z]+ \d+", prompt))
    return second - first


def draws(name: str, level: int) -> Iterator[tuple[Family, Problem]]:
    maker = family(name)
    for i in range(DRAWS):
        yield maker, maker.generate(seeds.rng("test", name, level, i), level)


def gold(maker: Family, problem: Problem, strategy: str) -> Gold:
    return maker.gold(problem, strategy, seeds.rng("gold", problem.prompt, strategy))


def false_claims(text: str) -> list[str]:
    """The claims `x=y` and `x<y<z` in a node's text that are not true (words and bare numbers claim nothing)."""
    wrong = []
    for claim in text.split():
        if re.fullmatch(r"-?\d+(?:[+*-]\d+)*=-?\d+", claim):
            left, right = claim.split("=")
            true = eval(left) == int(right)  # digits and + - * only
        elif re.fullmatch(r"\d+(?:[<>]\d+)+", claim):
            true = bool(eval(claim))  # a chain of comparisons
        else:
            assert "=" not in claim and "<" not in claim, f"{claim!r} in {text!r} is no readable claim"
            continue
        if not true:
            wrong.append(claim)
    return wrong


@pytest.mark.parametrize(("name", "level"), CELLS)
def test_answers_match_an_oracle_that_reads_the_prompt(name: str, level: int) -> None:
    size, bounds = SIZES[name]
    seen = set()
    for maker, problem in draws(name, level):
        assert ORACLES[name](problem.prompt) == problem.answer, problem.prompt
        assert verify(problem, problem.answer).correct and not verify(problem, problem.answer + "1").correct
        low, high = bounds[level - 1]
        assert low <= size(problem.prompt) <= high, problem.prompt
        assert (problem.task, problem.level) == (maker.name, level) == (name, level)
        json.dumps(dict(problem.data))
        seen.add(problem.prompt)
        assert len(seen) <= maker.space(level)
    assert len(seen) >= 0.5 * min(family(name).space(level), DRAWS)


@pytest.mark.parametrize(("name", "level"), CELLS)
def test_golds_are_clean_graphs_with_true_arithmetic(name: str, level: int) -> None:
    for maker, problem in draws(name, level):
        for strategy in STRATEGIES:
            found = gold(maker, problem, strategy)
            assert found.answer == problem.answer and found.strategy == strategy
            assert resolve(found.nodes)[1] == ()
            if strategy == "direct":
                assert found.nodes == ()
                continue
            assert from_text(to_text(found.nodes)).nodes == tuple(Node(n.kind, n.text, n.parents) for n in found.nodes)
            for node in found.nodes:
                assert node.slip or false_claims(node.text) == [], (problem.prompt, node.text)
            shown = [n.text for n in found.nodes if n.kind == "S" and not n.slip]
            if name == "sort" and strategy != "decompose":  # the answer grows over the steps; "3:" heads a tens digit
                shown = [" ".join(re.sub(r"\b\d: ", "", text) for text in shown)]
                assert shown == [problem.answer]
            edge = r"(?<!\d)" if name == "count" else r"(?<!\w)"  # a running count sits right behind its letter
            assert re.search(rf"{edge}{problem.answer}$", shown[-1]), (problem.prompt, shown[-1])


@pytest.mark.parametrize(("name", "level"), CELLS)
def test_strategies_have_their_shapes(name: str, level: int) -> None:
    for maker, problem in draws(name, level):
        steps = gold(maker, problem, "steps").nodes
        assert {n.kind for n in steps[:-1]} == {"S"} and steps[-1] == Node("A")
        parts = gold(maker, problem, "decompose").nodes
        assert [n.kind for n in parts] == ["P", *"S" * (len(parts) - 2), "A"] and parts[-1] == Node("A")
        merges = [n for n in parts if n.parents is not None and len(n.parents) >= 2]
        assert len(merges) == 1 and sum(n.parents == () for n in parts) == len(merges[0].parents or ())
        checked = gold(maker, problem, "verify").nodes
        assert (
            "".join(n.kind for n in checked)
            == "".join("SMD" if n.slip else "SM" for n in checked if n.kind == "S") + "A"
        )
        for node, after in itertools.pairwise(checked):
            if node.kind == "S":
                assert after.text.split()[0] == ("fail" if node.slip else "ok")


@pytest.mark.parametrize("name", NAMES)
def test_slips_come_at_the_stated_rate_are_wrong_and_repaired(name: str) -> None:
    slipped = 0
    for level in LEVELS:
        for maker, problem in draws(name, level):
            nodes = gold(maker, problem, "verify").nodes
            at = [i for i, n in enumerate(nodes) if n.slip]
            assert len(at) <= 1
            slipped += len(at)
            for i in at:
                wrong, fail, why, repair, ok = nodes[i : i + 5]
                assert [n.kind for n in (wrong, fail, why, repair, ok)] == list("SMDSM")
                assert wrong.text != repair.text and why.text and not repair.slip
                tries = (maker.gold(problem, "verify", seeds.rng(j)).nodes for j in range(100))
                clean = next(nodes for nodes in tries if not any(n.slip for n in nodes))
                assert [n.text for n in nodes[:i] + nodes[i + 3 :]] == [n.text for n in clean]
    n = DRAWS * len(LEVELS)
    spread = 4 * (SLIP_RATE * (1 - SLIP_RATE) / n) ** 0.5
    assert abs(slipped / n - SLIP_RATE) < spread


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_problem_and_unknown_strategy_is_named(name: str) -> None:
    maker = family(name)
    problem = maker.generate(seeds.rng("again"), 3)
    assert problem == maker.generate(seeds.rng("again"), 3)
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        maker.gold(problem, "step", seeds.rng(0))


def test_the_checker_sees_false_claims() -> None:
    assert false_claims("ok 4+7=12 3*7+2=23 12<34<33 Monday 5") == ["4+7=12", "12<34<33"]
