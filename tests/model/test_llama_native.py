"""The Llama family in C: equal to Hugging Face's, int8 close to it, rows bit-identical whatever else is in a step."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.model.nets import CONTEXT, alone, draw, gap, hf_model, log_gap, used_cache

from gnomon.base import native, seeds
from gnomon.base.errors import ModelError, UnknownNameError
from gnomon.base.native import pointer
from gnomon.model.foreign import HFBackbone
from gnomon.model.gguf import STAMP, cache_root
from gnomon.model.llama_native import NativeLlama, library
from gnomon.model.load import load_backbone
from gnomon.reasoner import fingerprint

FAMILIES = ("llama", "llama tied", "llama biased", "mistral", "qwen2")
KINDS = ("float", "int8")
pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler here, or GNOMON_NATIVE=0")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_hugging_face(family: str) -> None:
    """Prompts and steps, ragged, log-probabilities and taps; shared heads, tied embeddings, biases, used slots."""
    model = hf_model(family)
    rows = [draw(n, family) for n in (30, 12, 7, 1, 18)]
    outs = []
    for net in (HFBackbone(model), NativeLlama(model)):
        cache = used_cache(net, 6)
        first = net.extend(cache, rows, 1, logits="all", taps=True)
        second = net.extend(cache, [(3,), (4, 5), (6,), (7, 8, 9), (8,)], 1, taps=True)
        outs.append((first.logits, first.taps, second.logits, second.taps))
    for wanted, got in zip(*outs, strict=True):
        assert wanted is not None and wanted.std() > 0.3
        assert gap(wanted, got) <= 1e-4
    assert log_gap(outs[0][0], outs[1][0]) <= 1e-4 and log_gap(outs[0][2], outs[1][2]) <= 1e-4


@pytest.mark.skipif(not (cache_root() / "smollm2" / STAMP).is_file(), reason="SmolLM2 is not prepared here")
@pytest.mark.slow
def test_smollm2_equals_hugging_face() -> None:
    net = load_backbone("smollm2")
    assert isinstance(net, NativeLlama)
    ids = draw(40, "smollm2")
    plain = alone(HFBackbone(net.module), ids, logits="all").logits
    assert log_gap(alone(net, ids, logits="all").logits, plain) <= 1e-4
    assert plain is not None
    small = alone(NativeLlama(net.module, "int8"), ids, logits="all").logits
    assert small is not None
    kl = torch.nn.functional.kl_div(small.log_softmax(-1), plain.log_softmax(-1), reduction="none", log_target=True)
    assert float(kl.sum(-1).mean()) <= 1e-4  # its file has 4-bit blocks, which 8 bits hold


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_close_to_float(family: str) -> None:
    model = hf_model(family)
    rows = [draw(20, family, r) for r in range(8)]
    outs = []
    for weights in KINDS:
        net = NativeLlama(model, weights)
        outs.append(net.extend(net.new_cache(8, CONTEXT), rows, logits="all").logits)
    a, b = outs
    assert a is not None and b is not None and not torch.equal(a, b)
    assert float((a - b).pow(2).mean().sqrt()) <= 0.05 * float(a.std())
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True)
    assert float(kl.sum(-1).mean()) <= 5e-3


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("company", [1, 2, 5, 19])
def test_bit_identical_in_any_company(weights: str, company: int) -> None:
    """The same row: in another slot, beside other rows, beside long prompts, its prompt in pieces."""
    net = NativeLlama(hf_model("llama"), weights)
    row = draw(19, "row")
    wanted = alone(net, row[:12], taps=True)
    cache = net.new_cache(1, 64)
    net.extend(cache, [row[:5]], logits="none")
    net.extend(cache, [row[5:12]], logits="none")
    steps = [net.extend(cache, [(t,)], taps=True) for t in row[12:]]
    cache = used_cache(net, company + 1)
    at = company // 2
    prompts = [draw(5 + 2 * r, "neighbour", r) for r in range(company)]
    prompts[at] = row[:12]
    out = net.extend(cache, prompts, 1, taps=True)
    assert out.logits is not None and out.taps is not None and wanted.logits is not None and wanted.taps is not None
    assert torch.equal(out.logits[at], wanted.logits[0]) and torch.equal(out.taps[at], wanted.taps[0])
    for k, (token, step) in enumerate(zip(row[12:], steps, strict=True)):
        others: list[tuple[int, ...]] = [(r + 1,) * (1 + (r + k) % 2) for r in range(company)]
        others[at] = (token,)
        out = net.extend(cache, others, 1, taps=True)
        assert out.logits is not None and out.taps is not None and step.logits is not None and step.taps is not None
        assert torch.equal(out.logits[at], step.logits[0]) and torch.equal(out.taps[at], step.taps[0])


@pytest.mark.parametrize("weights", KINDS)
def test_number_of_threads_changes_nothing(weights: str) -> None:
    net = NativeLlama(hf_model("qwen2"), weights)
    rows = [draw(n, "threads") for n in (40, 3, 9, 60, 50)]  # more than one group of tokens
    threads = torch.get_num_threads()
    outs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(net.extend(net.new_cache(5, 64), rows, logits="all", taps=True))
    finally:
        torch.set_num_threads(threads)
    for other in outs[1:]:
        assert gap(outs[0].logits, other.logits) == gap(outs[0].taps, other.taps) == 0.0


@pytest.mark.parametrize("weights", KINDS)
def test_slots_are_copied_cut_and_moved(weights: str) -> None:
    net = NativeLlama(hf_model("llama"), weights)
    row, other = draw(20, "slots"), draw(33, "slots")
    wanted = alone(net, row).logits
    cache = used_cache(net, 4)
    net.extend(cache, [row[:17], other], logits="none")
    cache.copy(0, 3, 9)
    cache.move(1, 2)
    cache.cut(0, 14)
    out = net.extend(cache, [row[14:], other[:4], (1, 2), row[9:]]).logits
    assert out is not None
    assert gap(out[0:1], wanted) == gap(out[3:4], wanted) == 0.0
    assert gap(out[2:3], alone(net, (*other, 1, 2)).logits) == 0.0


def test_the_module_keeps_its_weights() -> None:
    model = hf_model("llama tied")
    for name in ("embed_tokens", "norm"):  # as if they were mapped from a file, not on a cache line
        p = model.model.get_submodule(name).weight
        p.data = torch.cat([p.new_zeros(3), p.flatten()])[3:].view(p.shape)
    before, names = fingerprint(HFBackbone(model)), [name for name, _ in model.named_parameters()]
    wanted = alone(HFBackbone(model), draw(9, "module")).logits
    for weights in KINDS:
        net = NativeLlama(model, weights)
        assert net.module is model and [name for name, _ in model.named_parameters()] == names
        assert fingerprint(net) == before and model.lm_head.weight is model.model.embed_tokens.weight
        assert gap(alone(net, draw(9, "module")).logits, wanted) <= (1e-4 if weights == "float" else 1.0)


def test_bad_calls_are_refused_before_anything_is_written() -> None:
    net = NativeLlama(hf_model("llama"))
    cache = net.new_cache(2, 16)
    for tokens in ([(1,), ()], [(64,)], [(-1,)], [(1,) * 17], [(1,)] * 3):
        with pytest.raises(AssertionError):
            net.extend(cache, tokens)
    assert cache.lengths.tolist() == [0, 0]
    with pytest.raises(UnknownNameError, match="int8"):
        NativeLlama(hf_model("llama"), "int4")
    with pytest.raises(ModelError, match="use HFBackbone"):
        NativeLlama(hf_model("gpt2"))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    try:
        with pytest.raises(ModelError, match="C compiler"):
            NativeLlama(hf_model("llama"))
    finally:
        native.library.cache_clear()


def test_plain_c_gives_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the processor's wide and integer products, as on other machines; blocks of 4-bit weights are exact."""
    seeds.seed_torch("plain c")
    model = hf_model("qwen2")
    rows = [draw(n, "plain c") for n in (7, 20)]
    outs = {}
    for extra in (native._EXTRA, ((),)):
        monkeypatch.setattr(native, "_EXTRA", extra)
        native.library.cache_clear()
        try:
            for weights in KINDS:
                net = NativeLlama(model, weights)
                outs[extra, weights] = net.extend(net.new_cache(2, 32), rows, logits="all").logits
        finally:
            native.library.cache_clear()
    for weights in KINDS:
        assert gap(outs[native._EXTRA, weights], outs[((),), weights]) <= 1e-3


def test_blocks_of_a_quantised_file_are_held_exactly() -> None:
    """Sixteen even steps between any two numbers, or 8 bits around zero: what comes back is what went in."""
    lib = library()
    assert lib is not None
    rng = np.random.default_rng(seeds.derive("blocks"))
    steps = np.concatenate([np.arange(16), rng.integers(0, 16, 16)])
    rng.shuffle(steps)
    eight = np.concatenate([[-127], rng.integers(-127, 128, 31)])
    w = np.stack([0.013 * steps - 0.07, 0.0021 * eight]).astype(np.float32)
    packed = np.zeros(lib.gn_int8_size(2, 32), dtype=np.uint8)
    lib.gn_int8_pack(pointer(w), 2, 32, pointer(packed))
    scale, low = packed[:256].view(np.float32).reshape(2, 32)
    number = packed[256:].reshape(8, 32, 4).transpose(1, 0, 2).reshape(32, 32)
    back = low[:, None] + scale[:, None] * number
    np.testing.assert_allclose(back[:2], w, atol=2e-7)
    assert ctypes.sizeof(ctypes.c_float) * 64 + 1024 == len(packed)
