"""Gate and adapters: the same in every backbone and in training, nothing where they have no place, nothing at init."""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
import torch
from tests.model.nets import alone, decoder, draw, gap, hf_model, used_cache
from torch import Tensor

from gnomon.base.seeds import torch_generator
from gnomon.model.backbone import OwnBackbone
from gnomon.model.foreign import HFBackbone
from gnomon.model.llama import LlamaBackbone
from gnomon.model.llama_native import NativeLlama
from gnomon.model.native import NativeBackbone, library
from gnomon.model.steering import Adapter, Steer, Steering, adapted, expected_l0, hard_concrete, steered

C, L, R = 32, 3, 4
needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler on this machine")
MAKERS: dict[str, Any] = {
    "own": lambda: OwnBackbone(decoder(4)),
    "own plain": lambda: OwnBackbone(decoder(1)),
    "own sinkhorn": lambda: OwnBackbone(decoder(2, "sinkhorn")),
    "own native": lambda: NativeBackbone(decoder(4)),
    "own plain native": lambda: NativeBackbone(decoder(1)),
    "lean llama": lambda: LlamaBackbone(hf_model("llama")),
    "native llama": lambda: NativeLlama(hf_model("llama")),
    **{name: lambda name=name: HFBackbone(hf_model(name)) for name in ("llama", "gpt2", "qwen2", "gemma2", "neox")},
}
EVERY = [pytest.param(n, marks=needs_compiler) if "native" in n else n for n in MAKERS]


def steering(scale: float, gate_layer: int | None = 1) -> Steering:
    """Adapters at blocks 0 and 2; scale 0: as they are initialised."""
    g = torch_generator("steering", scale)
    make = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return Steering(
        gate_layer,
        {k: Adapter(make(R, C), scale * make(C, R), 0.3 * make(C), torch.tensor(0.2 * k - 0.1)) for k in (0, 2)},
    )


def vectors(n: int, scale: float) -> Tensor:
    return 1.0 + scale * torch.randn(n, C, generator=torch_generator("vectors", n))


@pytest.mark.parametrize("name", EVERY)
def test_the_identity_at_init_and_nothing_outside_thoughts(name: str) -> None:
    net = MAKERS[name]()
    rows = [draw(7, name, 1), draw(4, name, 2)]
    plain = net.extend(used_cache(net, 4), rows, 1, logits="all", taps=True)
    fresh = Steer(steering(0.0), vectors(2, 0.0), [0] * 7 + [1] * 4)
    for made in (fresh, Steer(steering(1.0), vectors(2, 0.5), [-1] * 11)):
        got = net.extend(used_cache(net, 4), rows, 1, logits="all", taps=True, steer=made)
        assert torch.equal(got.logits, plain.logits) and torch.equal(got.taps, plain.taps)
    # Steered from position 3 on: what stands in front of it, and the other row, do not change by a bit.
    some = Steer(steering(1.0), vectors(2, 0.5), [-1] * 3 + [0] * 2 + [-1] * 2 + [-1] * 4)
    got = net.extend(used_cache(net, 4), rows, 1, logits="all", taps=True, steer=some)
    assert torch.equal(got.logits[:3], plain.logits[:3]) and torch.equal(got.logits[7:], plain.logits[7:])
    assert torch.equal(got.taps[1], plain.taps[1])
    assert gap(got.logits[3:7], plain.logits[3:7]) > 0.01, "later positions see what was thought"


@pytest.mark.parametrize("name", EVERY)
def test_cut_into_calls_and_beside_others_it_is_the_same(name: str) -> None:
    net, ids = MAKERS[name](), draw(12, name, 3)
    made, gates = steering(1.0), vectors(3, 0.5)
    at = [-1] * 5 + [2] * 4 + [-1] * 3
    whole = alone(net, ids, logits="all", taps=True, steer=Steer(made, gates, at))
    cache, other = used_cache(net, 3), draw(12, name, 4)
    net.extend(cache, [ids[:5], other[:6]], logits="none", steer=Steer(made, gates, at[:5] + [0, 1, -1, 0, 0, 0]))
    for t in range(5, 12):
        out = net.extend(cache, [ids[t : t + 1], other[t : t + 1]], taps=[0], steer=Steer(made, gates, [at[t], 0]))
        assert gap(out.logits[:1], whole.logits[t : t + 1]) < 2e-4
    assert gap(out.taps, whole.taps) < 2e-3 and out.taps.shape == (1, L, C)


