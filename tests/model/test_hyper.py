"""mHC coefficients: the hand-checkable vectors of algorithms.md §13, both projections, the gauges."""

from __future__ import annotations

import math

import pytest
import torch

from gnomon.base import seeds
from gnomon.model.hyper import HyperConnection, birkhoff, gauges, mix, permutation_matrices, sinkhorn

LOGITS = [[1.0, 0, 2, -1], [0, 1, 0, 1], [-1, 2, 0, 0], [0.5, -0.5, 1, 0]]
COMB = [
    [0.374615, 0.064666, 0.507281, 0.053439],
    [0.177341, 0.226196, 0.088344, 0.508119],
    [0.068287, 0.643585, 0.092470, 0.195657],
    [0.379757, 0.065553, 0.311905, 0.242785],
]


def test_sinkhorn_vector() -> None:
    comb = sinkhorn(torch.tensor(LOGITS), 20)
    assert torch.allclose(comb, torch.tensor(COMB), atol=5e-6)


def test_mixing_uses_the_transpose() -> None:
    """A first value of 2.23955 would mean that comb was read as H_res."""
    x = torch.tensor([1.0, 2, 3, 4]).reshape(1, 4, 1)
    mixed = mix(x, sinkhorn(torch.tensor(LOGITS), 20)[None])[0, :, 0]
    assert torch.allclose(mixed, torch.tensor([2.45319, 2.71003, 2.20900, 2.62779]), atol=2e-5)
    assert abs(mixed[0].item() - 2.23955) > 0.2


def test_columns_last_makes_the_rows_of_h_res_exact() -> None:
    """After few iterations only the side that was normalised last holds: column sums of comb, rows of H_res."""
    comb = sinkhorn(3 * torch.randn(64, 4, 4, generator=seeds.torch_generator("last side")), 3)
    reading = gauges(comb, torch.ones(64, 4, 8))
    assert reading["row_error"] < 1e-5 < 1e-3 < reading["column_error"]


@pytest.mark.parametrize(
    "c, diagonal, off, entropy", [(1.0, 0.475367, 0.174878, 1.2683), (5.0, 0.980187, 0.006604, 0.1191)]
)
def test_scaled_identity(c: float, diagonal: float, off: float, entropy: float) -> None:
    comb = sinkhorn(c * torch.eye(4), 20)
    assert torch.allclose(comb.diagonal(), torch.full((4,), diagonal), atol=1e-5)
    assert torch.allclose(comb[~torch.eye(4, dtype=torch.bool)], torch.full((12,), off), atol=1e-5)
    assert gauges(comb[None], torch.ones(1, 4, 2))["entropy"] == pytest.approx(entropy, abs=2e-4)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_exact_projection_at_any_sharpness(n: int) -> None:
    """Rows and columns sum to 1 within 1e-6 for logits of any standard deviation in [0, 8] (goal 2)."""
    tables = permutation_matrices(n)
    draws = torch.randn(300, math.factorial(n), generator=seeds.torch_generator("birkhoff", n))
    for std in (0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0):
        comb = birkhoff(std * draws, tables)
        assert (comb >= 0).all()
        assert (comb.sum(-1) - 1).abs().max() <= 1e-6
        assert (comb.sum(-2) - 1).abs().max() <= 1e-6


def test_sinkhorn_error_beside_the_exact_one() -> None:
    """What §1.5 measures: 20 iterations do for soft logits and are off by percents for sharp ones."""
    draws = torch.randn(300, 4, 4, generator=seeds.torch_generator("sinkhorn error"))

    def error(std: float) -> float:
        comb = sinkhorn(std * draws, 20)
        assert (comb.sum(-2) - 1).abs().max() < 1e-5  # the side that is normalised last
        return (comb.sum(-1) - 1).abs().max().item()

    errors = {std: error(std) for std in (0.5, 1.0, 2.0, 5.0, 8.0)}
    assert errors[0.5] < 1e-5
    assert errors[1.0] < 1e-3
    assert errors[2.0] > 1e-3 and 1e-2 < errors[5.0] < 0.5 and errors[8.0] > errors[2.0]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_permutation_tables(n: int) -> None:
    tables = permutation_matrices(n)
    assert tables.shape == (math.factorial(n), n, n)
    assert torch.equal(tables[0], torch.eye(n))
    assert torch.equal(tables.sum(-1), torch.ones(len(tables), n))
    assert torch.equal(tables.sum(-2), torch.ones(len(tables), n))
    assert len(tables.unique(dim=0)) == len(tables)


