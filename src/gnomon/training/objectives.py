"""Named losses of the metacognitive heads; each is a pure function, has a weight, and is tested alone.

N rows · L layers · K plans · G sampler settings. Budgets are in log1p(tokens). Rows without a target (NaN, or plan -1)
carry no loss. What the base itself is trained with is in lm_objectives.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional as F

from gnomon.base.errors import unknown

BONUSES: Final = frozenset({"style_entropy"})  # more is better: `weighted` takes them off


class LossWeights(BaseModel):
    """Weight of each named part; 0 switches it off. `layer_*` train the per-layer experts.

    `solve` and `cost` train the values of the plans: the share of right rollouts and log1p(mean tokens) of each.
    `boundary_*` train the running estimates: remaining tokens, final correctness and its order. `closing` and
    `closing_rank` take the place of the last two where there are trial answers: is closing here right. `policy` trains
    the decoding policy; `style_entropy` is a bonus.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: float = Field(default=1.0, ge=0.0)
    solve: float = Field(default=1.0, ge=0.0)
    cost: float = Field(default=0.2, ge=0.0)
    budget: float = Field(default=1.0, ge=0.0)
    budget_quantile: float = Field(default=0.0, ge=0.0)
    conf_before: float = Field(default=1.0, ge=0.0)
    conf_after: float = Field(default=1.0, ge=0.0)
    conf_rank: float = Field(default=0.2, ge=0.0)
    boundary_budget: float = Field(default=0.2, ge=0.0)
    boundary_conf: float = Field(default=0.25, ge=0.0)
    boundary_rank: float = Field(default=0.05, ge=0.0)
    closing: float = Field(default=0.5, ge=0.0)
    closing_rank: float = Field(default=0.1, ge=0.0)
    layer_plan: float = Field(default=0.2, ge=0.0)
    layer_budget: float = Field(default=0.2, ge=0.0)
    layer_conf: float = Field(default=0.2, ge=0.0)
    layer_budget_var: float = Field(default=0.01, ge=0.0)
    policy: float = Field(default=0.5, ge=0.0)
    style_entropy: float = Field(default=0.0, ge=0.0)


