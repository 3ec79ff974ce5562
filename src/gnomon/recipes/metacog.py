"""Metacognitive training, supervised part: label by sampling, fit heads, calibrate, evaluate, report (row R2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from gnomon.attempts import Job, run
from gnomon.base.config import Config
from gnomon.base.errors import DataError, ModelError
from gnomon.base.runs import Run
from gnomon.base.seeds import derive
from gnomon.base.telemetry import Progress
from gnomon.evaluation import runner
from gnomon.evaluation.baselines import best_strategy
from gnomon.evaluation.calibration_fit import Uncapped, fit_card
from gnomon.evaluation.records import EvalRecord
from gnomon.evaluation.running_fit import Closings
from gnomon.evaluation.sweep import Sweep
from gnomon.metacognition import store
from gnomon.metacognition.calibration import Card
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.policy import GRID
from gnomon.metacognition.steerer import SteerConfig
from gnomon.reasoner import Reasoner, is_own
from gnomon.recipes import draws, metacog_checks, phases
from gnomon.tasks.problem import Problem
from gnomon.tasks.procedural import problems
from gnomon.training.adapt import AdaptConfig
from gnomon.training.head_rows import whole
from gnomon.training.heads_fit import HeadsConfig, fit_heads, gauges, read_greedy, read_trials
from gnomon.training.labels import LabelSet
from gnomon.training.phase_fit import PhaseConfig
from gnomon.training.policy_rates import policy_rates
from gnomon.training.rollout import problem_id
from gnomon.training.trials import Trials


class MetacogRunConfig(Config):
    """One run of `train metacog`. Problems per split; samples: rollouts beside the greedy one, at T = 0.8."""

    base: str = "nano"
    tasks: str = "all"
    label_n: int = Field(default=600, ge=20)
    calibration_n: int = Field(default=400, ge=20)
    val_n: int = Field(default=200, ge=10)
    test_n: int = Field(default=600, ge=10)
    levels: tuple[int, ...] = (1, 2, 3, 4, 5)
    samples: int = Field(default=3, ge=0)
    strategies: tuple[str, ...] | None = None
    max_think: int | None = Field(default=None, description="cap of the labelling rollouts; null = the context")
    stream: str = "metacog"
    seed: int = 0
    max_batch: int = Field(default=64, ge=1)
    device: str = Field(default="cpu", description="where base and training compute: cpu, cuda, or auto")
    with_sweep: bool = True
    plan_tolerance: float = Field(
        default=0.004, ge=0, lt=1, description="accuracy that the choice of plans may give up for cheaper ones"
    )
    clip_tolerance: float = Field(default=0.001, ge=0, lt=1, description="accuracy that the budget clip may give up")
    trial_n: int = Field(
        default=0, ge=0,
        description="train problems with a trial answer at every node boundary, which make the running confidence that "
        "of closing there (rule sure); 0 = none, it is that of the whole thought",
    )  # fmt: skip
    labels: str | None = Field(default=None, description="a folder of labels from an earlier run with this base")
    policy_samples: int = Field(
        default=0, ge=0, description="rollouts per sampler setting for a decoding policy; 0 = none is learned"
    )
    heads: HeadsConfig = HeadsConfig()
    phases: Literal["A", "AB", "ABC"] = Field(
        default="A", description="A: heads; B: gate and adapters too; C: on-policy, with parts of the base"
    )
    steer: SteerConfig = SteerConfig()
    b: PhaseConfig = PhaseConfig()
    c: PhaseConfig = PhaseConfig(rounds=2, capped=0.5, adapt=AdaptConfig(mode="last_k", last_k=1))


TRIAL_CALIBRATION = 1000  # problems whose trial answers scale the confidence at boundaries; two numbers are fitted

# A real pretrained base on a CPU: two strategies, short thoughts, greedy and one sampled rollout. Its wide states make
# a step of the heads dear, and a few hundred problems are soon learned.
FOREIGN_SIZES = {
    "label_n": 300, "calibration_n": 100, "val_n": 50, "test_n": 200, "samples": 1, "max_think": 64,
    "heads.steps": 400, "heads.batch": 96,
}  # fmt: skip


def defaults_for(base: str) -> dict[str, Any]:
    """Field values that suit a base where the user names none."""
    return {} if is_own(base) else dict(FOREIGN_SIZES)


@dataclass(frozen=True)
class Trained:
    """A reasoner with its new layer, and what every stage reported."""

    reasoner: Reasoner
    heads_report: dict[str, Any]
    card_report: dict[str, Any]
    labels: LabelSet


def draw_labels(base: Reasoner, config: MetacogRunConfig, split: str, n: int, samples: int, cache: Path) -> LabelSet:
    """Labels of `n` problems of a split, from the cache when the same labels were made before."""
    strategies = config.strategies or base.codec.strategies
    facts = {
        **draws.acting(base), "tasks": config.tasks, "split": split, "n": n, "samples": samples,
        "levels": config.levels, "stream": config.stream, "cap": config.max_think, "strategies": strategies,
        "version": 2,
    }  # fmt: skip
    return draws.labelled(
        base, lambda: problems(config.tasks, split, config.stream, n, config.levels), f"rollouts ({split})",
        strategies=strategies, samples=samples, cap=config.max_think, max_batch=config.max_batch,
        seed=f"labels/{config.stream}/{split}", n=n, facts=facts, cache=cache,
    )  # fmt: skip


def draw_trials(
    base: Reasoner, config: MetacogRunConfig, split: str, n: int, cache: Path | None, plans: Sequence[str] | None = None
) -> Trials:
    """Trial answers at the boundaries of `n` problems of a split, from the cache when they were made before.

    plans: in place of the strategies of the config.
    """
    strategies = tuple(plans or config.strategies or base.codec.strategies)
    facts = {
        **draws.acting(base), "trials": 1, "tasks": config.tasks, "split": split, "n": n, "levels": config.levels,
        "stream": config.stream, "cap": config.max_think, "strategies": strategies,
    }  # fmt: skip
    return draws.tried(
        base, lambda: problems(config.tasks, split, config.stream, n, config.levels), f"trial answers ({split})",
        strategies=strategies, cap=config.max_think, max_batch=config.max_batch, n=n, facts=facts, cache=cache,
    )  # fmt: skip


def calibrate(
    base: Reasoner,
    heads: MetacogHeads,
    labels: LabelSet,
    items: Sequence[Problem],
    cost_order: Sequence[str],
    config: MetacogRunConfig,
    best_plan: dict[str, str],
    cache: Path | None = None,
) -> tuple[Card, dict[str, Any]]:
    """Fit the card on greedy outcomes of the calibration split; rows that the clip would cut are decoded cut.

    Heads that say whether closing at a boundary is right are calibrated on trial answers, kept in `cache`.
    """
    steerer = None if base.decider is None else base.decider.steerer
    bare = replace(base, decider=Decider(heads, None, steerer))

    def cut(rows: Any, plans: Sequence[str], caps: Any) -> tuple[Any, Any]:
        jobs = [
            Job(items[int(i)], plan, int(cap), use_prediction=False, seed="calibrate")
            for i, plan, cap in zip(rows, plans, caps, strict=True)
        ]
        found = [group[0] for group in run(bare, jobs, max_batch=config.max_batch)]
        after = [a.trace.confidence_after_raw for a in found]
        return np.array([a.correct for a in found]), np.array([0.0 if x is None else x for x in after])

    greedy = read_greedy(heads, labels)
    closings = _closings(bare, heads, config, cache, greedy) if heads.config.closing else None
    return fit_card(
        Uncapped(**greedy),
        cost_order,
        weights=store.fingerprint(heads, steerer),
        dataset=config.tasks,
        stream=config.stream,
        best_plan=best_plan,
        cut=cut,
        tolerance=config.clip_tolerance,
        plan_tolerance=config.plan_tolerance,
        closings=closings,
    )


def _closings(
    base: Reasoner, heads: MetacogHeads, config: MetacogRunConfig, cache: Path | None, greedy: dict[str, Any]
) -> Closings:
    """What the heads say at boundaries of up to `TRIAL_CALIBRATION` calibration problems, beside the trial answers."""
    n = min(config.calibration_n, TRIAL_CALIBRATION)
    found = draw_trials(base, config, "calibration", n, cache, greedy["plans"])
    plans = tuple(name for k, name in enumerate(found.plans) if (found.plan == k).any())
    held = [greedy["plans"].index(name) for name in plans]
    return Closings(
        found.problem, read_trials(heads, found), found.right, plans,
        greedy["conf_before"][:, held].ravel(), greedy["correct"][:, held].ravel(),
    )  # fmt: skip


def recalibrate(reasoner: Reasoner, config: MetacogRunConfig) -> tuple[Card, dict[str, Any]]:
    """A new card for a reasoner that has heads, from `config.calibration_n` problems of the calibration split."""
    assert reasoner.decider is not None, "the caller checks that there is a layer"
    heads, old = reasoner.decider.heads, reasoner.decider.card
    items = problems(config.tasks, "calibration", config.stream, config.calibration_n, config.levels)
    names = config.strategies or heads.config.plans  # a layer may know fewer than its base can write
    labels = draws.labelled(
        reasoner, lambda: items, "rollouts (calibration)", strategies=names, samples=0, cap=config.max_think,
        max_batch=config.max_batch, seed=f"labels/{config.stream}/calibration", n=len(items),
    )  # fmt: skip
    order = old.cost_order if old is not None else labels.cost_order()
    return calibrate(reasoner, heads, labels, items, order, config, dict(reasoner.best_plan))


def train(
    base: Reasoner,
    config: MetacogRunConfig,
    cache: Path,
    on_step: Any = None,
    on_phase: Callable[[dict[str, Any]], None] = lambda _: None,
    keep: Callable[[Reasoner], None] = lambda _: None,
) -> Trained:
    """Label, fit heads, calibrate; then the phases that the config names, and a new card.

    Train, val and calibration problems are disjoint by construction. on_phase: what `phases.run_phase` reports.
    keep: gets the reasoner with the card of phase A before the others begin, so that a later failure costs only itself.
    Raises ModelError for a base that is a steered layer itself.
    """
    if (base.decider is not None and base.decider.steerer is not None) or base.overlay is not None:
        raise ModelError(
            f"{config.base} is a layer that acts on its base (gate, adapters, an adaptation); a new one is trained on "
            "the base alone: name the base with --base"
        )
    metacog_checks.check(base, config)
    if config.phases != "A":
        phases.check(base, config.steer, (config.b, config.c)[: len(config.phases) - 1])
    if config.labels is not None:
        labels = LabelSet.load(Path(config.labels))
        metacog_checks.same_kind(labels, base, config)
    else:
        labels = draw_labels(base, config, "train", config.label_n, config.samples, cache)
    trials = draw_trials(base, config, "train", config.trial_n, cache) if config.trial_n else None
    rates = _policy_rates(base, labels, config) if config.policy_samples else None
    with Progress("fit heads", config.heads.steps) as bar:
        heads, report = fit_heads(
            labels, config.heads, config.seed, policy_rates=rates, device=config.device, trials=trials,
            on_step=lambda step, row: _tick(bar, step, row, on_step),
        )  # fmt: skip
    reasoner = replace(base, decider=Decider(heads))
    reasoner, card_report = _with_card(reasoner, labels.cost_order(), config, cache)
    if config.phases != "A":
        keep(reasoner)
        reasoner = phases.with_steerer(reasoner, config.steer, config.seed)
        draw = phases.Draw(
            config.tasks, config.levels, f"{config.stream}/phases", config.strategies, config.max_think,
            config.max_batch, config.seed, cache,
        )  # fmt: skip
        for letter, phase in zip(config.phases[1:], (config.b, config.c), strict=False):
            reasoner = phases.run_phase(reasoner, phase, draw, letter, config.heads.weights, on_phase)
        reasoner, card_report = _with_card(reasoner, labels.cost_order(), config, cache)
        val = draw_labels(reasoner, config, "val", config.val_n, 0, cache)  # as the card has drawn them
        report = {**report, "telemetry": gauges(reasoner.decider.heads, whole(val))}  # type: ignore[union-attr]
    return Trained(reasoner, report, card_report, labels)


def _policy_rates(base: Reasoner, labels: LabelSet, config: MetacogRunConfig) -> Any:
    """Pass rates of the sampler grid on the labelled problems. Raises DataError where these are not this run's."""
    items = problems(config.tasks, "train", config.stream, config.label_n, config.levels)
    if [problem_id(item) for item in items] != [p.id for p in labels.problems]:
        raise DataError(
            f"policy_samples = {config.policy_samples} needs the problems behind the labels, but those in "
            f"{config.labels} are not the {config.label_n} of stream {config.stream!r}; label again (leave labels out)"
        )
    solved = sum(plan is not None for plan in labels.plan_labels())
    with Progress("sampler settings", solved * (1 + (len(GRID) - 1) * config.policy_samples)) as bar:
        return policy_rates(
            base, items, labels, config.policy_samples, cap=config.max_think, max_batch=config.max_batch,
            seed=f"policy/{config.stream}", on_done=bar.advance,
        )  # fmt: skip


