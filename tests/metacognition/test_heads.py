"""Shapes, identities and gradients of trunk, experts, aggregator and heads."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from gnomon.base.errors import DataError, ModelError
from gnomon.base.seeds import seed_torch, torch_generator
from gnomon.metacognition.aggregator import LayerAggregator
from gnomon.metacognition.config import END, PROMPT, SITES, THINK_SITE, MetacogConfig
from gnomon.metacognition.experts import LayerExperts
from gnomon.metacognition.heads import MetacogHeads, site_ids, telemetry
from gnomon.metacognition.trunk import PerLayerTrunk

N, L, C = 6, 5, 12


def heads_of(**change: object) -> MetacogHeads:
    seed_torch("test-heads")
    return MetacogHeads(MetacogConfig(n_layers=L, hidden_size=C, proj_dim=8, width=16, **change)).eval()


@pytest.fixture
def taps() -> torch.Tensor:
    return torch.randn(N, L, C, generator=torch_generator("taps"))


def test_shapes_and_per_layer_record(taps: torch.Tensor) -> None:
    heads, used = heads_of(), torch.zeros(N)
    out = heads(taps, site_ids("prompt", N), used)
    assert out.per_layer == {}
    assert out.plan_logits.shape == (N, 4)
    assert out.budget_raw.shape == out.conf_raw.shape == (N,)
    assert out.alpha.shape == (N, L)
    assert out.g.shape == (N, 8)
    detail = heads(taps, site_ids("prompt", N), used, per_layer=True).per_layer
    assert {k: tuple(v.shape) for k, v in detail.items()} == {
        "plan_logits_pl": (N, L, 4),
        "budget_raw_pl": (N, L),
        "conf_raw_pl": (N, L),
    }


def test_head_losses_never_reach_the_base(taps: torch.Tensor) -> None:
    taps.requires_grad_(True)
    heads = heads_of()
    out = heads(taps, site_ids("think", N), torch.zeros(N), per_layer=True)
    outputs = (out.plan_logits, out.budget_raw, out.conf_raw, *out.per_layer.values())
    total = sum(t.sum() for t in outputs)
    bias = heads.trunk.out.bias
    to_taps, to_heads = torch.autograd.grad(total, [taps, bias], allow_unused=True)
    assert to_taps is None
    assert float(to_heads.abs().sum()) > 0.0


def test_every_parameter_gets_a_gradient(taps: torch.Tensor) -> None:
    heads = heads_of(experts_per_layer=2).train()
    with torch.no_grad():  # off the symmetric start: gates and the query start at zero
        for p in heads.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch_generator("kick", tuple(p.shape))))
    site = torch.tensor([PROMPT, PROMPT, THINK_SITE, THINK_SITE, END, END])
    out = heads(taps, site, torch.arange(N).float(), per_layer=True)
    total = sum(t.square().sum() for t in (out.plan_logits, out.budget_raw, out.conf_raw, *out.per_layer.values()))
    grads = torch.autograd.grad(total, list(heads.parameters()))
    names = [n for n, _ in heads.named_parameters()]
    silent = [n for n, g in zip(names, grads, strict=True) if float(g.abs().sum()) == 0.0]
    assert silent == []


def test_aggregator_starts_as_the_mean_and_mean_has_no_parameters(taps: torch.Tensor) -> None:
    attention, mean = LayerAggregator(L, C), LayerAggregator(L, C, "mean")
    for agg in (attention, mean):
        g, alpha = agg(taps)
        assert torch.allclose(g, taps.mean(1), atol=1e-6)
        assert torch.allclose(alpha, torch.full((N, L), 1.0 / L))
    assert list(mean.parameters()) == []
    with torch.no_grad():
        attention.prior[2] = 50.0
    assert torch.allclose(attention(taps)[0], taps[:, 2], atol=1e-5)


def test_standardisation_uses_each_sites_own_statistics(taps: torch.Tensor) -> None:
    trunk = PerLayerTrunk(L, C, 8, 16)
    shifted = torch.cat([taps, 100.0 + 3.0 * taps])
    site = torch.cat([site_ids("prompt", N), site_ids("think", N)])
    trunk.set_statistics(shifted, site)
    assert torch.allclose(trunk.mean[THINK_SITE], 100.0 + 3.0 * taps.mean(0), atol=1e-3)
    z = trunk(shifted, site, torch.zeros(2 * N))
    assert torch.allclose(z[:N], z[N:], atol=1e-3), "offsets start at zero, so standardised twins must agree"
    assert torch.allclose(trunk.mean[SITES.index("boundary")], shifted.mean(0), atol=1e-3)
    taps[0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        trunk.set_statistics(taps, site_ids("prompt", N))


def test_one_expert_is_a_linear_map_and_more_are_a_mixture(taps: torch.Tensor) -> None:
    experts = LayerExperts(L, C, 4, experts=3)
    plan, budget, conf = experts(taps)
    each = torch.einsum("nlp,lepo->nleo", taps, experts.weight) + experts.bias
    want = each.mean(2)  # gates start uniform
    assert torch.allclose(plan, want[..., :4], atol=1e-5)
    assert torch.allclose(torch.stack([budget, conf], -1), want[..., 4:], atol=1e-5)


def test_a_subset_of_layers_ignores_the_others(taps: torch.Tensor) -> None:
    heads = heads_of(layers=(1, 3))
    assert not heads.config.linked_all_layers
    before = heads(taps, site_ids("think", N), torch.zeros(N))
    other = taps.clone()
    other[:, [0, 2, 4]] = 9.0
    after = heads(other, site_ids("think", N), torch.zeros(N))
    assert torch.equal(before.budget_raw, after.budget_raw)
    assert before.alpha.shape == (N, 2)


def test_rows_are_independent(taps: torch.Tensor) -> None:
    heads = heads_of()
    whole = heads(taps, site_ids("end", N), torch.arange(N).float())
    alone = heads(taps[3:4], site_ids("end", 1), torch.tensor([3.0]))
    assert torch.allclose(whole.conf_raw[3:4], alone.conf_raw, atol=1e-6)


def test_used_tokens_matter_once_trained_and_site_is_read(taps: torch.Tensor) -> None:
    heads = heads_of()
    with torch.no_grad():
        heads.trunk.used_offset.fill_(0.3)
        heads.trunk.site_offset[END] = 0.5
    a = heads(taps, site_ids("think", N), torch.zeros(N)).conf_raw
    assert not torch.allclose(a, heads(taps, site_ids("think", N), torch.full((N,), 50.0)).conf_raw)
    assert not torch.allclose(a, heads(taps, site_ids("end", N), torch.zeros(N)).conf_raw)


def test_foreign_taps_are_refused(taps: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"another base model"):
        heads_of()(taps[:, :-1], site_ids("think", N), torch.zeros(N))


def test_telemetry_is_finite_and_means_what_it_says(taps: torch.Tensor) -> None:
    heads = heads_of()
    gauges = telemetry(heads(taps, site_ids("prompt", N), torch.zeros(N), per_layer=True))
    assert gauges["alpha/mean"] == pytest.approx(1.0 / L)
    assert gauges["alpha/entropy"] == pytest.approx(math.log(L), abs=1e-5)
    assert 0.0 <= gauges["layers/plan_agreement"] <= 1.0
    assert gauges["layers/budget_var"] > 0.0
    assert all(math.isfinite(v) for v in gauges.values())


def test_fingerprint_follows_weights_and_configuration() -> None:
    heads = heads_of()
    same = heads_of()
    assert heads.fingerprint() == same.fingerprint()
    with torch.no_grad():
        same.aggregator.prior[0] += 1e-3
    assert heads.fingerprint() != same.fingerprint()
    assert heads.fingerprint() != heads_of(dropout=0.2).fingerprint()


@pytest.mark.parametrize(
    "change", [{"layers": (3, 1)}, {"layers": (9,)}, {"plans": ("direct", "direct")}, {"plans": ("guess",)}, {"x": 1}]
)
def test_bad_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MetacogConfig(n_layers=L, hidden_size=C, **change)
