"""A base model on whole sequences, with gradients: what training calls, our decoder and Hugging Face models alike.

Legend: B rows, T positions (padded on the right), L blocks, C channels, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gnomon.model.blocks import block_list
from gnomon.model.decoder import Decoder
from gnomon.model.steering import Steer, steered


class LMOutput(NamedTuple):
    """logits float32 [B, T, V] or None; states float32 [B, L, C] at one position of every row, or None."""

    logits: Tensor | None
    states: Tensor | None


class LM:
    """Rows begin at position 0; padding stands behind them, where no real position sees it."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._blocks = block_list(module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    def __call__(
        self, ids: Tensor, *, logits: bool = True, states_at: Tensor | None = None, steer: Steer | None = None
    ) -> LMOutput:
        """ids int64 [B, T]; states_at int64 [B]: the position of each row whose block outputs are wanted."""
        if isinstance(self.module, Decoder):
            kept = "all" if logits else "none"
            out = self.module(ids, want_states=states_at is not None, logits=kept, steer=steer)
            return LMOutput(out.logits, None if states_at is None else _at(out.states, states_at))
        with steered(self._blocks, steer) as touched:
            out = self.module(input_ids=ids, use_cache=False, output_hidden_states=states_at is not None)
        states = None
        if states_at is not None:
            found = [touched.get(i, h) if i < len(self._blocks) - 1 else h for i, h in enumerate(out.hidden_states[1:])]
            states = _at(found, states_at)
        return LMOutput(out.logits.float() if logits else None, states)


def _at(states: list[Tensor], where: Tensor) -> Tensor:
    """States [B, T, C] of every block -> float32 [B, L, C] at one position a row."""
    row = torch.arange(len(where), device=where.device)
    return torch.stack([s[row, where] for s in states], 1).float()
