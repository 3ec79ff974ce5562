"""Phases B and C: gate, adapters, heads and unfrozen parts of the base learn together (rows T1, T2, C4, C5).

One step: finished thoughts through the pass that serving makes (`thoughts.guided`) for the losses of the language
model, and labelled states for the losses of the heads, so that g stays what the heads need while the gate learns to
read it. Legend: B rows, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from gnomon.base.config import Config
from gnomon.base.errors import ConfigError, DataError
from gnomon.base.seeds import torch_generator
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import Steerer, telemetry
from gnomon.model.lm import LM
from gnomon.model.steering import expected_l0
from gnomon.training import heads_fit, lm_objectives, objectives
from gnomon.training.adapt import AdaptConfig, Adapted
from gnomon.training.ema import Ema
from gnomon.training.head_rows import HeadRows
from gnomon.training.heads_fit import head_losses, warm_cosine
from gnomon.training.lm_objectives import LMLossWeights
from gnomon.training.loop import each, fit
from gnomon.training.objectives import LossWeights
from gnomon.training.thoughts import Batch, Guided, Thought, beside, collate, guided, without_thought

CURVE_POINTS = 40  # of a round, at least, where it has so many steps


class PhaseConfig(Config):
    """One phase: rounds of rollouts, fresh labels, and steps on both.

    problems: those whose rollouts are learned from, per round, `samples` at T = 0.8 beside a greedy one, under the
    predicted plan. capped: share of the problems whose rollouts run under the predicted budget (at most three quarters:
    needs are only seen where nothing cuts). label_n: problems that all strategies are sampled on again, per round.
    batch, head_batch: thoughts, and labelled states per site, in a step. lr: of gate, adapters and LoRA; heads_lr: of
    the heads. l0: weight of the expected number of open adapters. ema: with it the moving average of all that learned
    takes its place at the end of a round (not with LoRA, whose average is no product of two factors).
    """

    rounds: int = Field(default=1, ge=0)
    problems: int = Field(default=1000, ge=8)
    samples: int = Field(default=3, ge=0)
    capped: float = Field(default=0.0, ge=0.0, le=0.75)
    label_n: int = Field(default=1000, ge=20)
    steps: int = Field(default=150, ge=1)
    batch: int = Field(default=32, ge=2)
    head_batch: int = Field(default=128, ge=2)
    lr: float = Field(default=5e-4, gt=0.0)
    heads_lr: float = Field(default=5e-5, gt=0.0)
    l0: float = Field(default=0.0003, ge=0.0)
    ema: float = Field(default=0.0, ge=0.0, le=1.0, description="share of the new value in an average; 0 = off")
    margin: float = Field(default=0.0, description="what a thought must gain for `consistency`, nats per token")
    adapt: AdaptConfig = AdaptConfig()
    weights: LMLossWeights = LMLossWeights()

    @field_validator("weights")
    @classmethod
    def _made_here(cls, weights: LMLossWeights) -> LMLossWeights:
        if weights.over_budget > 0:
            raise ValueError(
                f"over_budget = {weights.over_budget}, but phases learn from thoughts that closed by themselves and "
                "make no such loss; leave it 0"
            )
        return weights


class _Fixed(Config):
    """Weights of what only the phases have."""

    l0: float


def fit_phase(
    lm: LM,
    heads: MetacogHeads,
    steerer: Steerer,
    adapted: Adapted,
    thoughts: Sequence[Thought],
    rows: HeadRows,
    config: PhaseConfig,
    head_weights: LossWeights,
    *,
    pad: int,
    name: str,
    on_step: Callable[[int, dict[str, Any]], bool | None] | None = None,
) -> dict[str, Any]:
    """One round of steps, in place. rows: labelled states of the model, on its device. name: of the random streams.

    Every row of `on_step` has all losses by name and the gauges of gate and adapters, some have those of the heads.
    Returns the loop's report with `telemetry` (the last gauges of both) and `curve` (some of the rows). Raises
    DataError without thoughts.
    """
    if not thoughts:
        raise DataError("no rollout of this round was right, so there is nothing to learn from; draw more problems")
    with beside(lm, heads, steerer):
        average = _average(config, steerer, heads, lm.module)
        draw, noise = torch_generator("phase-rows", name), torch_generator("phase-gates", name)
        gauges: dict[str, float] = {}  # of gate and adapters at the last step
        curve: list[dict[str, Any]] = []

        def step_loss(_: int) -> tuple[Tensor, dict[str, float]]:
            picked = [thoughts[i] for i in torch.randint(len(thoughts), (config.batch,), generator=draw).tolist()]
            heads.eval()  # what steers is read as in serving
            batch = collate(picked, pad, lm.device)
            out = guided(lm, heads, steerer, batch, noise)
            parts = lm_losses(lm, out, batch, picked, pad, config)
            gauges.update(telemetry(out.vectors, out.steer.seen))
            heads.train()
            at = [torch.randint(max(n, 1), (config.head_batch * (n > 0),), generator=draw) for n in rows.sizes()]
            parts |= head_losses(heads, rows, at)[0]
            return objectives.weighted(parts, config.weights, head_weights, _Fixed(l0=config.l0))

        def watch(step: int, row: dict[str, Any]) -> bool | None:
            if average is not None:
                average.update()
            row = {**row, **gauges}
            if step % max(1, config.steps // CURVE_POINTS) == 0 or step == config.steps:
                row |= heads_fit.named(heads_fit.gauges(heads, rows, 256))
                curve.append({"step": step, **row})
            return None if on_step is None else on_step(step, row)

        groups = _groups(steerer, heads, adapted, config)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        steerer.train()
        adapted.learning(True)
        result = fit(each(step_loss), [optimizer], config.steps, schedule=warm_cosine(0.05), clip=1.0, on_step=watch)
        if average is not None:
            _take(average, [p for g in groups for p in g["params"]])
        heads.eval()
        steerer.eval()
        adapted.learning(False)
        return {**result, "telemetry": gauges | heads_fit.named(heads_fit.gauges(heads, rows)), "curve": curve}


def _groups(steerer: Steerer, heads: MetacogHeads, adapted: Adapted, config: PhaseConfig) -> list[dict[str, Any]]:
    """Parameter groups of the optimiser, each with its rate."""
    return [
        {"params": list(steerer.parameters()), "lr": config.lr, "name": "steerer"},
        {"params": [p for p in heads.parameters() if p.requires_grad], "lr": config.heads_lr, "name": "heads"},
        *adapted.groups(config.lr),
    ]


def _average(config: PhaseConfig, *modules: nn.Module) -> Ema | None:
    """The moving average of all that learns, where one is asked for."""
    if config.ema and config.adapt.mode == "lora":
        raise ConfigError("ema cannot be kept as LoRA factors: set ema = 0, or another adapt.mode (ln, last_k, all)")
    return Ema(nn.ModuleList(modules), config.ema) if config.ema else None


@torch.no_grad()
def _take(average: Ema, parameters: Sequence[nn.Parameter]) -> None:
    """Averages become the weights."""
    with average.applied():
        kept = [p.clone() for p in parameters]
    for p, value in zip(parameters, kept, strict=True):
        p.copy_(value)


def lm_losses(
    lm: LM, out: Guided, batch: Batch, thoughts: Sequence[Thought], pad: int, config: PhaseConfig
) -> dict[str, Tensor]:
    """The language model's losses of one pass, by name; those with weight 0 that cost a pass are left out."""
    logits, ids = out.logits[:, :-1], batch.ids[:, 1:]
    think, answer = batch.think[:, 1:], batch.answer[:, 1:]
    parts = {
        "think_ce": lm_objectives.think_ce(logits, ids, think),
        "answer_ce": lm_objectives.answer_ce(logits, ids, answer),
    }
    if out.steer.seen:
        parts["l0"] = torch.cat([expected_l0(logit) for logit, _ in out.steer.seen.values()]).mean()
    if config.weights.forced_close > 0:
        logp = lm_objectives.token_logprobs(logits, ids, batch.closed[:, 1:])
        parts["forced_close"] = lm_objectives.forced_close(logp, batch.closed[:, 1:])
    if config.weights.consistency > 0:
        bare = collate([without_thought(t) for t in thoughts], pad, lm.device)
        with torch.no_grad():  # no thought, so nothing is steered; the baseline gets no gradient
            plain = lm(bare.ids).logits
        assert plain is not None
        parts["consistency"] = lm_objectives.consistency(
            _row(logits, ids, answer), _row(plain[:, :-1], bare.ids[:, 1:], bare.answer[:, 1:]), config.margin
        )
    return parts


def _row(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return lm_objectives.row_logprob(lm_objectives.token_logprobs(logits, ids, mask), mask)
