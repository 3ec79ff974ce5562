"""gnomon's own decoder-only LM: pre-norm blocks on n residual streams (mHC), RoPE, QK-norm, squared ReLU.

The input of a position is its token's embedding plus a linear map of the embeddings of the few tokens before it. One
attention layer can then find "what followed this earlier", which otherwise takes two layers and a long plateau of
training (smeared keys: Olsson et al. 2022, "In-context learning and induction heads").

Legend: B rows, T positions, n streams, C channels, V vocabulary, L blocks. Tensors in, tensors out; no strings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gnomon.base.errors import unknown
from gnomon.model import fused
from gnomon.model.attention import Attention, record_mask, rms_norm, rope_table
from gnomon.model.cache import DecoderCache, KeyValues
from gnomon.model.fused import Linear, Segments
from gnomon.model.hyper import HyperConnection, gauges


class DecoderConfig(BaseModel):
    """Shape of the decoder. streams=1 builds the plain residual net without hyper parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(ge=8)
    channels: int = 192
    layers: int = 4
    heads: int = 4
    ffn: int = 4
    context: int = 512
    before: int = Field(default=3, ge=1, description="how many tokens before a position enter its input")
    streams: int = Field(default=4, ge=1)
    projection: Literal["exact", "sinkhorn"] = "exact"
    sinkhorn_iterations: int = 20
    rope_base: float = 10_000.0


# Sizes: micro ~1 M, nano 2-5 M, small ~30 M, base ~120 M parameters with their usual vocabularies.
PRESETS: dict[str, dict[str, int]] = {
    "micro": {"channels": 128, "layers": 4, "heads": 4, "context": 512},
    "nano": {"channels": 160, "layers": 6, "heads": 5, "context": 512},
    "small": {"channels": 512, "layers": 8, "heads": 8, "context": 1024},
    "base": {"channels": 768, "layers": 12, "heads": 12, "context": 2048},
}


def preset(name: str, vocab_size: int, **changes: object) -> DecoderConfig:
    """The named preset for a vocabulary, with any field changed."""
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return DecoderConfig.model_validate({"vocab_size": vocab_size, **PRESETS[name], **changes})


@dataclass
class DecoderOutput:
    """logits float32 [B, T', V] or None; states: per block the mean stream [B, T, C] when asked for."""

    logits: Tensor | None
    hidden: Tensor
    states: list[Tensor]


