"""One protocol over our decoder and over Hugging Face models: cache, padding, positions, taps, rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gnomon.base import seeds
from gnomon.model.backbone import (
    Backbone,
    HFBackbone,
    OwnBackbone,
    attention_mask,
    check_left_padded,
    positions_of,
)
from gnomon.model.decoder import Decoder, DecoderConfig

VOCAB = 64
KINDS = ("own", "own plain", "llama", "gpt2")


def backbone(kind: str) -> Backbone:
    """A small random model of each kind, with weights large enough that positions and context matter."""
    seeds.seed_torch("backbone", kind)
    if kind.startswith("own"):
        streams = 1 if kind == "own plain" else 4
        model = Decoder(DecoderConfig(vocab_size=VOCAB, channels=32, layers=3, heads=2, context=64, streams=streams))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        return OwnBackbone(model)
    shape: dict[str, Any] = {"vocab_size": VOCAB, "initializer_range": 0.2}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64, **shape,
        )  # fmt: skip
        return HFBackbone(LlamaForCausalLM(config))
    return HFBackbone(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, **shape)))


@pytest.fixture(params=KINDS, scope="module")
def net(request: pytest.FixtureRequest) -> Backbone:
    return backbone(request.param)


def tokens(rows: int, length: int, name: str = "ids") -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=seeds.torch_generator(name, rows, length))


def full(net: Backbone, ids: Tensor, **options: Any) -> Any:
    return net.step(ids, torch.ones_like(ids, dtype=torch.bool), net.new_cache(len(ids), 64), **options)


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    length = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = True
    return ids, mask


def close(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None and b is not None and a.shape == b.shape
    return bool((a - b).abs().max() <= 1e-5)


def test_shapes(net: Backbone) -> None:
    ids = tokens(2, 7)
    out = full(net, ids, want_taps=True)
    assert (net.n_layers, net.hidden_size, net.vocab_size, net.context) == (3, 32, VOCAB, 64)
    assert out.logits.shape == (2, VOCAB) and out.logits.dtype == torch.float32
    assert out.taps.shape == (2, 3, 32) and out.taps.dtype == torch.float32
    assert out.cache.length == 7
    every = full(net, ids, logits="all")
    assert every.logits.shape == (2, 7, VOCAB) and every.taps is None
    assert close(every.logits[:, -1], out.logits)
    assert full(net, ids, logits="none").logits is None


@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 1, 1, 5), (11, 1)])
def test_cached_equals_full(net: Backbone, cuts: tuple[int, ...]) -> None:
    ids = tokens(3, 12)
    wanted = full(net, ids, logits="all", want_taps=True)
    cache, at, seen = net.new_cache(3, 16), 0, []
    for cut in cuts:
        at += cut
        out = net.step(ids[:, at - cut : at], torch.ones(3, at, dtype=torch.bool), cache, logits="all", want_taps=True)
        seen.append(out.logits)
    assert wanted.logits.std() > 0.1
    assert close(torch.cat(seen, 1), wanted.logits)
    assert close(out.taps, wanted.taps)


def test_row_alone_equals_row_in_a_padded_batch(net: Backbone) -> None:
    """Prefill and three decoded tokens, rows of different length; also what stands in the padding is irrelevant."""
    rows = [tokens(1, n, "ragged")[0] for n in (3, 9, 6, 1)]
    ids, mask = left_padded(rows)
    ids[~mask] = 17
    cache = net.new_cache(4, 16)
    out = net.step(ids, mask, cache, want_taps=True)
    extra = tokens(4, 3, "extra")
    outs = [(out.logits, out.taps)]
    for t in range(3):
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.bool)], 1)
        out = net.step(extra[:, t : t + 1], mask, cache, want_taps=True)
        outs.append((out.logits, out.taps))
    for i, row in enumerate(rows):
        for t, (logits, taps) in enumerate(outs):
            alone = full(net, torch.cat([row, extra[i, :t]])[None], want_taps=True)
            assert close(logits[i : i + 1], alone.logits)
            assert close(taps[i : i + 1], alone.taps)


def test_select_reorders_and_repeats_rows(net: Backbone) -> None:
    rows = [tokens(1, n, "select")[0] for n in (4, 7, 2)]
    ids, mask = left_padded(rows)
    cache = net.new_cache(3, 16)
    net.step(ids, mask, cache)
    chosen = torch.tensor([2, 0, 0, 1, 2])
    cache.select(chosen)
    assert cache.length == 7
    new = tokens(5, 1, "new")
    mask = torch.cat([mask[chosen], torch.ones(5, 1, dtype=torch.bool)], 1)
    out = net.step(new, mask, cache)
    for i, row in enumerate(chosen.tolist()):
        assert close(out.logits[i : i + 1], full(net, torch.cat([rows[row], new[i]])[None]).logits)


def test_taps_are_the_states_after_every_block(net: Backbone) -> None:
    """[B, L, C]: against the model's own list of states, at the last position."""
    ids = tokens(2, 6)
    taps = full(net, ids, want_taps=True).taps
    with torch.no_grad():
        if isinstance(net, OwnBackbone):
            states = net.module(ids, want_states=True).states
        else:
            assert isinstance(net, HFBackbone)
            states = net.module(ids, output_hidden_states=True).hidden_states[1:]
    assert len(states) == net.n_layers
    for k, state in enumerate(states):
        assert close(taps[:, k], state[:, -1])
    assert (taps[:, 0] - taps[:, -1]).abs().max() > 1e-2


def test_positions_and_view() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    assert positions_of(mask, 5).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions_of(mask, 2).tolist() == [[1, 2], [3, 4]]
    view = attention_mask(mask, 2)
    assert view.shape == (2, 1, 2, 5)
    assert view[0, 0].tolist() == [[False, False, True, True, False], [False, False, True, True, True]]
    assert view[1, 0].tolist() == [[True, True, True, True, False], [True] * 5]
    assert attention_mask(mask, 5)[0, 0, 0].tolist() == [True, False, False, False, False]  # padding sees itself


def test_padding_elsewhere_is_refused(net: Backbone) -> None:
    bad = [[1, 1, 0], [1, 0, 1], [0, 0, 0]]
    for row in bad:
        with pytest.raises(AssertionError, match="padding must be on the left|last position"):
            check_left_padded(torch.tensor([[1, 1, 1], row], dtype=torch.bool))
        with pytest.raises(AssertionError, match="padding must be on the left|last position"):
            net.step(torch.ones(1, 3, dtype=torch.long), torch.tensor([row], dtype=torch.bool), net.new_cache(1, 8))
    check_left_padded(torch.tensor([[0, 0, 1], [1, 1, 1]], dtype=torch.bool))
