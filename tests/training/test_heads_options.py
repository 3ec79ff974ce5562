"""What the heads can be asked for beyond the defaults: every option of their shape trains, and a decoding policy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gnomon.base.errors import DataError
from gnomon.evaluation import metrics
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.policy import GRID
from gnomon.training.heads_fit import HeadsConfig, fit_heads, read_greedy
from gnomon.training.labels import LabelSet
from gnomon.training.objectives import LossWeights

QUICK = HeadsConfig(proj_dim=12, width=24, steps=90, batch=64, lr=6e-3)


@pytest.fixture(scope="module")
def labels(synthetic: Any) -> LabelSet:
    return synthetic.make(150, seed=1)


@pytest.fixture(scope="module")
def unseen(synthetic: Any) -> LabelSet:
    return synthetic.make(200, seed=2)


def rates_of(labels: LabelSet) -> np.ndarray:
    """Easy problems are best left alone, hard ones want entry 2; nothing is known in between. [P, K, 3]"""
    by_level = {1: (0.9, 0.5, 0.5), 2: (0.9, 0.5, 0.9), 3: (0.0, 0.0, 0.0), 4: (0.2, 0.5, 0.9), 5: (0.0, 0.5, 0.9)}
    found = np.array([[by_level[min(p.level, 5)]] * len(labels.strategies) for p in labels.problems])
    found[:, 0] = math.nan  # one plan was not measured
    return found


@pytest.mark.parametrize(
    "option",
    [
        {"aggregator": "mean"},
        {"experts_per_layer": 3},
        {"layers": (1, 3)},
        {"layers": (2,), "aggregator": "mean"},
        {"proj_dim": 5, "experts_per_layer": 2},
    ],
)
def test_every_option_trains(labels: LabelSet, unseen: LabelSet, option: dict[str, Any]) -> None:
    heads, report = fit_heads(labels, HeadsConfig(**{**QUICK.model_dump(), **option}), seed=0)
    for name, value in option.items():
        assert getattr(heads.config, name) == value
    assert heads.config.linked_all_layers is ("layers" not in option)
    used = len(heads.config.used_layers)
    told = report["telemetry"]
    assert {len(v) for v in told["alpha_by_site"].values()} == {used} == {len(told["agreement_by_layer"])}
    assert told["layers/plan_agreement"] == pytest.approx(np.mean(told["agreement_by_layer"]))
    assert all(math.isfinite(v) for k, v in told.items() if isinstance(v, float))
    if option.get("aggregator") == "mean":
        assert told["alpha/entropy"] == pytest.approx(math.log(used), abs=1e-5) and told["alpha/min"] == 1.0 / used
    read = read_greedy(heads, unseen)
    held = read["correct"] & (np.arange(4) > 0)
    assert metrics.budget_corr(np.expm1(read["budget_raw"][held]), read["used"][held]) > 0.8
    assert metrics.auroc(read["conf_after"].ravel(), read["correct"].ravel()) > 0.9


def test_a_policy_is_learned_from_pass_rates(labels: LabelSet, unseen: LabelSet) -> None:
    heads, report = fit_heads(labels, QUICK, seed=0, policy_rates=rates_of(labels))
    assert heads.config.policy == 3 and 0.1 < report["telemetry"]["policy/identity"] < 0.9
    first = report["curve"][0]["val/policy"]
    assert report["val"]["policy"] <= first < math.log(3)
    assert "loss/policy" not in report["val"], "the report has plain names"
    think = torch.from_numpy(np.stack([p.strategies["steps"].taps_think for p in unseen.problems]))
    said = Decider(heads).policy(think, ["steps"] * len(unseen.problems))
    easy = [s is None for s, p in zip(said, unseen.problems, strict=True) if p.level <= 2]
    hard = [s == GRID[2] for s, p in zip(said, unseen.problems, strict=True) if p.level >= 4]
    assert np.mean(easy) > 0.9 and np.mean(hard) > 0.9


def test_without_pass_rates_nothing_is_new(labels: LabelSet) -> None:
    short = QUICK.model_copy(update={"steps": 3})
    heads, report = fit_heads(labels, short, seed=0)
    assert heads.config.policy == 0 and heads.policy_head is None
    assert "policy" not in report["val"] and "policy/identity" not in report["telemetry"]


def test_the_style_bonus_spreads_plans(labels: LabelSet) -> None:
    def spread(weight: float) -> float:
        rows: list[dict[str, Any]] = []
        config = QUICK.model_copy(update={"steps": 30, "weights": LossWeights(style_entropy=weight)})
        fit_heads(labels, config, seed=0, on_step=lambda step, row: rows.append(dict(row)))
        return rows[-1]["loss/style_entropy"]

    assert spread(0.0) + 0.05 < spread(3.0) <= math.log(4) + 1e-6


def test_rates_that_do_not_fit_are_refused(labels: LabelSet) -> None:
    rates = rates_of(labels)
    for bad, message in (
        (rates[:-1], r"must be \[150, 4, entries\] for these labels, got \[149, 4, 3\]"),
        (rates[:, 0], r"got \[150, 3\]"),
        (rates[..., :1], "2 to 5 entries"),
        (np.zeros_like(rates), "none is above 0"),
        (np.full_like(rates, math.nan), "none was measured"),
    ):
        with pytest.raises(DataError, match=message):
            fit_heads(labels, QUICK, policy_rates=bad)


def test_unknown_layers_plans_and_aggregators_are_named(labels: LabelSet) -> None:
    with pytest.raises(ValidationError, match="no layer 7: the base has 4 blocks, 0 to 3"):
        fit_heads(labels, QUICK.model_copy(update={"layers": (1, 7)}))
    with pytest.raises(ValidationError, match="unknown plan 'stepz'; did you mean 'steps'"):
        QUICK.metacog(4, 24, ("direct", "stepz"))
    with pytest.raises(ValidationError, match="'attention' or 'mean'"):
        HeadsConfig(aggregator="median")  # type: ignore[arg-type]