class FeedForward(nn.Module):
    """Squared-ReLU MLP; the output projection starts at zero."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.up = Linear(channels, factor * channels)
        self.out = Linear(factor * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.up) is Linear and type(self.out) is Linear and fused.usable(x):  # no adapter around them
            return fused.squared_relu_mlp(x, self.up.weight, self.out.weight)
        return self.out(F.relu(self.up(x)).square())


class Block(nn.Module):
    """Attention and MLP, each its own mHC sublayer (or plain residual adds with one stream)."""

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.attention = Attention(config.channels, config.heads)
        self.mlp = FeedForward(config.channels, config.ffn)
        self.streams = config.streams
        if config.streams > 1:
            options = (config.projection, config.sinkhorn_iterations)
            self.hyper = nn.ModuleList(
                HyperConnection(config.streams, config.channels, 2 * index + part, *options) for part in range(2)
            )

    def forward(
        self, x: Tensor, table: Tensor, mask: Tensor | Segments | None, cache: KeyValues | None, index: int
    ) -> Tensor:
        """x [B, T, C] (one stream) or [B, T, n, C] -> the same shape."""
        if isinstance(mask, Segments):
            return self._fused(x, table, mask)
        layer = partial(cache.append, index) if cache is not None else None
        if self.streams == 1:
            x = x + self.attention(rms_norm(x), table, mask, layer)
            return x + self.mlp(rms_norm(x))
        batch, length = x.shape[:2]
        flat = x.flatten(0, 1)
        first, second = self.hyper
        y, post, comb = first.read(flat)
        z = self.attention(rms_norm(y).unflatten(0, (batch, length)), table, mask, layer)
        flat = first.write(flat, z.flatten(0, 1), post, comb)
        y, post, comb = second.read(flat)
        flat = second.write(flat, self.mlp(rms_norm(y)), post, comb)
        return flat.unflatten(0, (batch, length))

    def _fused(self, x: Tensor, table: Tensor, records: Segments) -> Tensor:
        """The same on whole sequences in float32, with compiled gradients."""
        shape, flat = x.shape[:2], x.flatten(0, 1)

        def attend(y: Tensor) -> Tensor:
            return self.attention(y.unflatten(0, shape), table, records, None).flatten(0, 1)  # type: ignore[no-any-return]

        if self.streams == 1:
            flat, y = fused.add_norm(flat, None)
            flat, y = fused.add_norm(flat, attend(y))
            flat = flat + self.mlp(y)
        elif self.hyper[0].projection == "exact":
            first, second = (hyper.reading() for hyper in self.hyper)
            flat, y, held = fused.hyper_read(flat, first)
            flat, y, held = fused.hyper_pass(flat, attend(y), held, second)
            flat = fused.hyper_write(flat, self.mlp(y), held)
        else:
            first, second = self.hyper
            y, post, comb = first.read(flat)
            flat = first.write(flat, attend(rms_norm(y)), post, comb)
            y, post, comb = second.read(flat)
            flat = second.write(flat, self.mlp(rms_norm(y)), post, comb)
        return flat.unflatten(0, shape)


def previous_tokens(ids: Tensor, mask: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The K real tokens before each new one, and the last K real tokens of each row.

    ids int64 [B, T]; mask bool [B, S + T], False at padding, wherever it stands; last int64 [B, K]: the newest real
    tokens among the S cached positions, newest at the right, -1 = none.
    -> (int64 [B, T, K], nearest first, -1 where there is none; int64 [B, K] as `last`).
    """
    (batch, new), depth = ids.shape, last.shape[1]
    real = mask[:, -new:].long()
    upto = real.cumsum(-1)
    # Real tokens side by side behind `last`; padding goes to a slot that nobody reads.
    slots = torch.where(real.bool(), depth + upto - 1, depth + new)
    line = torch.cat([last, ids.new_full((batch, new + 1), -1)], dim=1).scatter(1, slots, ids)
    back = torch.arange(1, depth + 1, device=ids.device)
    previous = line.gather(1, ((depth + upto - real).unsqueeze(-1) - back).flatten(1)).view(batch, new, depth)
    return previous, line.gather(1, upto[:, -1:] + back - 1)


