"""Phases B and C of metacognitive training, behind the heads of phase A (rows R2, T1, T3).

A round: rollouts through the serving engine under the predicted plan, the shortest right ones to learn from; fresh
labels, by the model as it now is (stale ones are the classic mistake); steps on both. Phase B leaves the
base frozen, phase C unfreezes what its `adapt` names and runs a share of the rollouts under the predicted budget.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from gnomon.attempts import Attempt, Job, run
from gnomon.base.seeds import fraction, seed_torch
from gnomon.base.telemetry import Progress
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.steerer import SteerConfig, Steerer
from gnomon.model.lm import LM
from gnomon.model.load import rebuilt
from gnomon.model.overlay import Overlay
from gnomon.reasoner import Reasoner
from gnomon.recipes import draws
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import problems
from gnomon.training.adapt import Adapted, adapt
from gnomon.training.head_rows import whole
from gnomon.training.labels import LabelSet
from gnomon.training.objectives import LossWeights
from gnomon.training.phase_fit import PhaseConfig, fit_phase
from gnomon.training.rollout import TEMPERATURE
from gnomon.training.thoughts import beside, collate, guided, thought_of


@dataclass(frozen=True)
class Draw:
    """Where problems come from: tasks, levels and the name of the run's train stream.

    cache: folder where rollouts and labels are kept by hash, None = nowhere.
    """

    tasks: str
    levels: tuple[int, ...]
    stream: str
    strategies: tuple[str, ...] | None
    cap: int | None
    max_batch: int
    seed: int
    cache: Path | None = None


def run_phase(
    reasoner: Reasoner,
    config: PhaseConfig,
    draw: Draw,
    letter: str,
    head_weights: LossWeights,
    report: Callable[[dict[str, Any]], None],
) -> Reasoner:
    """All rounds of one phase; the reasoner with its new layer. Its card is the old one and has to be fitted again.

    report: gets one dictionary per round, and one per step with `step` in it. Heads and steerer are changed in place,
    and in phase C the base's module, as `config.adapt` says.
    """
    assert reasoner.decider is not None, "phases follow the heads"
    heads = reasoner.decider.heads
    steerer = reasoner.decider.steerer
    assert steerer is not None, "the caller adds one with `with_steerer`"
    module: Any = reasoner.backbone.module  # type: ignore[attr-defined]
    adapted, earlier = adapt(module, config.adapt), reasoner.overlay
    try:
        for number in range(config.rounds):
            name = f"{draw.stream}/{letter}{number}"
            lessons = learnable(reasoner, config, draw, name)
            labels = refreshed(reasoner, config, draw, name)
            rows = whole(labels, str(reasoner.backbone.device))
            thoughts = [*lessons.thoughts, *(lessons.cut if config.weights.forced_close > 0 else ())]
            seen = round_row(lessons.report)
            with Progress(f"phase {letter}, round {number + 1}", config.steps) as bar:
                told = fit_phase(
                    LM(module), heads, steerer, adapted, thoughts, rows, config, head_weights,
                    pad=reasoner.codec.layout.pad, name=f"{name}/{draw.seed}",
                    on_step=lambda step, row, bar=bar, seen=seen: _tick(bar, step, row | seen, report),  # type: ignore[misc]
                )  # fmt: skip
            reasoner = _served(reasoner, adapted, steerer)
            made = {"phase": letter, "round": number, "thoughts": len(thoughts), **lessons.report}
            report({**made, "fit": told, "labels": labels.summary()})
    finally:
        adapted.restore()
    return _settled(reasoner, earlier)


def check(reasoner: Reasoner, steer: SteerConfig, configs: Sequence[PhaseConfig]) -> None:
    """Refuse what cannot run before anything is labelled: blocks that are not there, modes that train nothing."""
    steer.resolved(reasoner.backbone.n_layers)
    for config in configs:
        adapt(reasoner.backbone.module, config.adapt).restore()  # type: ignore[attr-defined]


def with_steerer(reasoner: Reasoner, config: SteerConfig, seed: int) -> Reasoner:
    """A fresh gate and fresh adapters over copies of the heads: the identity until they are trained."""
    assert reasoner.decider is not None
    heads = type(reasoner.decider.heads)(reasoner.decider.heads.config)
    heads.load_state_dict(reasoner.decider.heads.state_dict())
    seed_torch("steerer", seed)
    return replace(reasoner, decider=Decider(heads, reasoner.decider.card, Steerer(config, heads.config)))


def collect(reasoner: Reasoner, config: PhaseConfig, draw: Draw, name: str) -> list[list[Attempt]]:
    """Rollouts of one round, by problem, through the serving engine: a greedy one and `samples` others."""
    items = problems(draw.tasks, "train", name, config.problems, draw.levels)
    jobs = []
    for item in items:
        capped = fraction("capped", name, item.prompt) < config.capped
        budget: int | Literal["predicted"] | None = "predicted" if capped else draw.cap
        job = Job(item, "predicted", budget, use_prediction=capped, seed=name)
        jobs.append(job)
        if config.samples:
            jobs.append(replace(job, temperature=TEMPERATURE, samples=config.samples))
    each = 2 if config.samples else 1
    with Progress(f"rollouts ({name.rpartition('/')[2]})", len(items) * (1 + config.samples)) as bar:
        found = run(reasoner, jobs, max_batch=draw.max_batch, on_done=bar.advance)
    return [[a for group in found[i : i + each] for a in group] for i in range(0, len(found), each)]


def learnable(reasoner: Reasoner, config: PhaseConfig, draw: Draw, name: str) -> draws.Lessons:
    """The thoughts of one round to learn from, from the cache when this model has made them before."""
    decider, layout = reasoner.decider, reasoner.codec.layout
    assert decider is not None, "phases follow the heads"

    def made() -> draws.Lessons:
        found = collect(reasoner, config, draw, name)
        cut = [a for group in found for a in group if a.correct and a.trace.stop == "hard"]
        right, late = (
            [thought_of(a.trace, layout, decider.plans) for a in part] for part in (shortest_right(found), cut)
        )
        return draws.Lessons(tuple(right), tuple(late), think_report(found))

    facts = {
        **draws.predicting(reasoner), "rollouts": name, "tasks": draw.tasks, "levels": draw.levels, "cap": draw.cap,
        "n": config.problems, "samples": config.samples, "capped": config.capped, "version": 2,
    }  # fmt: skip
    return draws.lessons(made, facts, draw.cache)


def shortest_right(found: Sequence[Sequence[Attempt]]) -> list[Attempt]:
    """Of every problem that was solved, the right rollout with the fewest think tokens that closed by itself."""
    right = [[a for a in group if a.correct and a.trace.closed_naturally] for group in found]
    return [min(group, key=lambda a: (a.trace.used, a.trace.sample)) for group in right if group]


def refreshed(reasoner: Reasoner, config: PhaseConfig, draw: Draw, name: str) -> LabelSet:
    """Labels of all strategies by the model as it now is, on problems of this round's own."""
    names = draw.strategies or reasoner.codec.strategies
    stream = f"{name}/labels"
    facts = {
        **draws.acting(reasoner), "stream": stream, "tasks": draw.tasks, "levels": draw.levels, "n": config.label_n,
        "samples": config.samples, "cap": draw.cap, "strategies": names, "version": 2,
    }  # fmt: skip
    return draws.labelled(
        reasoner, lambda: problems(draw.tasks, "train", stream, config.label_n, draw.levels),
        f"labels ({name.rpartition('/')[2]})", strategies=names, samples=config.samples, cap=draw.cap,
        max_batch=draw.max_batch, seed=stream, n=config.label_n, facts=facts, cache=draw.cache,
    )  # fmt: skip


