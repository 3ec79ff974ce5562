"""Heads trained on synthetic states recover what is in them, on problems they have not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gnomon.base.errors import DataError
from gnomon.base.seeds import torch_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.calibration_fit import Uncapped, fit_card
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.training.heads_fit import HeadsConfig, domain_layer, fit_heads, read_greedy

SMALL = HeadsConfig(proj_dim=24, width=48, steps=400)


@pytest.fixture(scope="module")
def trained(synthetic: Any) -> Any:
    labels = synthetic.make(350, seed=1)
    return labels, *fit_heads(labels, SMALL, seed=0)


@pytest.fixture(scope="module")
def unseen(synthetic: Any) -> Any:
    return synthetic.make(500, seed=2)


def test_heads_recover_plan_budget_and_confidence(trained: Any, unseen: Any) -> None:
    _, heads, _ = trained
    read = read_greedy(heads, unseen)
    held = read["correct"] & (np.arange(4) > 0)
    assert metrics.budget_corr(np.expm1(read["budget_raw"][held]), read["used"][held]) > 0.95
    right = read["correct"].ravel()
    assert metrics.auroc(read["conf_before"].ravel(), right) > 0.88
    assert metrics.auroc(read["conf_after"].ravel(), right) > 0.98
    order = trained[0].cost_order()
    truth = unseen.plan_labels(order)
    solved = [i for i, t in enumerate(truth) if t is not None]
    guess = [read["plans"][k] for k in read["plan_probs"].argmax(1)]
    assert np.mean([guess[i] == truth[i] for i in solved]) > 0.65


def test_layers_mean_something_on_their_own(trained: Any, unseen: Any) -> None:
    _, heads, report = trained
    arrays = unseen.arrays()
    n = len(arrays.share)
    out = heads(torch.from_numpy(arrays.think_taps), torch.full((n,), 1), torch.zeros(n), per_layer=True)
    known = ~np.isnan(arrays.budget) & (arrays.strategy > 0)
    for layer in range(4):
        guess = out.per_layer["budget_raw_pl"][:, layer].detach().numpy()
        assert metrics.pearson(guess[known], arrays.budget[known]) > 0.7
    assert report["telemetry"]["layers/plan_agreement"] > 0.6
    assert {len(v) for v in report["telemetry"]["alpha_by_site"].values()} == {4}


def test_the_report_tells_what_happened(trained: Any) -> None:
    labels, heads, report = trained
    assert report["val"]["loss"] <= min(row["val/loss"] for row in report["curve"]) + 1e-6, "the best state is kept"
    assert report["labels"]["n"] == len(labels.problems)
    assert not heads.training
    assert report["parameters"] == sum(p.numel() for p in heads.parameters())


def test_same_seed_same_heads(synthetic: Any) -> None:
    labels = synthetic.make(40, seed=5)
    short = SMALL.model_copy(update={"steps": 12, "eval_every": 6})
    a, b, c = (fit_heads(labels, short, seed=s)[0].fingerprint() for s in (1, 1, 2))
    assert a == b != c


def test_card_from_heads_promises_what_holds_on_new_problems(trained: Any, unseen: Any, synthetic: Any) -> None:
    labels, heads, _ = trained
    card, report = fit_card(
        Uncapped(**read_greedy(heads, unseen)),
        labels.cost_order(),
        weights=heads.fingerprint(),
        dataset="synthetic",
        stream="cal",
    )
    assert report["clip_loss"] <= 0.005 + 1e-9
    fresh = synthetic.make(500, seed=9)
    decider = Decider(heads, card)
    stacked = torch.from_numpy(np.stack([p.taps_prompt for p in fresh.problems]))
    plans = [d.plan for d in decider.plan(stacked)]
    think = torch.from_numpy(np.stack([p.strategies[s].taps_think for p, s in zip(fresh.problems, plans, strict=True)]))
    rows = decider.budget(think, plans)
    known = [d.calibrated for d in rows]
    assert np.mean(known) > 0.95, "in-domain problems are seldom called foreign"
    greedy = [p.strategies[s].rollouts[0] for p, s in zip(fresh.problems, plans, strict=True)]
    prob = [d.confidence for d in rows if d.confidence is not None]
    assert metrics.ece(prob, [r.correct for r, k in zip(greedy, known, strict=True) if k]) < 0.09
    strangers = decider.budget(3.0 * torch.randn(200, 4, 24, generator=torch_generator("strangers")), ["steps"] * 200)
    assert np.mean([d.calibrated for d in strangers]) < 0.1


@pytest.fixture(scope="module")
def watched(synthetic: Any) -> Any:
    return fit_heads(synthetic.make(250, seed=1, boundaries=True), SMALL, seed=0)


def test_running_estimates_are_learned_from_state_and_tokens_used(watched: Any, synthetic: Any) -> None:
    heads, report = watched
    read = read_greedy(heads, synthetic.make(500, seed=2, boundaries=True))
    there = read["boundary_used"] >= 0
    assert not there[:, 0].any() and there[:, 1:].mean() > 0.99, "direct does not think"
    assert (read["boundary_used"] + read["boundary_remaining"] == read["used"])[there].all()
    held = there & read["correct"]
    need, said = np.log1p(read["boundary_remaining"][held]), read["boundary_budget"][held]
    assert metrics.pearson(said, need) > 0.9
    whole, used = np.log1p(read["used"][held]), np.log1p(read["boundary_used"][held])
    from_both = np.linalg.lstsq(np.stack([whole, used, used**2, np.ones_like(used)], 1), said, rcond=None)[0]
    assert from_both[0] > 0.5, "more for a longer solution (the state)"
    spent = held & (read["boundary_used"] > 0.8 * read["used"])
    begun = held & (read["boundary_used"] < 0.2 * read["used"])
    assert np.median(read["boundary_budget"][spent]) < np.median(read["boundary_budget"][begun]) - 1.0
    assert metrics.auroc(read["boundary_conf"][there], read["correct"][there]) > 0.9
    assert {"boundary_budget", "boundary_conf"} <= set(report["val"]) and "boundary" in report["telemetry"][
        "alpha_by_site"
    ]


def test_the_running_bound_covers_what_it_says_on_new_problems(watched: Any, synthetic: Any) -> None:
    heads, _ = watched
    labels = synthetic.make(500, seed=2, boundaries=True)
    card, report = fit_card(
        Uncapped(**read_greedy(heads, labels)),
        labels.cost_order(),
        weights=heads.fingerprint(),
        dataset="s",
        stream="c",
    )
    assert card.running is not None and card.running.level >= 0.95
    fresh = read_greedy(heads, synthetic.make(500, seed=9, boundaries=True))
    decider = Decider(heads, card)
    assert decider.reads_boundaries
    held = (fresh["boundary_used"] >= 0) & fresh["correct"]
    fits = card.running.upper(fresh["boundary_budget"][held]) >= fresh["boundary_remaining"][held]
    level, n = card.running.level, min(card.running.n, len(fits))
    assert fits.mean() > level - 3.5 * np.sqrt(2 * level * (1 - level) / n)
    assert report["running"]["coverage"] == pytest.approx(
        level, abs=4 * np.sqrt(2 * level * (1 - level) / card.running.n)
    )
    assert report["running"]["error"] < report["running"]["error_before"] + 0.1
    assert report["running"]["auroc"] > 0.7


def test_heads_that_never_saw_a_boundary_read_none(trained: Any, synthetic: Any) -> None:
    labels, heads, report = trained
    assert "boundary_budget" not in report["val"]
    read = read_greedy(heads, synthetic.make(60, seed=4, boundaries=True))
    assert (read["boundary_used"] == -1).all() and np.isnan(read["boundary_conf"]).all()
    card, told = fit_card(Uncapped(**read), labels.cost_order(), weights="w", dataset="s", stream="c")
    assert card.running is None and told["running"] is None and not Decider(heads, card).reads_boundaries


def test_too_few_problems_is_a_clear_error(synthetic: Any) -> None:
    with pytest.raises(DataError, match="too few"):
        fit_heads(synthetic.make(1, seed=1), SMALL)


def test_the_domain_is_read_in_an_early_block_but_not_the_first() -> None:
    found = {}
    for n in (1, 2, 4, 6, 12, 30):
        found[n] = domain_layer(MetacogHeads(MetacogConfig(n_layers=n, hidden_size=8, proj_dim=4, width=4)))
    assert found == {1: 0, 2: 1, 4: 1, 6: 1, 12: 2, 30: 5}