@pytest.mark.parametrize("projection", ["exact", "sinkhorn"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_coefficients_at_initialisation(n: int, projection: str) -> None:
    """Pre sums to 1 with its weight on stream index mod n, post is 1, H_res is row-stochastic: a plain residual."""
    x = torch.randn(5, n, 8, generator=seeds.torch_generator("coefficients", n))
    for index in range(n + 1):
        pre, post, comb = HyperConnection(n, 8, index, projection).coefficients(x)
        assert torch.allclose(pre.sum(-1), torch.ones(5), atol=1e-6)
        assert (pre.argmax(-1) == index % n).all()
        assert torch.equal(post, torch.ones(5, n))
        assert torch.allclose(comb.sum(-2), torch.ones(5, n), atol=1e-5)
        assert not torch.allclose(comb, torch.eye(n).expand(5, n, n), atol=0.05)  # not frozen at the identity


@pytest.mark.parametrize("projection", ["exact", "sinkhorn"])
def test_coefficients_are_float32_and_the_bias_is_not_divided(projection: str) -> None:
    """bf16 streams give float32 coefficients; scaling the stream changes nothing (one RMS per token)."""
    hyper = HyperConnection(3, 8, 0, projection)
    with torch.no_grad():
        hyper.phi.normal_(generator=seeds.torch_generator("phi"))
    x = torch.randn(4, 3, 8, generator=seeds.torch_generator("x"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(c.dtype == torch.float32 for c in hyper.coefficients(x.bfloat16()))
    for once, tenfold in zip(hyper.coefficients(x), hyper.coefficients(10 * x), strict=True):
        assert torch.allclose(once, tenfold, atol=1e-5)


def test_read_and_write_by_hand() -> None:
    hyper = HyperConnection(3, 2, 0)
    x = torch.randn(4, 3, 2, generator=seeds.torch_generator("hand"))
    y, post, comb = hyper.read(x)
    pre = hyper.coefficients(x)[0]
    assert torch.allclose(y, torch.einsum("bn,bnc->bc", pre, x), atol=1e-6)
    z = torch.randn(4, 2, generator=seeds.torch_generator("z"))
    wanted = torch.einsum("bjk,bjc->bkc", comb, x) + post[..., None] * z[:, None]
    assert torch.allclose(hyper.write(x, z, post, comb), wanted, atol=1e-6)


def test_gauges() -> None:
    """Identity: no error, no entropy. A wrong row or column is reported on its own side. Spread of known streams."""
    same = torch.ones(2, 4, 8)
    clean = gauges(torch.eye(4).expand(2, 4, 4), same)
    assert max(abs(v) for v in clean.values()) < 1e-6
    comb = torch.eye(4).repeat(2, 1, 1)
    comb[0, 0, 0] = 0.5
    comb[0, 0, 1] = 0.5  # comb rows still sum to 1: H_res columns do, its rows do not
    reading = gauges(comb, same)
    assert reading["row_error"] == pytest.approx(0.5) and reading["column_error"] < 1e-6
    uniform = gauges(torch.full((2, 4, 4), 0.25), same)
    assert uniform["entropy"] == pytest.approx(math.log(4), abs=1e-5)
    apart = torch.tensor([0.5, 1.5, 0.5, 1.5]).reshape(1, 4, 1).expand(1, 4, 8)
    assert gauges(torch.eye(4)[None], apart)["spread"] == pytest.approx(0.5, abs=1e-6)


def test_refused() -> None:
    with pytest.raises(ValueError, match="exact.*sinkhorn.*'softmax'"):
        HyperConnection(4, 8, 0, "softmax")
    with pytest.raises(ValueError, match="5! permutations.*sinkhorn"):
        HyperConnection(5, 8, 0, "exact")
    assert HyperConnection(5, 8, 0, "sinkhorn").n_res == 25
