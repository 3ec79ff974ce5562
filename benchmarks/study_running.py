"""Study c: confidence along the thought, and closing on it against closing on the probability of a trial answer.

Two kinds of confidence at a boundary: the one that the layer has ("the answer will be right in the end", heads of the
other studies) and a probe of the same shape trained for what a stopping rule needs ("closing here gives a right
answer"), on trial answers of train-split thoughts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study_base import Setup, fitted, look_up, over_seeds, plain, say, shown, table
from study_heads import Train
from study_slack import ANSWERS, TOLERANCE, chosen, each, earliest, probes, row, shown_rules
from study_thoughts import CUTS, Thought, by_table, collect, outcomes, with_answers, with_trials

from gnomon.decoding.slack import AnswerProbability
from gnomon.evaluation import metrics
from gnomon.metacognition.config import BOUNDARY, END, THINK_SITE
from gnomon.metacognition.heads import MetacogHeads
from gnomon.training.labels import LabelledProblem, LabelSet, Rollout, StrategyLabels
from gnomon.training.objectives import LossWeights

PLACES = (0.25, 0.5, 0.75, 1.0)
PROBE = dict.fromkeys(LossWeights.model_fields, 0.0) | {"boundary_conf": 1.0, "boundary_rank": 0.2}
Floats = NDArray[np.float64]
Stops = list[int | None]


@torch.no_grad()
def confidence(heads: MetacogHeads, states: Sequence[Any], site: int, used: Sequence[int]) -> Floats:
    """Logits [N] of states [L, C] read at one site."""
    found = []
    for start in range(0, len(states), 1024):
        part = torch.from_numpy(np.stack(states[start : start + 1024]))
        tokens = torch.tensor(list(used[start : start + 1024]), dtype=torch.float32)
        found.append(heads(part, torch.full((len(part),), site), tokens).conf_raw.double().numpy())
    return np.concatenate(found)


def along(heads: MetacogHeads, thoughts: Sequence[Thought]) -> list[list[tuple[int, float]]]:
    """Per thought (think tokens, logit) at every boundary state."""
    flat = [(i, used, state) for i, t in enumerate(thoughts) for used, state in t.states]
    said = confidence(heads, [s for _, _, s in flat], BOUNDARY, [u for _, u, _ in flat])
    found: list[list[tuple[int, float]]] = [[] for _ in thoughts]
    for (i, used, _), logit in zip(flat, said, strict=True):
        found[i].append((used, float(logit)))
    return found


def place(count: int, share: float) -> int:
    """Index of the boundary at this share of a thought that has `count` boundaries."""
    return max(0, math.ceil(share * count) - 1)


def rising(heads: MetacogHeads, thoughts: Sequence[Thought]) -> dict[str, Floats]:
    """Logits [N] at the start, at shares of the boundaries, and at the end, of thoughts that have boundaries."""
    seen = along(heads, thoughts)
    found = {"start": confidence(heads, [t.before for t in thoughts], THINK_SITE, [0] * len(thoughts))}
    for share in PLACES:
        found[f"{share:.0%}"] = np.array([s[place(len(s), share)][1] for s in seen])
    found["end"] = confidence(heads, [t.end for t in thoughts], END, [t.used for t in thoughts])
    return found


def along_answers(thoughts: Sequence[Thought]) -> dict[str, Floats]:
    """Log-prob of the trial answer at the same places (in front of the KIND token), and of the own answer."""
    found = {}
    for share in PLACES:
        at = [t.nodes[place(len(t.nodes), share)] for t in thoughts]
        found[f"{share:.0%}"] = np.array([t.trials[p].logprob for t, p in zip(thoughts, at, strict=True)])
    return found | {"end": np.array([t.own.logprob for t in thoughts])}


def probe_labels(thoughts: Sequence[Thought]) -> LabelSet:
    """A label set whose boundary rows say whether closing there is right; nothing else in it is trained on."""
    found = []
    for i, t in enumerate(thoughts):
        rolls = tuple(
            Rollout(t.at(used).correct, used + 1, 1, 0.0, True, state, n == 0, (used, state))
            for n, (used, state) in enumerate(t.states)
        )
        cell = {t.plan: StrategyLabels(t.before, rolls)}
        found.append(LabelledProblem(f"{i}-{t.problem.prompt}", t.problem.task, t.problem.level, t.before, cell))
    return LabelSet((thoughts[0].plan,), tuple(found), {})


def above(heads: MetacogHeads) -> Callable[[Any, Sequence[Thought]], Stops]:
    """A policy: close at the first boundary whose logit reaches the setting (None: never)."""
    known: list[tuple[Sequence[Thought], list[list[tuple[int, float]]]]] = []  # read once per list of thoughts

    def apply(setting: Any, thoughts: Sequence[Thought]) -> Stops:
        if setting is None:
            return [None] * len(thoughts)
        if not any(held is thoughts for held, _ in known):
            known.append((thoughts, along(heads, thoughts)))
        said = next(said for held, said in known if held is thoughts)
        return [next((u for u, x in seen if x >= setting), None) for seen in said]

    return apply


def settings(heads: MetacogHeads, held: Sequence[Thought]) -> list[float]:
    """Logits to try: quantiles over the boundaries of `held`."""
    seen = [x for s in along(heads, held) for _, x in s]
    return np.unique(np.quantile(seen, [*np.linspace(0.02, 0.98, 49), 0.99, 0.995, 0.999])).tolist()


def stopping(
    held: Sequence[Thought], thoughts: Sequence[Thought], layer: Sequence[MetacogHeads], probe: Sequence[MetacogHeads]
) -> list[dict[str, Any]]:
    """Rules with settings from `held`; heads one row per seed."""
    answer = each(AnswerProbability, with_answers)
    setting = chosen(answer, ANSWERS, held)
    stops = answer(setting, thoughts)
    found = [
        row("uncapped", None, outcomes(thoughts, [None] * len(thoughts)), thoughts),
        row("answer probability", setting, outcomes(thoughts, stops), thoughts, probes(thoughts, stops)),
    ]
    prices = np.geomspace(1e-5, 3e-2, 30).tolist()
    price = chosen(lambda x, ts: by_table(held, ts, x), prices, held)
    cuts: Stops = [None] * len(thoughts) if price is None else by_table(held, thoughts, price)
    found.append(row("cut per (family, level)", price, outcomes(thoughts, cuts), thoughts))
    for name, group in (("layer: right in the end", layer), ("probe: right if closed here", probe)):
        for seed, heads in enumerate(group):
            policy = above(heads)
            best = chosen(policy, settings(heads, held), held)
            found.append(row(f"{name}, seed {seed}", best, outcomes(thoughts, policy(best, thoughts)), thoughts))
    found.append(row("hindsight: first right boundary", None, outcomes(thoughts, earliest(thoughts)), thoughts))
    return found


def rises(values: dict[str, Floats], right: NDArray[np.bool_]) -> dict[str, float]:
    return {k: metrics.auroc(v, right) for k, v in values.items()}


def running(setup: Setup, *, stream: str, n: int, val_n: int, train_n: int = 1300) -> dict[str, Any]:
    """AUROC along the thought for plans verify and steps; closing early under verify."""
    layer = [fitted(setup, "attention", {}, s, Train(setup)).heads for s in range(setup.seeds)]
    calibration = setup.draw("calibration")
    body: dict[str, Any] = {"stream": stream, "n": n, "val_n": val_n, "train_n": train_n, "plans": {}}
    items = setup.fresh(f"{stream}/test", n)
    for plan in ("verify", "steps"):
        say(f"{n} thoughts, plan {plan}")
        thoughts = [t for t in collect(setup.base, items, plan, states=True) if t.states and t.boundaries]
        thoughts = with_trials(setup.base, thoughts, _everywhere if plan == "verify" else _in_front)
        body["plans"][plan] = aurocs(layer, thoughts, calibration)
        if plan == "verify":
            test = thoughts
    held = collect(setup.base, setup.fresh(f"{stream}/val", val_n, "val"), "verify", states=True)
    held = with_trials(setup.base, held, _everywhere)
    taught = collect(setup.base, setup.fresh(f"{stream}/train", train_n, "train"), "verify", states=True)
    taught = with_trials(setup.base, taught, lambda t: [u for u, _ in t.states])
    labels = probe_labels([t for t in taught if t.states])
    change = {"weights": PROBE, "steps": min(400, setup.config.heads.steps)}
    probe = [fitted(setup, "probe-verify", change, s, lambda: labels).heads for s in range(setup.seeds)]
    now = np.array([t.at(u).correct for t in test for u, _ in t.states if u < t.used])
    body["right_now"] = {
        "layer": over_seeds([metrics.auroc(_flat(along(h, test), test), now) for h in layer]),
        "probe": over_seeds([metrics.auroc(_flat(along(h, test), test), now) for h in probe]),
        "answer probability": metrics.auroc(
            [t.trials[p].logprob for t in test for p in t.boundaries],
            [t.trials[p].correct for t in test for p in t.boundaries],
        ),
    }
    body["stopping"] = stopping(held, test, layer, probe)
    _show(body)
    return plain(body)


def _in_front(t: Thought) -> tuple[int, ...]:
    return t.nodes


def _everywhere(t: Thought) -> list[int]:
    """Places of trial answers: in front of every boundary and where its state is read, and at fixed cuts."""
    return [*t.nodes, *(u for u, _ in t.states), *CUTS]


def _flat(seen: list[list[tuple[int, float]]], thoughts: Sequence[Thought]) -> list[float]:
    """Logits at the boundaries where there is something left to save."""
    return [x for s, t in zip(seen, thoughts, strict=True) for u, x in s if u < t.used]


def aurocs(layer: Sequence[MetacogHeads], thoughts: Sequence[Thought], calibration: LabelSet) -> dict[str, Any]:
    """AUROC of being right in the end, along the thought: heads over seeds, trial answers, the look-up table."""
    right = np.array([t.own.correct for t in thoughts])
    plan = thoughts[0].plan
    seen = [rising(h, thoughts) for h in layer]
    rows = [rises(s, right) for s in seen]
    family, level = [p.family for p in calibration.problems], [p.level for p in calibration.problems]
    greedy = [p.strategies[plan].rollouts[0].correct for p in calibration.problems]
    told = look_up(family, level, greedy).predict([(t.problem.task, t.problem.level) for t in thoughts])
    mean = {k: np.mean([s[k] for s in seen], 0) for k in seen[0]}
    gap = metrics.bootstrap(
        lambda late, early, y: metrics.auroc(late, y) - metrics.auroc(early, y), mean["100%"], mean["25%"], right
    )
    return {
        "n": len(thoughts),
        "wrong": int((~right).sum()),
        "layer": {k: over_seeds([r[k] for r in rows]) for k in rows[0]},
        "late_minus_early": over_seeds([r["100%"] - r["25%"] for r in rows]) | {"problems_ci": list(gap)},
        "answer probability": rises(along_answers(thoughts), right),
        "table": metrics.auroc(told, right),
    }


def _show(body: dict[str, Any]) -> None:
    for plan, x in body["plans"].items():
        names = list(x["layer"])
        table(
            f"AUROC of being right in the end, plan {plan}, stream {body['stream']}/test, n = {x['n']} "
            f"({x['wrong']} wrong); look-up {x['table']:.3f}; 100 % − 25 %: {shown(x['late_minus_early'])}, over "
            f"problems {shown(x['late_minus_early']['problems_ci'])}",
            ("score", *names),
            [("layer", *x["layer"].values()), ("trial answer", *(x["answer probability"].get(k, "–") for k in names))],
        )
    table("AUROC of 'closing at this boundary is right', plan verify", ("score", "AUROC"), [
        (k, v) for k, v in body["right_now"].items()
    ])  # fmt: skip
    shown_rules(f"Closing early, plan verify; settings from val, n = {body['val_n']}, ≤ {100 * TOLERANCE} points",
                body["stopping"])  # fmt: skip