class Decoder(nn.Module):
    """The whole network. Initialisation is drawn from torch's global generator (seed it by name first)."""

    rope: Tensor

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.channels)
        self.before = Linear(config.before * config.channels, config.channels)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.unembed = Linear(config.channels, config.vocab_size)
        size = config.channels // config.heads
        table = torch.empty(config.context, 2, size // 2, dtype=torch.float32)  # whatever the default dtype is
        self.register_buffer("rope", table, persistent=False)
        self.make_tables()
        self.checkpointing = False
        self.initialise()

    @torch.no_grad()
    def make_tables(self) -> None:
        """Fill the rotary table, which is not saved with the weights."""
        c = self.config
        self.rope.copy_(rope_table(c.context, c.channels // c.heads, c.rope_base))

    @torch.no_grad()
    def initialise(self) -> None:
        """Zero output projections and map of the tokens before, gains of 1, a small unembedding.

        Elsewhere uniform with standard deviation 1/sqrt(C).
        """
        width = self.config.channels
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.zeros_(self.before.weight)
        nn.init.normal_(self.unembed.weight, std=0.02)
        bound = (3.0 / width) ** 0.5
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.uniform_(block.attention.qkv.weight, -bound, bound)
            nn.init.uniform_(block.mlp.up.weight, -bound, bound)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.ones_(block.attention.gain)
            nn.init.zeros_(block.mlp.out.weight)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | Literal["records"] | None = None,
        cache: KeyValues | None = None,
        *,
        previous: Tensor | None = None,
        want_states: bool = False,
        logits: Literal["all", "last", "none"] = "all",
        steer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> DecoderOutput:
        """ids int64 [B, T]; positions int64 [B, T] (default 0..T-1); mask bool [B, 1, T, S] or None = causal.

        mask "records": rows hold several records, each seen by itself alone; one begins wherever a position is 0.
        previous int64 [B, T, K]: the tokens before each, nearest first, -1 = none (see `previous_tokens`). Default:
        the columns to the left, down to position 0; with a cache it must be given. steer: what is done to the output of
        a block (index, [B, T, n, C]), see `steering.Steer`.
        """
        length = ids.shape[1]
        table = self.rope[None, :length] if positions is None else self.rope[positions]
        assert cache is None or previous is not None, "a cached pass needs the tokens before its own"
        x = self.input(ids, positions, previous)
        packed = positions if mask == "records" else None
        view: Tensor | Segments | None
        if cache is None and not isinstance(mask, Tensor) and fused.usable(x):
            view = fused.segments(ids.shape[0], length, packed, table)
            x = fused.add_norm(x.flatten(0, 1), None)[1].view(x.shape)
        else:
            view = mask if isinstance(mask, Tensor) else None if packed is None else record_mask(packed)
            x = rms_norm(x)
        if self.config.streams > 1:
            x = x.unsqueeze(-2).expand(-1, -1, self.config.streams, -1)
        states = []
        for index, block in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(block, x, table, view, cache, index, use_reentrant=False)
            else:
                x = block(x, table, view, cache, index)
            if steer is not None:
                x = steer(index, x)
            if want_states:
                states.append(self.collapse(x))
        if cache is not None:
            cache.advance(length)
        hidden = rms_norm(self.collapse(x))
        if logits == "none":
            return DecoderOutput(None, hidden, states)
        seen = hidden[:, -1:] if logits == "last" else hidden
        return DecoderOutput(self.unembed(seen).float(), hidden, states)

    def input(self, ids: Tensor, positions: Tensor | None, previous: Tensor | None) -> Tensor:
        """Input of every position before its norm [B, T, C]; arguments as in `forward`."""
        x = self.embed(ids)
        if previous is not None:
            near = self.embed(previous.clamp_min(0)) * (previous >= 0).unsqueeze(-1)
            return x + self.before(near.flatten(-2))
        at = torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions
        # Shifting what is embedded already spares the gradient of K more look-ups.
        shifted = [x.roll(k, dims=1) * (at >= k).unsqueeze(-1) for k in range(1, self.config.before + 1)]
        return x + self.before(torch.cat(shifted, dim=-1))

    def collapse(self, x: Tensor) -> Tensor:
        """Streams -> one vector per position (their mean; algorithms.md §1.1)."""
        return x.mean(-2) if self.config.streams > 1 else x

    def new_cache(self, batch: int, capacity: int) -> DecoderCache:
        c = self.config
        return DecoderCache(c.layers, batch, c.heads, capacity, c.channels // c.heads, self.unembed.weight, c.before)

    @torch.no_grad()
    def health(self, ids: Tensor) -> list[dict[str, float]]:
        """mHC gauges per sublayer on a batch of ids [B, T]; empty for a plain net."""
        readings: list[dict[str, float]] = []

        def recording(hyper: HyperConnection) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
            def read(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                result = HyperConnection.read(hyper, x)
                readings.append(gauges(result[2], x))
                return result

            return read

        hypers = [m for m in self.modules() if isinstance(m, HyperConnection)]
        try:
            for hyper in hypers:
                hyper.read = recording(hyper)  # type: ignore[assignment, method-assign]
            self(ids, logits="none")
        finally:
            for hyper in hypers:
                del hyper.read
        return readings