def think_report(found: Sequence[Sequence[Attempt]]) -> dict[str, Any]:
    """Shares of rollouts: right, valid, empty and truncated thoughts, thinking by level, and what the budget says.

    censored: cut by a cap; predicted_mean: think tokens predicted (a fall over the rounds is the collapse to look for);
    plans: share of each plan.
    """
    every = [a for group in found for a in group]
    n = len(every)
    thinks = [a.trace.used > 0 for a in every]
    by_level: dict[int, list[bool]] = {}
    for a, thought in zip(every, thinks, strict=True):
        by_level.setdefault(a.problem.level, []).append(thought)
    said = [a.trace.budget_predicted for a in every if a.trace.budget_predicted is not None]
    return {
        "correct": sum(a.correct for a in every) / n,
        "valid": sum(t and a.trace.closed_naturally for a, t in zip(every, thinks, strict=True)) / n,
        "empty": sum(not t for t in thinks) / n,
        "truncated": sum(not a.trace.closed_naturally for a in every) / n,
        "missing": sum(not a.trace.answered for a in every) / n,
        "censored": sum(a.trace.stop in ("hard", "limit") for a in every) / n,
        "think_tokens_mean": sum(a.trace.used for a in every) / n,
        "predicted_mean": sum(said) / len(said) if said else None,
        "think_rate_by_level": {level: sum(v) / len(v) for level, v in sorted(by_level.items())},
        "plans": {plan: count / n for plan, count in sorted(Counter(a.trace.plan for a in every).items())},
    }


