"""Steerer: the part of the layer that acts on the base inside a thought, a feedback gate and side adapters.

N rows · P proj_dim · K plans · C channels of the base · L blocks
"""

from __future__ import annotations

import hashlib

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gnomon.base.errors import ModelError
from gnomon.metacognition.adapters import SideAdapters
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.gate import FeedbackGate
from gnomon.model.steering import Steering


class SteerConfig(BaseModel):
    """gate_layer: the block whose output the gate multiplies, "middle", or None = no gate.

    adapter_layers: blocks with a side adapter, "all", or () = none. rank: of the adapters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gate_layer: int | str | None = Field(default="middle", description='a block number, "middle", or null')
    adapter_layers: tuple[int, ...] | str = Field(default="all", description='block numbers or "all"')
    rank: int = Field(default=8, ge=1)

    def resolved(self, n_layers: int) -> SteerConfig:
        """With block numbers in place of words. Raises ModelError for a block that the base does not have."""
        gate, blocks = self.gate_layer, self.adapter_layers
        if isinstance(gate, str):
            if gate != "middle":
                raise ModelError(f'gate_layer {gate!r} is no block; give a number below {n_layers}, "middle" or null')
            gate = n_layers // 2
        if isinstance(blocks, str):
            if blocks != "all":
                raise ModelError(f'adapter_layers {blocks!r} are no blocks; give numbers below {n_layers} or "all"')
            blocks = tuple(range(n_layers))
        for name, given in (("gate_layer", () if gate is None else (gate,)), ("adapter_layers", blocks)):
            bad = [k for k in given if not 0 <= k < n_layers]
            twice = sorted({k for k in given if given.count(k) > 1})
            if bad or twice:
                told = ", ".join(map(str, bad or twice)) + ("" if bad else " more than once")
                raise ModelError(
                    f"{name} names {told}, but the blocks of this base are 0 to {n_layers - 1}, each at most once"
                )
        if gate is None and not blocks:
            raise ModelError("a steerer with neither gate nor adapters does nothing; leave it out")
        return SteerConfig(gate_layer=gate, adapter_layers=tuple(sorted(blocks)), rank=self.rank)


class Steerer(nn.Module):
    """Gate and adapters over one base. The identity at initialisation; `steering` is what a pass gets.

    Raises ModelError where the config names blocks that the base does not have.
    """

    def __init__(self, config: SteerConfig, heads: MetacogConfig) -> None:
        super().__init__()
        self.config = config.resolved(heads.n_layers)
        gate, blocks = self.config.gate_layer, self.config.adapter_layers
        assert not isinstance(gate, str) and not isinstance(blocks, str)
        self.gate_layer = gate
        self.channels = heads.hidden_size
        self.gate = None if gate is None else FeedbackGate(heads.proj_dim, heads.n_plans, heads.hidden_size)
        self.adapters = SideAdapters(blocks, heads.hidden_size, self.config.rank) if blocks else None

    def steering(self) -> Steering:
        """Views of the present weights, with gradients. Make a new one after an optimiser step on a compiled base."""
        return Steering(self.gate_layer, {} if self.adapters is None else self.adapters.by_block())

    def vectors(self, g: Tensor, plan: Tensor, confidence: Tensor) -> Tensor:
        """g [N, P], plan int64 [N], confidence logit [N] -> gate vectors [N, C]; ones without a gate."""
        if self.gate is None:
            return g.new_ones(len(g), self.channels)
        found: Tensor = self.gate(g, plan, confidence)
        return found

    def fingerprint(self) -> str:
        """Hash of configuration and weights."""
        digest = hashlib.sha256(self.config.model_dump_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def telemetry(vectors: Tensor, seen: dict[int, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Gauges of one pass: distance of the gate from the identity, share of open adapters, their expected activity.

    vectors [N, C]; seen: block -> (log α [tokens], gates [tokens]) over think tokens (`Steer.seen`).
    """
    away = (vectors - 1.0).square().mean(-1).sqrt()
    gauges = {"gate/rms": float(away.mean()), "gate/rms_max": float(away.max())}
    if seen:
        gates = torch.stack([gate.float() for _, gate in seen.values()])
        gauges["gate/activity"] = float(gates.mean())
        gauges["gate/coverage"] = float((gates > 0).float().mean())
    return gauges
