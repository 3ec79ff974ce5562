"""Every built-in family: disjoint splits, reproducible streams, golds that pass, corruptions that fail."""

from __future__ import annotations

import json

import pytest

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, DataError, UnknownNameError
from gnomon.protocol.tags import STRATEGIES, TAGS
from gnomon.tasks.mixture import Mixture, level_weights
from gnomon.tasks.problem import SPLITS, Problem
from gnomon.tasks.procedural import LEVELS, REGISTRY, draw, family, problems, resolve_tasks
from gnomon.tasks.splits import SHARES, canonical, split_of
from gnomon.tasks.verifiers import verify

FAMILIES = sorted(REGISTRY)
DRAWS = 20  # x 2 streams x 4 splits x 5 levels x 13 families = 10,400


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_are_disjoint_across_streams(name: str) -> None:
    where: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for level in LEVELS:
            for stream in ("one", "two"):
                for index in range(DRAWS):
                    problem = draw(name, level, split, stream, index)
                    assert (problem.task, problem.level, problem.split) == (name, level, split)
                    where[split].add(canonical(problem.prompt))
    for i, a in enumerate(SPLITS):
        for b in SPLITS[:i]:
            assert not where[a] & where[b]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("level", LEVELS)
def test_gold_passes_corruptions_fail(name: str, level: int) -> None:
    """Accept the gold in every strategy; reject empty, garbage, wrapped, doubled and another problem's answer."""
    found = [draw(name, level, "train", "audit", i) for i in range(6)]
    rejected_swaps = 0
    for i, problem in enumerate(found):
        assert verify(problem, problem.answer).correct, problem
        for strategy in STRATEGIES:
            gold = family(name).gold(problem, strategy, seeds.rng("test", name, i, strategy))
            assert gold.strategy == strategy
            assert bool(gold.nodes) == (strategy != "direct")
            assert verify(problem, gold.answer).correct, (problem, gold)
        for bad in ("", "   ", "zzz", "the answer is " + problem.answer, problem.answer + " !", "(" * 300):
            assert not verify(problem, bad).correct, (problem, bad)
        rejected_swaps += any(not verify(problem, p.answer).correct for p in found if p is not problem)
    assert rejected_swaps > 0, f"{name} level {level}: another problem's answer is always accepted"


@pytest.mark.parametrize("name", FAMILIES)
def test_no_constant_answer_is_right_for_most(name: str) -> None:
    golds = [draw(name, 5, "train", "constant", i).answer for i in range(60)]
    assert max(golds.count(g) for g in golds) <= 45


@pytest.mark.parametrize("name", FAMILIES)
def test_problems_are_plain_data(name: str) -> None:
    for level in LEVELS:
        problem = draw(name, level, "val", "plain", 0)
        assert json.loads(json.dumps(dict(problem.data))) is not None
        assert not any(tag in problem.prompt + problem.answer for tag in TAGS)
        assert problem.prompt == problem.prompt.strip()
        assert "\n" not in problem.answer
        assert family(name).space(level) >= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_stated_space_is_honest(name: str) -> None:
    """A level that states many distinct texts does not repeat itself more than drawing from that many would."""
    n = 120
    for level in (1, 5):
        unique = len({canonical(draw(name, level, "train", "space", i).prompt) for i in range(n)})
        room = family(name).space(level) * SHARES["train"]
        expected = room * (1 - (1 - 1 / room) ** n) if room > 1 else 1
        assert unique >= 0.8 * min(expected, n), (name, level, unique, room)


def test_streams_are_reproducible_and_extend() -> None:
    short = problems(["chain", "count"], "test", "s1", 30)
    assert problems(["chain", "count"], "test", "s1", 60)[:30] == short
    assert short != problems(["chain", "count"], "test", "s2", 30)


def test_equal_weight_over_tasks_and_levels() -> None:
    found = problems(["chain", "sort", "lookup", "boolean"], "train", "weights", 200)
    cells = {(p.task, p.level) for p in found}
    counts = [sum((p.task, p.level) == c for p in found) for c in cells]
    assert len(cells) == 20
    assert set(counts) == {10}


def test_split_shares_are_as_stated() -> None:
    found = [split_of(f"text {i}") for i in range(20_000)]
    for name, share in SHARES.items():
        assert abs(found.count(name) / 20_000 - share) < 0.01


def test_case_and_blanks_do_not_make_a_new_item() -> None:
    assert split_of("Sort  3 1\n2") == split_of("sort 3 1 2")


def test_too_many_problems_are_refused_with_the_numbers() -> None:
    room = int(family("chain").space(1) * SHARES["val"])
    with pytest.raises(ConfigError, match=f"{room} distinct val"):
        problems("chain", "val", "s", 10_000_000 if room > 10**6 else room + 1, levels=(1,))


class Tiny:
    """A family with two texts that both fall in one split."""

    name = "tiny"

    def generate(self, rng: object, level: int) -> Problem:
        return Problem("tiny", level, "only this", "yes")

    def space(self, level: int) -> int:
        return 1


def test_a_split_that_a_family_cannot_fill_teaches() -> None:
    empty = next(s for s in SPLITS if s != split_of("only this"))
    with pytest.raises(DataError, match="space of 1 texts"):
        draw(Tiny(), 1, empty, "s", 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "hint"), [("chian", "chain"), ("cout", "count"), ("knigths", "knights")])
def test_unknown_task_is_suggested(spec: str, hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{hint}'"):
        resolve_tasks(spec)


def test_all_is_every_family_and_bad_splits_and_levels_are_named() -> None:
    assert [s.name for s in resolve_tasks("all")] == list(REGISTRY)
    with pytest.raises(UnknownNameError, match="calibration"):
        problems("chain", "calib", "s", 1)
    with pytest.raises(ConfigError, match="levels are 1–5"):
        draw("chain", 6, "train", "s", 0)
    with pytest.raises(ConfigError, match="none of the asked"):
        problems("chain", "train", "s", 1, levels=(7,))


def test_curriculum_opens_levels_in_order() -> None:
    assert level_weights(0.0) == {1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0}
    assert set(level_weights(0.35).values()) == {1.0}
    halfway = list(level_weights(0.17).values())
    assert halfway == sorted(halfway, reverse=True)
    assert 0 < halfway[2] < 1
    assert set(level_weights(2.0).values()) == {1.0}


def test_mixture_is_resumable_weighted_and_stays_in_train() -> None:
    mixture = Mixture(tasks={"chain": 3.0, "sort": 1.0, "count": 0.0}, stream="m")
    stream = mixture.items(total=1000)
    first = [next(stream) for _ in range(300)]
    assert next(mixture.items(total=1000, start=200)) == first[200]
    assert {i.problem.split for i in first} == {"train"}
    tasks = [i.problem.task for i in first]
    assert 190 <= tasks.count("chain") <= 260
    assert tasks.count("count") == 0
    assert {i.strategy for i in first} == set(STRATEGIES)
    assert max(i.problem.level for i in first[:50]) <= 2


def test_bad_mixture_is_named() -> None:
    with pytest.raises(UnknownNameError, match="chain"):
        Mixture(tasks={"chian": 1.0})
    with pytest.raises(UnknownNameError, match="verify"):
        Mixture(strategies={"verfy": 1.0})
    with pytest.raises(ConfigError, match="weights"):
        Mixture(tasks={"chain": -1.0})