def round_row(told: Mapping[str, Any]) -> dict[str, float]:
    """`think_report` for the metrics of every step that learns from these rollouts (row T3)."""
    shares = ("correct", "valid", "empty", "truncated", "missing", "censored")
    levels: Mapping[Any, float] = told["think_rate_by_level"]
    said = told["predicted_mean"]
    return {
        "budget/used": told["think_tokens_mean"],
        **({} if said is None else {"budget/predicted": said}),
        "mode/think": 1.0 - told["empty"],
        **{f"mode/think/level_{level}": rate for level, rate in levels.items()},
        **{f"plan/{plan}": share for plan, share in told["plans"].items()},
        **{f"rollouts/{name}": told[name] for name in shares},
    }


def heat_map(reasoner: Reasoner, problem: Problem) -> dict[str, Any]:
    """Gates of the side adapters over one greedy thought under `steps`, for the report; empty without adapters.

    tokens [T] texts, blocks [A], gates [A][T], reach: root mean square distance of the gate factors from 1.
    """
    decider = reasoner.decider
    if decider is None or decider.steerer is None or decider.steerer.adapters is None:
        return {}
    plan = "steps" if "steps" in decider.plans else decider.plans[-1]
    trace = run(reasoner, [Job(problem, plan, 64, use_prediction=False)])[0][0].trace
    thought = thought_of(trace, reasoner.codec.layout, decider.plans)
    if not any(thought.inside):
        return {}
    lm = LM(reasoner.backbone.module)  # type: ignore[attr-defined]
    with torch.no_grad(), beside(lm, decider.heads, decider.steerer):
        out = guided(lm, decider.heads, decider.steerer, collate([thought], reasoner.codec.layout.pad, lm.device))
    seen, codec = out.steer.seen, reasoner.codec
    inside = [token for token, acts in zip(thought.ids, thought.inside, strict=True) if acts]
    return {
        "tokens": [codec.decode([token]) or "·" for token in inside],
        "blocks": list(seen),
        "gates": [gate.tolist() for _, gate in seen.values()],
        "reach": float((out.vectors - 1.0).square().mean().sqrt()),
    }


def _served(reasoner: Reasoner, adapted: Adapted, steerer: Steerer) -> Reasoner:
    """The reasoner that serves with what was just learned: fresh copies in compiled code, and what the base changed."""
    assert reasoner.decider is not None
    decider = Decider(reasoner.decider.heads, reasoner.decider.card, steerer)
    state = adapted.trained_state()
    if not state:
        return replace(reasoner, decider=decider)
    lora = adapted.config.lora
    scale = lora.alpha / lora.rank if adapted.lora else 1.0
    with adapted.merged(), torch.no_grad():
        backbone = rebuilt(reasoner.backbone)
    return replace(reasoner, backbone=backbone, decider=decider, overlay=Overlay(state, scale))


def _settled(reasoner: Reasoner, earlier: Overlay | None) -> Reasoner:
    """Behind a phase: LoRA goes into the module itself, which serves where nothing is compiled, and the overlay holds
    what an `earlier` phase changed too."""
    made = reasoner.overlay
    if made is None or made is earlier:
        return reasoner
    module: Any = reasoner.backbone.module  # type: ignore[attr-defined]
    if not made.targets <= made.tensors.keys():
        made.apply(module)
        reasoner = replace(reasoner, backbone=rebuilt(reasoner.backbone))
    if earlier is not None:
        own = dict(module.named_parameters())
        made = Overlay({name: own[name].detach().clone() for name in sorted(made.targets | earlier.targets)})
    return replace(reasoner, overlay=made)


def _tick(bar: Progress, step: int, row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    bar.advance(1, f"loss {row['loss']:.3f}")
    report({"step": step, **row})
