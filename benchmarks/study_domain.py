"""Study d: does the card's domain know prompts of families that it was not fitted on?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from study_base import Setup, fitted, plain, say, shown, table
from study_heads import Train, fresh_labels

from gnomon.attempts import prompt_logprobs
from gnomon.base.seeds import fraction, numpy_generator
from gnomon.evaluation import metrics
from gnomon.evaluation.calibration_fit import Uncapped, fit_domain, fit_plan_price
from gnomon.metacognition.calibration import best_value
from gnomon.training.heads_fit import read_greedy
from gnomon.training.labels import LabelSet

SPLITS = 3
GOAL_IN, GOAL_OUT = 0.02, 0.90
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def splits(families: Sequence[str], count: int = SPLITS) -> list[tuple[str, ...]]:
    """Disjoint groups of families to leave out, by a hashed order; about a quarter each."""
    order = numpy_generator("studies-domain-splits").permutation(len(families))
    size = max(1, len(families) // (count + 1))
    return [tuple(sorted(families[i] for i in order[k * size : (k + 1) * size])) for k in range(count)]


def states(labels: LabelSet, layer: int) -> Floats:
    """[N, K, C] of one block at the think tag of every plan."""
    return np.array([[p.strategies[s].taps_think[layer] for s in labels.strategies] for p in labels.problems])


def without(labels: LabelSet, out: Sequence[str]) -> LabelSet:
    """The label set without some families."""
    return LabelSet(labels.strategies, tuple(p for p in labels.problems if p.family not in out), labels.meta)


def flags(fit_on: LabelSet, target: LabelSet, out: Sequence[str], layer: int) -> tuple[Bools, Floats]:
    """(flagged, distance) [N, K] of `target` by a domain fitted on `fit_on` without the families `out`."""
    kept = without(fit_on, out)
    x = states(kept, layer)
    groups = [f"{p.family}/{s}" for p in kept.problems for s in kept.strategies]
    found = fit_domain(x.reshape(-1, x.shape[-1]), groups, layer)
    y = states(target, layer)
    far = found.distance(y.reshape(-1, y.shape[-1])).reshape(y.shape[:2])
    return far > found.threshold, far


def shares(flagged: Bools, plan: NDArray[np.int64], foreign: Bools, family: Sequence[str]) -> dict[str, Any]:
    """Shares flagged under the chosen plans: in-domain, left out, the least of the left-out families; any plan."""
    mine = flagged[np.arange(len(plan)), plan]
    names = np.asarray(family)
    per = {f: float(mine[names == f].mean()) for f in sorted(set(names[foreign].tolist()))}
    inside, outside = int(mine[~foreign].sum()), int(mine[foreign].sum())
    return {
        "in_domain": inside / max(1, int((~foreign).sum())),
        "in_domain_ci": list(metrics.wilson(inside, int((~foreign).sum()))),
        "left_out": outside / max(1, int(foreign.sum())),
        "left_out_ci": list(metrics.wilson(outside, int(foreign.sum()))),
        "families": per,
        "least": min(per.values(), default=float("nan")),
        "in_domain_all_plans": float(flagged[~foreign].mean()),
        "left_out_all_plans": float(flagged[foreign].mean()),
    }


def chosen_plans(setup: Setup, train: Train, out: Sequence[str], held: LabelSet, target: LabelSet) -> NDArray[np.int64]:
    """Plans that heads and price choose which never saw the families `out`; shorter fits than the other studies'."""
    steps = min(600, setup.config.heads.steps)
    heads = fitted(setup, f"without-{'-'.join(out)}", {"steps": steps}, 0, lambda: without(train(), out)).heads
    price = fit_plan_price(Uncapped(**read_greedy(heads, without(held, out))), setup.config.plan_tolerance)
    said = read_greedy(heads, target)
    assert price is not None
    return best_value(said["solve"], said["cost"], price)


def perplexity(setup: Setup, stream: str, n: int) -> tuple[Floats, Floats, list[str]]:
    """Mean prompt log-prob on calibration and on the stream, and the families of calibration: the scalar baseline."""
    held = setup.items("calibration")
    return (
        np.array(prompt_logprobs(setup.base, held)),
        np.array(prompt_logprobs(setup.base, setup.fresh(stream, n))),
        [p.task for p in held],
    )


