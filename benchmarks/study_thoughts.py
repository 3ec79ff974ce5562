"""Recorded uncapped thoughts with a trial answer at every place where a rule might close them.

p: think tokens kept. Our own models begin nodes with KIND tokens, so a boundary lies in front of one; other models end
them with a newline, so it lies behind it (decoding.slack, decoding.row).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study_base import look_up, quiet, say

from gnomon.attempts import judge
from gnomon.base.seeds import derive
from gnomon.data.codec import OwnCodec
from gnomon.decoding.slack import NOTHING, RuleConfig, SoftView, replay
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner
from gnomon.tasks.problem import Problem
from gnomon.training.rollout import TrialAnswer as Trial
from gnomon.training.rollout import trial_answers

CUTS = (0, 4, 8, 16, 32, 64, 128)
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Views = tuple[SoftView, ...]


@dataclass(frozen=True)
class Thought:
    """One uncapped greedy thought.

    views: every think position as the engine showed it to soft rules; where the model begins its answer node it is
    closing already, so that is no boundary here. closing: per position the best logit minus that of the answer node's
    KIND token, and `unchecked` the same with the monitor's KIND token left out (own models, where a block ends by an
    answer node and the end tag is never a rival; else empty). kinds: per position the KIND that follows, "" where none
    does. states: (think tokens, [L, C]) at node boundaries. trials: p -> answer given there.
    """

    problem: Problem
    plan: str
    ids: tuple[int, ...]
    own: Trial
    views: Views
    before: Any = None
    end: Any = None
    states: tuple[tuple[int, Any], ...] = ()
    closing: tuple[float, ...] = ()
    unchecked: tuple[float, ...] = ()
    kinds: tuple[str, ...] = ()
    trials: dict[int, Trial] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return len(self.ids)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Places before the end where a rule may close at a boundary, ascending."""
        return tuple(sorted({v.used for v in self.views if v.boundary and not v.begun and v.used < self.used}))

    @property
    def nodes(self) -> tuple[int, ...]:
        """Places in front of every node, the answer node too; other models: the boundaries."""
        return tuple(p for p, kind in enumerate(self.kinds) if kind) or self.boundaries

    def at(self, p: int | None) -> Trial:
        """The answer where the thought is closed at p; None or its own end: its own answer."""
        return self.own if p is None or p >= self.used else self.trials[p]


class _Watch:
    """A soft rule that looks and does nothing."""

    wants_margin, wants_answer, wants_confidence = True, False, False

    def __init__(self, seen: list[SoftView]) -> None:
        self._seen = seen

    def look(self, view: SoftView) -> tuple[float, None]:
        self._seen.append(view)
        return NOTHING  # type: ignore[return-value]


def collect(
    reasoner: Reasoner, items: Sequence[Problem], plan: str, *, states: bool = False, max_batch: int = 64
) -> list[Thought]:
    """Uncapped greedy thoughts of the bare base under one plan; states: keep those at boundaries, start and end."""
    quiet()
    seen: dict[str, list[SoftView]] = {}
    bare = replace(reasoner, decider=None, rules=lambda request: [_Watch(seen.setdefault(request.id, []))])
    requests = [
        Request(
            str(i), tuple(reasoner.codec.encode_prompt(p.prompt)), plan=plan, budget=None, use_prediction=False,
            seed=derive("studies", p.prompt), max_answer_tokens=48,
        )
        for i, p in enumerate(items)
    ]  # fmt: skip
    traces: list[Trace] = bare.engine(max_batch).run(requests, record_taps=states, record_boundaries=states)
    found = []
    for problem, trace in zip(items, traces, strict=True):
        got = judge(reasoner, problem, trace)
        logprob = -math.inf if trace.answer_logprob is None else trace.answer_logprob
        taps = trace.taps or {}
        found.append(
            Thought(
                problem, plan, trace.think_ids, Trial(got.correct, logprob, trace.answer_tokens),
                tuple(seen[trace.id]), taps.get("think"), taps.get("end"),
                tuple(b for b in trace.boundaries or () if b[0] <= trace.used),
            )
        )  # fmt: skip
    return with_kinds(reasoner, found) if isinstance(reasoner.codec, OwnCodec) else found


@torch.inference_mode()
def with_kinds(reasoner: Reasoner, thoughts: Sequence[Thought], rows: int = 32) -> list[Thought]:
    """Margins of the answer node at every position, from one forward pass over the finished thoughts."""
    assert isinstance(reasoner.codec, OwnCodec)
    layout, kinds = reasoner.codec.layout, reasoner.codec.tokenizer.kinds
    mask, names = reasoner.engine(1).masks[0], {ident: name for name, ident in kinds.items()}
    answer, monitor = kinds["A"], kinds["M"]
    found: list[Thought] = []
    for start in range(0, len(thoughts), rows):
        part = thoughts[start : start + rows]
        prompts = [reasoner.codec.encode_prompt(t.problem.prompt) for t in part]
        tails = [(*layout.plan_ids(t.plan), *layout.think, *t.ids) for t in part]
        cache = reasoner.backbone.new_cache(len(part), max(map(len, prompts)) + max(map(len, tails)))
        reasoner.backbone.extend(cache, prompts, logits="none")
        out = reasoner.backbone.extend(cache, tails, logits="all")
        assert out.logits is not None
        for t, scores in zip(part, out.logits.split([len(tail) for tail in tails]), strict=True):
            here = scores[-(t.used + 1) :] + mask
            best, ends = here.max(-1).values, here[:, answer].clone()
            here[:, monitor] = -torch.inf
            rival = here.max(-1).values
            found.append(
                replace(
                    t,
                    views=tuple(
                        replace(v, boundary=v.boundary and float(best[v.used] - ends[v.used]) > 0) for v in t.views
                    ),
                    closing=tuple((best - ends).tolist()),
                    unchecked=tuple((rival - ends).tolist()),
                    kinds=(*(names.get(i, "") for i in t.ids), ""),
                )
            )
    return found


