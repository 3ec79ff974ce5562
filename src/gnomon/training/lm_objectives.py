"""Named losses of the phases that run the base itself; each is a pure function, has a weight, and is tested alone.

B rows · T positions · V vocabulary. Position t of `logits` is what the model says in front of token t of `ids`: callers
shift once, here nothing is shifted. A mask says which tokens count; ids outside it are never looked at.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from gnomon.training.objectives import masked_mean


class LMLossWeights(BaseModel):
    """Weight of each named part; 0 switches it off. `over_budget` is objectives.over_budget, which needs caps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answer_ce: float = Field(default=1.0, ge=0.0)
    think_ce: float = Field(default=1.0, ge=0.0)
    over_budget: float = Field(default=0.0, ge=0.0)
    forced_close: float = Field(default=0.0, ge=0.0)
    consistency: float = Field(default=0.0, ge=0.0)


def answer_ce(logits: Tensor, ids: Tensor, answer: Tensor) -> Tensor:
    """Mean cross-entropy in nats per answer token, its own end tag included.

    logits [B, T, V], ids [B, T] int64, answer [B, T] bool. The mean is over all tokens of the batch, so a long answer
    weighs more than a short one; 0 without tokens.
    """
    return _token_ce(logits, ids, answer)


def think_ce(logits: Tensor, ids: Tensor, think: Tensor) -> Tensor:
    """Mean cross-entropy in nats per think token; shapes as in `answer_ce`.

    think: what the model chose or should choose inside the block, an end tag of its own included. Forced tokens
    (plan, tags, a forced close, results behind `T … =`) and planted slips are no part of it (decisions.md §1).
    """
    return _token_ce(logits, ids, think)


def token_logprobs(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log p of the given ids, [B, T] float32 (float64 stays), 0 outside the mask. Shapes as in `answer_ce`."""
    held = -F.cross_entropy(_wide(logits[mask]), ids[mask], reduction="none")
    return held.new_zeros(mask.shape).index_put((mask,), held)


def row_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean log-prob of each row's tokens in nats; logprobs, mask [B, T] -> [B], NaN for a row without tokens."""
    count = mask.sum(-1)
    mean = torch.where(mask, logprobs, torch.zeros_like(logprobs)).sum(-1) / count.clamp_min(1)
    return torch.where(count > 0, mean, mean.new_full((), torch.nan))


def consistency(with_thought: Tensor, without: Tensor, margin: float = 0.0) -> Tensor:
    """Hinge on what a thought gains: mean of max(0, margin - (with_thought - without)).

    with_thought, without [B]: log p(answer | x, thought) and log p(answer | x) from `row_logprob` of one answer; the
    margin is in the same nats per token. NaN rows carry none. After Quiet-STaR (arXiv 2403.09629, eq. 4), a hinge on
    the difference in place of its REINFORCE term (decisions.md §3).

    The thought is detached: its ids are data, no gradient goes through the choice of them. The states at think
    positions are not, or THINK-only adapters and gate would learn nothing from the answer. `without` is the baseline
    and gets no gradient: a thought must not gain by making the answer without it worse.
    """
    gain = with_thought - without.detach()
    held = ~torch.isnan(gain)
    gain = torch.where(held, gain, torch.zeros_like(gain))
    return masked_mean((margin - gain).clamp_min(0.0), held)


def forced_close(logprobs: Tensor, forced: Tensor) -> Tensor:
    """Over-budget penalty on the base: mean over rows of -log p(end tag) where the controller closed at the cap.

    logprobs [B, T] from `token_logprobs`; forced [B, T] bool: the tokens of the end tag, one or several, that the
    controller put at the cap. Rows without one carry none.

    Mark only rows whose answer was right: there the rest of the thought was slack. Where the answer was wrong the cap
    was too low, and the lesson would be to stop before the answer is known.
    """
    spent = -torch.where(forced, logprobs, torch.zeros_like(logprobs)).sum(-1)
    return masked_mean(spent, forced.any(-1))


def _token_ce(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    if not bool(mask.any()):
        return logits[:0].sum()  # not `sum() * 0`, which is NaN where a logit is masked
    return F.cross_entropy(_wide(logits[mask]), ids[mask])


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits as float32: a sum over a vocabulary needs it."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
