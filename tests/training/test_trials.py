"""Trial answers at boundaries: what closing there gives, kept on disk, and learned as the running confidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import own

from gnomon.attempts import Job, run
from gnomon.base.errors import DataError
from gnomon.base.seeds import numpy_generator
from gnomon.decoding.slack import FixedCut, factory
from gnomon.evaluation import metrics
from gnomon.metacognition.heads import MetacogHeads
from gnomon.protocol.tags import STRATEGIES
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems
from gnomon.training.head_rows import split, whole
from gnomon.training.heads_fit import HeadsConfig, fit_heads, head_losses, read_trials
from gnomon.training.rollout import label_trials, problem_id, trial_answers
from gnomon.training.trials import Trials

ITEMS = problems("boolean", "train", "trials", 6, (1, 2))
SMALL = HeadsConfig(proj_dim=16, width=32, steps=140)


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.load(own.save(own.taught(steps=60), tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def trials(reasoner: Reasoner) -> Trials:
    return label_trials(reasoner, ITEMS)


def test_every_row_is_what_the_engine_gives_when_it_closes_there(reasoner: Reasoner, trials: Trials) -> None:
    """Oracle: the same problem decoded from the start, closed by a rule at that number of tokens."""
    assert trials.plans == STRATEGIES and trials.problems == tuple(map(problem_id, ITEMS))
    for used in np.unique(trials.used):
        rows = np.flatnonzero(trials.used == used)
        closing = replace(reasoner, rules=factory(FixedCut(int(used))))
        jobs = [Job(ITEMS[trials.problem[r]], STRATEGIES[trials.plan[r]], None, use_prediction=False) for r in rows]
        found = [group[0] for group in run(closing, jobs)]
        assert [a.correct for a in found] == trials.right[rows].tolist()
        assert {a.trace.used for a in found} == {used}


def test_all_boundaries_inside_greedy_thoughts_are_there(reasoner: Reasoner, trials: Trials) -> None:
    jobs = [Job(p, s, None, use_prediction=False) for p in ITEMS for s in STRATEGIES]
    whole = [group[0] for group in run(reasoner, jobs, all_boundaries=True)]
    wanted = [
        (n // 4, n % 4, used, a.trace.used, a.correct, state)
        for n, a in enumerate(whole)
        for used, state in a.trace.boundaries or ()
        if used < a.trace.used
    ]
    columns = (trials.problem, trials.plan, trials.used, trials.total, trials.final)
    got = list(zip(*(c.tolist() for c in columns), strict=True))
    assert got == [w[:5] for w in wanted] and len(got) > 20
    assert np.allclose(trials.taps, np.stack([w[5] for w in wanted]), atol=1e-4)
    assert not (trials.plan == STRATEGIES.index("direct")).any(), "it does not think"
    assert len(set(trials.right.tolist())) == 2


def test_a_trial_answer_says_what_it_cost(reasoner: Reasoner) -> None:
    (found,) = trial_answers(reasoner, [(ITEMS[0], "steps", ())])
    (again,) = run(reasoner, [Job(ITEMS[0], "steps", 0, use_prediction=False)])[0]
    assert found == (again.correct, pytest.approx(again.trace.answer_logprob), again.trace.answer_tokens)


def test_trials_survive_the_disk_and_damage_is_named(trials: Trials, tmp_path: Path) -> None:
    again = Trials.load(trials.save(tmp_path / "t"))
    for name, value in vars(trials).items():
        assert np.array_equal(getattr(again, name), value), name
    (tmp_path / "t" / "labels.json").write_text('{"plans": []}')
    with pytest.raises(DataError, match="damaged"):
        Trials.load(tmp_path / "t")
    with pytest.raises(DataError, match="interrupted"):
        Trials.load(tmp_path)


def test_thoughts_without_boundaries_are_refused(reasoner: Reasoner) -> None:
    with pytest.raises(DataError, match="no place for a trial answer"):
        label_trials(reasoner, ITEMS[:2], strategies=("direct",))


def synthetic_trials(n: int, name: str, ids: tuple[str, ...] = ()) -> Trials:
    """Closing is right where a fact of the state, up to noise, says so; the whole thought is right by chance."""
    g = numpy_generator("trials", name)
    fact, there = g.normal(size=n), numpy_generator("trials-mix").normal(size=(4, 24))
    ids = ids or tuple(f"{name}-{i}" for i in range(n))
    used = g.integers(1, 40, n)
    return Trials(
        STRATEGIES, ids, (there[None] * fact[:, None, None]).astype(np.float32), used,
        fact + 0.3 * g.normal(size=n) > 0, np.arange(n) % len(ids), np.full(n, 1), used + 9, g.random(n) < 0.5,
    )  # fmt: skip


def test_the_running_confidence_learns_whether_closing_is_right(synthetic: Any) -> None:
    labels = synthetic.make(200, seed=1, boundaries=True)
    heads, report = fit_heads(labels, SMALL, trials=synthetic_trials(600, "train"))
    fresh = synthetic_trials(800, "fresh")
    assert heads.config.closing and metrics.auroc(read_trials(heads, fresh), fresh.right) > 0.9
    assert metrics.auroc(read_trials(heads, fresh), fresh.final) < 0.6
    assert "closing" in report["val"] and "boundary_conf" not in report["val"]
    assert {"plan", "conf_before", "conf_after", "boundary_budget"} <= set(report["val"]), "the others still learn"


def test_a_problem_is_on_one_side_in_labels_and_in_trials(synthetic: Any) -> None:
    labels = synthetic.make(60, seed=1)
    train, val, _ = split(
        labels, None, 0.3, "cpu", synthetic_trials(300, "sides", tuple(p.id for p in labels.problems))
    )
    assert len(train.share) // 4 * 5 == len(train.closing_right), "five rows for each of 60 problems"
    assert len(val.share) // 4 * 5 == len(val.closing_right) > 0


def test_trials_of_another_base_are_refused(synthetic: Any) -> None:
    trials = synthetic_trials(30, "other")
    with pytest.raises(DataError, match=r"states \[3, 24\], the labels \[4, 24\]"):
        fit_heads(synthetic.make(40, seed=1), SMALL, trials=replace(trials, taps=trials.taps[:, :3]))


def test_a_round_without_trial_answers_teaches_them_nothing(synthetic: Any) -> None:
    """Phases B and C: labels alone. The other label, of the whole thought, must not take its place."""
    heads = MetacogHeads(SMALL.metacog(4, 24, STRATEGIES, closing=True))
    rows = whole(synthetic.make(30, seed=1, boundaries=True))
    parts, _ = head_losses(heads, rows, [torch.arange(min(n, 8)) for n in rows.sizes()])
    assert len(rows.outcome) > 8 and "boundary_conf" not in parts
    assert not {"closing", "closing_rank"} & set(parts), "a loss without rows is no loss of 0"
    assert parts["boundary_budget"].item() > 0
    plain = MetacogHeads(SMALL.metacog(4, 24, STRATEGIES))
    none = whole(synthetic.make(30, seed=1))
    parts, _ = head_losses(plain, none, [torch.arange(min(n, 8)) for n in none.sizes()])
    assert not len(none.outcome) and not {"boundary_budget", "boundary_conf", "boundary_rank"} & set(parts)
