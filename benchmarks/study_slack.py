"""Study a: closing thoughts early without training, on plans of nano and on SmolLM2 (rows D2, D9).

Every rule is replayed on recorded uncapped thoughts; what it would have answered was decoded at each place. Settings
are chosen on val: the most tokens saved with at most TOLERANCE lost there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from study_base import Setup, plain, say, shown, table
from study_thoughts import (
    CUTS,
    Outcomes,
    Thought,
    Views,
    by_table,
    capped,
    collect,
    margins,
    outcomes,
    where,
    with_answers,
    with_message,
    with_trials,
)

from gnomon.decoding.slack import AnswerProbability, FixedCut, Margin, RuleConfig, SlackStop
from gnomon.evaluation import metrics
from gnomon.reasoner import Reasoner

TOLERANCE = 0.005
GOAL = 0.30
CAPS = CUTS[1:]
ANSWERS = tuple(  # as many to choose from as other rules have: 61 odds from 1 to 100,000, evenly in their logarithm
    1.0 / (1.0 + 10.0**-x) for x in np.linspace(0.0, 5.0, 61).tolist()
)
Stops = list[int | None]
Apply = Callable[[Any, Sequence[Thought]], Stops]
Cost = Callable[[Sequence[Thought], Stops], int]
PROBING = ("answer probability", "answer probability, chosen net of probes")
NETTED = PROBING[1]


def saved(o: Outcomes, thoughts: Sequence[Thought]) -> float:
    """Share of the uncapped think tokens that a policy leaves out."""
    return 1.0 - float(o.used.sum()) / max(1, sum(t.used for t in thoughts))


def lost(o: Outcomes, thoughts: Sequence[Thought]) -> float:
    return float(np.mean([t.own.correct for t in thoughts])) - float(o.correct.mean())


def chosen(apply: Apply, settings: Sequence[Any], held: Sequence[Thought], cost: Cost | None = None) -> Any:
    """The setting that saves most on `held` within the tolerance; None (never close) where none saves anything.

    cost: tokens that it spends on its way, taken off; off spends none.
    """
    best, most = None, 0.0
    total = max(1, sum(t.used for t in held))
    for setting in settings:
        stops = apply(setting, held)
        o = outcomes(held, stops)
        gain = saved(o, held) - (0 if cost is None else cost(held, stops)) / total
        if lost(o, held) <= TOLERANCE + 1e-12 and gain > most:
            best, most = setting, gain
    return best


def row(name: str, setting: Any, o: Outcomes, thoughts: Sequence[Thought], extra: int = 0) -> dict[str, Any]:
    """One policy on `thoughts`, paired with the uncapped thoughts. extra: probe tokens that it cost."""
    own = np.array([t.own.correct for t in thoughts])
    loss, ci = metrics.paired_difference(own, o.correct)
    full = np.array([t.used for t in thoughts], dtype=float)
    share = metrics.bootstrap(lambda u, f: 1.0 - u.sum() / f.sum(), o.used, full)
    return {
        "rule": name, "setting": setting, "n": len(thoughts), "accuracy": float(o.correct.mean()), "loss": loss,
        "loss_ci": list(ci), "tokens": float(o.used.mean()), "saved": saved(o, thoughts), "saved_ci": list(share),
        "fired": float(o.fired.mean()), "probe_tokens": extra / len(thoughts),
        "net_tokens": float(np.mean(full) - o.used.mean()) - extra / len(thoughts),
        "goal": saved(o, thoughts) >= GOAL and loss <= TOLERANCE,
    }  # fmt: skip


def each(make: Callable[[float], RuleConfig], views: Callable[[Thought], Views]) -> Apply:
    """A family of rules with one number as a policy."""
    return lambda setting, thoughts: [where(make(setting) if setting is not None else None, views(t)) for t in thoughts]


def grid(held: Sequence[Thought], kind: str) -> list[float]:
    """Margins to try: quantiles of those at boundaries of `held`."""
    seen = [v.margin for t in held for v in margins(t, kind) if v.boundary and v.used < t.used and not v.begun]
    return sorted({0.0, 1.0, *np.quantile(seen, np.linspace(0.002, 0.6, 60)).tolist()}) if seen else [0.0]


def rules(held: Sequence[Thought]) -> dict[str, tuple[Apply, Sequence[Any]]]:
    """Name -> (policy, settings to choose from)."""
    found: dict[str, tuple[Apply, Sequence[Any]]] = {"margin of the end tag": (
        each(Margin, lambda t: t.views), grid(held, "end")
    )}  # fmt: skip
    if held[0].closing:
        for kind in ("answer node", "unchecked"):
            name = {"answer node": "margin of the answer node", "unchecked": "the same, monitors aside"}[kind]
            found[name] = each(Margin, lambda t, k=kind: margins(t, k)), grid(held, kind)
    for name in PROBING:
        found[name] = each(AnswerProbability, with_answers), ANSWERS
    found["cut at a number"] = each(FixedCut, lambda t: t.views), CUTS
    found["cut per (family, level)"] = lambda price, ts: (
        [None] * len(ts) if price is None else by_table(held, ts, price)
    ), np.geomspace(1e-5, 3e-2, 30).tolist()  # fmt: skip
    return found


def probes(thoughts: Sequence[Thought], stops: Stops) -> int:
    """Tokens of the trial answers that answer probability makes on its way: one at each boundary in front of its close.

    The probe at the close itself is the answer that is given, and a thought's own end is no boundary: neither is extra.
    """
    return sum(
        t.trials[p].tokens + 1 for t, stop in zip(thoughts, stops, strict=True) for p in t.boundaries
        if stop is None or p < stop
    )  # fmt: skip


def earliest(thoughts: Sequence[Thought]) -> Stops:
    """Hindsight: the first boundary with the right answer, where the whole thought is right."""
    return [next((p for p in t.boundaries if t.trials[p].correct), None) if t.own.correct else None for t in thoughts]


def compare(held: Sequence[Thought], thoughts: Sequence[Thought]) -> list[dict[str, Any]]:
    """All rules, settings from `held`, numbers from `thoughts`."""
    own = outcomes(thoughts, [None] * len(thoughts))
    found = [row("uncapped", None, own, thoughts)]
    for name, (apply, settings) in rules(held).items():
        paid = probes if name in PROBING else None
        setting = chosen(apply, settings, held, probes if name == NETTED else None)
        stops = apply(setting, thoughts)
        extra = 0 if paid is None or setting is None else paid(thoughts, stops)
        found.append(row(name, setting, outcomes(thoughts, stops), thoughts, extra))
    found.append(row("hindsight: first right boundary", None, outcomes(thoughts, earliest(thoughts)), thoughts))
    return found


def boundary_kinds(thoughts: Sequence[Thought]) -> list[dict[str, Any]]:
    """What stands at boundaries, by the node that follows: is the answer there, and does a margin say so (AUROC)?"""
    rows = [(t.kinds[p] if t.kinds else "", p, t) for t in thoughts for p in t.nodes]
    found = []
    for kind in ("all", *sorted({k for k, _, _ in rows if k})):
        part = [(p, t) for k, p, t in rows if kind in ("all", k)]
        right = np.array([t.trials[p].correct for p, t in part])
        views = [{v.used: v for v in t.views if not v.begun} for _, t in part]
        scores = {
            "margin of the end tag": [-v[p].margin for v, (p, _) in zip(views, part, strict=True)],
            "answer probability": [t.trials[p].logprob for p, t in part],
        }
        if part[0][1].closing:
            scores["margin of the answer node"] = [-t.closing[p] for p, t in part]
            scores["the same, monitors aside"] = [-max(0.0, t.unchecked[p]) for p, t in part]
        ends = np.quantile(-np.array(scores["margin of the end tag"]), [0.0, 0.01, 0.5])
        found.append({
            "before": kind, "n": len(part), "right_now": float(right.mean()), "end_margin_min_1%_median": ends.tolist(),
            **{f"auroc: {k}": metrics.auroc(v, right) for k, v in scores.items()},
        })  # fmt: skip
    return found


def under_caps(
    held: Sequence[Thought], thoughts: Sequence[Thought], floor: float, message: Sequence[Thought] | None
) -> list[dict[str, Any]]:
    """Accuracy at every budget, hard cut (with message: `message`, the same thoughts with other trials) and SlackStop.

    Share and strength are chosen on `held`; floor: accuracy without thinking.
    """
    kinds = ("end", "answer node") if thoughts[0].closing else ("end",)
    options = [(k, s, x) for k in kinds for s in (0.25, 0.5) for x in (8.0, 16.0, 24.0, 32.0, 40.0, 48.0)]

    def stops(option: Any, cap: int, ts: Sequence[Thought]) -> Stops:
        if option is None:
            return [cap] * len(ts)
        kind, share, strength = option
        rule = SlackStop(share, strength)
        return [cap if (p := where(rule, capped(margins(t, kind), cap))) is None else p for t in ts]

    def mean(option: Any) -> float:
        return float(np.mean([outcomes(held, stops(option, cap, held)).correct.mean() for cap in CAPS]))

    best = max(options, key=mean)
    found = []
    for name, option in (
        ("hard cut", None), *([("hard cut with message", None)] if message is not None else []),
        ("slack, defaults", ("end", 0.25, 8.0)), ("slack, chosen on val", best),
    ):  # fmt: skip
        for cap in CAPS:
            these = message if message is not None and name == "hard cut with message" else thoughts
            o = outcomes(these, stops(option, cap, these))
            found.append({
                "rule": name, "setting": option, "budget": cap, "accuracy": float(o.correct.mean()),
                "tokens": float(o.used.mean()), "valley": float(o.correct.mean()) < floor - 0.005,
            })  # fmt: skip
    return found


def thoughts_of(reasoner: Reasoner, items: Sequence[Any], plan: str, cuts: bool) -> list[Thought]:
    """Thoughts with answers at boundaries and, where asked, at fixed numbers of tokens."""
    say(f"{len(items)} thoughts, plan {plan}")
    found = collect(reasoner, items, plan)
    numbers = CUTS if cuts else ()
    return with_trials(reasoner, found, lambda t: [*t.nodes, *numbers])


def _messages(reasoner: Reasoner, thoughts: Sequence[Thought]) -> list[Thought] | None:
    """The thoughts with trial answers behind a message at fixed cuts; None where the model's cut has one anyway."""
    if not thoughts[0].closing:
        return None
    return with_trials(with_message(reasoner), [replace(t, trials={}) for t in thoughts], lambda t: CUTS)


