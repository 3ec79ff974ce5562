"""Finished rollouts as sequences to learn from, and the pass over them that training shares with serving.

decisions.md §6: the states up to the think tag first, then what the layer makes of them, then the whole sequence with
gate and adapters at the positions inside the thought. The first pass costs a third of a forward pass and no memory for
gradients: what is read there is detached, and causality makes it what serving reads.
Legend: B rows, T positions, L blocks, C channels, P proj_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.metacognition.config import THINK_SITE
from gnomon.metacognition.heads import MetacogHeads, MetacogOutput
from gnomon.metacognition.steerer import Steerer
from gnomon.model.lm import LM
from gnomon.model.steering import Steer
from gnomon.protocol.layout import Layout
from gnomon.protocol.match import matcher
from gnomon.protocol.trace import Trace


@dataclass(frozen=True)
class Thought:
    """One sequence: prompt, plan, thought and answer.

    think_at: position of the think tag's last token, where g is read. inside: positions that gate and adapters act on.
    think, answer: positions whose tokens the model chose, end tags of its own included; closed: those of an end tag
    that the controller put at the cap. plan: index of the strategy. begin, end: of the think block, tags not included.
    """

    ids: tuple[int, ...]
    think_at: int
    inside: tuple[bool, ...]
    think: tuple[bool, ...]
    answer: tuple[bool, ...]
    closed: tuple[bool, ...]
    plan: int
    begin: int
    end: int


def thought_of(trace: Trace, layout: Layout, plans: Sequence[str]) -> Thought:
    """A finished trace as a sequence. Its ids are those that were sampled: nothing is decoded and encoded again."""
    begin, end = trace.think_span
    after, prompt, tag = trace.answer_span[0], len(trace.prompt_ids), len(layout.end_think)
    chosen = [role == "sampled" for role in trace.roles]
    none = (False,) * prompt
    rule, state, inside = matcher(layout.end_think, *layout.end_think_also), 0, [False] * len(trace.ids)
    for at in range(begin, end):
        state = rule.step(state, trace.ids[at])
        inside[at] = chosen[at] and rule.depth[state] == 0
    return Thought(
        ids=(*trace.prompt_ids, *trace.ids),
        think_at=prompt + begin - 1,
        inside=(*none, *inside),
        think=(*none, *(c and begin <= at < after for at, c in enumerate(chosen))),
        answer=(*none, *(c and at >= after for at, c in enumerate(chosen))),
        closed=(*none, *(not c and end <= at < end + tag for at, c in enumerate(chosen))),
        plan=list(plans).index(trace.plan),
        begin=prompt + begin,
        end=prompt + end,
    )


def without_thought(thought: Thought) -> Thought:
    """The same prompt and answer around an empty block: what the thought is measured against."""
    cut = slice(thought.begin, thought.end)

    def left(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values[: cut.start] + values[cut.stop :]

    masks: dict[str, Any] = {name: left(getattr(thought, name)) for name in ("inside", "think", "answer", "closed")}
    return replace(thought, ids=left(thought.ids), end=thought.begin, **masks)


@dataclass(frozen=True)
class Batch:
    """ids int64 [B, T], padded on the right; inside, think, answer, closed bool [B, T]; think_at, plan int64 [B]."""

    ids: Tensor
    inside: Tensor
    think: Tensor
    answer: Tensor
    closed: Tensor
    think_at: Tensor
    plan: Tensor


def collate(thoughts: Sequence[Thought], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Rows of different lengths side by side."""
    width = max(len(t.ids) for t in thoughts)

    def grid(name: str, fill: int | bool) -> Tensor:
        rows = [getattr(t, name) for t in thoughts]
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)

    masks = {name: grid(name, False) for name in ("inside", "think", "answer", "closed")}
    places = {name: torch.tensor([getattr(t, name) for t in thoughts], device=device) for name in ("think_at", "plan")}
    return Batch(ids=grid("ids", pad), **masks, **places)


@dataclass(frozen=True)
class Guided:
    """logits float32 [B, T, V]: the steered base; read: what the heads say at the think tag; vectors [B, C]."""

    logits: Tensor
    read: MetacogOutput
    vectors: Tensor
    steer: Steer


@contextmanager
def beside(lm: LM, *parts: nn.Module) -> Iterator[None]:
    """For a while, heads and steerer where the base computes; they decide on the CPU."""
    try:
        for part in parts:
            part.to(lm.device)
        yield
    finally:
        for part in parts:
            part.to("cpu")


def guided(lm: LM, heads: MetacogHeads, steerer: Steerer, batch: Batch, noise: torch.Generator | None = None) -> Guided:
    """Both passes; heads and steerer lie `beside` the base. noise: draws the adapters' gates (training), None = as in
    serving.

    Gradients of what is made of `logits` reach gate, adapters, unfrozen parts of the base and, through g, trunk and
    aggregator; those of `read` never reach the base.
    """
    first = int(batch.think_at.max()) + 1
    with torch.no_grad():
        states = lm(batch.ids[:, :first], logits=False, states_at=batch.think_at).states
    assert states is not None
    site = torch.full_like(batch.plan, THINK_SITE)
    read: MetacogOutput = heads(states, site, torch.zeros(len(site), device=site.device))
    vectors = steerer.vectors(read.g, batch.plan, read.conf_raw)
    row = torch.arange(len(batch.ids), device=batch.ids.device)[:, None]
    at = torch.where(batch.inside, row, -1)
    steer = Steer(steerer.steering(), vectors, at, noise=noise, record=True)
    logits = lm(batch.ids, steer=steer).logits
    assert logits is not None
    return Guided(logits, read, vectors, steer)
