"""Study b: the aggregator against the mean and the best single layer, five seeds each, on one fresh label set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_base import Fit, Setup, fitted, keys, look_up, over_seeds, plain, quiet, say, shown, table

from gnomon.base.seeds import numpy_generator
from gnomon.evaluation import metrics
from gnomon.metacognition.calibration import best_value
from gnomon.recipes.metacog import draw_labels
from gnomon.training.heads_fit import read_greedy
from gnomon.training.labels import LabelSet

Read = dict[str, Any]
METRICS = {
    "plan_accuracy": "plan = cheapest solver", "value": "value (accuracy − price × tokens)", "accuracy": "accuracy",
    "tokens": "think tokens", "budget_r_family": "budget r within family",
    "budget_r_cell": "budget r within (family, plan)", "before_steps": "AUROC before, steps",
    "after_steps": "AUROC after, steps", "before_chosen": "AUROC before, own plans",
    "after_chosen": "AUROC after, own plans",
}  # fmt: skip


class Train:
    """The training labels, loaded when they are first needed (they hold all states)."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self._labels = setup, None

    def __call__(self) -> LabelSet:
        if self._labels is None:
            say("load training labels")
            self._labels = self._setup.draw("train")
        return self._labels


def fresh_labels(setup: Setup, stream: str, n: int, split: str = "test") -> LabelSet:
    """One uncapped greedy pass of all strategies on a fresh stream, with states, kept in the cache."""
    quiet()
    config = setup.config.model_copy(update={"stream": stream})
    return draw_labels(setup.base, config, split, n, 0, setup.cache / "labels")


def measure(r: Read, label: NDArray[np.int64], price: float, rows: NDArray[np.int64]) -> dict[str, float]:
    """The numbers of METRICS on these rows; label [N]: the cheapest solver, -1 where none."""
    plans, family = list(r["plans"]), np.asarray(r["family"])[rows]
    right, used, before, after = (r[k][rows] for k in ("correct", "used", "conf_before", "conf_after"))
    probs, mine = r["plan_probs"][rows], label[rows]
    pick = best_value(r["solve"][rows], r["cost"][rows], price)
    at, steps = np.arange(len(rows)), plans.index("steps")
    known, thinking = mine >= 0, np.array([p != "direct" for p in plans])
    held = right & r["closed"][rows] & thinking
    cell = np.char.add(family[:, None], np.array(plans)[None])[held]
    guess, need = np.expm1(r["budget_raw"][rows][held]), used[held]
    accuracy, tokens = float(right[at, pick].mean()), float(used[at, pick].mean())
    return {
        "plan_accuracy": float((probs.argmax(1) == mine)[known].mean()),
        "value": accuracy - price * tokens,
        "accuracy": accuracy,
        "tokens": tokens,
        "budget_r_family": metrics.budget_corr_within(
            guess, need, np.repeat(family[:, None], len(plans), 1)[held]
        ),
        "budget_r_cell": metrics.budget_corr_within(guess, need, cell),
        "before_steps": metrics.auroc(before[:, steps], right[:, steps]),
        "after_steps": metrics.auroc(after[:, steps], right[:, steps]),
        "before_chosen": metrics.auroc(before[at, pick], right[at, pick]),
        "after_chosen": metrics.auroc(after[at, pick], right[at, pick]),
    }  # fmt: skip


def from_table(fit_on: Read, target: Read, label: NDArray[np.int64]) -> Read:
    """What the (family, level) look-up says in the place of heads. fit_on: of calibration; label [N]: there."""
    plans = range(len(target["plans"]))
    mine = keys(target["family"], target["level"])

    def column(values: NDArray[Any]) -> NDArray[np.float64]:
        return look_up(fit_on["family"], fit_on["level"], values).predict(mine)

    chance = np.clip(np.stack([column(fit_on["correct"][:, k]) for k in plans], 1), 1e-4, 1 - 1e-4)
    logit = np.log(chance / (1 - chance))
    need = np.stack([column(np.log1p(fit_on["used"][:, k])) for k in plans], 1)
    cost = np.log1p(np.stack([column(fit_on["used"][:, k]) for k in plans], 1))
    return target | {
        "plan_probs": np.stack([column(label == k) for k in plans], 1), "solve": logit, "cost": cost,
        "budget_raw": need, "conf_before": logit, "conf_after": logit,
    }  # fmt: skip


