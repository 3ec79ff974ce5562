"""What decoding and metacognition see of a base model, our own decoder and any Hugging Face causal LM alike.

Legend: B rows, T new tokens, S cached positions, L blocks, C channels, V vocabulary. Rows are left-padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gnomon.model.cache import DecoderCache
from gnomon.model.decoder import Decoder, previous_tokens

Logits = Literal["last", "all", "none"]


class Cache(Protocol):
    """Keys and values of a batch; `length` counts cached positions, padding included."""

    length: int

    def select(self, rows: Tensor) -> None:
        """Keep, repeat or reorder rows in place: rows int64 [B']."""


@dataclass
class BackboneOutput:
    """logits float32 [B, V] ("last"), [B, T, V] ("all") or None; taps float32 [B, L, C] (last position) or None."""

    logits: Tensor | None
    taps: Tensor | None
    cache: Any


class Backbone(Protocol):
    """A causal LM for inference. `context` is the largest number of positions."""

    n_layers: int
    hidden_size: int
    vocab_size: int
    context: int

    @property
    def device(self) -> torch.device:
        """Where ids, masks and outputs live."""

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows and at most `capacity` positions."""

    def step(
        self, ids: Tensor, mask: Tensor, cache: Any, *, logits: Logits = "last", want_taps: bool = False
    ) -> BackboneOutput:
        """ids int64 [B, T]; mask bool [B, S + T], False at padding, which may only stand on the left."""


def positions_of(mask: Tensor, new: int) -> Tensor:
    """Position of each new token counted from the row's first real token: mask bool [B, S + T] -> int64 [B, T]."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -new:]


def attention_mask(mask: Tensor, new: int) -> Tensor:
    """Which positions each new token may look at: mask bool [B, S + T] -> bool [B, 1, T, S + T].

    A padding position looks at itself alone, so that no row of the softmax is empty.
    """
    total = mask.shape[1]
    index = torch.arange(total, device=mask.device)
    query = index[total - new :]
    causal = index[None, :] <= query[:, None]
    itself = index[None, :] == query[:, None]
    return ((mask[:, None, :] & causal) | itself)[:, None]


def check_left_padded(mask: Tensor) -> None:
    """Padding may only stand on the left of a row and never fill it."""
    assert bool((mask[:, 1:].long() >= mask[:, :-1].long()).all()), "padding must be on the left of every row"
    assert bool(mask[:, -1].all()), "the last position of every row must be a real token"


class OwnBackbone:
    """Our decoder behind the protocol."""

    def __init__(self, decoder: Decoder):
        self.module = decoder.eval()
        config = decoder.config
        self.n_layers, self.hidden_size = config.layers, config.channels
        self.vocab_size, self.context = config.vocab_size, config.context

    @property
    def device(self) -> torch.device:
        return self.module.unembed.weight.device

    def new_cache(self, batch: int, capacity: int) -> DecoderCache:
        return self.module.new_cache(batch, capacity)

    @torch.inference_mode()
    def step(
        self, ids: Tensor, mask: Tensor, cache: DecoderCache, *, logits: Logits = "last", want_taps: bool = False
    ) -> BackboneOutput:
        if cache.length == 0:
            check_left_padded(mask)
        new = ids.shape[1]
        previous, cache.last = previous_tokens(ids, mask, cache.last)
        out = self.module(
            ids,
            positions_of(mask, new),
            attention_mask(mask, new),
            cache,
            previous=previous,
            want_states=want_taps,
            logits=logits,
        )
        taps = torch.stack([s[:, -1] for s in out.states], dim=1).float() if want_taps else None
        scores = out.logits[:, -1] if logits == "last" and out.logits is not None else out.logits
        return BackboneOutput(scores, taps, cache)


class HFCache:
    """A transformers DynamicCache with the operations that the engine needs."""

    def __init__(self, cache: Any):
        self.cache = cache
        self.length = 0

    def select(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)


class HFBackbone:
    """Any Hugging Face causal LM behind the protocol; the model's own code is not touched."""

    def __init__(self, model: Any):
        self.module = model.eval()
        config = model.config.get_text_config()
        self.n_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.vocab_size, self.context = config.vocab_size, config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def new_cache(self, batch: int, capacity: int) -> HFCache:
        from transformers import DynamicCache

        return HFCache(DynamicCache(config=self.module.config))

    @torch.inference_mode()
    def step(
        self, ids: Tensor, mask: Tensor, cache: HFCache, *, logits: Logits = "last", want_taps: bool = False
    ) -> BackboneOutput:
        if cache.length == 0:
            check_left_padded(mask)
        out = self.module(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions_of(mask, ids.shape[1]),
            past_key_values=cache.cache,
            use_cache=True,
            output_hidden_states=want_taps,
            logits_to_keep=0 if logits == "all" else 1,
        )
        cache.length += ids.shape[1]
        taps = torch.stack([h[:, -1] for h in out.hidden_states[1:]], dim=1).float() if want_taps else None
        if logits == "none":
            return BackboneOutput(None, taps, cache)
        scores = out.logits.float()
        return BackboneOutput(scores if logits == "all" else scores[:, -1], taps, cache)
