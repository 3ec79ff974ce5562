"""Every family of Hugging Face models in slots equals its own plain forward pass, or is refused with a reason."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from tests.model.nets import ENDS, FAMILIES, SHAPE, SHARED, VOCAB, draw, gap, hf_model, log_gap, used_cache
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPTNeoConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
)

from gnomon.base.errors import ModelError
from gnomon.model.foreign import HFBackbone


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_equal_the_plain_forward_pass(family: str) -> None:
    """Ragged rows, several calls, beyond every sliding window, in slots that held longer sequences."""
    model = hf_model(family)
    net = HFBackbone(model)
    rows = [draw(n, family) for n in (30, 12, 7)]
    cache = used_cache(net, 3)
    net.extend(cache, [row[: len(row) // 2] for row in rows], logits="none")
    middle = net.extend(cache, [row[len(row) // 2 : -1] for row in rows], logits="all")
    out = net.extend(cache, [row[-1:] for row in rows], taps=True)
    assert middle.logits is not None and out.logits is not None and out.taps is not None
    pieces = middle.logits.split([len(row) - len(row) // 2 - 1 for row in rows])
    for r, row in enumerate(rows):
        with torch.no_grad():
            plain = model(torch.tensor([row]), output_hidden_states=True)
        assert plain.logits.std() > 0.3
        assert log_gap(pieces[r], plain.logits[0, len(row) // 2 : -1]) <= 1e-4
        assert log_gap(out.logits[r], plain.logits[0, -1]) <= 1e-4
        assert gap(out.taps[r], torch.stack([s[0, -1] for s in plain.hidden_states[1:]])) <= 1e-4


def test_the_windows_of_the_families_matter() -> None:
    """Otherwise the test above would pass without them."""
    for family in ("mistral sliding", "gemma3", "qwen2 sliding"):
        model = hf_model(family)
        net = HFBackbone(model)
        net._window = 1000
        row = draw(30, family)
        out = net.extend(net.new_cache(1, 40), [row]).logits
        with torch.no_grad():
            assert gap(out, model(torch.tensor([row])).logits[:, -1]) > 1e-2


def test_attention_that_adds_its_mask() -> None:
    """Eager attention of the same model."""
    model = hf_model("qwen2")
    rows = [draw(9, "eager"), draw(4, "eager")]
    outs = []
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        net = HFBackbone(model)
        outs.append(net.extend(net.new_cache(2, 16), rows).logits)
    assert gap(*outs) <= 1e-5
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation='sdpa'"):
        HFBackbone(model)


def test_half_precision_is_tried_with_its_own_tolerance() -> None:
    net = HFBackbone(hf_model("llama").to(torch.bfloat16))
    out = net.extend(net.new_cache(1, 8), [(3, 4, 5)], taps=True)
    assert out.logits is not None and out.taps is not None
    assert out.logits.dtype == out.taps.dtype == torch.float32


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_rows_never_change_each_others_positions(rope: str) -> None:
    """Turnings that change with the longest row of a batch are used only as far as they do not."""
    shape = {**SHARED, "max_position_embeddings": 128}
    if rope == "dynamic":
        kinds = {"rope_type": rope, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
        config = LlamaConfig(**shape, rope_parameters=kinds)
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
        extra = {"rope_parameters": {"rope_type": rope, **factors, "original_max_position_embeddings": 32}}
        config = Phi3Config(**shape, **extra, original_max_position_embeddings=32)
    assert HFBackbone(AutoModelForCausalLM.from_config(config)).context == 32


REFUSED = {
    "mamba": (lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, max_position_embeddings=64, **ENDS), "mamba"),
    "lfm2": (lambda: Lfm2Config(**SHARED, layer_types=["conv", "full_attention", "conv"]), "kind conv"),
    "mla": (lambda: DeepseekV3Config(**SHAPE), "different shapes"),
    "alibi": (
        lambda: FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, **ENDS),
        "forward pass fails",
    ),
    "bloom": (lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ENDS), "max_position_embeddings"),
    "gpt neo": (
        lambda: GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **ENDS
        ),
        "attention_types",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_slots_cannot_hold_is_refused(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(ModelError, match=reason):
        HFBackbone(AutoModelForCausalLM.from_config(make()))


def test_a_model_that_ignores_its_mask_is_found_out() -> None:
    model = hf_model("llama")
    forward = model.forward
    model.forward = lambda **given: forward(**{**given, "attention_mask": None})
    with pytest.raises(ModelError, match=r"logits that are off by"):
        HFBackbone(model)


def test_the_output_layer_sees_only_what_is_asked_for() -> None:
    """Prompts of different lengths end in different columns; a large vocabulary is not computed for all of them."""
    model = hf_model("llama")
    net = HFBackbone(model)
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    rows = [draw(9, "head"), draw(4, "head"), draw(2, "head")]
    for logits in ("last", "all", "none"):
        net.extend(net.new_cache(3, 16), rows, logits=logits)  # type: ignore[arg-type]
    assert seen == [(1, 3, VOCAB), (1, 15, VOCAB), (1, 0, VOCAB)]
    assert not model.lm_head._forward_pre_hooks


def test_threads_share_one_model() -> None:
    """Whether through one backbone or two, no pass sees the positions that another pass asked for."""
    model = hf_model("llama")
    nets = (HFBackbone(model), HFBackbone(model))
    work: list[list[Sequence[int]]] = [[draw(9, "a"), draw(4, "a")], [draw(5, "b"), draw(7, "b"), draw(6, "b")]]
    alone = [nets[0].extend(nets[0].new_cache(3, 16), rows).logits for rows in work]
    forward, both = model.forward, threading.Barrier(2)

    def meet(**given: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.3)  # two passes that can be inside the model together are
        return forward(**given)

    model.forward = meet
    for pair in ((nets[0], nets[0]), nets):
        both.reset()
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(net.extend, net.new_cache(3, 16), rows) for net, rows in zip(pair, work, strict=True)]
            for run, wanted in zip(runs, alone, strict=True):
                assert wanted is not None and torch.equal(run.result().logits, wanted)
    assert not model.lm_head._forward_pre_hooks
