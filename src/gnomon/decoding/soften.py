"""Soft rules at work: what they add to the logits of a step, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.decoding import slack
from gnomon.decoding.row import Row

Leaning = tuple[int, slack.Look, float, Tensor]


UNSEEN = (math.nan, -1)


def soften(rows: Sequence[Row], logits: Tensor, mask: Tensor) -> list[Leaning]:
    """Ask the soft rules of rows that think; adds their biases to the end tag's logits [R, V], in place.

    mask [V]: what is added to the logits inside a thought. Returns (row, what its rules say, margin and masked logits
    [1, V] before the bias) of the rows that were pushed. Rows whose rules need nothing of this position cost nothing,
    and the logits are only looked at for rules that want a margin.
    """
    asked = [(i, r) for i, r in enumerate(rows) if r.rules and not r.in_answer and r.asks and r.state.needs_choice]
    if not asked:
        return []
    seen = _margins([(i, row) for i, row in asked if row.weighs], logits, mask)
    pushed = []
    for i, row in asked:
        state = row.state
        margin, best = seen.get(i, UNSEEN)
        last = row.ids[-1] if len(row.ids) > row.think_start else -1
        view = slack.SoftView.of(state, row.at_boundary(best), margin, last, row.sure, row.promise)
        look = slack.consult(row.rules, view)
        if look.cause is not None:
            state.lower_cap(state.used, look.cause)
        if look.bias:
            margin = _margins([(i, row)], logits, mask)[i][0] if math.isnan(margin) else margin
            pushed.append((i, look, margin, logits[i : i + 1] + mask))
            logits[i, state.tag_next] += look.bias
    return pushed


def _margins(rows: Sequence[tuple[int, Row]], logits: Tensor, mask: Tensor) -> dict[int, tuple[float, int]]:
    """Row -> (best logit minus that of the end tag's next token, the best token)."""
    if not rows:
        return {}
    at = torch.tensor([i for i, _ in rows], device=logits.device)
    tags = torch.tensor([row.state.tag_next for _, row in rows], device=logits.device)
    top = (logits[at] + mask).max(-1)
    margins = (top.values - logits[at, tags]).tolist()
    return {i: pair for (i, _), pair in zip(rows, zip(margins, top.indices.tolist(), strict=True), strict=True)}


def settle(
    pushed: Sequence[Leaning], rows: Sequence[Row], ids: Sequence[int], logprobs: list[float], heat: Tensor
) -> None:
    """Note whose end tag came from a rule, and put what the model gives each token in the place of its log-prob.

    Not what the rule gives it, and without truncation, which may leave the tag no mass. heat [R]: temperatures.
    """
    for i, look, margin, plain in pushed:
        state = rows[i].state
        if slack.leaned(look, margin, ids[i], state.tag_next):
            state.lean()
        logprobs[i] = float((plain[0] / float(heat[i])).log_softmax(-1)[ids[i]])