def domain(setup: Setup, *, stream: str, n: int) -> dict[str, Any]:
    """Three splits with heads of their own, every family left out alone, all blocks; prompt perplexity beside."""
    calibration, target = setup.draw("calibration"), fresh_labels(setup, stream, n)
    family = [p.family for p in target.problems]
    every = sorted(set(family))
    layer, train = max(1, setup.base.backbone.n_layers // 6), Train(setup)
    held_lp, lp, held_family = perplexity(setup, stream, n)
    body: dict[str, Any] = {"stream": stream, "n": n, "layer": layer, "splits": [], "alone": {}, "layers": {}}
    for out in splits(every):
        foreign = np.array([f in out for f in family])
        plan = chosen_plans(setup, train, out, calibration, target)
        flagged, far = flags(calibration, target, out, layer)
        at = np.arange(n)
        least = np.quantile(held_lp[[f not in out for f in held_family]], 0.01)
        body["splits"].append(shares(flagged, plan, foreign, family) | {
            "out": out, "auroc": metrics.auroc(far[at, plan], foreign),
            "perplexity": {
                "in_domain": float((lp < least)[~foreign].mean()), "left_out": float((lp < least)[foreign].mean()),
                "auroc": metrics.auroc(-lp, foreign),
            },
        })  # fmt: skip
        say("left out", out, shown(body["splits"][-1]["left_out"]))
    steps = np.full(n, target.strategies.index("steps"))
    for name in every:
        flagged, _ = flags(calibration, target, [name], layer)
        body["alone"][name] = shares(flagged, steps, np.array([f == name for f in family]), family)
    for k in range(setup.base.backbone.n_layers):
        parts = [
            shares(flags(calibration, target, out, k)[0], steps, np.array([f in out for f in family]), family)
            for out in splits(every)
        ]
        body["layers"][k] = {key: [p[key] for p in parts] for key in ("in_domain", "left_out", "least")}
    _show(body)
    return plain(body)


def blocks(labels: LabelSet, layers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Every family left out alone, by block, all plans: fitted on one half of a label set, flagged on the other."""
    half = [fraction("study-domain-half", p.id) < 0.5 for p in labels.problems]
    fit_on, target = (
        LabelSet(labels.strategies, tuple(p for p, h in zip(labels.problems, half, strict=True) if h is side))
        for side in (True, False)
    )
    family = np.array([p.family for p in target.problems])
    found: dict[int, dict[str, Any]] = {}
    for k in layers:
        parts = {}
        for name in np.unique(family):
            flagged, _ = flags(fit_on, target, [str(name)], k)
            parts[str(name)] = (float(flagged[family != name].mean()), float(flagged[family == name].mean()))
        found[k] = {"in_domain": max(x for x, _ in parts.values()), "left_out": {n: y for n, (_, y) in parts.items()}}
        say("block", k, found[k])
    table("By block: in-domain flagged at most, each family left out alone (all plans)", ("block", "in", *parts), [
        (k, v["in_domain"], *v["left_out"].values()) for k, v in found.items()
    ])  # fmt: skip
    return found


def _show(body: dict[str, Any]) -> None:
    table(
        f"Domain (block {body['layer']}), stream {body['stream']}, n = {body['n']}, plans of heads that never saw them",
        ("left out", "in-domain flagged", "left out flagged", "least family", "AUROC", "under any plan (in, out)",
         "prompt perplexity (in, out, AUROC)"),
        [
            (", ".join(s["out"]), f"{s['in_domain']:.3f} {shown(s['in_domain_ci'])}",
             f"{s['left_out']:.3f} {shown(s['left_out_ci'])}", s["least"], s["auroc"],
             shown([s["in_domain_all_plans"], s["left_out_all_plans"]]), shown(list(s["perplexity"].values())))
            for s in body["splits"]
        ],
    )  # fmt: skip
    table("Every family left out alone (plan steps)", ("family", "in-domain flagged", "left out flagged"), [
        (k, s["in_domain"], s["left_out"]) for k, s in body["alone"].items()
    ])  # fmt: skip
    table("By block, the three splits (plan steps)", ("block", "in-domain", "left out", "least family"), [
        (k, shown(s["in_domain"]), shown(s["left_out"]), shown(s["least"])) for k, s in body["layers"].items()
    ])  # fmt: skip