def plan_numbers(labels: LabelSet, cost_order: Sequence[str]) -> NDArray[np.int64]:
    """Index of the cheapest solver per problem, -1 where none solves it."""
    return np.array([-1 if s is None else labels.strategies.index(s) for s in labels.plan_labels(cost_order)])


def variants(setup: Setup, train: Train) -> dict[str, list[Fit]]:
    """name -> one fit per seed; the single layer is the one of lowest loss on the inner validation problems."""
    layers = range(setup.base.backbone.n_layers)
    single = {k: fitted(setup, f"layer{k}", {"layers": (k,)}, 0, train) for k in layers}
    losses = {k: f.report["val"]["loss"] for k, f in single.items()}
    say("inner val loss of single layers:", {k: round(v, 4) for k, v in losses.items()})
    best = min(losses, key=lambda k: losses[k])
    seeds = range(setup.seeds)
    return {
        "attention": [fitted(setup, "attention", {}, s, train) for s in seeds],
        "mean": [fitted(setup, "mean", {"aggregator": "mean"}, s, train) for s in seeds],
        f"layer {best} alone": [fitted(setup, f"layer{best}", {"layers": (best,)}, s, train) for s in seeds],
    }


def ablations(setup: Setup, *, stream: str, n: int, draws: int = 200) -> dict[str, Any]:
    """All variants on the same fresh labels: intervals over seeds, paired differences over seeds and over problems."""
    assert setup.base.decider is not None and setup.base.decider.card is not None
    price = setup.base.decider.card.plan_price or 0.0
    fits = variants(setup, Train(setup))
    order = setup.base.decider.card.cost_order
    calibration, labels = setup.draw("calibration"), fresh_labels(setup, stream, n)
    reads = {name: [read_greedy(f.heads, labels) for f in found] for name, found in fits.items()}
    first = next(iter(reads.values()))[0]
    label = plan_numbers(labels, order)
    told = from_table(
        read_greedy(next(iter(fits.values()))[0].heads, calibration), first, plan_numbers(calibration, order)
    )
    every = np.arange(n)
    body: dict[str, Any] = {"stream": stream, "n": n, "price": price, "variants": {}, "differences": {}}
    numbers = {name: [measure(r, label, price, every) for r in found] for name, found in reads.items()}
    for name, found in numbers.items():
        body["variants"][name] = {k: over_seeds([x[k] for x in found]) for k in METRICS}
        body["variants"][name]["parameters"] = fits[name][0].report["parameters"]
    body["table"] = measure(told, label, price, every)
    draw = numpy_generator("studies-ablations")
    samples = [draw.integers(0, n, n) for _ in range(draws)]
    again = {
        name: [[measure(r, label, price, rows) for rows in samples] for r in found] for name, found in reads.items()
    }
    for name in list(reads)[1:]:
        body["differences"][name] = {
            k: over_seeds([a[k] - b[k] for a, b in zip(numbers["attention"], numbers[name], strict=True)])
            | {"problems_ci": _interval([
                float(np.mean([x[i][k] for x in again["attention"]]) - np.mean([x[i][k] for x in again[name]]))
                for i in range(draws)
            ])}
            for k in METRICS
        }  # fmt: skip
    _show(body)
    return plain(body)


def _interval(values: Sequence[float]) -> list[float]:
    return [float(np.nanquantile(values, q)) for q in (0.025, 0.975)]


def _show(body: dict[str, Any]) -> None:
    names = list(body["variants"])
    table(
        f"Heads on stream {body['stream']}, n = {body['n']}, mean and 95 % interval over seeds; price {body['price']}",
        ("what", *names, "(family, level) table"),
        [(text, *(body["variants"][v][k] for v in names), body["table"][k]) for k, text in METRICS.items()],
    )
    table(
        "Paired differences, attention − other: [over seeds] and [over problems, mean of seeds]",
        ("what", *names[1:]),
        [
            (text, *(f"{shown(d[k])} {shown(d[k]['problems_ci'])}" for d in body["differences"].values()))
            for k, text in METRICS.items()
        ],
    )
