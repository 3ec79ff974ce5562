"""The preallocated cache: what is appended comes back in order, per layer; rows can be chosen."""

from __future__ import annotations

import pytest
import torch

from gnomon.base import seeds
from gnomon.model.cache import DecoderCache


def filled() -> tuple[DecoderCache, list[torch.Tensor]]:
    cache = DecoderCache(layers=2, batch=3, heads=2, capacity=8, head_size=4, like=torch.zeros(1))
    generator = seeds.torch_generator("cache")
    parts = [torch.randn(2, 2, 3, 2, t, 4, generator=generator) for t in (5, 1)]  # layer, k or v, B, H, T, D
    for part in parts:
        for layer in range(2):
            cache.append(layer, part[layer, 0], part[layer, 1])
        cache.advance(part.shape[4])
    return cache, parts


def test_append_returns_everything_so_far() -> None:
    cache, parts = filled()
    assert cache.length == 6
    whole = torch.cat(parts, dim=4)
    more = torch.randn(2, 3, 2, 2, 4, generator=seeds.torch_generator("more"))
    for layer in range(2):
        k, v = cache.append(layer, more[0], more[1])
        assert torch.equal(k, torch.cat([whole[layer, 0], more[0]], 2))
        assert torch.equal(v, torch.cat([whole[layer, 1], more[1]], 2))
    assert cache.length == 6  # advances once per forward pass, not per layer


def test_select() -> None:
    cache, parts = filled()
    cache.select(torch.tensor([2, 0, 2, 1]))
    whole = torch.cat(parts, dim=4)
    assert cache.length == 6
    for layer in range(2):
        assert cache.store[layer].shape[1] == 4
        assert torch.equal(cache.store[layer][0, 2, :, :6], whole[layer, 0, 2])
        assert torch.equal(cache.store[layer][1, 3, :, :6], whole[layer, 1, 1])
    cache.append(0, torch.ones(4, 2, 1, 4), torch.ones(4, 2, 1, 4))  # goes on with the new rows


def test_full() -> None:
    cache, _ = filled()
    with pytest.raises(RuntimeError):
        cache.append(0, torch.ones(3, 2, 3, 4), torch.ones(3, 2, 3, 4))


def test_dtype_and_device_follow_the_model() -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    assert DecoderCache(1, 1, 1, 4, 2, like).store[0].dtype == torch.bfloat16
