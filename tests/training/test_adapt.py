"""Exactly what a mode names learns, on five families and our decoder; and everything goes back to what it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.model.nets import decoder, draw, gap, hf_model
from torch import Tensor, nn
from transformers import DynamicCache, OlmoConfig, OlmoForCausalLM

from gnomon.base import seeds
from gnomon.base.config import validate
from gnomon.base.errors import CheckpointError, ConfigError, GnomonError, ModelError
from gnomon.model.decoder import DecoderOutput
from gnomon.model.foreign import HFBackbone
from gnomon.model.llama import LlamaBackbone, unsupported
from gnomon.training.adapt import AdaptConfig, Adapted, LoraOptions, adapt, delta, export_lora, lora_layers, unfrozen
from gnomon.training.loop import each, fit

FAMILIES = ("llama", "llama tied", "gpt2", "qwen2", "qwen3", "gemma2", "neox", "ours", "ours plain")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the lora extra")
MODES = ["frozen", "ln", pytest.param("lora", marks=needs_peft), "last_k", "all"]
BLOCK_NORMS = {"llama": 2, "llama tied": 2, "gpt2": 4, "qwen2": 2, "qwen3": 4, "gemma2": 4, "neox": 4}


def build(family: str) -> nn.Module:
    return decoder(4 if family == "ours" else 1) if family.startswith("ours") else hf_model(family)


def logits(module: nn.Module, **options: Any) -> Tensor:
    """float32 [2, 12, V]."""
    ids = torch.tensor([draw(12, "a"), draw(12, "b")])
    out: Any = module(ids) if isinstance(module, type(decoder(1))) else module(ids, use_cache=False)
    assert isinstance(out, DecoderOutput) or out.logits is not None
    return out.logits


def lm_loss(module: nn.Module) -> Tensor:
    ids = torch.tensor([draw(12, "a"), draw(12, "b")])
    return F.cross_entropy(logits(module)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def lively(module: nn.Module) -> set[str]:
    """Names of the parameters with a gradient that is not zero; none has one that is."""
    found = {n for n, p in module.named_parameters() if p.grad is not None}
    assert all(bool((p.grad != 0).any()) for p in module.parameters() if p.grad is not None)
    return found


def randomised(adapted: Adapted) -> None:
    """LoRA with B that is not zero."""
    generator = seeds.torch_generator("test lora")
    with torch.no_grad():
        for p in adapted.lora.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_what_learns_and_nothing_else(family: str, mode: str) -> None:
    """In no family an unfrozen parameter is without gradient but A of LoRA while B is zero, at the first step."""
    module = build(family)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        plain = logits(module)
    adapted = adapt(module, AdaptConfig.model_validate({"mode": mode, "last_k": 2}))
    with torch.no_grad():
        assert torch.equal(logits(module), plain)  # nothing has been learned: bit-equal
    learning = {n for n, p in module.named_parameters() if p.requires_grad}
    groups = adapted.groups(1e-2)
    if mode == "frozen":
        assert not learning and not groups and not lm_loss(module).requires_grad
    else:
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(
            id(p) for p in module.parameters() if p.requires_grad
        )
        (group,) = groups
        assert group["lr"] == (1e-2 if mode == "lora" else 1e-2 * 0.05)
        if mode == "lora":
            lm_loss(module).backward()
            for n, p in module.named_parameters():
                if n in learning:
                    assert p.grad is not None and bool((p.grad != 0).any()) == (".lora_B." in n)
            torch.optim.SGD(adapted.groups(1.0)).step()
            module.zero_grad()
        lm_loss(module).backward()
        assert lively(module) == learning
        torch.optim.SGD(groups).step()
        with torch.no_grad():
            assert gap(logits(module), plain) > 1e-7
    adapted.restore()
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert module.state_dict().keys() == state.keys()
    changed = {n for n, value in module.state_dict().items() if not torch.equal(value, state[n])}
    assert bool(changed) == (mode in ("ln", "last_k", "all"))
    if mode in ("frozen", "lora"):
        with torch.no_grad():
            assert torch.equal(logits(module), plain)


@pytest.mark.parametrize("family", BLOCK_NORMS)
def test_what_the_modes_name(family: str) -> None:
    """Counted by hand: norms per block (weights and biases) times three, and the last one."""
    module = build(family)
    scales = unfrozen(module, AdaptConfig(mode="ln"))
    last = 2 if family in ("gpt2", "neox") else 1
    assert len(scales) == 3 * BLOCK_NORMS[family] + last and all(p.ndim == 1 for p in scales.values())
    top = unfrozen(module, AdaptConfig(mode="last_k", last_k=1))
    assert len([n for n in top if ".2." in n]) == len(top) - last and not any(".0." in n or ".1." in n for n in top)
    every = unfrozen(module, AdaptConfig(mode="all"))
    assert len({p.data_ptr() for p in every.values()}) == len(every)
    tied = family in ("llama tied", "gpt2", "gemma2")
    assert ("lm_head.weight" in every) == (not tied)


def test_what_ln_names_in_our_decoder() -> None:
    names = {n.split(".", 2)[2] for n in unfrozen(decoder(4), AdaptConfig(mode="ln"))}
    assert names == {"attention.gain", *(f"hyper.{i}.{p}" for i in range(2) for p in ("alpha", "bias"))}
    assert {n.split(".")[1] for n in unfrozen(decoder(4), AdaptConfig(mode="last_k", last_k=2))} == {"1", "2"}


@pytest.mark.parametrize("mode", ["ln", pytest.param("lora", marks=needs_peft), "last_k", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str, mode: str) -> None:
    """And each block is indeed computed twice."""
    found, calls = [], []
    for checkpointing in (False, True):
        module = build(family)
        adapted = adapt(module, AdaptConfig.model_validate({"mode": mode, "checkpointing": checkpointing}))
        randomised(adapted)
        module.train()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        count: list[int] = []
        first = next(p for n, p in module.named_modules() if n.endswith((".0.mlp", ".0.mlp.base_layer")))
        first.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        lm_loss(module).backward()
        found.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
        calls.append(len(count))
        adapted.restore()
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])
    # From the first block that needs a gradient on; last_k leaves the first one alone.
    assert calls == ([1, 1] if mode == "last_k" else [1, 2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "ours"])
def test_checkpointing_refuses_a_cache_while_training(family: str) -> None:
    module = build(family)
    ids = torch.tensor([draw(4, "cache")])
    adapted = adapt(module, AdaptConfig(mode="all", checkpointing=True))

    def cached() -> Any:
        if family == "ours":
            return module(ids, None, None, module.new_cache(1, 8), previous=ids[..., None].expand(1, 4, 3))  # type: ignore[operator]
        return module(ids, past_key_values=DynamicCache(config=module.config))

    with torch.no_grad():
        cached()  # serving is left alone
    module.train()
    with pytest.raises(ModelError, match="checkpointing cannot train through a cache"):
        cached()
    adapted.restore()
    with torch.no_grad():
        cached()


@needs_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_what_its_formula_says(family: str) -> None:
    """Layer by layer W + (alpha / rank) B A, and merged the same function as beside."""
    module = build(family)
    base, keys = {n: p.detach().clone() for n, p in module.named_parameters()}, module.state_dict().keys()
    adapted = adapt(module, AdaptConfig(mode="lora", lora=LoraOptions(rank=3, alpha=6.0)))
    randomised(adapted)
    for name, layer in lora_layers(module).items():
        a, b = adapted.lora[f"{name}.lora_A.weight"], adapted.lora[f"{name}.lora_B.weight"]
        product = torch.einsum("or,ri->oi", b, a).detach() * 2.0
        assert gap(delta(layer), product.T if family == "gpt2" else product) < 1e-6
    with torch.no_grad():
        beside = logits(module)
        with adapted.merged() as plain:
            assert plain.state_dict().keys() == keys
            assert not lora_layers(plain)
            merged = logits(plain)
        assert gap(merged, beside) <= 1e-4 * float(beside.std()) + 1e-6
        assert torch.equal(logits(module), beside)
    adapted.restore()
    assert all(torch.equal(p, base[n]) for n, p in module.named_parameters())


@needs_peft
def test_merged_runs_in_the_fast_pass() -> None:
    module = hf_model("llama")
    adapted = adapt(module, AdaptConfig(mode="lora"))
    randomised(adapted)
    assert "not plain ones" in str(unsupported(module))
    ids = draw(12, "a")
    slow = HFBackbone(module)
    wanted = slow.extend(slow.new_cache(1, 16), [ids]).logits
    with adapted.merged() as plain:
        fast = LlamaBackbone(plain)
    got = fast.extend(fast.new_cache(1, 16), [ids]).logits
    assert gap(got, wanted) < 1e-4
    with torch.no_grad():
        assert gap(wanted, hf_model("llama")(torch.tensor([ids])).logits[:, -1]) > 1e-2


@needs_peft
def test_lora_targets_and_stream() -> None:
    module = hf_model("llama")
    before = torch.random.get_rng_state()
    adapted = adapt(module, AdaptConfig(mode="lora", lora=LoraOptions(targets=("q_proj", "mlp.down_proj"))))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {n.split(".", 3)[3] for n in lora_layers(module)} == {"self_attn.q_proj", "mlp.down_proj"}
    first = adapted.trained_state()
    adapted.restore()
    for seed, same in ((0, True), (1, False)):
        options = LoraOptions(targets=("q_proj", "mlp.down_proj"), seed=seed)
        again = adapt(module, AdaptConfig(mode="lora", lora=options))
        name = "model.layers.0.self_attn.q_proj.lora_A.weight"
        assert torch.equal(again.trained_state()[name], first[name]) == same
        again.restore()
    with pytest.raises(
        GnomonError, match=r"unknown LoRA target 'q_prj'; did you mean '(q|up)_proj'.*Known: down_proj, gate"
    ):
        adapt(module, AdaptConfig(mode="lora", lora=LoraOptions(targets=("q_prj",))))
    assert all(p.requires_grad for p in module.parameters())  # a refusal changes nothing


@needs_peft
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_opens_what_is_exported(family: str, tmp_path: Path) -> None:
    peft = importlib.import_module("peft")
    module = build(family)
    adapted = adapt(module, AdaptConfig(mode="lora"))
    randomised(adapted)
    export_lora(adapted, tmp_path)
    with torch.no_grad():
        wanted = logits(module)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(build(family), str(tmp_path)).eval()), wanted)
    with pytest.raises(ModelError, match="mode 'all' has no LoRA factors"):
        export_lora(adapt(build(family), AdaptConfig(mode="all")), tmp_path)


@needs_peft
def test_factors_are_float32_on_a_base_in_half_precision() -> None:
    module = hf_model("llama").to(torch.bfloat16)
    adapted = adapt(module, AdaptConfig(mode="lora"))
    assert {p.dtype for p in adapted.lora.values()} == {torch.float32}
    randomised(adapted)
    lm_loss(module).backward()
    assert lively(module) == {n for n, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad(), adapted.merged() as plain:
        assert {p.dtype for p in plain.parameters()} == {torch.bfloat16} and bool(logits(plain).isfinite().all())


@pytest.mark.parametrize("mode", ["ln", pytest.param("lora", marks=needs_peft), "last_k"])
@pytest.mark.parametrize("family", ["gpt2", "ours"])
def test_what_was_trained_is_saved_alone_and_comes_back(family: str, mode: str) -> None:
    """Trained by the loop itself, carried to a fresh copy of the base."""
    config = AdaptConfig.model_validate({"mode": mode})
    module = build(family)
    adapted = adapt(module, config)
    optimizer = torch.optim.AdamW(adapted.groups(1e-2))
    report = fit(each(lambda _: (lm_loss(module), {})), [optimizer], 3)
    assert report["skipped"] == 0
    state = adapted.trained_state()
    assert sum(t.numel() for t in state.values()) < 0.6 * sum(p.numel() for p in build(family).parameters())
    other = build(family)
    again = adapt(other, config)
    again.load_trained(state)
    with torch.no_grad():
        assert torch.equal(logits(other), logits(module)) and gap(logits(module), logits(build(family))) > 1e-4
    fit(each(lambda _: (lm_loss(module), {})), [optimizer], 1)
    assert all(torch.equal(again.trained_state()[n], value) for n, value in state.items())  # copies


def test_states_that_do_not_fit_write_nothing() -> None:
    module = hf_model("llama")
    adapted = adapt(module, AdaptConfig(mode="ln"))
    good = adapted.trained_state()
    name = "model.norm.weight"
    bad = {
        r"1 missing \(model\.norm\.weight\)": {n: v for n, v in good.items() if n != name},
        r"1 unknown \(x\)": {**good, "x": good[name]},
        r"1 of another shape \(model\.norm": {**good, name: good[name][:3]},
        r"1 not finite \(model\.norm": {**good, name: good[name] * torch.nan},
    }
    for reason, state in bad.items():
        changed = {n: v + 1 for n, v in state.items()}
        with pytest.raises(CheckpointError, match=f"'llama' model adapted with mode 'ln': {reason}"):
            adapted.load_trained(changed)
    assert all(torch.equal(v, good[n]) for n, v in adapted.trained_state().items())


def test_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = hf_model("llama")
    with pytest.raises(ValueError, match=r"unknown adaptation mode 'lara'; did you mean 'lora'\?"):
        AdaptConfig.model_validate({"mode": "lara"})
    with pytest.raises(ConfigError, match="did you mean 'last_k'"):
        validate(AdaptConfig, {"last": 2})
    with pytest.raises(ConfigError, match=r"last_k = 4, but this model has 3 blocks; write 1 to 3"):
        adapt(module, AdaptConfig(mode="last_k", last_k=4))
    with seeds.undisturbed():
        olmo = OlmoForCausalLM(
            OlmoConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        )
    with pytest.raises(ModelError, match="norms of this 'olmo' model have no weights"):
        adapt(olmo, AdaptConfig(mode="ln"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else real(name, *a))
    with pytest.raises(ModelError, match=r"pip install 'gnomon\[lora\]'"):
        adapt(module, AdaptConfig(mode="lora"))
    monkeypatch.undo()
    assert all(p.requires_grad for p in module.parameters())


@needs_peft
def test_adapting_twice_is_refused() -> None:
    module = hf_model("llama")
    adapted = adapt(module, AdaptConfig(mode="lora"))
    with pytest.raises(ModelError, match=r"LoRA layers already; call restore\(\)"):
        adapt(module, AdaptConfig(mode="all"))
    adapted.restore()
    assert len(adapt(module, AdaptConfig(mode="all")).base) == len(list(module.parameters()))


def test_flags_that_were_set_before_come_back() -> None:
    module = hf_model("llama")
    module.model.embed_tokens.weight.requires_grad_(False)
    adapt(module, AdaptConfig(mode="all", checkpointing=True)).restore()
    assert not module.model.embed_tokens.weight.requires_grad and module.lm_head.weight.requires_grad
    assert not any(part.gradient_checkpointing for part in module.model.layers) and not module._forward_pre_hooks