def _with_card(
    reasoner: Reasoner, cost_order: Sequence[str], config: MetacogRunConfig, cache: Path
) -> tuple[Reasoner, dict[str, Any]]:
    """A card fitted on what the model does now, and its best plans by val."""
    assert reasoner.decider is not None
    heads, steerer = reasoner.decider.heads, reasoner.decider.steerer
    val = draw_labels(reasoner, config, "val", config.val_n, 0, cache)
    held = read_greedy(heads, val)
    best = best_strategy(held["family"], held["correct"], held["used"], val.strategies)
    calibration = draw_labels(reasoner, config, "calibration", config.calibration_n, 0, cache)
    items = problems(config.tasks, "calibration", config.stream, config.calibration_n, config.levels)
    card, report = calibrate(reasoner, heads, calibration, items, cost_order, config, best, cache)
    return replace(reasoner, decider=Decider(heads, card, steerer), best_plan={**reasoner.best_plan, **best}), report


def _tick(bar: Progress, step: int, row: dict[str, Any], on_step: Any) -> None:
    bar.advance(1, f"loss {row['loss']:.3f}")
    if on_step is not None:
        on_step(step, row)


@dataclass(frozen=True)
class Outcome:
    """What a run measured on its test stream."""

    trained: Trained
    summary: dict[str, Any]
    records: list[EvalRecord]
    sweep: Sweep | None
    seconds: dict[str, float]
    phases: list[dict[str, Any]] = field(default_factory=list)
    gates: dict[str, Any] = field(default_factory=dict)


