"""evaluate() and sweep() on a tiny model that was taught a little, against direct runs and sums by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from tests import own
from tests.training.test_thoughts import random_steerer

from gnomon.attempts import Job, run
from gnomon.base.errors import ModelError, UnknownNameError
from gnomon.base.seeds import seed_torch
from gnomon.decoding.slack import FixedCut, SlackStop, factory
from gnomon.evaluation import runner
from gnomon.evaluation.records import EvalRecord
from gnomon.evaluation.sweep import Point, Sweep
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.protocol.tags import STRATEGIES
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import problems

KEYS = (
    "n, unique_n, accuracy, accuracy_ci, think_tokens_mean, leakage_rate, answered_rate, violation_rate, budget_corr, "
    "budget_corr_within_task, budget_coverage, ece, brier, auroc, ece_before, brier_before, auroc_before, baselines, "
    "by_task, by_plan, by_level"
).split(", ")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Reasoner:
    return Reasoner.load(own.save(own.taught(steps=60), tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def reasoner(base: Reasoner) -> Reasoner:
    seed_torch("runner-heads")
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16)).eval()
    heads.start_from(2.5, 0.6)
    return replace(base, decider=Decider(heads), best_plan={"boolean": "verify"})


def test_evaluate_has_every_key_and_is_plain_json(reasoner: Reasoner) -> None:
    found = runner.evaluate(reasoner, "boolean", n=24, levels=(1, 2), baseline_n=16, quiet=True)
    assert [k for k in KEYS if k not in found.summary] == []
    assert json.loads(json.dumps(found.summary, allow_nan=False)) == found.summary
    assert found.summary["n"] == 24 and len(found.calibration) == 16
    assert set(found.summary["by_task"]["boolean"]) >= {"accuracy", "n"}
    assert found.summary["accuracy"] == np.mean([a.correct for a in found.attempts])
    assert found.summary["violation_rate"] == 0.0
    assert {r.prompt_id for r in found.records}.isdisjoint(r.prompt_id for r in found.calibration)
    assert {"family_level", "trace_length", "answer_probability", "prompt_perplexity"} <= set(
        found.summary["baselines"]
    )


def test_a_fixed_plan_needs_no_heads_and_a_best_one_is_looked_up(base: Reasoner, reasoner: Reasoner) -> None:
    fixed = runner.evaluate(base, "boolean", n=8, plan="steps", budget=None, levels=(1,), quiet=True)
    assert set(fixed.summary["by_plan"]) == {"steps"} and fixed.summary["budget_corr"] is None
    best = runner.evaluate(reasoner, "boolean", n=8, plan="best", budget=None, levels=(1,), quiet=True)
    assert set(best.summary["by_plan"]) == {"verify"}
    with pytest.raises(ModelError, match="stores no best plan for 'boolean'"):
        runner.evaluate(base, "boolean", n=4, plan="best", budget=None, quiet=True)
    with pytest.raises(ModelError, match="no plan can be predicted"):
        runner.evaluate(base, "boolean", n=4, quiet=True)
    with pytest.raises(ModelError, match="no budget can be predicted; write --budget none"):
        runner.evaluate(base, "boolean", n=4, plan="steps", quiet=True)
    with pytest.raises(UnknownNameError, match="did you mean 'steps'"):
        runner.evaluate(base, "boolean", n=4, plan="step", budget=None, quiet=True)


def test_budgets_zero_n_and_none(base: Reasoner) -> None:
    used = {}
    for budget in (0, 4, None):
        found = runner.evaluate(base, "boolean", n=12, plan="verify", budget=budget, levels=(1, 2), quiet=True)
        used[budget] = [r.used for r in found.records]
        needed = [r.needed for r in found.records]
        assert all(r.budget_effective == budget for r in found.records if budget is not None)
        if budget is None:
            assert needed == used[None] and max(needed) > 4
    assert set(used[0]) == {0} and max(used[4]) == 4
    assert needed == used[None]  # the uncapped pass of cut rows = what they use without a cap


def test_cut_rows_know_what_they_need_without_a_cap(base: Reasoner) -> None:
    """The uncapped pass goes on from where rows were cut: same need and verdict as decoding them afresh."""
    items = problems("boolean", "test", "need", 30, (1, 2, 3))
    records, _ = runner.decode_records(base, items, "verify", 3)
    direct = run(base, [Job(p, "verify", None, use_prediction=False) for p in items])
    assert sum(r.stop == "hard" for r in records) > 5
    for record, (full,) in zip(records, direct, strict=True):
        assert (record.needed, record.needed_correct, record.needed_closed) == (
            full.trace.used, full.correct, full.trace.closed_naturally,
        )  # fmt: skip


def test_the_sweep_equals_direct_runs_at_every_budget(reasoner: Reasoner) -> None:
    items = problems("boolean", "test", "sweep-direct", 12, (1, 2))
    budgets = (0, 1, 4, 16, None)
    swept = runner.sweep_problems(reasoner, items, budgets=budgets, quiet=True)
    jobs = [Job(p, s, b, use_prediction=False) for p in items for s in STRATEGIES for b in budgets]
    direct = [g[0] for g in run(reasoner, jobs)]
    shape = (len(items), len(STRATEGIES), len(budgets))
    assert swept.correct.tolist() == np.array([a.correct for a in direct]).reshape(shape).tolist()
    assert swept.used.tolist() == np.array([a.trace.used for a in direct]).reshape(shape).tolist()
    answered = np.array([a.trace.answered for a in direct]).reshape(shape).mean(0)
    # A row that thinks nothing anyway is not cut by budget 0, although a direct run calls that close `hard` (§5).
    longer = swept.used[:, :, -1:] > np.array([0, 1, 4, 16, -1])
    cut = (np.array([not a.trace.closed_naturally for a in direct]).reshape(shape) & longer).sum(0)
    for k, s in enumerate(STRATEGIES):
        for j, b in enumerate(budgets):
            assert swept.point(s, b).answered == pytest.approx(answered[k, j])
            assert swept.point(s, b).cut == cut[k, j]
    assert swept.point("verify", 4).cut > 0


def test_needs_and_sweeps_are_those_of_the_model_as_it_is_steered(reasoner: Reasoner) -> None:
    """Gate and adapters stay on where nothing is predicted: what a cut row needs is what this model would think."""
    assert reasoner.decider is not None
    heads = reasoner.decider.heads
    acting = replace(reasoner, decider=Decider(heads, None, random_steerer(heads, 1.0)))
    items = problems("boolean", "test", "steered-need", 16, (1, 2, 3))
    records, _ = runner.decode_records(acting, items, "verify", 3)
    jobs = [Job(p, "verify", None, use_prediction=False) for p in items]
    full, bare = ([g[0] for g in run(r, jobs)] for r in (acting, reasoner))
    assert [r.needed for r in records] == [a.trace.used for a in full] != [a.trace.used for a in bare]
    swept = runner.sweep_problems(acting, items, strategies=("verify",), budgets=(3, None), quiet=True)
    assert swept.used[:, 0, -1].tolist() == [a.trace.used for a in full]


@pytest.mark.parametrize("steered", [False, True])
def test_a_sweep_under_rules_equals_direct_runs_under_them(reasoner: Reasoner, steered: bool) -> None:
    """Also where a rule reads the budget: `slack` shortens thoughts that fit. A silent rule changes nothing."""
    assert reasoner.decider is not None
    heads, items, budgets = reasoner.decider.heads, problems("boolean", "test", "ruled", 8, (1, 2)), (0, 3, 9, 30, None)
    plain = replace(reasoner, decider=Decider(heads, None, random_steerer(heads, 1.0))) if steered else reasoner
    shape = (len(items), len(STRATEGIES), len(budgets))
    jobs = [Job(p, s, b, use_prediction=False) for p in items for s in STRATEGIES for b in budgets]
    bare = runner.sweep_problems(plain, items, budgets=budgets, quiet=True)
    for rule, changes in ((SlackStop(1.0, 60.0), True), (FixedCut(3), True), (FixedCut(4000), False)):
        ruled = replace(plain, rules=factory(rule))
        swept = runner.sweep_problems(ruled, items, budgets=budgets, quiet=True)
        direct = [g[0] for g in run(ruled, jobs)]
        assert swept.correct.tolist() == np.array([a.correct for a in direct]).reshape(shape).tolist()
        assert swept.used.tolist() == np.array([a.trace.used for a in direct]).reshape(shape).tolist()
        assert (swept.points != bare.points) is changes
    below = np.array([0, 3, 9, 30, 4000])
    eased = replace(plain, rules=factory(SlackStop(1.0, 60.0)))
    swept = runner.sweep_problems(eased, items, budgets=budgets, quiet=True)
    assert ((swept.used < bare.used) & (bare.used[:, :, -1:] <= below)).any(), "no cut, and shorter all the same"


def test_the_sweep_draws_its_constants_from_val_alone(reasoner: Reasoner, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[str] = []
    plain = runner.problems

    def noting(tasks: str, split: str, stream: str, n: int, levels: tuple[int, ...]) -> list[Problem]:
        splits.append(split)
        return list(plain(tasks, split, stream, n, levels))

    monkeypatch.setattr(runner, "problems", noting)
    swept = runner.sweep(reasoner, "boolean", n=8, val_n=6, levels=(1,), quiet=True)
    assert splits == ["test", "val"]
    body = json.loads(json.dumps(swept.to_json(), allow_nan=False))
    assert {"best_fixed", "constants", "predicted", *(f"fixed:{s}" for s in STRATEGIES)} <= set(body["policies"])
    assert len(body["points"]) == 8 * 4 and body["n"] == 8


def _sweep(correct: list[list[bool]], used: list[list[int]]) -> Sweep:
    """Two strategies, one budget (unlimited)."""
    right, tokens = np.array(correct)[:, :, None], np.array(used)[:, :, None]
    points = tuple(
        Point(s, None, len(right), float(right[:, k].mean()), (0.0, 1.0), float(tokens[:, k].mean()), 0, 1.0)
        for k, s in enumerate(("direct", "steps"))
    )
    return Sweep(("direct", "steps"), (None,), points, right, tokens)


def _problem(task: str) -> Problem:
    return Problem(task, 1, f"{task}?", "x")


def test_policies_follow_val_even_where_test_disagrees() -> None:
    held = [_problem("a")] * 4 + [_problem("b")] * 4
    val = _sweep([[True, False]] * 4 + [[False, True]] * 4, [[0, 10]] * 8)
    items = [_problem("a")] * 2 + [_problem("b")] * 2
    test = _sweep([[False, True]] * 2 + [[True, False]] * 2, [[0, 10]] * 4)  # on test the others would win
    out = runner.policies(val, held, test, items)
    assert out["best_fixed"]["choice"] == {"a": "direct", "b": "steps"}
    assert out["best_fixed"]["accuracy"] == 0.0 and out["best_fixed"]["tokens"] == 5.0
    assert out["fixed:direct"]["accuracy"] == out["fixed:steps"]["accuracy"] == 0.5


def test_the_paired_loss_by_hand() -> None:
    held = [_problem("a")] * 5
    val = _sweep([[False, True]] * 5, [[0, 10]] * 5)
    items = [_problem("a")] * 10
    # best fixed = steps: right on 8 of 10 at 10 tokens; predicted: right on 7 of 10 at 4 tokens
    test = _sweep([[False, i < 8] for i in range(10)], [[0, 10]] * 10)
    test.extra["constants"] = {
        "points": [
            {"tokens": 3.0, "accuracy": 0.6},
            {"tokens": 9.0, "accuracy": 0.7},
            {"tokens": 11.0, "accuracy": 0.8},
        ]
    }
    records = [EvalRecord(str(i), "a", 1, "direct" if i % 2 else "steps", i < 7, 4, "natural", True) for i in range(10)]
    out = runner.against(records, test, items, val, held)
    assert out["accuracy"] == 0.7 and out["loss"] == pytest.approx(0.1) and out["token_share"] == pytest.approx(0.4)
    assert out["loss_ci"][0] <= 0.1 <= out["loss_ci"][1] and out["loss_ci"][0] >= 0.0  # one pair differs, never below
    assert out["constant_tokens"] == 9.0 and out["plan_share"] == {
        "direct": 0.5, "steps": 0.5, "verify": 0.0, "decompose": 0.0,
    }  # fmt: skip
    test.extra["constants"] = {"points": [{"tokens": 3.0, "accuracy": 0.6}]}
    assert runner.against(records, test, items, val, held)["constant_tokens"] is None