@pytest.mark.parametrize(
    ("fast", "slow"),
    [
        pytest.param("own native", "own", marks=needs_compiler),
        pytest.param("own plain native", "own plain", marks=needs_compiler),
        pytest.param("native llama", "llama", marks=needs_compiler),
        ("lean llama", "llama"),
    ],
)
@pytest.mark.parametrize("gate_layer", [None, 0, 2])
def test_fast_backbones_equal_the_slow_one(fast: str, slow: str, gate_layer: int | None) -> None:
    rows = [draw(9, "fast", 1), draw(5, "fast", 2)]
    steer = Steer(steering(1.0, gate_layer), vectors(2, 0.5), [-1] * 2 + [1] * 6 + [-1] + [0, 0, -1, 0, 0])
    a, b = (MAKERS[name]() for name in (fast, slow))
    got, want = (net.extend(net.new_cache(2, 16), rows, logits="all", taps=True, steer=steer) for net in (a, b))
    assert gap(got.logits, want.logits) < 1e-4 and gap(got.taps, want.taps) < 1e-4 * float(want.taps.abs().max())


@needs_compiler
def test_new_weights_are_seen_by_a_compiled_base_and_gates_can_be_shut() -> None:
    net, ids = MAKERS["own native"](), draw(6, "again")
    for made in (steering(1.0), steering(2.0), steering(1.0)):
        shut = Steering(1, {k: a._replace(bias=torch.tensor(-40.0)) for k, a in made.adapters.items()})
        for s in (made, shut):
            steer = Steer(s, vectors(1, 0.2), [0] * 6)
            assert gap(alone(net, ids, steer=steer).logits, alone(MAKERS["own"](), ids, steer=steer).logits) < 1e-4
        gate_only = Steer(Steering(1, {}), vectors(1, 0.2), [0] * 6)
        assert torch.equal(alone(net, ids, steer=gate_only).logits, alone(net, ids, steer=steer).logits)


@pytest.mark.parametrize("family", ["own", "llama", "gpt2", "qwen2", "gemma2", "neox"])
def test_a_padded_training_pass_equals_serving_and_leaves_no_hook(family: str) -> None:
    net, ids = MAKERS[family](), torch.tensor([draw(8, family, 5), draw(8, family, 6)])
    made, gates = steering(1.0), vectors(2, 0.5)
    at = torch.tensor([[-1] * 3 + [0] * 3 + [-1] * 2, [-1] + [1] * 7])
    at[1, 4:] = -1  # ragged: columns 4.. of row 1 are padding
    served = net.extend(
        net.new_cache(2, 8), [ids[0].tolist(), ids[1, :4].tolist()], logits="all",
        steer=Steer(made, gates, [*at[0].tolist(), *at[1, :4].tolist()]),
    ).logits  # fmt: skip
    grid = Steer(made, gates, at, record=True)
    with torch.no_grad():
        if family == "own":
            out = net.module(ids, steer=grid).logits
        else:
            with steered(net._blocks, grid):
                out = net.module(ids).logits
            assert not any(block._forward_hooks for block in net._blocks)
    assert gap(torch.cat([out[0], out[1, :4]]), served) < 1e-4
    assert sorted(grid.seen) == [0, 2] and all(len(gate) == 3 + 3 for _, gate in grid.seen.values())


def test_gradients_reach_gate_and_adapters_and_go_through_them() -> None:
    model = decoder(4)
    ids = torch.tensor([draw(8, "grads")])
    parts = {name: t.clone().requires_grad_() for name, t in steering(1.0).adapters[0]._asdict().items()}
    gates = vectors(1, 0.1).requires_grad_()
    steer = Steer(Steering(1, {0: Adapter(**parts)}), gates, torch.tensor([[-1] * 2 + [0] * 4 + [-1] * 2]))

    def loss(s: Steer | None) -> Tensor:
        return model(ids, steer=s).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).mean()

    wanted = [*parts.values(), gates, model.embed.weight]
    got = torch.autograd.grad(loss(steer), wanted)
    assert all(bool(g.abs().max() > 0) for g in got)
    assert not torch.allclose(got[-1], torch.autograd.grad(loss(None), model.embed.weight)[0])
    # Finite differences of one number of each part.
    for part, grad in zip(wanted[:-1], got, strict=False):
        flat, at = part.data.view(-1), int(grad.abs().argmax())
        with torch.no_grad():
            values = []
            for step in (1e-2, -1e-2):
                flat[at] += step
                values.append(float(loss(steer)))
                flat[at] -= step
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(grad.view(-1)[at]), rel=0.05, abs=2e-4)


