"""Optimisers and schedules. Hidden matrices go to Muon, everything else to AdamW (algorithms.md §1.2, §11)."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from gnomon.base.errors import ConfigError
from gnomon.training.muon import Muon, orthogonalised
from gnomon.training.parallel import on_whole


class OptimConfig(BaseModel):
    """Learning rates per kind of parameter. lr is Muon's; the others are AdamW's."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    lr: float = Field(default=0.01, gt=0)
    embed_lr: float = Field(default=0.02, gt=0)
    unembed_lr: float = Field(default=0.004, gt=0)
    hyper_lr: float = Field(default=0.005, gt=0)
    momentum: float = 0.95
    warmup: float = Field(default=0.01, ge=0, lt=1)
    decay: float = Field(default=0.45, ge=0, le=1, description="share of the run over which the rate falls linearly")
    floor: float = Field(default=0.02, ge=0, le=1)
    clip: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _warms_up_first(self) -> OptimConfig:
        if self.warmup + self.decay > 1:
            raise ConfigError(
                f"optim.warmup {self.warmup} + optim.decay {self.decay} exceed 1: the schedule would end before it "
                "has warmed up; lower one of them"
            )
        return self


def schedule(config: OptimConfig, fraction: float) -> float:
    """Warm-up, plateau, linear decay to `floor`: fraction of the run in [0, 1) -> factor on the learning rate."""
    if fraction < config.warmup:
        return max(fraction / config.warmup, 0.01)
    left = (1 - fraction) / config.decay if config.decay else 1.0
    return config.floor + (1 - config.floor) * min(1.0, left)


def build(model: nn.Module, config: OptimConfig) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over all trainable parameters of our own decoder."""
    matrices: list[nn.Parameter] = []
    rest: dict[str, list[nn.Parameter]] = {"embed": [], "unembed": [], "hyper": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "hyper" in name or parameter.ndim < 2:  # coefficients and gains
            rest["hyper"].append(parameter)
        elif "unembed" in name:
            rest["unembed"].append(parameter)
        elif "embed" in name:
            rest["embed"].append(parameter)
        else:
            assert parameter.ndim == 2, f"{name} is not a matrix; give it to AdamW"
            matrices.append(parameter)
    rates = {"embed": config.embed_lr, "unembed": config.unembed_lr, "hyper": config.hyper_lr}
    groups = [{"params": params, "lr": rates[kind]} for kind, params in rest.items() if params]
    return [
        Muon(matrices, lr=config.lr, momentum=config.momentum, orthogonalise=on_whole(orthogonalised)),
        torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
    ]
