"""The shape of the metacognitive layer as one frozen, validated value."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gnomon.base.errors import unknown
from gnomon.metacognition.policy import GRID
from gnomon.protocol.tags import STRATEGIES

# Where a state was read. Every phase and path reads the same positions (decisions.md §1).
SITES: Final[tuple[str, ...]] = ("prompt", "think", "boundary", "end")
PROMPT, THINK_SITE, BOUNDARY, END = range(4)


class MetacogConfig(BaseModel):
    """Sizes and options of the heads; kept beside their weights as JSON.

    n_layers, hidden_size: of the backbone's taps [N, L, C].
    layers: the tapped blocks that are used; None = all of them (`linked_all_layers`).
    experts_per_layer: plan/budget/confidence experts per layer, mixed by a learned softmax gate.
    values: also say, per plan, how likely it solves the problem and what it costs (False in layers of older files).
    policy: entries of policy.GRID that a decoding-policy head tells apart; 0 = no such head.
    closing: what confidence at boundaries is of: that closing there gives a right answer; False (all layers from before
    2026-11-21, fifth session): that the whole thought will.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    proj_dim: int = Field(default=64, ge=2)
    width: int = Field(default=128, ge=2)
    plans: tuple[str, ...] = STRATEGIES
    aggregator: Literal["attention", "mean"] = "attention"
    layers: tuple[int, ...] | None = None
    experts_per_layer: int = Field(default=1, ge=1, le=16)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    values: bool = False
    policy: int = 0
    closing: bool = False

    @model_validator(mode="after")
    def _names(self) -> MetacogConfig:
        if len(set(self.plans)) != len(self.plans) or not self.plans:
            raise ValueError(f"plans must be distinct and not empty, got {self.plans}")
        for name in self.plans:
            if name not in STRATEGIES:
                raise unknown("plan", name, STRATEGIES)
        if self.layers is not None:
            bad = [k for k in self.layers if not 0 <= k < self.n_layers]
            if bad:
                raise ValueError(f"no layer {bad[0]}: the base has {self.n_layers} blocks, 0 to {self.n_layers - 1}")
            if not self.layers or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"layers must be ascending block numbers, at least one, got {self.layers}")
        if self.policy != 0 and not 2 <= self.policy <= len(GRID):
            raise ValueError(f"policy must be 0 (no head) or 2 to {len(GRID)} entries of the grid, got {self.policy}")
        return self

    @property
    def n_plans(self) -> int:
        """K, the number of strategies that the plan head tells apart."""
        return len(self.plans)

    @property
    def linked_all_layers(self) -> bool:
        """True when every block of the backbone is tapped."""
        return self.layers is None

    @property
    def used_layers(self) -> tuple[int, ...]:
        """The tapped blocks, ascending."""
        return self.layers if self.layers is not None else tuple(range(self.n_layers))
