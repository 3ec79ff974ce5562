"""Small random models of every kind behind the backbone protocol, and sequences for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from gnomon.base import seeds
from gnomon.model.backbone import Backbone, BackboneOutput
from gnomon.model.decoder import Decoder, DecoderConfig

VOCAB, CONTEXT = 64, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SHARED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2}
WINDOW = {"sliding_window": 5}
ENDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SHARED),
    "llama tied": lambda: LlamaConfig(**SHARED, head_dim=16, tie_word_embeddings=True),
    "llama biased": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SHARED, sliding_window=None),
    "mistral sliding": lambda: MistralConfig(**SHARED, **WINDOW),
    "qwen2": lambda: Qwen2Config(**SHARED),
    "qwen2 sliding": lambda: Qwen2Config(**SHARED, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SHARED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SHARED, **WINDOW, head_dim=16, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**SHARED, **WINDOW, head_dim=16, sliding_window_pattern=2),
    "phi3": lambda: Phi3Config(**SHARED),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, initializer_range=0.2, **ENDS),
    "neox": lambda: GPTNeoXConfig(**SHAPE),
    "opt": lambda: OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=CONTEXT,
        word_embed_proj_dim=32, init_std=0.2, pad_token_id=0, **ENDS,
    ),
}  # fmt: skip


def hf_model(family: str) -> Any:
    """A new model of the family, large random weights, random gains and biases."""
    seeds.seed_torch("net", family)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]())
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.2 * torch.randn_like(p)
    return model.eval()


def decoder(streams: int, projection: str = "exact", **shape: Any) -> Decoder:
    """Our decoder with noise on every parameter: fresh output projections are zero and would hide everything."""
    seeds.seed_torch("net", streams, projection)
    config = {"vocab_size": VOCAB, "channels": 32, "layers": 3, "heads": 2, "context": CONTEXT, **shape}
    model = Decoder(DecoderConfig(streams=streams, projection=projection, **config))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


@functools.lru_cache(maxsize=64)
def draw(length: int, *name: object) -> tuple[int, ...]:
    """`length` random ids."""
    return tuple(torch.randint(0, VOCAB, (length,), generator=seeds.torch_generator(*name, length)).tolist())


def alone(net: Backbone, ids: Any, **options: Any) -> BackboneOutput:
    """One sequence in one call, in a cache of its own."""
    return net.extend(net.new_cache(1, CONTEXT), [tuple(ids)], **options)


def used_cache(net: Backbone, slots: int) -> Any:
    """Slots in which longer sequences stood before; what they left behind must never be seen."""
    cache = net.new_cache(slots, CONTEXT)
    net.extend(cache, [draw(CONTEXT - r, "left behind", r) for r in range(slots)], logits="none")
    for slot in range(slots):
        cache.cut(slot)
    return cache


def gap(a: Tensor | None, b: Tensor | None) -> float:
    """Greatest difference."""
    assert a is not None and b is not None and a.shape == b.shape
    return float((a - b).abs().max())


def log_gap(a: Tensor | None, b: Tensor | None) -> float:
    """Greatest difference of log-probabilities."""
    assert a is not None and b is not None
    return gap(a.log_softmax(-1), b.log_softmax(-1))
