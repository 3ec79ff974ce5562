"""Study c: confidence along the thought, and the learned SlackStop against the scalar rules (rows C8, D2).

Two kinds of confidence at a boundary: "the whole thought will be right" (heads without trial answers) and "closing here
is right" (heads with them), which is what a stopping rule needs. Thresholds are chosen on val, numbers are of test.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study_base import Setup, fitted, over_seeds, plain, say, shown, table
from study_heads import Train
from study_others import others, show_others
from study_slack import (
    ANSWERS,
    NETTED,
    PROBING,
    TOLERANCE,
    chosen,
    each,
    earliest,
    grid,
    lost,
    probes,
    row,
    saved,
    shown_rules,
)
from study_thoughts import Thought, by_table, collect, outcomes, with_answers, with_trials

from gnomon.attempts import Job, run
from gnomon.decoding.slack import AnswerProbability, FixedCut, Margin, Sure, factory
from gnomon.evaluation import metrics
from gnomon.evaluation.scaling import fit_scale
from gnomon.metacognition.calibration import scaled
from gnomon.metacognition.config import BOUNDARY, END, THINK_SITE
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.recipes.metacog import TRIAL_CALIBRATION, calibrate
from gnomon.training.heads_fit import read_greedy, read_trials
from gnomon.training.trials import Trials

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
CUTS = (16, 32, 64, 128)
PLANS = ("verify", "steps")
Floats = NDArray[np.float64]
Stops = list[int | None]
Said = list[list[tuple[int, float]]]


@torch.no_grad()
def confidence(heads: MetacogHeads, states: Sequence[Any], site: int, used: Sequence[int]) -> Floats:
    """Logits [N] of states [L, C] read at one site."""
    found = []
    for start in range(0, len(states), 1024):
        part = torch.from_numpy(np.stack(states[start : start + 1024]))
        tokens = torch.tensor(list(used[start : start + 1024]), dtype=torch.float32)
        found.append(heads(part, torch.full((len(part),), site), tokens).conf_raw.double().numpy())
    return np.concatenate(found)


def along(heads: MetacogHeads, thoughts: Sequence[Thought]) -> Said:
    """Per thought (think tokens, logit) at every boundary state where there is something left to save."""
    flat = [(i, used, state) for i, t in enumerate(thoughts) for used, state in t.states if used < t.used]
    said = confidence(heads, [s for _, _, s in flat], BOUNDARY, [u for _, u, _ in flat])
    found: Said = [[] for _ in thoughts]
    for (i, used, _), logit in zip(flat, said, strict=True):
        found[i].append((used, float(logit)))
    return found


def place(count: int, share: float) -> int:
    """Index of the boundary at this share of a thought that has `count` boundaries; 0: the first."""
    return max(0, math.ceil(share * count) - 1)


def at_places(seen: Said, values: Callable[[int, int], float]) -> dict[str, Floats]:
    """values(thought, index of its boundary) at shares of the boundaries, of thoughts that have some."""
    return {
        "first" if share == 0 else f"{share:.0%}": np.array(
            [values(i, place(len(s), share)) for i, s in enumerate(seen)]
        )
        for share in PLACES
    }


def rises(heads: MetacogHeads, thoughts: Sequence[Thought]) -> dict[str, dict[str, float]]:
    """AUROC at the start, along the boundaries, and at the end: of being right in the end, and of closing there."""
    held = [t for t in thoughts if any(u < t.used for u, _ in t.states)]
    seen, right = along(heads, held), np.array([t.own.correct for t in held])
    said = at_places(seen, lambda i, k: seen[i][k][1])
    here = at_places(seen, lambda i, k: held[i].at(seen[i][k][0]).correct)
    ends = {
        "start": confidence(heads, [t.before for t in held], THINK_SITE, [0] * len(held)),
        **said,
        "end": confidence(heads, [t.end for t in held], END, [t.used for t in held]),
    }
    return {
        "in the end": {k: metrics.auroc(v, right) for k, v in ends.items()},
        "here": {k: metrics.auroc(v, here[k]) for k, v in said.items()},
        "share right here": {k: float(v.mean()) for k, v in here.items()},
    }


def flat(seen: Said) -> Floats:
    return np.array([x for s in seen for _, x in s])


def right_here(thoughts: Sequence[Thought]) -> NDArray[np.bool_]:
    """Whether closing is right at the boundaries of `along`."""
    return np.array([t.at(u).correct for t in thoughts for u, _ in t.states if u < t.used])


Scale = tuple[float, float]
Apply = Callable[[Any, Sequence[Thought]], Stops]


class Layer:
    """Heads with the scales of a card: of confidence at boundaries and, before thinking, of the whole thought."""

    def __init__(self, heads: MetacogHeads, scale: Scale, whole: Scale) -> None:
        self.heads, self.scale, self.whole = heads, scale, whole
        self._known: list[tuple[Sequence[Thought], Said, list[float]]] = []  # read once per list of thoughts

    def read(self, thoughts: Sequence[Thought]) -> tuple[Said, list[float]]:
        """Per thought (think tokens, probability that closing there is right), and the promise before thinking."""
        for held, said, promises in self._known:
            if held is thoughts:
                return said, promises
        seen = along(self.heads, thoughts)
        said = [[(u, float(scaled(np.array([x]), *self.scale)[0])) for u, x in s] for s in seen]
        before = confidence(self.heads, [t.before for t in thoughts], THINK_SITE, [0] * len(thoughts))
        self._known.append((thoughts, said, scaled(before, *self.whole).tolist()))
        return self._known[-1][1:]

    def sure(self, setting: Any, thoughts: Sequence[Thought]) -> Stops:
        """Rule `sure` as a policy; setting: (gap, threshold), None: never."""
        if setting is None:
            return [None] * len(thoughts)
        gap, threshold = setting
        return [
            next((u for u, x in seen if x >= max(threshold, promise - gap)), None)
            for seen, promise in zip(*self.read(thoughts), strict=True)
        ]

    def thresholds(self, held: Sequence[Thought]) -> list[tuple[float, float]]:
        """Settings without a promise: quantiles over the boundaries of `held`."""
        seen = [x for s in self.read(held)[0] for _, x in s]
        quantiles = np.quantile(seen, [*np.linspace(0.02, 0.98, 97), 0.985, 0.99, 0.995, 0.999])
        return [(1.0, x) for x in np.unique(quantiles).tolist()]


GAPS = [(x, 0.0) for x in np.round(np.arange(-0.03, 0.121, 0.0025), 4).tolist()]


def with_confidence(thought: Thought, seen: Sequence[tuple[int, float]], promise: float) -> Any:
    """The views as rule `sure` gets them."""
    said = dict(seen)
    return tuple(
        replace(v, confidence=said[v.used] if not v.begun else math.nan, promise=promise) if v.used in said else v
        for v in thought.views
    )


class Stopping:
    """All rules on the thoughts of one or more plans: settings from `held`, numbers from `thoughts`."""

    def __init__(self, held: Sequence[Thought], thoughts: Sequence[Thought]) -> None:
        self.held, self.thoughts = held, thoughts
        self.rows = [row("uncapped", None, outcomes(thoughts, [None] * len(thoughts)), thoughts)]
        self.stops: dict[str, Stops] = {}
        self.paid: dict[str, bool] = {}  # whether it makes trial answers

    def add(self, name: str, apply: Callable[[Any, Sequence[Thought]], Stops], options: Sequence[Any]) -> Stops:
        """One rule: the setting that saves most on `held` within the tolerance (off where none saves anything)."""
        setting = chosen(apply, options, self.held, probes if name == NETTED else None)
        stops = self.stops[name] = apply(setting, self.thoughts)
        self.paid[name] = name in PROBING and setting is not None
        cost = probes(self.thoughts, stops) if self.paid[name] else 0
        self.rows.append(row(name, setting, outcomes(self.thoughts, stops), self.thoughts, cost))
        return stops

    def scalars(self) -> None:
        """The rules that need no training."""
        held, thoughts = self.held, self.thoughts
        self.add("margin of the end tag", each(Margin, lambda t: t.views), grid(held, "end"))
        self.add("cut at a number", each(FixedCut, lambda t: t.views), CUTS)
        prices = np.geomspace(1e-5, 3e-2, 30).tolist()
        self.add("cut per (family, level)", lambda price, ts: (
            [None] * len(ts) if price is None else by_table(held, ts, price, CUTS)
        ), prices)  # fmt: skip
        for name in PROBING:
            self.add(name, each(AnswerProbability, with_answers), ANSWERS)
        stops = earliest(thoughts)
        self.rows.append(row("hindsight: first right boundary", None, outcomes(thoughts, stops), thoughts))

    def against(self, mine: Stops, theirs: str) -> dict[str, Any]:
        """Paired bootstrap of mine − theirs: share of think tokens saved, also net of probes, and accuracy."""
        thoughts, other = self.thoughts, self.stops[theirs]
        full = np.array([t.used for t in thoughts], dtype=float)
        a, b = outcomes(thoughts, mine), outcomes(thoughts, other)
        paid = np.array([probes([t], [s]) for t, s in zip(thoughts, other, strict=True)], dtype=float)
        paid *= self.paid[theirs]

        def gap(x: Floats, y: Floats, f: Floats) -> float:
            return float((y.sum() - x.sum()) / f.sum())

        def shares(y: Floats) -> list[float]:
            return [gap(a.used, y, full), *metrics.bootstrap(gap, a.used, y, full)]

        loss, ci = metrics.paired_difference(a.correct, b.correct)
        return {"saved": shares(b.used), "saved_net": shares(b.used + paid), "accuracy": [loss, *ci]}


def frontier(
    apply: Callable[[Any, Sequence[Thought]], Stops], options: Sequence[Any], thoughts: Sequence[Thought]
) -> list[dict[str, float]]:
    """Points lost and share saved at every tenth option: what another choice of the threshold would give."""
    found = []
    for option in list(options)[:: max(1, len(options) // 20)]:
        o = outcomes(thoughts, apply(option, thoughts))
        found.append({"setting": option, "lost": lost(o, thoughts), "saved": saved(o, thoughts)})
    return found


def kept(setup: Setup, stream: str, n: int, split: str, plan: str) -> list[Thought]:
    """Thoughts with answers in front of every boundary, where its state is read, and at fixed cuts; from the cache."""
    path: Path = setup.cache / "thoughts" / f"{stream.replace('/', '-')}-{n}-{plan}-{setup.base.base[:12]}.pkl"
    if path.is_file():
        found: list[Thought] = pickle.loads(path.read_bytes())  # our own file
        return found
    say(f"{n} thoughts of {stream}, plan {plan}")
    found = []
    items = setup.fresh(stream, n, split)
    for start in range(0, n, 500):
        part = collect(setup.base, items[start : start + 500], plan, states=True)
        found += with_trials(setup.base, part, lambda t: [*t.boundaries, *(u for u, _ in t.states), *CUTS])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(found))
    return found


class Once:
    """Trial answers of a split, made or loaded when they are first needed."""

    def __init__(self, setup: Setup, split: str, n: int) -> None:
        self._make, self._found = lambda: setup.trials(split, n), None

    def __call__(self) -> Trials:
        if self._found is None:
            self._found = self._make()
        return self._found


def layers(setup: Setup, held: Trials, group: Sequence[MetacogHeads]) -> list[Layer]:
    """Scaled on calibration: boundaries by their trial answers, promises by the greedy outcomes of thinking plans."""
    labels, found = setup.draw("calibration"), []
    for heads in group:
        r = read_greedy(heads, labels)
        at = [r["plans"].index(held.plans[k]) for k in np.unique(held.plan)]
        whole = fit_scale(r["conf_before"][:, at].ravel(), r["correct"][:, at].ravel())
        found.append(Layer(heads, fit_scale(read_trials(heads, held), held.right), whole))
    return found


def running(setup: Setup, *, stream: str, n: int, val_n: int, trial_n: int) -> dict[str, Any]:
    """AUROC along the thought and closing early under verify and steps; the other heads; the whole system served."""
    train, seeds = Train(setup), range(setup.seeds)
    taught = Once(setup, "train", trial_n)
    groups = {
        "right in the end": [fitted(setup, "attention", {}, s, train).heads for s in seeds],
        "right here": [fitted(setup, f"closing-{trial_n}", {}, s, train, taught).heads for s in seeds],
    }
    held = setup.trials("calibration", min(setup.config.calibration_n, TRIAL_CALIBRATION))
    found = {name: layers(setup, held, hs) for name, hs in groups.items()}
    val = {plan: kept(setup, f"{stream}/val", val_n, "val", plan) for plan in PLANS}
    test = {plan: kept(setup, f"{stream}/test", n, "test", plan) for plan in PLANS}
    body: dict[str, Any] = {
        "stream": stream, "n": n, "val_n": val_n, "trial_n": trial_n, "heads": others(setup, groups),
        "labels_n": setup.config.val_n, "plans": {},
    }  # fmt: skip
    for plan in (*PLANS, "both"):
        mine = PLANS if plan == "both" else (plan,)
        body["plans"][plan] = study(found, [t for p in mine for t in val[p]], [t for p in mine for t in test[p]])
        _show(body, plan)
    gaps = [
        r["setting"][0] for r in body["plans"]["both"]["stopping"] if r["rule"].startswith("sure, ") and r["setting"]
    ]
    body["served"] = served(setup, groups["right here"][0], float(np.median(gaps)), setup.fresh(f"{stream}/test", n))
    _show_served(body)
    return plain(body)


def study(groups: dict[str, list[Layer]], held: Sequence[Thought], test: Sequence[Thought]) -> dict[str, Any]:
    """AUROCs and rules on one set of thoughts."""
    now, found = right_here(test), {}
    for name, group in groups.items():
        seen = [rises(x.heads, test) for x in group]
        probs = [[p for s in x.read(test)[0] for _, p in s] for x in group]
        found[name] = {
            "auroc": over_seeds([metrics.auroc(p, now) for p in probs]),
            "ece": over_seeds([metrics.ece(p, now) for p in probs]),
            **{k: {p: over_seeds([s[k][p] for s in seen]) for p in seen[0][k]} for k in ("in the end", "here")},
            "share right here": seen[0]["share right here"],
        }
    rules = Stopping(held, test)
    rules.scalars()
    gaps: dict[str, list[Any]] = {}
    curves = []
    for name, group in groups.items():
        for seed, layer in enumerate(group):
            rules.add(f"threshold, {name}, seed {seed}", layer.sure, layer.thresholds(held))
    for seed, layer in enumerate(groups["right here"]):
        stops = rules.add(f"sure, gap to the promise, seed {seed}", layer.sure, GAPS)
        for rival in (*PROBING, "cut per (family, level)", f"threshold, right here, seed {seed}"):
            gaps.setdefault(rival.partition(", seed")[0], []).append(rules.against(stops, rival))
        curves.append(frontier(layer.sure, GAPS, test))
    answers = [(t.trials[p].logprob, t.trials[p].correct) for t in test for p in t.boundaries]
    return {
        "n": len(test), "boundaries": len(now), "right_now": float(now.mean()), "layers": found,
        "answer_auroc": metrics.auroc([a for a, _ in answers], [c for _, c in answers]),
        "stopping": rules.rows, "against": gaps, "frontier": curves,
    }  # fmt: skip


def served(setup: Setup, heads: MetacogHeads, gap: float, items: Sequence[Any]) -> dict[str, Any]:
    """The engine itself with a card: own plan and budget, and two plans without a budget, with the rule and without."""
    base, config = setup.base, setup.config
    assert base.decider is not None and base.decider.card is not None
    labels, old = setup.draw("calibration"), base.decider.card
    bare = replace(base, decider=Decider(heads))
    card, _ = calibrate(
        bare, heads, labels, setup.items("calibration"), old.cost_order, config, dict(base.best_plan),
        setup.cache / "labels",
    )  # fmt: skip
    found: dict[str, Any] = {"gap": gap, "rows": []}
    for plan, budget in (("predicted", "predicted"), ("verify", None), ("steps", None)):
        jobs = [Job(p, plan, budget, use_prediction=plan == "predicted", seed="studies") for p in items]
        a, b = (
            [g[0] for g in run(replace(base, decider=Decider(heads, card), rules=rules), jobs)]
            for rules in (None, factory(Sure(gap)))
        )
        used = [np.array([x.trace.used for x in found], dtype=float) for found in (a, b)]
        loss, ci = metrics.paired_difference([x.correct for x in a], [x.correct for x in b])
        found["rows"].append({
            "plan": plan, "accuracy": float(np.mean([x.correct for x in a])), "tokens": float(used[0].mean()),
            "loss": loss, "loss_ci": list(ci), "saved": 1.0 - used[1].sum() / max(1.0, used[0].sum()),
            "saved_ci": list(metrics.bootstrap(lambda x, y: 1.0 - y.sum() / x.sum(), *used)),
            "fired": float(np.mean([x.trace.stop == "confidence" for x in b])),
            "reads": float(np.mean([len(x.trace.running) for x in b])),
            "over": sum(x.trace.overshoot > 0 for x in b),
        })  # fmt: skip
    return found


def _show(body: dict[str, Any], plan: str) -> None:
    x = body["plans"][plan]
    names = list(x["layers"])
    for what in ("in the end", "here"):
        places = list(x["layers"][names[0]][what])
        table(
            f"AUROC of being right {what}, plan {plan}, stream {body['stream']}/test, n = {x['n']}",
            ("layer", *places),
            [(name, *x["layers"][name][what].values()) for name in names]
            + ([("share right here", *x["layers"][names[0]]["share right here"].values())] if what == "here" else []),
        )
    table(
        f"'Closing at this boundary is right', plan {plan}, {x['boundaries']} boundaries, {x['right_now']:.3f} right",
        ("score", "AUROC", "ECE"),
        [*((name, x["layers"][name]["auroc"], x["layers"][name]["ece"]) for name in names),
         ("answer probability", x["answer_auroc"], "–")],
    )  # fmt: skip
    shown_rules(f"Closing early, plan {plan}; settings from val, n = {body['val_n']}, ≤ {100 * TOLERANCE} points",
                x["stopping"])  # fmt: skip
    table(
        f"Rule sure (gap) − rival, plan {plan}, paired bootstrap over problems, per seed",
        ("rival", "seed", "saved, points of %", "net of probes", "accuracy, points"),
        [(rival, s, *(shown([100 * v for v in g[k]], 2) for k in ("saved", "saved_net", "accuracy")))
         for rival, gs in x["against"].items() for s, g in enumerate(gs)],
    )  # fmt: skip


def _show_served(body: dict[str, Any]) -> None:
    show_others(body["heads"], body["labels_n"])
    table(
        f"Served with rule sure, gap {body['served']['gap']:.4f}, seed 0, stream {body['stream']}/test",
        ("plan", "accuracy without", "tokens without", "points lost", "saved", "closed early", "reads a problem"),
        [(r["plan"], r["accuracy"], r["tokens"], f"{100 * r['loss']:.2f} {shown([100 * v for v in r['loss_ci']], 2)}",
          f"{100 * r['saved']:.1f} % {shown([100 * v for v in r['saved_ci']], 1)}", r["fired"], r["reads"])
         for r in body["served"]["rows"]],
    )  # fmt: skip