def shown_rules(title: str, found: Sequence[dict[str, Any]]) -> None:
    columns = (
        "rule",
        "setting (val)",
        "accuracy",
        "points lost",
        "think tokens",
        "saved",
        "closed early",
        "probes",
        "net tokens",
    )
    table(title, columns, [
        (r["rule"], shown(r["setting"]) if r["setting"] is not None else "–", r["accuracy"],
         f"{100 * r['loss']:.2f} {shown([100 * x for x in r['loss_ci']], 2)}", r["tokens"],
         f"{100 * r['saved']:.1f} % {shown([100 * x for x in r['saved_ci']], 1)}", r["fired"], r["probe_tokens"],
         r["net_tokens"])
        for r in found
    ])  # fmt: skip


def shown_kinds(title: str, found: Sequence[dict[str, Any]]) -> None:
    names = [k for k in found[0] if k.startswith("auroc")]
    table(title, ("before", "boundaries", "answer right there", "end margin: min, 1 %, median", *names), [
        (r["before"], r["n"], r["right_now"], shown(r["end_margin_min_1%_median"], 1), *(r[k] for k in names))
        for r in found
    ])  # fmt: skip


def slackstop(
    setup: Setup, *, plans: Sequence[str], stream: str, n: int, val_n: int, cuts: bool = True
) -> dict[str, Any]:
    """The study on one base: per plan all rules, what stands at boundaries, and SlackStop under budgets."""
    base = setup.base
    held, items = setup.fresh(f"{stream}/val", val_n, "val"), setup.fresh(f"{stream}/test", n)
    direct = [t.own.correct for t in collect(base, items, "direct")]
    floor = float(np.mean(direct))
    body: dict[str, Any] = {"stream": stream, "n": n, "val_n": val_n, "no_think": floor, "plans": {}}
    for plan in plans:
        val, test = thoughts_of(base, held, plan, cuts), thoughts_of(base, items, plan, cuts)
        found = {"rules": compare(val, test), "boundaries": boundary_kinds(test)}
        shown_rules(f"{base.name}, plan {plan}, stream {stream}/test, n = {n}; settings from val, n = {val_n}",
                    found["rules"])  # fmt: skip
        shown_kinds(f"{base.name}, plan {plan}: boundaries", found["boundaries"])
        if cuts:
            found["budgets"] = under_caps(val, test, floor, _messages(base, test))
            table(
                f"{base.name}, plan {plan}: budgets; no-think (direct) {floor:.3f}",
                ("rule", "setting", *map(str, CAPS)),
                [
                    (name, shown(part[0]["setting"]), *(f"{r['accuracy']:.3f} at {r['tokens']:.1f}" for r in part))
                    for name in dict.fromkeys(r["rule"] for r in found["budgets"])
                    for part in [[r for r in found["budgets"] if r["rule"] == name]]
                ],
            )
        body["plans"][plan] = found
    return plain(body)
