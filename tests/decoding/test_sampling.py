"""Sampling: distributions, log-probs at temperature and truncation, independence of neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gnomon.base import seeds
from gnomon.decoding import sampling

V = 50
SETTINGS = [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 5, 1.0), (1.3, 0, 0.7), (1.0, 20, 0.9), (0.8, 1, 1.0)]


def logits(rows: int, name: str = "l") -> torch.Tensor:
    return torch.randn(rows, V, generator=seeds.torch_generator("sampling-test", name)) * 2


def settings(rows: list[tuple[float, int, float]], key0: int = 0) -> sampling.Params:
    t, k, p = zip(*rows, strict=True)
    return sampling.params(t, k, p, [sampling.stream_key(key0, str(i), 0) for i in range(len(rows))])


def steps(rows: int, step: int) -> np.ndarray:
    return np.full(rows, step, dtype=np.uint64)


@pytest.mark.parametrize(("t", "k", "p"), SETTINGS[1:])
def test_log_probs_equal_a_textbook_computation(t: float, k: int, p: float) -> None:
    x = logits(1)
    got = sampling.log_distribution(x, settings([(t, k, p)]))[0].double().exp().numpy()
    q = np.exp(x[0].double().numpy() / t)
    q /= q.sum()
    order = np.argsort(-q, kind="stable")[: k or V]
    nucleus, total = [], 0.0
    for i in order:
        if nucleus and total >= p:
            break
        nucleus.append(int(i))
        total += q[i] / q[order].sum()
    want = np.zeros(V)
    want[nucleus] = q[nucleus] / q[nucleus].sum()
    assert np.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(("t", "k", "p"), SETTINGS[1:])
def test_frequencies_follow_the_distribution(t: float, k: int, p: float) -> None:
    n = 4000
    x = logits(1).expand(n, V).clone()
    rule = settings([(t, k, p)] * n, key0=7)
    ids, logp = sampling.sample(x, rule, steps(n, 3))
    want = sampling.log_distribution(x[:1], settings([(t, k, p)]))[0]
    assert torch.allclose(logp, want[ids], atol=1e-5)
    freq = torch.bincount(ids, minlength=V).double() / n
    probs = want.double().exp()
    assert float((freq - probs).abs().max()) < 5 * float((probs * (1 - probs) / n).sqrt().max()) + 1e-9
    assert bool((freq[probs == 0] == 0).all())


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = SETTINGS * 3
    x, rule = logits(len(rows)), settings(SETTINGS * 3)
    ids, logp = sampling.sample(x, rule, steps(len(rows), 9))
    for i in range(len(rows)):
        one, lp = sampling.sample(x[i : i + 1], rule.take([i]), steps(1, 9))
        assert one[0] == ids[i] and torch.allclose(lp[0], logp[i], atol=1e-6)
    order = list(reversed(range(len(rows))))
    back, _ = sampling.sample(x[order], rule.take(order), steps(len(rows), 9))
    assert back.tolist() == ids[order].tolist()


def test_greedy_rows_take_the_best_token_also_beside_sampled_ones() -> None:
    x = logits(2)
    ids, logp = sampling.sample(x, settings([(0.0, 0, 1.0), (1.0, 3, 0.5)]), steps(2, 0))
    alone, lp = sampling.sample(x[:1], settings([(0.0, 0, 1.0)]), steps(1, 0))
    assert ids[0] == alone[0] == x[0].argmax()
    want = x[0].log_softmax(-1)[ids[0]]
    assert torch.allclose(logp[0], want, atol=1e-5) and torch.allclose(lp[0], want, atol=1e-5)


def test_masked_tokens_are_never_drawn_and_carry_no_mass() -> None:
    n = 500
    x = logits(1).expand(n, V).clone()
    masks = torch.zeros(2, V)
    masks[1, :45] = -torch.inf
    phase = np.array([0] + [1] * (n - 1), dtype=np.int32)
    for row in SETTINGS:
        ids, logp = sampling.sample(x, settings([row] * n), steps(n, 1), masks, phase)
        free, _ = sampling.sample(x[:1], settings([row]), steps(1, 1))
        assert int(ids[0]) == int(free[0]), "every row has the mask of its own phase"
        ids, logp = ids[1:], logp[1:]
        assert int(ids.min()) >= 45
        if row == (1.0, 0, 1.0):
            assert torch.allclose(logp, x[0, 45:].log_softmax(-1)[ids - 45], atol=1e-5)


def test_uniforms_are_uniform_and_differ_by_stream_and_step() -> None:
    keys = np.array([sampling.stream_key(0, str(i), 0) for i in range(200)], dtype=np.uint64)
    u = np.stack([sampling.uniforms(keys, steps(200, s)) for s in range(100)])
    assert u.min() >= 0 and u.max() < 1 and len(np.unique(u)) == u.size
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: p = 1e-4
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03
    assert sampling.stream_key(0, "a", 0) != sampling.stream_key(0, "a", 1) != sampling.stream_key(1, "a", 0)