def plan_ce(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """logits [N, K] or [N, L, K], target [N] int64 (-1 = no label) -> mean cross-entropy; 0 without labels."""
    if logits.ndim == 3:
        target = target.unsqueeze(1).expand(logits.shape[:2])
    logits, target = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    held = target >= 0
    if not bool(held.any()):
        return logits[:0].sum()  # not `sum() * 0`, which is NaN where a logit is masked
    return F.cross_entropy(logits[held], target[held], label_smoothing=smoothing)


def budget_error(pred: Tensor, target: Tensor, censored: Tensor | None = None) -> Tensor:
    """Mean squared error in log tokens. A censored row only says "at least this": loss only if pred < target.

    pred [N] or [N, L], target [N] (NaN = no label), censored bool [N].
    """
    gap, held = _gap(pred, target)
    if censored is not None:
        gap = torch.where(_like(censored, gap), gap.clamp_max(0.0), gap)
    return masked_mean(gap.square(), held)


def budget_pinball(pred: Tensor, target: Tensor, q: float, censored: Tensor | None = None) -> Tensor:
    """Quantile (pinball) loss at level q in (0, 1); shapes and censoring as in `budget_error`."""
    gap, held = _gap(pred, target)
    if censored is not None:
        gap = torch.where(_like(censored, gap), gap.clamp_max(0.0), gap)
    return masked_mean(torch.maximum(-q * gap, (1.0 - q) * gap), held)


def confidence_bce(logit: Tensor, target: Tensor) -> Tensor:
    """logit [N] or [N, L], target [N] in [0, 1] (a share correct; NaN = no label) -> mean binary cross-entropy."""
    wide = _like(target, logit)
    held = ~torch.isnan(wide)
    loss = F.binary_cross_entropy_with_logits(logit, torch.where(held, wide, 0.5), reduction="none")
    return masked_mean(loss, held)


def confidence_rank(logit: Tensor, target: Tensor, margin: float = 0.25) -> Tensor:
    """Pairwise logistic loss over pairs whose targets differ by more than `margin`; 0 when there is none.

    logit [N], target [N] in [0, 1], NaN = no label.
    """
    difference = target[:, None] - target[None, :]
    held = difference > margin  # False at NaN
    return masked_mean(F.softplus(-(logit[:, None] - logit[None, :])), held)


def layer_variance(budget_raw_pl: Tensor) -> Tensor:
    """Variance over layers of the per-layer budgets [N, L], averaged over rows."""
    if not len(budget_raw_pl):
        return budget_raw_pl.sum()
    return budget_raw_pl.var(dim=1, unbiased=False).mean()


def policy_ce(logits: Tensor, target: Tensor) -> Tensor:
    """logits [N, G] at the think tag, target [N] int64 -> mean cross-entropy; decisions.md §3.

    target: the entry of policy.GRID with the best pass rate at the row's plan (`policy_labels`), -1 = no label.
    """
    return plan_ce(logits, target)


def style_entropy(plan_logits: Tensor) -> Tensor:
    """plan_logits [N, K] -> entropy in nats of the batch-mean plan distribution, at most log K; 0 without rows.

    A bonus (decisions.md §3): it falls when all problems go to one strategy, and not when every problem is decided
    surely, as an entropy per row would.
    """
    if not len(plan_logits):
        return plan_logits.sum()
    mean = plan_logits.softmax(-1).mean(0).clamp_min(1e-12)  # a share that underflows to 0 has no finite gradient
    return torch.special.entr(mean).sum()


def expected_need(plan_logits: Tensor, cost: Tensor) -> Tensor:
    """Need in log tokens, expected over the plans: sum_k p_k · cost_k. plan_logits, cost [N, K] -> [N].

    Costs are constants here: a penalty on the need may move the choice of a plan, never what a plan is said to cost.
    """
    return (plan_logits.softmax(-1) * cost.detach()).sum(-1)


def over_budget(need: Tensor, cap: Tensor) -> Tensor:
    """Mean of max(0, need - cap) in log tokens. need [N] or [N, L], cap [N] in log1p(tokens), NaN = no cap.

    Meant for `expected_need`. On a predicted budget it would teach a head to say less than is needed.
    """
    gap, held = _gap(need, cap)
    return masked_mean(gap.clamp_min(0.0), held)


def weighted(parts: Mapping[str, Tensor], *weights: BaseModel) -> tuple[Tensor, dict[str, float]]:
    """Sum of weight × part (bonuses taken off), and every part unweighted for the log.

    weights: one or more tables with a number per name. Raises UnknownNameError for an unnamed part.
    """
    table: dict[str, float] = {name: value for each in weights for name, value in each.model_dump().items()}
    total: Tensor | None = None
    for name, part in parts.items():
        if name not in table:
            raise unknown("loss", name, table)
        if table[name] > 0:
            weight = -table[name] if name in BONUSES else table[name]
            total = part * weight if total is None else total + part * weight
    if total is None:
        raise unknown("non-zero loss among", ", ".join(parts) or "(none)", table)
    return total, {f"loss/{name}": float(part.detach()) for name, part in parts.items()}


def masked_mean(values: Tensor, held: Tensor) -> Tensor:
    """Mean of the values where `held` (bool, same shape); 0 with a graph where nothing is held."""
    count = held.sum().clamp_min(1)
    return torch.where(held, values, torch.zeros_like(values)).sum() / count


def _like(x: Tensor, reference: Tensor) -> Tensor:
    return x.unsqueeze(1).expand_as(reference) if reference.ndim == x.ndim + 1 else x


def _gap(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    wide = _like(target, pred)
    held = ~torch.isnan(wide)
    return pred - torch.where(held, wide, pred.detach()), held
