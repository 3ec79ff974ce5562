"""The lean pass of the Llama family in torch equals Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from tests.model.nets import SHARED, alone, draw, gap, hf_model, log_gap, used_cache
from transformers import AutoModelForCausalLM, LlamaConfig

from gnomon.base.errors import ModelError
from gnomon.model.foreign import HFBackbone
from gnomon.model.llama import LlamaBackbone, unsupported
from gnomon.reasoner import fingerprint

LEAN = ("llama", "llama tied", "llama biased", "mistral", "qwen2")


@pytest.mark.parametrize("family", LEAN)
def test_equals_hugging_face(family: str) -> None:
    """Prompts and steps, ragged, log-probabilities and taps; shared heads, tied embeddings, biases."""
    model = hf_model(family)
    plain, rows = HFBackbone(model), [draw(n, family) for n in (30, 12, 7, 1, 18)]
    outs = []
    for net in (plain, LlamaBackbone(model), plain):
        cache = used_cache(net, 6)
        first = net.extend(cache, rows, 1, logits="all", taps=True)
        second = net.extend(cache, [(3,)] * 5, 1, taps=True)
        outs.append((first.logits, first.taps, second.logits, second.taps))
    for wanted, got, again in zip(*outs, strict=True):
        assert wanted is not None and wanted.std() > 0.3
        assert gap(wanted, got) <= 1e-4 and gap(wanted, again) <= 1e-6
    assert log_gap(outs[0][0], outs[1][0]) <= 1e-4


def test_the_module_is_left_as_it_was() -> None:
    model = hf_model("llama")
    before, names = fingerprint(HFBackbone(model)), [name for name, _ in model.named_parameters()]
    net = LlamaBackbone(model)
    assert net.module is model and [name for name, _ in model.named_parameters()] == names
    assert fingerprint(net) == before and all(p.is_contiguous() for p in model.parameters())


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hf_model("llama"), draw(9, "onednn")
    wanted = alone(LlamaBackbone(model), ids).logits
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert gap(alone(LlamaBackbone(model), ids).logits, wanted) <= 1e-4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "positions"),
    ],
)
def test_other_llamas_are_left_to_hugging_face(change: dict[str, object], reason: str) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHARED, **change))
    assert reason in str(unsupported(model))
    with pytest.raises(ModelError, match="use HFBackbone"):
        LlamaBackbone(model)
    HFBackbone(model)


def test_other_families_and_precisions_are_left_to_hugging_face() -> None:
    for family in ("qwen3", "mistral sliding", "qwen2 sliding", "gemma2", "gpt2"):
        assert unsupported(hf_model(family)), family
    assert "float32" in str(unsupported(hf_model("llama").to(torch.bfloat16)))
    adapted = hf_model("llama")
    adapted.model.layers[0].mlp.up_proj = torch.nn.Sequential(adapted.model.layers[0].mlp.up_proj)
    assert "plain" in str(unsupported(adapted))
