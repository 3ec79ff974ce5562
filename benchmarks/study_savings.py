"""Study e: predicted plan and budget against the best fixed strategy per family, five seeds of heads and cards.

One uncapped pass of all strategies over the test stream serves every seed; only rows that a card cuts are decoded anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_base import Setup, fitted, over_seeds, plain, quiet, say, shown, table
from study_heads import Train, fresh_labels, from_table, plan_numbers

from gnomon.attempts import Job, run
from gnomon.evaluation import metrics
from gnomon.evaluation.baselines import best_strategy
from gnomon.evaluation.calibration_fit import Uncapped, fit_plan_price
from gnomon.metacognition.calibration import Card, best_value
from gnomon.metacognition.heads import MetacogHeads
from gnomon.recipes.metacog import calibrate
from gnomon.tasks.problem import Problem
from gnomon.training.heads_fit import read_greedy

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
GOAL_SHARE, GOAL_LOSS = 0.5, 0.005
PRICES = (0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.006)


def decoded(setup: Setup, r: dict[str, Any], card: Card, items: Sequence[Problem]) -> tuple[Bools, Ints, Ints, Ints]:
    """(correct, used, plan, uncapped tokens of that plan) [N] under a card; rows over their cap are decoded cut."""
    plan = card.choose_plan(r["plan_probs"], r["solve"], r["cost"])
    at = np.arange(len(plan))
    caps = card.clip_budget(r["budget_raw"][at, plan])
    right, used = r["correct"][at, plan].copy(), r["used"][at, plan].copy()
    full = used.copy()
    over = np.flatnonzero(used > caps)
    bare = replace(setup.base, decider=None, rules=None)
    names = r["plans"]
    jobs = [Job(items[i], names[plan[i]], int(caps[i]), use_prediction=False, seed="studies") for i in over]
    for i, group in zip(over, run(bare, jobs, max_batch=setup.config.max_batch), strict=True):
        right[i], used[i] = group[0].correct, group[0].trace.used
    return right, used, plan, full


def hindsight(correct: Bools, used: Ints) -> tuple[Bools, Ints]:
    """The cheapest strategy that is right; where none is, the cheapest. correct, used [N, K]."""
    cost = np.where(correct, used, np.iinfo(np.int64).max)
    pick = np.where(correct.any(1), cost.argmin(1), used.argmin(1))
    at = np.arange(len(pick))
    return correct[at, pick], used[at, pick]


def against(
    right: NDArray[Any], used: NDArray[Any], fixed: tuple[Bools, Ints], oracle: tuple[Bools, Ints]
) -> dict[str, Any]:
    """A policy beside the best fixed strategy and the oracle. oracle_share: of the tokens that hindsight saves."""
    loss, ci = metrics.paired_difference(fixed[0], right)

    def share(mine: NDArray[Any], base: NDArray[Any]) -> float:
        return float(mine.sum() / base.sum())

    def reached(mine: NDArray[Any], base: NDArray[Any], best: NDArray[Any]) -> float:
        return float((base.sum() - mine.sum()) / (base.sum() - best.sum()))

    return {
        "accuracy": float(np.mean(right)), "tokens": float(np.mean(used)), "loss": loss, "loss_ci": list(ci),
        "token_share": share(used, fixed[1]), "token_share_ci": list(metrics.bootstrap(share, used, fixed[1])),
        "oracle_share": reached(used, fixed[1], oracle[1]),
        "oracle_share_ci": list(metrics.bootstrap(reached, used, fixed[1], oracle[1])),
    }  # fmt: skip


def carded(
    setup: Setup, heads: MetacogHeads, best: dict[str, str], order: Sequence[str]
) -> tuple[Card, dict[str, Any]]:
    """A card for these heads from the calibration labels, as a training run makes it."""
    quiet()
    labels, items = setup.draw("calibration"), setup.items("calibration")
    return calibrate(setup.base, heads, labels, items, order, setup.config, best)


def savings(setup: Setup, *, stream: str, n: int) -> dict[str, Any]:
    """The study."""
    assert setup.base.decider is not None and setup.base.decider.card is not None
    order, train = setup.base.decider.card.cost_order, Train(setup)
    fits = [fitted(setup, "attention", {}, s, train) for s in range(setup.seeds)]
    items, labels = setup.fresh(stream, n), fresh_labels(setup, stream, n)
    val = read_greedy(fits[0].heads, setup.draw("val"))
    best = best_strategy(val["family"], val["correct"], val["used"], val["plans"])
    first = read_greedy(fits[0].heads, labels)
    pick = np.array([first["plans"].index(best[f]) for f in first["family"]])
    at = np.arange(n)
    fixed = first["correct"][at, pick], first["used"][at, pick]
    oracle = hindsight(first["correct"], first["used"])
    found, plans_only, shares, reads = [], [], [], []
    for seed, fit in enumerate(fits):
        card, report = carded(setup, fit.heads, best, order)
        say(f"seed {seed}: price {card.plan_price}, clip level {card.budget_clip.level}")
        reads.append(read_greedy(fit.heads, labels))
        right, used, plan, full = decoded(setup, reads[-1], card, items)
        found.append((right, used))
        uncut = first["correct"][at, plan]
        plans_only.append(against(uncut, full, fixed, oracle))
        shares.append({p: float((plan == k).mean()) for k, p in enumerate(first["plans"])} | {
            "price": card.plan_price, "level": card.budget_clip.level, "calibration": report["accuracy"],
        })  # fmt: skip
    seeds = [against(right, used, fixed, oracle) for right, used in found]
    pooled = against(np.mean([f[0] for f in found], axis=0), np.mean([f[1] for f in found], axis=0), fixed, oracle)
    names = ("accuracy", "tokens", "loss", "token_share", "oracle_share")
    body = {
        "stream": stream, "n": n, "best": best,
        "best_fixed": {"accuracy": float(fixed[0].mean()), "tokens": float(fixed[1].mean())},
        "oracle": against(oracle[0], oracle[1], fixed, oracle), "seeds": seeds, "plans": shares,
        "over_seeds": {k: over_seeds([s[k] for s in seeds]) for k in names}, "mean_of_seeds": pooled,
        "plan_only": {k: over_seeds([s[k] for s in plans_only]) for k in names},
        "prices": price_curve(reads, fixed, oracle),
        "table": by_table(setup, val, first, best, fixed, oracle),
        "shipped": shipped(setup, labels, items, fixed, oracle),
        "goal": statistics.fmean(s["token_share"] for s in seeds) <= GOAL_SHARE and pooled["loss"] <= GOAL_LOSS,
    }  # fmt: skip
    _show(body)
    return plain(body)


def price_curve(reads: Sequence[dict[str, Any]], fixed: Any, oracle: Any) -> list[dict[str, Any]]:
    """What other prices of a token would give on this stream, mean of seeds, uncapped: a picture, not a choice."""
    found = []
    for price in PRICES:
        rows = []
        for r in reads:
            plan = best_value(r["solve"], r["cost"], price)
            at = np.arange(len(plan))
            rows.append((r["correct"][at, plan], r["used"][at, plan]))
        right, used = (np.mean([x[k] for x in rows], axis=0) for k in (0, 1))
        found.append(against(right, used, fixed, oracle) | {"price": price})
    return found


def shipped(setup: Setup, labels: Any, items: Sequence[Problem], fixed: Any, oracle: Any) -> dict[str, Any]:
    """The layer that the model ships with, the same way."""
    decider = setup.base.decider
    assert decider is not None and decider.card is not None
    right, used, _, _ = decoded(setup, read_greedy(decider.heads, labels), decider.card, items)
    return against(right, used, fixed, oracle)


def by_table(
    setup: Setup, val: dict[str, Any], target: dict[str, Any], best: dict[str, str], fixed: Any, oracle: Any
) -> dict[str, Any]:
    """Plans from the (family, level) table of calibration, the price from val by the rule of the card; no cap."""
    calibration = setup.draw("calibration")
    assert setup.base.decider is not None and setup.base.decider.card is not None
    held = read_greedy(setup.base.decider.heads, calibration)
    label = plan_numbers(calibration, setup.base.decider.card.cost_order)
    chosen_on, mine = from_table(held, val, label), from_table(held, target, label)
    price = fit_plan_price(Uncapped(**chosen_on), setup.config.plan_tolerance, best)
    assert price is not None
    plan = best_value(mine["solve"], mine["cost"], price)
    at = np.arange(len(plan))
    return against(target["correct"][at, plan], target["used"][at, plan], fixed, oracle) | {"price": price}


def _show(body: dict[str, Any]) -> None:
    def line(name: str, x: dict[str, Any]) -> tuple[Any, ...]:
        return (
            name, x["accuracy"], x["tokens"], f"{100 * x['loss']:.2f} {shown([100 * v for v in x['loss_ci']], 2)}",
            f"{x['token_share']:.3f} {shown(x['token_share_ci'])}",
            f"{x['oracle_share']:.3f} {shown(x['oracle_share_ci'])}",
        )  # fmt: skip

    fixed = body["best_fixed"]
    rows = [("best fixed per family (val)", fixed["accuracy"], fixed["tokens"], "–", 1.0, 0.0)]
    rows += [line("hindsight, cheapest correct", body["oracle"]), line("(family, level) table", body["table"])]
    rows += [line("shipped layer", body["shipped"])]
    rows += [line(f"seed {k}", s) for k, s in enumerate(body["seeds"])]
    rows += [line("mean of seeds", body["mean_of_seeds"])]
    table(
        f"Predicted plan and budget, stream {body['stream']}, n = {body['n']}",
        ("policy", "accuracy", "think tokens", "points lost", "share of fixed's tokens", "share of oracle's saving"),
        rows,
    )
    table(
        "Other prices on this stream, mean of seeds, uncapped (nothing is chosen here)",
        ("policy", "accuracy", "think tokens", "points lost", "share of fixed's tokens", "share of oracle's saving"),
        [line(f"price {x['price']}", x) for x in body["prices"]],
    )
    table("Over seeds (t-interval)", ("what", "plan and budget", "plan only, uncapped"), [
        (k, body["over_seeds"][k], body["plan_only"][k]) for k in body["over_seeds"]
    ])  # fmt: skip
