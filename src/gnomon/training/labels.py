"""Labels made by sampling the model itself (decisions.md §3), kept with the states that they belong to.

One problem gives at most one plan example, one (budget, confidence-before) example per strategy, and per rollout one
confidence-after example and at most one (remaining, confidence) example at a node boundary. L layers · C hidden size.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import DataError

SOLVES_AT: Final = 0.75
STATES_FILE: Final = "states.safetensors"
FACTS_FILE: Final = "labels.json"
States = NDArray[np.float32]


@dataclass(frozen=True)
class Rollout:
    """One uncapped decode of one strategy.

    used: think tokens; closed: the model itself closed the block (False = cut by a limit: censored);
    answer_logprob: mean per answer token, NaN without one; taps_end [L, C] at the end tag;
    boundary: (think tokens used there, state [L, C]) at one node boundary of the block, None where there is none.
    """

    correct: bool
    used: int
    answer_tokens: int
    answer_logprob: float
    closed: bool
    taps_end: States
    greedy: bool = False
    boundary: tuple[int, States] | None = None


@dataclass(frozen=True)
class StrategyLabels:
    """All rollouts of one problem under one strategy (greedy first); taps_think [L, C] at the think tag."""

    taps_think: States
    rollouts: tuple[Rollout, ...]

    @property
    def share(self) -> float:
        """Confidence label: the share of correct rollouts."""
        return sum(r.correct for r in self.rollouts) / len(self.rollouts)

    @property
    def solves(self) -> bool:
        """Whether the strategy solves the problem: at least 75 % of the rollouts are right."""
        return self.share >= SOLVES_AT

    @property
    def budget(self) -> tuple[float, bool] | None:
        """(median think tokens of the correct rollouts, censored), None when none is right.

        Censored: the middle of the correct rollouts was not closed by the model, so the need is at least that.
        """
        right = sorted((r.used, not r.closed) for r in self.rollouts if r.correct)
        if not right:
            return None
        return float(statistics.median(used for used, _ in right)), right[len(right) // 2][1]


@dataclass(frozen=True)
class LabelledProblem:
    """One problem with its states and rollouts; taps_prompt [L, C] at the last prompt token.

    prompt_logprob: mean log-prob of the prompt's tokens (baseline for confidence-before), NaN when not measured.
    """

    id: str
    family: str
    level: int
    taps_prompt: States
    strategies: Mapping[str, StrategyLabels]
    prompt_logprob: float = math.nan


@dataclass(frozen=True)
class BoundaryData:
    """Rows: rollouts with a boundary. taps [R, L, C], used [R] tokens there, correct [R], row [R] of the problem.

    need [R]: log1p(tokens still to come), NaN where the rollout was wrong; censored [R]: it was at least that.
    """

    taps: States
    used: States
    need: States
    censored: NDArray[np.bool_]
    correct: States
    row: NDArray[np.int64]


@dataclass(frozen=True)
class HeadData:
    """Training arrays. Rows of `prompt`: problems; `think`: problem × strategy; `end`: rollouts; `boundary`: some.

    prompt_taps [P, L, C], plan [P] int64 (-1 none), solve [P, K] share right and cost [P, K] log1p(mean tokens) per
    plan · think_taps [T, L, C], budget [T] log1p(tokens) (NaN none), censored [T], share [T], strategy [T] · end_taps
    [E, L, C], used [E], correct [E] · *_row: index of the problem.
    """

    prompt_taps: States
    plan: NDArray[np.int64]
    solve: States
    cost: States
    think_taps: States
    budget: States
    censored: NDArray[np.bool_]
    share: States
    strategy: NDArray[np.int64]
    think_row: NDArray[np.int64]
    end_taps: States
    used: States
    correct: States
    end_row: NDArray[np.int64]
    boundary: BoundaryData


@dataclass(frozen=True)
class LabelSet:
    """Labelled problems of one model. `strategies` is the order of the plan head; meta: model hash, stream, seeds."""

    strategies: tuple[str, ...]
    problems: tuple[LabelledProblem, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.problems:
            raise DataError("a label set needs at least one problem; did every rollout fail?")
        for p in self.problems:
            missing = [s for s in self.strategies if s not in p.strategies or not p.strategies[s].rollouts]
            if missing:
                raise DataError(f"problem {p.id!r} has no rollouts for {', '.join(missing)}")

    def mean_cost(self) -> dict[str, float]:
        """Mean think tokens of every strategy over all rollouts."""
        return {
            s: statistics.fmean(r.used for p in self.problems for r in p.strategies[s].rollouts)
            for s in self.strategies
        }

    def cost_order(self) -> tuple[str, ...]:
        """Strategies from cheap to dear; use the order of the training split for every other split."""
        cost = self.mean_cost()
        return tuple(sorted(self.strategies, key=lambda s: (cost[s], self.strategies.index(s))))

    def plan_labels(self, cost_order: Sequence[str] | None = None) -> list[str | None]:
        """Per problem the cheapest strategy that solves it, None where none does."""
        order = tuple(cost_order) if cost_order is not None else self.cost_order()
        return [next((s for s in order if p.strategies[s].solves), None) for p in self.problems]

    def arrays(self, cost_order: Sequence[str] | None = None) -> HeadData:
        """Everything that head training needs. Problems that no strategy solves carry neither plan nor budget."""
        labels = self.plan_labels(cost_order)
        index = {s: k for k, s in enumerate(self.strategies)}
        think: list[tuple[States, float, bool, float, int, int]] = []
        end: list[tuple[States, int, bool, int]] = []
        for row, (p, label) in enumerate(zip(self.problems, labels, strict=True)):
            for name in self.strategies:
                s = p.strategies[name]
                need = s.budget if label is not None else None
                log_need = math.nan if need is None else math.log1p(need[0])
                think.append((s.taps_think, log_need, need is not None and need[1], s.share, index[name], row))
                end.extend((r.taps_end, r.used, r.correct, row) for r in s.rollouts)
        return HeadData(
            prompt_taps=_stack(p.taps_prompt for p in self.problems),
            plan=np.array([-1 if s is None else index[s] for s in labels], dtype=np.int64),
            solve=self._per_plan(lambda s: s.share),
            cost=self._per_plan(lambda s: math.log1p(statistics.fmean(r.used for r in s.rollouts))),
            think_taps=_stack(t[0] for t in think),
            budget=np.array([t[1] for t in think], dtype=np.float32),
            censored=np.array([t[2] for t in think]),
            share=np.array([t[3] for t in think], dtype=np.float32),
            strategy=np.array([t[4] for t in think], dtype=np.int64),
            think_row=np.array([t[5] for t in think], dtype=np.int64),
            end_taps=_stack(e[0] for e in end),
            used=np.array([e[1] for e in end], dtype=np.float32),
            correct=np.array([e[2] for e in end], dtype=np.float32),
            end_row=np.array([e[3] for e in end], dtype=np.int64),
            boundary=self._boundaries(),
        )

    def _boundaries(self) -> BoundaryData:
        found = [
            (taps, used, r.correct, math.log1p(r.used - used) if r.correct else math.nan, not r.closed, row)
            for row, p in enumerate(self.problems)
            for s in self.strategies
            for r in p.strategies[s].rollouts
            if r.boundary is not None
            for used, taps in (r.boundary,)
        ]
        empty = np.zeros((0, *self.problems[0].taps_prompt.shape), dtype=np.float32)
        return BoundaryData(
            taps=_stack(f[0] for f in found) if found else empty,
            used=np.array([f[1] for f in found], dtype=np.float32),
            need=np.array([f[3] for f in found], dtype=np.float32),
            censored=np.array([f[4] for f in found], dtype=np.bool_),
            correct=np.array([f[2] for f in found], dtype=np.float32),
            row=np.array([f[5] for f in found], dtype=np.int64),
        )

    def _per_plan(self, value: Callable[[StrategyLabels], float]) -> States:
        return np.array([[value(p.strategies[s]) for s in self.strategies] for p in self.problems], dtype=np.float32)

    def summary(self) -> dict[str, Any]:
        """Counts for the log: label shares, unsolved items, accuracy, cost and censored share per strategy."""
        labels = Counter(label or "unsolved" for label in self.plan_labels())
        per: dict[str, Any] = {}
        for name in self.strategies:
            rolls = [r for p in self.problems for r in p.strategies[name].rollouts]
            per[name] = {
                "accuracy": statistics.fmean(r.correct for r in rolls),
                "solves": statistics.fmean(p.strategies[name].solves for p in self.problems),
                "think_tokens_mean": statistics.fmean(r.used for r in rolls),
                "censored": statistics.fmean(not r.closed for r in rolls),
                "label": labels[name] / len(self.problems),
            }
        return {
            "n": len(self.problems),
            "unsolved": labels["unsolved"] / len(self.problems),
            "cost_order": self.cost_order(),
            "by_strategy": per,
        }

    def save(self, folder: Path) -> Path:
        """Write states (safetensors) and facts (JSON, last) into a folder; returns it."""
        folder.mkdir(parents=True, exist_ok=True)
        strategies = [p.strategies[s] for p in self.problems for s in self.strategies]
        states = {
            "prompt": _stack(p.taps_prompt for p in self.problems),
            "think": _stack(s.taps_think for s in strategies),
            "end": _stack(r.taps_end for s in strategies for r in s.rollouts),
        }
        boundaries = [r.boundary[1] for s in strategies for r in s.rollouts if r.boundary is not None]
        if boundaries:
            states["boundary"] = _stack(boundaries)
        save_tensors(folder, STATES_FILE, {k: torch.from_numpy(v) for k, v in states.items()})
        facts = [
            {
                "id": p.id,
                "family": p.family,
                "level": p.level,
                "prompt_logprob": _number(p.prompt_logprob),
                "rollouts": {s: [_row(r) for r in p.strategies[s].rollouts] for s in self.strategies},
            }
            for p in self.problems
        ]
        body = {"version": 2, "strategies": self.strategies, "meta": self.meta, "problems": facts}
        write_atomic(folder / FACTS_FILE, json.dumps(body) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path) -> LabelSet:
        """Read what `save` wrote (version 1 has no boundaries). Raises DataError when it is missing or damaged."""
        path = folder / FACTS_FILE
        if not path.is_file():
            raise DataError(f"no label set in {str(folder)!r}: {FACTS_FILE} is missing (was labelling interrupted?)")
        states = {k: v.numpy() for k, v in load_tensors(folder, STATES_FILE).items()}
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            names = tuple(body["strategies"])
            think, end = iter(states["think"]), iter(states["end"])
            boundary = iter(states.get("boundary", ()))
            problems = []
            for row, fact in enumerate(body["problems"]):
                found = {}
                for s in names:
                    taps = next(think)
                    found[s] = StrategyLabels(taps, tuple([_rollout(r, end, boundary) for r in fact["rollouts"][s]]))
                measured = fact["prompt_logprob"]
                problems.append(
                    LabelledProblem(
                        id=fact["id"],
                        family=fact["family"],
                        level=fact["level"],
                        taps_prompt=states["prompt"][row],
                        strategies=found,
                        prompt_logprob=math.nan if measured is None else measured,
                    )
                )
            return cls(names, tuple(problems), body["meta"])
        except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
            raise DataError(f"the label set in {str(folder)!r} is damaged: {error!r}") from None


def cache_folder(root: Path, facts: Mapping[str, Any]) -> Path:
    """Where labels with these facts (model hash, tasks, stream, n, sampling, versions) live below `root`."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return root / f"labels-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _row(r: Rollout) -> list[Any]:
    facts = [int(r.correct), r.used, r.answer_tokens, _number(r.answer_logprob), int(r.closed), int(r.greedy)]
    return [*facts, None if r.boundary is None else r.boundary[0]]


def _rollout(row: Sequence[Any], ends: Iterator[States], boundaries: Iterator[States]) -> Rollout:
    correct, used, answer_tokens, logprob, closed, greedy, *place = row
    return Rollout(
        correct=bool(correct),
        used=int(used),
        answer_tokens=int(answer_tokens),
        answer_logprob=math.nan if logprob is None else float(logprob),
        closed=bool(closed),
        taps_end=next(ends),
        greedy=bool(greedy),
        boundary=(int(place[0]), next(boundaries)) if place and place[0] is not None else None,
    )


def _number(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _stack(parts: Iterable[States]) -> States:
    return np.stack([np.asarray(x, dtype=np.float32) for x in parts])
