"""Averages equal the slow obvious sum; what is exchanged comes back to the bit and disturbs no backward pass."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.model.nets import decoder, draw, gap, hf_model
from torch import Tensor, nn

from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import CheckpointError, ConfigError
from gnomon.training.adapt import AdaptConfig, adapt, lora_layers
from gnomon.training.ema import Ema

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the lora extra")
RATE = 0.3


def logits(module: nn.Module) -> Tensor:
    out: Any = module(torch.tensor([draw(9, "ema")]))
    return out.logits


def loss_of(module: nn.Module) -> Tensor:
    return F.cross_entropy(logits(module)[0, :-1], torch.tensor(draw(9, "ema"))[1:])


def average(values: list[Tensor]) -> Tensor:
    """(1 − r)^t v_0 + Σ_i r (1 − r)^(t − i) v_i, term by term in float64."""
    t = len(values) - 1
    parts = [(1 - RATE) ** t * values[0].double()]
    parts += [RATE * (1 - RATE) ** (t - i) * v.double() for i, v in enumerate(values) if i]
    return torch.stack(parts).sum(0)


def steps(module: nn.Module, params: list[nn.Parameter], ema: Ema, n: int) -> list[dict[str, Tensor]]:
    """n optimiser steps; -> all parameters before the first and after each."""
    optimizer = torch.optim.AdamW(params, lr=3e-2)
    seen = [{name: p.detach().clone() for name, p in module.named_parameters()}]
    for _ in range(n):
        loss_of(module).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
        seen.append({name: p.detach().clone() for name, p in module.named_parameters()})
    return seen


@pytest.mark.parametrize("family", ["ours", "gpt2", "llama tied"])
def test_plain_parameters(family: str) -> None:
    module = decoder(4) if family == "ours" else hf_model(family)
    adapted = adapt(module, AdaptConfig(mode="last_k", last_k=2))
    ema = Ema(module, RATE)
    seen = steps(module, list(adapted.base.values()), ema, 4)
    assert ema.state_dict().keys() == adapted.base.keys()
    for name, value in ema.state_dict().items():
        wanted = average([at[name] for at in seen])
        assert gap(value.double(), wanted) < 1e-6 and gap(value, seen[-1][name]) > 1e-3
    live = {name: p.detach().clone() for name, p in module.named_parameters()}
    fresh = decoder(4) if family == "ours" else hf_model(family)
    fresh.load_state_dict({**module.state_dict(), **ema.state_dict()})
    with torch.no_grad():
        mine = logits(module)
        with ema.applied():
            assert torch.equal(logits(module), logits(fresh)) and gap(logits(module), mine) > 1e-3
        assert torch.equal(logits(module), mine)
    assert all(torch.equal(p, live[name]) for name, p in module.named_parameters())


@needs_peft
@pytest.mark.parametrize("family", ["llama", "gpt2", "ours"])
def test_lora_averages_the_product(family: str) -> None:
    """A dense W + mean of (alpha / rank) B A, which the product of the means misses by far."""
    module = decoder(1) if family == "ours" else hf_model(family)
    plain = decoder(1) if family == "ours" else hf_model(family)
    adapted = adapt(module, AdaptConfig(mode="lora"))
    ema = Ema(module, RATE)
    seen = steps(module, list(adapted.lora.values()), ema, 4)
    flip = (lambda x: x.T) if family == "gpt2" else (lambda x: x)
    dense, factors = dict(plain.named_parameters()), {}
    for name in lora_layers(module):
        a = [at[f"{name}.lora_A.default.weight"] for at in seen]
        b = [at[f"{name}.lora_B.default.weight"] for at in seen]
        wanted = average([flip(2.0 * (q.double() @ p.double())) for p, q in zip(a, b, strict=True)])
        factors[name] = flip(2.0 * (average(b) @ average(a)))
        assert gap(ema.state_dict()[f"{name}.delta"].double(), wanted) < 1e-6
        assert gap(factors[name], wanted) > 0.05 * float(wanted.abs().max())
        with torch.no_grad():
            dense[f"{name}.weight"] += wanted.float()
    assert ema.state_dict().keys() == {f"{name}.delta" for name in factors}
    with torch.no_grad():
        mine = logits(module)
        with ema.applied():
            assert gap(logits(module), logits(plain)) < 1e-4 and gap(logits(module), mine) > 1e-3
            assert not lora_layers(module)
        assert torch.equal(logits(module), mine)
    adapted.restore()
    original = decoder(1) if family == "ours" else hf_model(family)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), original.parameters(), strict=True))


@needs_peft
@pytest.mark.parametrize("mode", ["lora", "all"])
def test_a_teacher_between_forward_and_backward_changes_no_gradient(mode: str) -> None:
    module = hf_model("llama")
    adapted = adapt(module, AdaptConfig.model_validate({"mode": mode}))
    ema = Ema(module, RATE)
    steps(module, [*adapted.base.values(), *adapted.lora.values()], ema, 2)
    found = []
    for teacher in (False, True):
        loss = loss_of(module)
        if teacher:
            with torch.no_grad(), ema.applied():
                assert gap(loss_of(module), loss.detach()) > 1e-4
        loss.backward()
        found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
        module.zero_grad()
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_an_error_inside_brings_the_weights_back() -> None:
    module = decoder(1)
    ema = Ema(module, RATE)
    with torch.no_grad():
        for p in module.parameters():
            p += 1.0
    live = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(KeyError), ema.applied():
        assert not torch.equal(next(module.parameters()), live[0])
        with pytest.raises(RuntimeError, match="average the averages"):
            ema.update()
        with pytest.raises(RuntimeError, match="inside itself"), ema.applied():
            pass
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), live, strict=True))
    ema.update()


def test_half_precision_weights_have_averages_that_move() -> None:
    """In bfloat16 itself 1 + 1 % of 2^-4 rounds to 1 for ever."""
    module = nn.Linear(4, 4, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema = Ema(module, 0.01)
        module.weight.fill_(1.0625)
    for _ in range(100):
        ema.update()
    wanted = 1.0625 - 0.0625 * 0.99**100
    assert gap(ema.state_dict()["weight"], torch.full((4, 4), wanted)) < 1e-5
    with ema.applied():
        assert module.weight.dtype == torch.bfloat16 and module.weight[0, 0].item() == 1.0390625
    assert module.weight[0, 0].item() == 1.0625


@needs_peft
def test_averages_are_saved_and_go_on(tmp_path: Any) -> None:
    def run(n: int) -> tuple[nn.Module, list[nn.Parameter], Ema]:
        module = hf_model("llama")
        params = list(adapt(module, AdaptConfig(mode="lora")).lora.values())
        ema = Ema(module, RATE)
        steps(module, params, ema, n)
        return module, params, ema

    (_, _, first), (module, params, other) = run(3), run(1)
    save_tensors(tmp_path, "ema.safetensors", first.state_dict())
    other.load_state_dict(load_tensors(tmp_path, "ema.safetensors"))
    state = first.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in other.state_dict().items())
    steps(module, params, other, 1)
    assert all(torch.equal(value, state[n]) for n, value in first.state_dict().items())
    assert not any(torch.equal(value, state[n]) for n, value in other.state_dict().items())


def test_nonsense_is_named() -> None:
    module = decoder(1)
    for rate in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"not in \(0, 1\]: it is the share of the new value"):
            Ema(module, rate)
    with pytest.raises(ConfigError, match="nothing to average"):
        Ema(module.requires_grad_(False))
    ema = Ema(module.requires_grad_(True), RATE)
    state = ema.state_dict()
    with pytest.raises(CheckpointError, match=r"1 missing \(before\.weight\)"):
        ema.load_state_dict({n: v for n, v in state.items() if n != "before.weight"})
    with pytest.raises(CheckpointError, match=r"1 of another shape \(embed\.weight\)"):
        ema.load_state_dict({n: v[:1] + 1 if n == "embed.weight" else v + 1 for n, v in state.items()})
    assert all(torch.equal(v, state[n]) for n, v in ema.state_dict().items())
