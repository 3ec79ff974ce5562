"""The compiled training pass against the plain modules: values and every gradient, with float64 as the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gnomon.base import seeds
from gnomon.model import fused
from gnomon.model.attention import record_mask
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.model.hyper import HyperConnection

pytestmark = pytest.mark.skipif(fused.library() is None, reason="no C compiler")
VOCAB, CONTEXT = 48, 100
RECORDS = (1, 7, 2, 50, 33, 4)  # shorter and longer than a block of queries


def build(streams: int, projection: str = "exact", channels: int = 40, heads: int = 2, layers: int = 2) -> Decoder:
    """Noise on every parameter: fresh output projections are zero and would hide everything."""
    seeds.seed_torch("fused", streams, channels)
    shape = {"vocab_size": VOCAB, "channels": channels, "layers": layers, "heads": heads, "context": CONTEXT}
    model = Decoder(DecoderConfig(**shape, streams=streams, projection=projection))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def draw(*shape: int, name: str = "x") -> Tensor:
    return torch.randn(*shape, generator=seeds.torch_generator("fused", name, *shape))


def ids(rows: int = 3, length: int = sum(RECORDS)) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=seeds.torch_generator("fused ids"))


def packed_positions(rows: int = 3) -> Tensor:
    """Every row cut at other places."""
    return torch.stack([torch.cat([torch.arange(n) for n in (*RECORDS[r:], *RECORDS[:r])]) for r in range(rows)])


def close(found: Tensor | None, wanted: Tensor | None, tolerance: float = 3e-5) -> None:
    """Within a share of the largest number."""
    assert found is not None and wanted is not None
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def trained(model: Decoder, positions: Tensor | None, mask: object, low: bool = False) -> Tensor:
    """Logits, with gradients left in the parameters."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
        logits = model(ids(), positions, mask).logits  # type: ignore[arg-type]
    weight = draw(*logits.shape, name="weight").to(logits.dtype)
    (logits.log_softmax(-1) * weight).sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach()  # type: ignore[no-any-return]


