"""Do gate and adapters act on a base where they should, and nowhere else? A group of `gnomon check backbone`.

Measured on random rows, from outside, with a fresh layer (the identity) and a random one (decisions.md §6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from gnomon.base import seeds
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.steerer import SteerConfig, Steerer
from gnomon.model.backbone import Backbone
from gnomon.model.lm import LM
from gnomon.model.steering import Steer, Steering

MEANING: Final[dict[str, str]] = {
    "identity": "logits under a fresh gate and fresh adapters that differ from the base's, by any bit",
    "outside": "logits in front of a thought, and of sequences without one, that gate and adapters change by any bit",
    "acts": "0 where random gate and adapters change what follows a thought, 1 where they do nothing",
    "trained": "logits of the training pass against those of decoding, steered, in standard deviations",
}


def steered(backbone: Backbone, rows: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Worst finding by the names of MEANING; rows of at least two tokens, a thought from the middle of each on."""
    rows = [row for row in rows if len(row) > 2]
    fresh, wild = (_steering(backbone, scale) for scale in (0.0, 1.0))
    at = [r if t >= len(row) // 2 else -1 for r, row in enumerate(rows) for t in range(len(row))]
    before = torch.tensor([t < len(row) // 2 for row in rows for t in range(len(row))])
    gates = torch.ones(len(rows), backbone.hidden_size)
    swayed = 1.0 + 0.3 * torch.randn(gates.shape, generator=seeds.torch_generator("acting gates"))
    plain = _logits(backbone, rows, None)
    same = _logits(backbone, rows, Steer(fresh, gates, at))
    nowhere = _logits(backbone, rows, Steer(wild, swayed, [-1] * len(at)))
    there = _logits(backbone, rows, Steer(wild, swayed, at))
    return {
        "identity": float((same != plain).sum()),
        "outside": float((nowhere != plain).sum() + (there[before] != plain[before]).sum()),
        "acts": float(not bool((there[~before] - plain[~before]).abs().max() > 1e-3)),
        "trained": _trained(backbone, rows, Steer(wild, swayed, at), there),
    }


def _steering(backbone: Backbone, scale: float) -> Steering:
    heads = MetacogConfig(n_layers=backbone.n_layers, hidden_size=backbone.hidden_size)
    with seeds.undisturbed():
        seeds.seed_torch("acting", scale)
        made = Steerer(SteerConfig(), heads).eval()
        with torch.no_grad():
            for parameter in made.parameters() if scale else ():
                parameter += scale * torch.randn_like(parameter) / (parameter.shape[-1] if parameter.ndim else 1) ** 0.5
    return made.steering()


@torch.inference_mode()
def _logits(backbone: Backbone, rows: Sequence[tuple[int, ...]], steer: Steer | None) -> Tensor:
    """[sum of tokens, V]"""
    cache = backbone.new_cache(len(rows), max(map(len, rows)))
    out = backbone.extend(cache, rows, logits="all", steer=steer)
    assert out.logits is not None
    return out.logits.cpu()


@torch.no_grad()
def _trained(backbone: Backbone, rows: Sequence[tuple[int, ...]], steer: Steer, served: Tensor) -> float:
    """The pass of training over the same rows, padded on the right."""
    lm = LM(backbone.module)  # type: ignore[attr-defined]
    counts, width = [len(row) for row in rows], max(map(len, rows))
    grid = torch.zeros(len(rows), width, dtype=torch.int64)
    for r, row in enumerate(rows):
        grid[r, : len(row)] = torch.tensor(row)
    steering = steer.steering.on(lm.device)
    laid = Steer(steering, steer.vectors, steer.at).on_grid(counts, len(rows), width, lm.device)
    logits = lm(grid.to(lm.device), steer=laid).logits
    assert logits is not None
    got = torch.cat([logits[r, :n] for r, n in enumerate(counts)]).cpu()
    return float((got - served).abs().max() / served.std())