def test_hard_concrete_is_the_paper_s() -> None:
    logits = torch.tensor([-8.0, -1.5, 0.0, 0.7, 3.0]).double()
    n = 40_000
    drawn = hard_concrete(logits.expand(n, 5), torch_generator("gates"))
    assert torch.allclose((drawn > 0).double().mean(0), expected_l0(logits), atol=0.01)
    assert float(drawn.min()) == 0.0 and float(drawn.max()) == 1.0
    # One uniform number by hand (equations 10 and 11).
    u = torch.rand(1, generator=torch_generator("one")).double()
    s = torch.sigmoid((u.log() - (1 - u).log() + 0.7) * 1.5)
    got = hard_concrete(torch.tensor([0.7]).double(), torch_generator("one"))
    assert torch.allclose(got, (s * 1.2 - 0.1).clamp(0, 1))
    assert torch.allclose(hard_concrete(logits), (torch.sigmoid(logits) * 1.2 - 0.1).clamp(0, 1))


def test_an_adapter_is_a_low_rank_residual_of_the_normed_state() -> None:
    a = steering(1.0).adapters[0]
    x = 7.0 * torch.randn(5, C, generator=torch_generator("adapted"))
    delta, _, gate = adapted(x, a)
    for i in range(5):
        h = x[i].double() / (x[i].double().square().mean() + 1e-6).sqrt()
        z = min(1.0, max(0.0, 1.2 / (1 + float(torch.exp(-(h @ a.weight.double() + a.bias)))) - 0.1))
        assert float(gate[i]) == pytest.approx(z, abs=1e-5)
        assert torch.allclose(delta[i].double(), z * (a.up.double() @ (a.down.double() @ h)), atol=1e-4)
    assert torch.linalg.matrix_rank(a.up @ a.down) == R


@needs_compiler
@pytest.mark.parametrize("name", ["own native", "native llama"])
def test_two_layers_act_on_one_compiled_base_from_two_threads(name: str) -> None:
    """What a call reads must not be exchanged or freed while another layer's call is prepared."""
    backbone = MAKERS[name]()
    rows = [tuple(range(3 + r, 15 + r)) for r in range(3)]
    at, gates = [0 if t > 2 else -1 for row in rows for t in range(len(row))], vectors(1, 0.2)
    layers = [steering(0.4), steering(1.5, None)]
    layers[1] = Steering(None, {1: layers[1].adapters[0]})

    def logits(layer: Steering) -> Tensor:
        out = backbone.extend(backbone.new_cache(3, 16), rows, logits="all", steer=Steer(layer, gates, at)).logits
        assert out is not None
        return out

    want = [logits(layer).clone() for layer in layers]
    assert not torch.allclose(want[0], want[1])
    wrong: list[int] = []
    start = threading.Barrier(4)

    def work(k: int) -> None:
        start.wait()
        for turn in range(60):  # with layers of its own now and then, which are freed again
            layer = layers[k % 2]
            if turn % 3 == 0:
                layer = Steering(
                    layer.gate_layer, {i: Adapter(*(t.clone() for t in a)) for i, a in layer.adapters.items()}
                )
            if not torch.equal(logits(layer), want[k % 2]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(former)
    assert not wrong


@needs_compiler
def test_a_layer_that_is_gone_leaves_no_copy_behind() -> None:
    backbone = MAKERS["own native"]()
    for _ in range(3):
        steer = Steer(steering(0.4), vectors(1, 0.2), [0, 0])
        backbone.extend(backbone.new_cache(1, 4), [(5, 6)], steer=steer)
        assert len(backbone._steers._made) == 1
        del steer
        gc.collect()
        assert len(backbone._steers._made) == 0