@pytest.mark.parametrize("channels, heads", [(40, 2), (48, 1), (36, 6)])
@pytest.mark.parametrize(
    "streams, projection", [(1, "exact"), (2, "exact"), (3, "exact"), (4, "exact"), (3, "sinkhorn")]
)
def test_values_and_gradients_are_those_of_the_plain_net(
    streams: int, projection: str, channels: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(streams, projection, channels, heads)
    positions = packed_positions()
    calls: list[int] = []
    attend = fused.attend
    monkeypatch.setattr(fused, "attend", lambda *a: (calls.append(1), attend(*a))[1])
    found = trained(model, positions, "records"), {n: p.grad for n, p in model.named_parameters()}
    assert len(calls) == 2
    oracle = build(streams, projection, channels, heads).double()
    oracle.load_state_dict(model.state_dict())
    wanted = trained(oracle, positions, record_mask(positions))
    close(found[0], wanted)
    for name, p in oracle.named_parameters():
        close(found[1][name], p.grad, 1e-4)
    assert len(calls) == 2  # float64 is not compiled


def test_whole_rows_and_checkpointing() -> None:
    model = build(4)
    oracle = build(4).double()
    close(trained(model, None, None), trained(oracle, None, None))
    first = {n: p.grad for n, p in model.named_parameters()}
    model.train().checkpointing = True
    trained(model, None, None)
    for name, p in model.named_parameters():
        close(first[name], oracle.get_parameter(name).grad, 1e-4)
        assert p.grad is not None and torch.equal(p.grad, first[name])


def test_bfloat16_is_near() -> None:
    model, oracle = build(4), build(4).double()
    close(trained(model, packed_positions(), "records", low=True), trained(oracle, packed_positions(), "records"), 0.05)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32
        close(p.grad, oracle.get_parameter(name).grad, 0.2)


def test_a_record_does_not_depend_on_its_neighbours() -> None:
    """Neither in what it says nor in what it is taught: bit for bit, wherever it stands in a row."""
    model = build(4)
    positions = torch.cat([torch.arange(40), torch.arange(57)])[None]
    line = ids(1, 97)
    both = model(line, positions, "records", logits="none").hidden[:, 40:]
    alone = model(line[:, 40:], None, None, logits="none").hidden
    assert torch.equal(both, alone)
    hidden = model(line, positions, "records", logits="none").hidden
    taught = torch.autograd.grad(hidden[:, 40:].sum(), model.embed.weight)[0]
    model.embed.weight.grad = None
    changed = line.clone()
    changed[:, :40] = line[:, :40].flip(1)
    hidden = model(changed, positions, "records", logits="none").hidden
    assert torch.equal(torch.autograd.grad(hidden[:, 40:].sum(), model.embed.weight)[0], taught)


def test_threads_change_nothing() -> None:
    before = torch.get_num_threads()
    kept = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            model = build(4)
            logits = trained(model, packed_positions(), "records")
            kept.append(
                [logits, *(h for n, h in sorted((n, p.grad) for n, p in model.named_parameters()) if "gain" in n)]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_hyper_steps(n: int) -> None:
    """Read, pass and write of the kernel against the module in float64: values and all gradients."""
    parts = [HyperConnection(n, 24, i) for i in range(2)]
    with torch.no_grad():
        for i, part in enumerate(parts):
            part.phi.normal_(std=3.0, generator=seeds.torch_generator("phi", n, i))
            part.alpha += torch.tensor([0.3, 0.4, 0.5])
    twins = [HyperConnection(n, 24, i).double() for i in range(2)]
    for part, twin in zip(parts, twins, strict=True):
        twin.load_state_dict(part.state_dict())

    def run(fast: bool, hyper: list[HyperConnection], dtype: torch.dtype) -> list[Tensor]:
        x = draw(21, n, 24).to(dtype).requires_grad_()
        if fast:
            x1, y, coef = fused.hyper_read(x, hyper[0].reading())
            x2, y2, coef2 = fused.hyper_pass(x1, y.sin(), coef, hyper[1].reading())
            out = fused.hyper_write(x2, y2.cos(), coef2)
        else:
            y, y2, out = plain(x, hyper)
        weights = [draw(*t.shape, name=f"w{i}").to(dtype) for i, t in enumerate((y, y2, out))]
        loss = sum(((t * w).sum() for t, w in zip((y, y2, out), weights, strict=True)), x.new_zeros(()))
        return [y, y2, out, *torch.autograd.grad(loss, [x, *(p for h in hyper for p in h.parameters())])]

    for found, wanted in zip(run(True, parts, torch.float32), run(False, twins, torch.float64), strict=True):
        close(found, wanted, 1e-4)


def plain(x: Tensor, hyper: list[HyperConnection]) -> tuple[Tensor, Tensor, Tensor]:
    """Two sublayers in the module's words; float64 all through (`coefficients` would go to float32)."""

    def coefficients(h: HyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return h._coefficients(x.flatten(-2))

    def normed(y: Tensor) -> Tensor:
        return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    reads, turns = [], (torch.sin, torch.cos)
    for h, turn in zip(hyper, turns, strict=True):
        pre, post, comb = coefficients(h, x)
        reads.append(normed(torch.einsum("tj,tjc->tc", pre, x)))
        x = torch.einsum("tjk,tjc->tkc", comb, x) + post[..., None] * turn(reads[-1])[:, None]
    return reads[0], reads[1], x


def check(fast: Callable[..., Tensor], slow: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values and gradients of `fast` against those of `slow` in float64."""
    a = [x.clone().requires_grad_() for x in inputs]
    b = [x.double().requires_grad_() for x in inputs]
    found, wanted = fast(*a), slow(*b)
    close(found, wanted)
    weight = draw(*wanted.shape, name="check")
    gradients = zip(
        torch.autograd.grad((found * weight).sum(), a), torch.autograd.grad((wanted * weight).sum(), b), strict=True
    )
    for one, other in gradients:
        close(one, other)


def test_mlp_and_linear() -> None:
    x, up, out = draw(5, 7, 24), draw(96, 24, name="up"), draw(24, 96, name="out")
    check(fused.squared_relu_mlp, lambda x, u, o: (x @ u.T).relu().square() @ o.T, x, up, out)
    for width in (8, 24, 90):
        layer = fused.Linear(24, width)

        def fast(x: Tensor, w: Tensor, layer: fused.Linear = layer) -> Tensor:
            return torch.func.functional_call(layer, {"weight": w}, (x,))  # type: ignore[no-any-return]

        check(fast, lambda x, w: x @ w.T, x, draw(width, 24, name="w"))


@pytest.mark.parametrize("added", [False, True])
def test_add_and_norm(added: bool) -> None:
    def slow(x: Tensor, z: Tensor) -> Tensor:
        total = x + z if added else x
        return torch.cat([total, total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt()]) + 0 * z.sum()

    x, z = draw(70, 24), draw(70, 24, name="z")
    check(
        lambda x, z: torch.cat(fused.add_norm(x, z if added else None)) + 0 * z.sum(), slow, x, z
    ) if added else check(lambda x: torch.cat(fused.add_norm(x, None)), lambda x: slow(x, torch.zeros(1)), x)


def test_a_row_beyond_the_context_is_refused() -> None:
    model = build(2)
    with pytest.raises(ValueError, match=f"rows of {CONTEXT + 1} tokens.*context is {CONTEXT}"):
        model(ids(2, CONTEXT + 1))
    with pytest.raises(IndexError):
        model(ids(1, 4), torch.tensor([[0, 1, 2, CONTEXT]]), "records")


def test_large_gains_stay_finite() -> None:
    """Scores of hundreds: the exponentials are taken below the largest."""
    model = build(4)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.gain.fill_(200.0)  # type: ignore[union-attr, operator]
    logits = trained(model, packed_positions(), "records")
    assert logits.isfinite().all()
    assert all(p.grad is not None and math.isfinite(p.grad.abs().max()) for p in model.parameters())
