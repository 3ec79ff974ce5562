"""Heads and card applied to states, as plain numbers: the definition. `native.py` is the same in C.

Legend: N rows, A tapped layers of the backbone, C hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gnomon.metacognition.calibration import Card, Floats, clip_tokens, numbers
from gnomon.metacognition.config import BOUNDARY, END, PROMPT, THINK_SITE
from gnomon.metacognition.gate import FeedbackGate
from gnomon.metacognition.heads import MetacogHeads, MetacogOutput

Rows = list[list[float]]


class Reader(Protocol):
    """What `Decider` reads with; a list of numbers a row. Raises ModelError where the heads gave no finite number."""

    def plan(self, taps: Tensor) -> Rows:
        """taps [N, A, C] -> [chosen, probability of each plan]."""

    def budget(self, taps: Tensor, plans: Sequence[int]) -> tuple[Rows, Tensor | None]:
        """taps [N, A, C] -> [expected tokens, clipped, confidence, its logit, distance]; NaN without a card.

        Second: what a feedback gate does under these plans (indices [N]), float32 [N, C]; None without a gate.
        """

    def after(self, taps: Tensor, used: Sequence[int]) -> Rows:
        """taps [N, A, C], used [N] tokens -> [confidence, its logit]; NaN without a card."""

    def running(self, taps: Tensor, used: Sequence[int]) -> Rows:
        """taps [N, A, C], used [N] tokens -> [expected remainder, upper bound, confidence, its logit]."""

    def reached(self, taps: Tensor, ends: Sequence[bool], used: Sequence[int]) -> Rows:
        """`after` where ends [N] says so, else `running`, in one read; at the end NaN, NaN come first."""


class TorchReader:
    """On any device."""

    def __init__(self, heads: MetacogHeads, card: Card | None, gate: FeedbackGate | None = None) -> None:
        self.heads, self.card, self.gate = heads, card, gate

    def plan(self, taps: Tensor) -> Rows:
        out = self._say(taps, PROMPT)
        logits, solve, cost = _floats(out.plan_logits), _maybe(out.solve_logits), _maybe(out.cost_raw)
        numbers(logits, solve, cost)
        probs = _softmax(logits)
        chosen = probs.argmax(1) if self.card is None else self.card.choose_plan(probs, solve, cost)
        return _rows(chosen, *probs.T)

    def budget(self, taps: Tensor, plans: Sequence[int]) -> tuple[Rows, Tensor | None]:
        out = self._say(taps, THINK_SITE)
        vectors = None
        if self.gate is not None:
            with torch.no_grad():
                vectors = self.gate(out.g, torch.tensor(list(plans), device=out.g.device), out.conf_raw).cpu()
        raw, logits = _floats(out.budget_raw), _floats(out.conf_raw)
        numbers(raw, logits)
        if self.card is None:
            nothing = np.full(len(raw), np.nan)
            return _rows(_tokens(raw), clip_tokens(raw, 0.0), nothing, logits, nothing), vectors
        distance = self.card.domain.distance(_floats(taps[:, self.card.domain.layer]))
        probs = self.card.confidence(logits, "before")
        return _rows(_tokens(raw), self.card.clip_budget(raw), probs, logits, distance), vectors

    def after(self, taps: Tensor, used: Sequence[int]) -> Rows:
        logits = _floats(self._say(taps, END, used).conf_raw)
        numbers(logits)
        probs = np.full(len(logits), np.nan) if self.card is None else self.card.confidence(logits, "after")
        return _rows(probs, logits)

    def reached(self, taps: Tensor, ends: Sequence[bool], used: Sequence[int]) -> Rows:
        found: Rows = [[]] * len(used)
        for end in (True, False):
            at = [i for i, e in enumerate(ends) if e is end]
            if at:
                mine = taps[at], [used[i] for i in at]
                said = [[math.nan, math.nan, *row] for row in self.after(*mine)] if end else self.running(*mine)
                for i, row in zip(at, said, strict=True):
                    found[i] = row
        return found

    def running(self, taps: Tensor, used: Sequence[int]) -> Rows:
        assert self.card is not None and self.card.running is not None, "the caller asks for a card that can"
        out = self._say(taps, BOUNDARY, used)
        raw, logits = _floats(out.budget_raw), _floats(out.conf_raw)
        numbers(raw, logits)
        card = self.card.running
        return _rows(_tokens(raw), card.upper(raw), card.confidence(logits), logits)

    def policy(self, taps: Tensor) -> Rows:
        """taps [N, A, C] at the think tag -> [chosen, probability of each entry of the grid]; heads with a policy.

        No part of `Reader`: the head is off by default, and only torch reads it.
        """
        said = self._say(taps, THINK_SITE).policy_logits
        assert said is not None, "the caller asks heads that have a policy"
        logits = _floats(said)
        numbers(logits)
        probs = _softmax(logits)
        return _rows(probs.argmax(1), *probs.T)

    @torch.no_grad()
    def _say(self, taps: Tensor, site: int, used: Sequence[int] | None = None) -> MetacogOutput:
        device = self.heads.layer_index.device
        n = taps.shape[0]
        tokens = torch.zeros(n) if used is None else torch.tensor(list(used), dtype=torch.float32)
        where = torch.full((n,), site, dtype=torch.int64, device=device)
        found: MetacogOutput = self.heads(taps.to(device), where, tokens.to(device))
        return found


def _softmax(logits: Floats) -> Floats:
    """Logits [N, K] -> probabilities [N, K]."""
    probs = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(probs / probs.sum(1, keepdims=True))


def _tokens(raw: Floats) -> Floats:
    """Predicted log1p(tokens) [N] -> tokens, not clipped."""
    return np.asarray(np.maximum(np.expm1(np.minimum(raw, 16.0)), 0.0))


def _rows(*columns: object) -> Rows:
    """Columns [N] -> a list of numbers for every row."""
    found: Rows = np.stack([np.asarray(c, dtype=np.float64) for c in columns], 1).tolist()
    return found


def _maybe(x: Tensor | None) -> Floats | None:
    return None if x is None else _floats(x)


def _floats(x: Tensor) -> Floats:
    return x.detach().double().cpu().numpy()
