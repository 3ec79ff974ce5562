"""What decoding and metacognition see of a base model, our own decoder and any Hugging Face causal LM alike.

Sequences stand in slots of a cache and grow by `extend`; rows of one call are a run of neighbouring slots, so that no
cache is ever gathered. Legend: R rows, T new tokens, L blocks, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gnomon.model.decoder import Decoder
from gnomon.model.slots import Pass, SlotCache, TensorSlots, row_bucket, start_pass
from gnomon.model.steering import Steer

Logits = Literal["last", "all", "none"]
Tokens = Sequence[Sequence[int]]
Taps = bool | Sequence[int]  # rows whose states are wanted; True: all


@dataclass
class BackboneOutput:
    """logits float32: [R, V] of each row's last token ("last"), [sum of tokens, V] row after row ("all") or None;
    taps float32 [W, L, C]: the state of every block at the last token of each wanted row, or None."""

    logits: Tensor | None
    taps: Tensor | None


class Backbone(Protocol):
    """A causal LM for inference. `context` is the largest number of positions."""

    n_layers: int
    hidden_size: int
    vocab_size: int
    context: int

    @property
    def device(self) -> torch.device:
        """Where outputs live."""

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        """Empty slots for at most `capacity` positions each."""

    def extend(
        self,
        cache: Any,
        tokens: Tokens,
        first: int = 0,
        *,
        logits: Logits = "last",
        taps: Taps = False,
        steer: Steer | None = None,
    ) -> BackboneOutput:
        """Append tokens[r] (one or more ids each) to slot first + r. The caller keeps within capacity and context.

        steer: what a metacognitive layer does to some of these tokens, `at` one number a token.
        """


def picked(values: Tensor, run: Pass, rows: int, logits: Logits) -> Tensor:
    """values [R', T, *] -> those that `logits` asks for, of the first `rows` rows: [rows, *] or [sum of tokens, *]."""
    if logits == "all":
        real = torch.arange(values.shape[1], device=values.device) <= run.last[:rows, None]
        return values[:rows][real]
    if values.shape[1] == 1:
        return values[:rows, 0]
    return values[torch.arange(rows, device=values.device), run.last[:rows]]


def wanted(taps: Taps, rows: int) -> Sequence[int]:
    """The rows whose states are asked for."""
    if isinstance(taps, bool):
        return range(rows) if taps else ()
    return taps


def stacked(states: Sequence[Tensor], asked: Sequence[int]) -> Tensor | None:
    """States [R, C] of every block -> float32 [W, L, C] of the rows asked for."""
    if not asked:
        return None
    found = torch.stack(list(states), 1).float()
    return found if list(asked) == list(range(len(found))) else found[list(asked)]


def laid_out(steer: Steer | None, run: Pass) -> Steer | None:
    """Steering on the grid of a pass, None where no token of it is steered."""
    if steer is None or steer.idle:
        return None
    rows, width = run.ids.shape
    return steer.on_grid(run.counts.tolist(), rows, width, run.ids.device)


class OwnBackbone:
    """Our decoder in torch, on any device."""

    def __init__(self, decoder: Decoder):
        self.module = decoder.eval()
        config = decoder.config
        self.n_layers, self.hidden_size = config.layers, config.channels
        self.vocab_size, self.context = config.vocab_size, config.context

    @property
    def device(self) -> torch.device:
        return self.module.unembed.weight.device

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        c = self.module.config
        size = c.channels // c.heads
        return TensorSlots(c.layers, row_bucket(slots), c.heads, capacity, size, self.module.unembed.weight)

    @torch.inference_mode()
    def extend(
        self,
        cache: Any,
        tokens: Tokens,
        first: int = 0,
        *,
        logits: Logits = "last",
        taps: Taps = False,
        steer: Steer | None = None,
    ) -> BackboneOutput:
        rows, asked = len(tokens), wanted(taps, len(tokens))
        run = start_pass(cache, tokens, first, self.context)
        out = self.module(
            run.ids,
            run.places,
            run.mask,
            run,
            previous=run.previous(self.module.config.before),
            want_states=bool(asked),
            logits="none",
            steer=laid_out(steer, run),
        )
        scores = None if logits == "none" else self.module.unembed(picked(out.hidden, run, rows, logits)).float()
        return BackboneOutput(scores, stacked([picked(s, run, rows, "last") for s in out.states], asked))
