"""The lean pass of the Llama family equals Hugging Face's; int8 is close to it and independent of neighbours."""

from __future__ import annotations

import pytest
import torch
from tests.model.nets import SHARED, alone, draw, gap, hf_model, log_gap, used_cache
from transformers import AutoModelForCausalLM, LlamaConfig

from gnomon.base import seeds
from gnomon.base.errors import ModelError, UnknownNameError
from gnomon.model.foreign import HFBackbone
from gnomon.model.int8 import Int8Product
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
    for weights in ("float", "int8"):
        net = LlamaBackbone(model, weights)
        assert net.module is model and [name for name, _ in model.named_parameters()] == names
        assert fingerprint(net) == before and all(p.is_contiguous() for p in model.parameters())


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = hf_model("llama"), draw(9, "onednn")
    wanted = alone(LlamaBackbone(model), ids).logits
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert gap(alone(LlamaBackbone(model), ids).logits, wanted) <= 1e-4
    with pytest.raises(ModelError, match="oneDNN"):
        LlamaBackbone(model, "int8")


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
    with pytest.raises(UnknownNameError, match="int8"):
        LlamaBackbone(hf_model("llama"), "int4")


def test_int8_products() -> None:
    """Within the rounding of inputs and weights; a row's numbers are bit-identical in any company."""
    seeds.seed_torch("int8")
    x, weight, bias = torch.randn(5, 96), torch.randn(130, 96), torch.randn(130)
    x[0] *= 1000
    x[3] = 0
    product = Int8Product(weight, bias)
    x[4, 7] = 100  # inputs of 8 bits would lose what stands beside it
    got, wanted = product(x), x @ weight.T + bias
    assert ((got - wanted).abs().amax(1) <= 0.01 * (wanted - bias).abs().amax(1)).all()
    exact = x @ (product._scale[:, None] * (weight / product._scale[:, None]).round()).T + bias
    assert ((got - exact).abs().amax(1) <= 2e-4 * (wanted - bias).abs().amax(1)).all()  # inputs are all but exact
    assert torch.equal(got[3], bias)
    for r in range(5):
        assert torch.equal(product(x[r : r + 1])[0], got[r])


@pytest.mark.parametrize("family", LEAN)
def test_int8_is_close_to_float(family: str) -> None:
    model = hf_model(family)
    rows = [draw(20, family, r) for r in range(8)]
    plain = [alone(LlamaBackbone(model), row, logits="all").logits for row in rows]
    net = LlamaBackbone(model, "int8")
    small = [alone(net, row, logits="all").logits for row in rows]
    a, b = (torch.cat([x for x in xs if x is not None]) for xs in (plain, small))
    assert not torch.equal(a, b)
    assert float((a - b).pow(2).mean().sqrt()) <= 0.05 * float(a.std())
    assert float((a.argmax(-1) == b.argmax(-1)).float().mean()) >= 0.9


def test_int8_rows_do_not_depend_on_their_neighbours() -> None:
    """A row of huge values beside it would spoil a scale that rows share."""
    net = LlamaBackbone(hf_model("llama"), "int8")
    rows = [draw(n, "company") for n in (9, 25, 4)]
    cache = used_cache(net, 4)
    net.extend(cache, rows, logits="none")
    out = net.extend(cache, [(3,)] * 3).logits
    assert out is not None
    for r, row in enumerate(rows):
        assert log_gap(out[r : r + 1], alone(net, (*row, 3)).logits) <= 1e-3
