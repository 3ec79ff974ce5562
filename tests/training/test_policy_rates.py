"""Labels of the decoding policy: measured with the sampler that will be used, and learned by the recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests import own

from gnomon.attempts import Job, run
from gnomon.base.errors import DataError, ModelError
from gnomon.interfaces.commands.measure import Draw
from gnomon.metacognition.policy import GRID, Sampling
from gnomon.reasoner import Reasoner
from gnomon.recipes import metacog
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.tasks.procedural import problems
from gnomon.training.heads_fit import HeadsConfig
from gnomon.training.policy_rates import _Always, policy_rates
from gnomon.training.rollout import label


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=80), tmp_path_factory.mktemp("base"))


def test_rates_are_of_the_plan_label_and_the_entry(folder: Path) -> None:
    base = Reasoner.load(folder)
    items = problems("boolean", "train", "rates", 16, (1, 2))
    labels = label(base, items, samples=1)
    rates = policy_rates(base, items, labels, samples=3)
    assert rates.shape == (16, len(labels.strategies), len(GRID))
    for i, plan in enumerate(labels.plan_labels()):
        for k, name in enumerate(labels.strategies):
            assert np.isnan(rates[i, k]).all() == (name != plan)
        if plan is not None:
            k = labels.strategies.index(plan)
            greedy = run(base, [Job(items[i], plan, None, use_prediction=False)])[0][0]
            assert rates[i, k, 0] == greedy.correct, "identity is what a greedy request gets"
            assert all(3 * r == pytest.approx(round(3 * r)) for r in rates[i, k, 1:])
    assert len(np.unique(rates[~np.isnan(rates)])) > 1


def test_the_thought_is_sampled_and_the_answer_is_greedy(folder: Path) -> None:
    item = problems("boolean", "train", "rates", 1, (2,))[0]
    hot = replace(Reasoner.load(folder), decider=_Always(Sampling(3.0, 1.0)), modulate=True)  # type: ignore[arg-type]
    job = Job(item, "steps", 30, samples=12, use_prediction=False)
    traces = [a.trace for a in run(hot, [job])[0]]
    assert len({t.think_ids for t in traces}) > 1
    same = {t.think_ids: set() for t in traces}  # type: dict[tuple[int, ...], set[tuple[int, ...]]]
    for t in traces:
        same[t.think_ids].add(t.answer_ids)
    assert all(len(answers) == 1 for answers in same.values())


def test_the_recipe_learns_a_policy_and_refuses_labels_of_other_problems(folder: Path, tmp_path: Path) -> None:
    body = {
        "base": str(folder), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini-policy",
        "label_n": 26, "calibration_n": 26, "val_n": 26, "policy_samples": 2,
        "heads": HeadsConfig(steps=10, proj_dim=8, width=16),
    }  # fmt: skip
    base = Reasoner.load(folder)
    trained = metacog.train(base, MetacogRunConfig.model_validate(body), tmp_path)
    decider = trained.reasoner.decider
    assert decider is not None and decider.modulates and decider.heads.config.policy == len(GRID)
    assert not trained.reasoner.modulate, "off until somebody asks for it"
    layer = tmp_path / "layer"
    trained.reasoner.save_layer(layer)
    found, _ = Draw(model=str(layer), tasks="boolean", modulate=True, n=2, levels="1").load()
    assert found.modulate and found.decider is not None and found.decider.modulates
    with pytest.raises(ModelError, match="no decoding policy for --modulate"):
        Draw(model=str(folder), tasks="boolean", modulate=True, n=2, levels="1").load()
    other = {
        **body,
        "labels": str(next(p for p in tmp_path.iterdir() if p.name.startswith("labels"))),
        "stream": "elsewhere",
    }
    with pytest.raises(DataError, match="label again"):
        metacog.train(base, MetacogRunConfig.model_validate(other), tmp_path / "other")
