"""Labels made by sampling the model itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests import own

from gnomon.attempts import Job, one_boundary, run
from gnomon.protocol.tags import STRATEGIES
from gnomon.protocol.trace import Request
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems
from gnomon.training.labels import LabelSet
from gnomon.training.rollout import TEMPERATURE, jobs_for, label, problem_id

N = 6


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.load(own.save(own.taught(steps=60), tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def labels(reasoner: Reasoner) -> LabelSet:
    return label(reasoner, problems("boolean", "train", "rollout", N, (1, 2)), samples=3)


def test_jobs_are_one_greedy_and_one_sampled_group_per_strategy() -> None:
    items = problems("boolean", "train", "rollout", 2, (1,))
    jobs = jobs_for(items, ("direct", "steps"), 3, 9, "s")
    assert [(j.plan, j.temperature, j.samples) for j in jobs] == [
        ("direct", 0.0, 1), ("direct", TEMPERATURE, 3), ("steps", 0.0, 1), ("steps", TEMPERATURE, 3),
    ] * 2  # fmt: skip
    assert all(j.budget == 9 and not j.use_prediction for j in jobs) and TEMPERATURE == 0.8
    assert len(jobs_for(items, ("direct",), 0, None, "s")) == 2


def test_every_cell_has_the_greedy_rollout_first_and_states_of_the_right_shape(
    reasoner: Reasoner, labels: LabelSet
) -> None:
    items = problems("boolean", "train", "rollout", N, (1, 2))
    assert labels.strategies == STRATEGIES and len(labels.problems) == N
    assert labels.meta["base"] == reasoner.base and labels.meta["samples"] == 3
    greedy = run(reasoner, [Job(p, s, None, use_prediction=False) for p in items for s in STRATEGIES])
    for i, (problem, row) in enumerate(zip(items, labels.problems, strict=True)):
        assert (row.id, row.family, row.level) == (problem_id(problem), problem.task, problem.level)
        assert row.taps_prompt.shape == (2, 32) and row.taps_prompt.dtype == np.float32
        for k, name in enumerate(STRATEGIES):
            cell = row.strategies[name]
            assert [r.greedy for r in cell.rollouts] == [True, False, False, False]
            assert cell.taps_think.shape == (2, 32) and all(r.taps_end.shape == (2, 32) for r in cell.rollouts)
            want = greedy[i * 4 + k][0]
            got = cell.rollouts[0]
            assert (got.correct, got.used, got.answer_tokens) == (
                want.correct, want.trace.used, want.trace.answer_tokens,
            )  # fmt: skip
            assert cell.share == sum(r.correct for r in cell.rollouts) / 4
    assert len({r.used for p in labels.problems for r in p.strategies["verify"].rollouts}) > 1


def test_states_differ_by_strategy_and_site(labels: LabelSet) -> None:
    row = labels.problems[0]
    thinks = [row.strategies[s].taps_think for s in STRATEGIES]
    assert not np.allclose(thinks[0], thinks[1]) and not np.allclose(thinks[0], row.taps_prompt)


def test_every_rollout_keeps_one_of_its_boundaries(reasoner: Reasoner, labels: LabelSet) -> None:
    items = problems("boolean", "train", "rollout", N, (1, 2))
    seen = [r for p in labels.problems for s in STRATEGIES for r in p.strategies[s].rollouts]
    assert all(r.boundary is None or 0 < r.boundary[0] <= r.used for r in seen)
    requests = [
        Request(str(i), tuple(reasoner.codec.encode_prompt(p.prompt)), plan="verify", budget=None, use_prediction=False,
                max_answer_tokens=48)
        for i, p in enumerate(items)
    ]  # fmt: skip
    traces = reasoner.engine(8).run(requests, record_boundaries=True)
    some = 0
    for row, trace in zip(labels.problems, traces, strict=True):
        greedy = row.strategies["verify"].rollouts[0]
        places = dict(trace.boundaries or [])
        assert trace.used == greedy.used and bool(places) == (greedy.boundary is not None)
        if greedy.boundary is not None:
            assert np.allclose(greedy.boundary[1], places[greedy.boundary[0]], atol=1e-4)
            some += 1
    assert some


def test_which_boundary_is_kept_is_uniform_and_reproducible(reasoner: Reasoner) -> None:
    prompt = tuple(reasoner.codec.encode_prompt("x"))
    (trace,) = reasoner.engine(1).run([Request("r", prompt, plan="verify", budget=3, use_prediction=False)])
    full = replace(trace, used=7, boundaries=[(1, "a"), (3, "b"), (6, "c"), (9, "behind the end")])
    kept = [one_boundary(full, seed).boundaries for seed in range(300)]
    assert kept == [one_boundary(full, seed).boundaries for seed in range(300)]
    counts = Counter(b[0][1] for b in kept if b)
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 70, "binomial(300, 1/3): mean 100, sd 8"
    assert one_boundary(replace(full, boundaries=[(9, "behind")]), 0).boundaries is None
    assert one_boundary(replace(full, boundaries=None), 0).boundaries is None


def test_a_cap_censors_and_says_so(reasoner: Reasoner) -> None:
    items = problems("boolean", "train", "rollout", 3, (1, 2))
    capped = label(reasoner, items, strategies=("verify",), samples=1, cap=2)
    rolls = [r for p in capped.problems for r in p.strategies["verify"].rollouts]
    assert max(r.used for r in rolls) == 2 and not all(r.closed for r in rolls)
    assert all(len(p.strategies["verify"].rollouts) == 2 for p in capped.problems)
    assert capped.strategies == ("verify",) and capped.summary()["by_strategy"]["verify"]["censored"] > 0


def test_labels_are_reproducible_and_survive_the_disk(reasoner: Reasoner, labels: LabelSet, tmp_path: Path) -> None:
    again = label(reasoner, problems("boolean", "train", "rollout", N, (1, 2)), samples=3, max_batch=7)
    loaded = LabelSet.load(labels.save(tmp_path / "labels"))
    for a, b, c in zip(labels.problems, again.problems, loaded.problems, strict=True):
        for s in STRATEGIES:
            facts = [
                [(r.correct, r.used, r.answer_tokens, r.closed, r.greedy) for r in x.strategies[s].rollouts]
                for x in (a, b, c)
            ]
            assert facts[0] == facts[1] == facts[2]