def with_trials(
    reasoner: Reasoner, thoughts: Sequence[Thought], places: Callable[[Thought], Sequence[int]], max_batch: int = 64
) -> list[Thought]:
    """The same thoughts with an answer at each of `places` before their end."""
    quiet()
    wanted = [(i, p) for i, t in enumerate(thoughts) for p in sorted(set(places(t)) - set(t.trials)) if 0 <= p < t.used]
    say(f"{len(wanted)} trial answers")
    bare = replace(reasoner, decider=None, rules=None)
    given = [(thoughts[i].problem, thoughts[i].plan, thoughts[i].ids[:p]) for i, p in wanted]
    trials = [dict(t.trials) for t in thoughts]
    for (i, p), got in zip(wanted, trial_answers(bare, given, max_batch), strict=True):
        trials[i][p] = got
    return [replace(t, trials=found) for t, found in zip(thoughts, trials, strict=True)]


def with_message(reasoner: Reasoner) -> Reasoner:
    """The same model, whose cuts write an answer node's KIND token before the end tag: the hard cut with message."""
    assert isinstance(reasoner.codec, OwnCodec)
    codec = copy(reasoner.codec)
    codec.layout = replace(codec.layout, transition=(codec.tokenizer.kinds["A"],))
    return replace(reasoner, codec=codec)


def margins(thought: Thought, kind: str) -> Views:
    """The views with another margin: "end" as the engine has it, "answer node", or "unchecked" (see Thought).

    A margin that is not the end tag's is 0 where the model closes anyway.
    """
    if kind == "end":
        return thought.views
    other = thought.closing if kind == "answer node" else thought.unchecked
    return tuple(replace(v, margin=min(v.margin, max(0.0, other[v.used]))) for v in thought.views)


def with_answers(thought: Thought) -> Views:
    """The views with the probability of the trial answer at boundaries."""
    return tuple(
        replace(v, answer=math.exp(thought.trials[v.used].logprob)) if v.boundary and v.used in thought.trials else v
        for v in thought.views
    )


def capped(views: Views, cap: int) -> Views:
    """The views as they are under a cap, up to it."""
    return tuple(replace(v, cap=cap) for v in views if v.used <= cap)


def where(config: RuleConfig | None, views: Views) -> int | None:
    """Think tokens where a rule closes, None where it does not."""
    found = None if config is None else replay(config, views)
    return None if found is None else found[0]


@dataclass(frozen=True)
class Outcomes:
    """correct, used [N] of a policy, and fired: it closed before the model."""

    correct: Bools
    used: Ints
    fired: Bools


def outcomes(thoughts: Sequence[Thought], stops: Sequence[int | None]) -> Outcomes:
    """What closing every thought at its place gives."""
    used = np.array([t.used if p is None else min(p, t.used) for t, p in zip(thoughts, stops, strict=True)])
    right = np.array([t.at(p).correct for t, p in zip(thoughts, stops, strict=True)])
    return Outcomes(right, used, used < np.array([t.used for t in thoughts]))


def by_table(
    held: Sequence[Thought], thoughts: Sequence[Thought], price: float, cuts: Sequence[int] = CUTS
) -> list[int | None]:
    """The (family, level) look-up: the cut of highest accuracy − price × tokens on `held`, applied to `thoughts`.

    Accuracy and tokens of a cell are shrunk towards those of its family. On `held` itself each half is served by the
    table of the other, so that a price chosen there is not chosen in sample.
    """
    if thoughts is held:
        halves = [held[k::2] for k in (0, 1)]
        sides = [by_table(halves[1 - k], halves[k], price, cuts) for k in (0, 1)]
        return [sides[i % 2][i // 2] for i in range(len(held))]
    names = [(t.problem.task, t.problem.level) for t in held]
    family, level = [k[0] for k in names], [k[1] for k in names]
    choices: tuple[int | None, ...] = (*cuts, None)
    found = [outcomes(held, [c] * len(held)) for c in choices]
    right = [look_up(family, level, o.correct) for o in found]
    spent = [look_up(family, level, o.used) for o in found]
    mine = [(t.problem.task, t.problem.level) for t in thoughts]
    value = np.stack([r.predict(mine) - price * s.predict(mine) for r, s in zip(right, spent, strict=True)], 1)
    return [choices[k] for k in value.argmax(1)]