def run_metacog(config: MetacogRunConfig, folder: Run) -> Outcome:
    """The whole path into a run folder: model/, results.json, report.html. Test problems come from their own stream."""
    began = time.monotonic()
    base = Reasoner.load(config.base, config.device)
    folder.status("training heads")
    log = _Log(folder)
    trained = train(
        base, config, folder.folder / "labels", log.step, log.phase,
        lambda reasoner: reasoner.save_layer(folder.folder / "model"),
    )  # fmt: skip
    trained.reasoner.save_layer(folder.folder / "model")
    seconds = {"train": time.monotonic() - began}
    folder.status("evaluating")
    stream = f"{config.stream}/test/{derive(config.seed) % 10_000}"
    found = runner.evaluate(
        trained.reasoner, config.tasks, "test", stream, config.test_n, levels=config.levels,
        baseline_n=config.calibration_n, cap=config.max_think, max_batch=config.max_batch,
    )  # fmt: skip
    seconds["evaluate"] = time.monotonic() - began - seconds["train"]
    swept = None
    if config.with_sweep:
        swept = runner.sweep(
            trained.reasoner, config.tasks, "test", stream, config.test_n, config.levels,
            val_n=config.val_n, max_batch=config.max_batch, cap=config.max_think, strategies=config.strategies,
        )  # fmt: skip
        seconds["sweep"] = time.monotonic() - began - sum(seconds.values())
    results = {
        "summary": found.summary,
        "sweep": None if swept is None else swept.to_json(),
        "heads": trained.heads_report,
        "card": trained.card_report,
        "phases": log.rounds,
        "seconds": seconds,
    }
    folder.write_json("results.json", results)
    sample = problems(config.tasks, "val", config.stream, len(config.levels), config.levels)[-1]
    return Outcome(
        trained, found.summary, found.records, swept, seconds, log.rounds, phases.heat_map(trained.reasoner, sample)
    )


class _Log:
    """Metrics rows of a run, one behind the other: every round of the phases counts its own steps from 1."""

    def __init__(self, folder: Run) -> None:
        self._folder, self._before, self._last = folder, 0, 0
        self.rounds: list[dict[str, Any]] = []

    def step(self, step: int, row: dict[str, Any]) -> None:
        if step <= self._last:
            self._before += self._last
        self._last = step
        self._folder.row(self._before + step, **_rates(row))

    def phase(self, facts: dict[str, Any]) -> None:
        """A step, or what a round reports at its end."""
        if "step" in facts:
            self.step(facts["step"], {k: v for k, v in facts.items() if k != "step"})
        else:
            self.rounds.append(facts)


def _rates(row: dict[str, Any]) -> dict[str, float]:
    """Numbers of a row; what has no name of its own (alpha/entropy, budget/used) is called train/…."""
    named = {k if "/" in k and not k.startswith("loss/") else f"train/{k}": v for k, v in row.items()}
    return {k: float(v) for k, v in named.items() if isinstance(v, (int, float))}
