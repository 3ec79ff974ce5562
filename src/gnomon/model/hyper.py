"""Manifold-constrained hyper-connections (mHC): n residual streams mixed by doubly stochastic matrices.

Legend: N tokens, n streams, C channels. Source: arXiv 2512.24880 §4 (and arXiv 2601.05732 for the exact projection).
A sublayer F sees one collapsed stream and writes back to all of them:

    x_out[k] = post[k] * F(sum_j pre[j] x[j]) + sum_j comb[j, k] x[j]

`comb` is the transpose of H_res, so that "columns of comb last" makes the rows of H_res exact.
All coefficient arithmetic is float32: bf16 Sinkhorn drifts.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

EPS = 1e-6


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Approximate projection on doubly stochastic matrices, comb convention.

    logits [..., n, n] float32 -> comb [..., n, n]: softmax over the last axis, column division, then
    `iterations - 1` times (row division, column division). mHC §4.2 uses 20 iterations.
    """
    comb = torch.softmax(logits, dim=-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    return comb


def permutation_matrices(n: int) -> Tensor:
    """All n! permutation matrices [n!, n, n], identity first."""
    eye = torch.eye(n)
    return torch.stack([eye[list(p)] for p in itertools.permutations(range(n))])


def birkhoff(weights: Tensor, permutations: Tensor) -> Tensor:
    """Exact projection: a convex combination of permutation matrices (Birkhoff), for n <= 4.

    weights [..., n!] logits, permutations [n!, n, n] -> comb [..., n, n]; every row and column sums to 1
    up to float rounding, whatever the logits.
    """
    n = permutations.shape[-1]
    mixed = torch.softmax(weights, dim=-1) @ permutations.reshape(permutations.shape[0], n * n)
    return mixed.unflatten(-1, (n, n))


def mix(x: Tensor, comb: Tensor) -> Tensor:
    """H_res x: x [N, n, C], comb [N, n, n] (comb[j, k] = H_res[k, j]) -> [N, n, C]."""
    out = comb[..., 0, :, None] * x[..., :1, :]
    for j in range(1, x.shape[-2]):  # broadcast sums beat n x n batched matmuls on CPU, and compilers fuse them
        out = out + comb[..., j, :, None] * x[..., j : j + 1, :]
    return out


class HyperConnection(nn.Module):
    """Pre, post and residual coefficients of one sublayer, computed per token from the whole stream.

    Initialisation (algorithms.md §1.4): the dynamic part is zero, post = 1 and pre sums to 1 with most of its
    weight on stream `index mod n`. So a fresh net equals the plain pre-norm net while the streams can diverge.
    """

    permutations: Tensor

    def __init__(self, streams: int, channels: int, index: int, projection: str = "exact", iterations: int = 20):
        super().__init__()
        if projection not in ("exact", "sinkhorn"):
            raise ValueError(f"mHC projection must be 'exact' or 'sinkhorn', not {projection!r}.")
        if projection == "exact" and streams > 4:
            raise ValueError(f"the exact projection lists {streams}! permutations; use projection='sinkhorn' above 4.")
        self.streams, self.channels, self.iterations = streams, channels, iterations
        self.projection = projection
        n = streams
        self.n_res = math.factorial(n) if projection == "exact" else n * n
        self.phi = nn.Parameter(torch.zeros(n * channels, 2 * n + self.n_res))
        self.alpha = nn.Parameter(torch.full((3,), 0.01))
        delta = 0.1
        share = torch.full((n,), delta)
        share[index % n] = 1 - (n - 1) * delta
        bias = torch.zeros(2 * n + self.n_res)
        bias[:n] = torch.logit(share)
        if projection == "exact":
            bias[2 * n] = math.log(4.0 * max(self.n_res - 1, 1))  # identity permutation weighs 0.8
            table = torch.empty(self.n_res, n, n, dtype=torch.float32)  # whatever the default dtype is
            self.register_buffer("permutations", table, persistent=False)
            self.make_tables()
        else:
            bias[2 * n :] = 2.0 * torch.eye(n).flatten()  # diagonal .71, gradients alive (§1.5)
        self.bias = nn.Parameter(bias)

    @torch.no_grad()
    def make_tables(self) -> None:
        """Fill the permutation matrices, which are not saved with the weights."""
        if self.projection == "exact":
            self.permutations.copy_(permutation_matrices(self.streams))

    def scale(self) -> Tensor:
        """Factor of every coefficient before its bias [2n + n_res]."""
        n = self.streams
        return torch.cat([self.alpha[0].expand(n), self.alpha[1].expand(n), self.alpha[2].expand(self.n_res)])

    def reading(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the compiled kernel needs for `read` (fused.py): phi, factor and bias of every coefficient."""
        return self.phi, self.scale(), self.bias

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, n, C] -> pre [N, n], post [N, n], comb [N, n, n], all float32 (float64 stays)."""
        flat = x.flatten(-2)
        with torch.autocast(x.device.type, enabled=False):
            return self._coefficients(flat if flat.dtype == torch.float64 else flat.float())

    def _coefficients(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = self.streams
        inverse_rms = torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
        raw = (flat @ self.phi) * inverse_rms
        raw = raw * self.scale() + self.bias
        pre = torch.sigmoid(raw[..., :n])
        post = 2 * torch.sigmoid(raw[..., n : 2 * n])
        if self.projection == "exact":
            comb = birkhoff(raw[..., 2 * n :], self.permutations)
        else:
            comb = sinkhorn(raw[..., 2 * n :].unflatten(-1, (n, n)), self.iterations)
        return pre, post, comb

    def read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams for the sublayer: x [N, n, C] -> (y [N, C], post [N, n], comb [N, n, n])."""
        pre, post, comb = self.coefficients(x)
        y = pre[..., 0, None] * x[..., 0, :]
        for j in range(1, self.streams):
            y = y + pre[..., j, None] * x[..., j, :]
        return y.to(x.dtype), post, comb

    def write(self, x: Tensor, z: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """Write the sublayer's output z [N, C] back: -> [N, n, C]."""
        return (mix(x, comb.to(x.dtype)) + post.to(x.dtype).unsqueeze(-1) * z.unsqueeze(-2)).to(x.dtype)


def gauges(comb: Tensor, x: Tensor) -> dict[str, float]:
    """Health of one hyper-connection: row and column error of H_res, row entropy (max ln n), stream spread.

    comb [N, n, n], x [N, n, C]. Spread is the RMS deviation of the streams from their mean over the RMS of the mean.
    """
    h_res = comb.transpose(-1, -2).float()
    centre = x.float().mean(-2, keepdim=True)
    return {
        "row_error": (h_res.sum(-1) - 1).abs().max().item(),
        "column_error": (h_res.sum(-2) - 1).abs().max().item(),
        "entropy": -(h_res * (h_res + 1e-12).log()).sum(-1).mean().item(),
        "spread": ((x.float() - centre).square().mean().sqrt() / (centre.square().mean().sqrt() + 1e-12)).item(),
    }
