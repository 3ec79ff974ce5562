"""Blocks, linear layers and norms of every family are found by what they hold."""

from __future__ import annotations

import pytest
import torch
from tests.model.nets import ENDS, FAMILIES, SHARED, VOCAB, decoder, draw, gap, hf_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    MambaConfig,
    MixtralConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from gnomon.base import seeds
from gnomon.base.errors import ModelError
from gnomon.model.blocks import block_linears, block_list, block_path, check_layer, final_norms, norms
from gnomon.model.hf import GnomonConfig, GnomonForCausalLM

PLACES = {"gpt2": "transformer.h", "neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
FINAL = {"gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_what_makes_the_hidden_states(family: str) -> None:
    """Block i's output is hidden state i + 1 (before the final norm, for the last)."""
    model = hf_model(family)
    blocks = block_list(model)
    assert block_path(model) == PLACES.get(family, "model.layers") and len(blocks) == 3
    (name, final), *others = final_norms(model).items()
    assert name == FINAL.get(family, "model.norm") and not others
    seen: list[torch.Tensor] = []
    hooks = [
        b.register_forward_hook(lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0])) for b in blocks
    ]
    with torch.no_grad():
        states = model(torch.tensor([draw(9, family)]), output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        assert [gap(a, b) for a, b in zip(seen[:-1], states[1:-1], strict=True)] == [0.0, 0.0]
        assert gap(final(seen[-1]), states[-1]) == 0.0


@pytest.mark.parametrize(
    ("family", "linears", "norms_wanted"),
    [
        ("llama", 7, 7),
        ("gpt2", 4, 7),
        ("qwen2", 7, 7),
        ("qwen3", 7, 13),
        ("gemma2", 7, 13),
        ("neox", 4, 7),
        ("opt", 6, 7),
    ],
)
def test_counts_of_linears_and_norms(family: str, linears: int, norms_wanted: int) -> None:
    model = hf_model(family)
    found = block_linears(model)
    assert len(found) == 3 * linears and len(norms(model)) == norms_wanted
    for name, part in found.items():
        assert model.get_submodule(name) is part and part is not model.get_output_embeddings()
    matrices = sum(p.numel() for p in block_list(model).parameters() if p.ndim > 1)
    assert matrices == sum(part.weight.numel() for part in found.values())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("streams", [1, 4])
def test_our_decoder(streams: int) -> None:
    """Two blocks, so that the pairs of hyper-connections inside have the length of the list."""
    net = decoder(streams, layers=2)
    assert block_list(net) is net.blocks and block_path(net) == "blocks"
    assert len(block_linears(net)) == 2 * 4 and not norms(net) and not final_norms(net)
    wrapped = GnomonForCausalLM(GnomonConfig(**net.config.model_dump()))
    assert block_list(wrapped) is wrapped.decoder.blocks and block_path(wrapped) == "decoder.blocks"


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **ENDS), "transformer.h"),
        (lambda: FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **ENDS), "transformer.h"),
        (lambda: GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **ENDS), "transformer.h"),
        (lambda: MixtralConfig(**{**SHARED, "num_hidden_layers": 2}, num_local_experts=2), "model.layers"),
    ],
)
def test_families_that_are_built_otherwise(config: object, path: str) -> None:
    """Norms on embeddings, parallel branches, as many experts as layers."""
    with seeds.undisturbed():
        model = AutoModelForCausalLM.from_config(config())  # type: ignore[operator]
    assert block_path(model) == path and len(final_norms(model)) == 1


def test_what_has_no_blocks_is_named() -> None:
    with seeds.undisturbed():
        mamba = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, **ENDS))
        t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
        )
    with pytest.raises(ModelError, match=r"'mamba' model has no list of 2 transformer blocks"):
        block_list(mamba)
    with pytest.raises(ModelError, match=r"'t5' model has no list"):
        block_list(t5)
    with pytest.raises(ModelError, match=r"'Linear' is no causal LM"):
        block_list(nn.Linear(2, 2))


def test_two_stacks_are_ambiguous() -> None:
    model = hf_model("llama")
    model.other = hf_model("llama").model
    with pytest.raises(ModelError, match=r"'llama' model has 2 lists of 3 \(model\.layers, other\.layers\)"):
        block_list(model)


@pytest.mark.parametrize("index", [-1, 3, True, 1.0, None])
def test_unknown_layers(index: object) -> None:
    with pytest.raises(
        ModelError, match=r"there is no layer .*this model has 3 blocks; write 0 \(first\) to 2 \(last\)"
    ):
        check_layer(index, 3)  # type: ignore[arg-type]
    assert [check_layer(i, 3) for i in range(3)] == [0, 1, 2]
