"""MetacogHeads: taps -> shared trunk -> per-layer experts -> aggregator -> global plan, budget and confidence.

N rows · L tapped layers · C hidden size · P proj_dim · K plans. Taps are detached: head losses never reach the base.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gnomon.base.errors import ModelError
from gnomon.metacognition.aggregator import LayerAggregator
from gnomon.metacognition.config import SITES, MetacogConfig
from gnomon.metacognition.experts import LayerExperts
from gnomon.metacognition.policy import IDENTITY
from gnomon.metacognition.trunk import PerLayerTrunk


@dataclass(frozen=True)
class MetacogOutput:
    """plan_logits [N, K] · budget_raw [N] in log1p(tokens) · conf_raw [N] logit · alpha [N, L] · g [N, P].

    solve_logits, cost_raw [N, K], at the prompt: whether each plan solves the problem, and its log1p(tokens); None
    where the config has no `values`. policy_logits [N, G], at the think tag: which entry of policy.GRID; None where the
    config has no `policy`.

    per_layer: always present; empty unless asked for, else plan_logits_pl [N, L, K], budget_raw_pl [N, L],
    conf_raw_pl [N, L].
    """

    plan_logits: Tensor
    budget_raw: Tensor
    conf_raw: Tensor
    alpha: Tensor
    g: Tensor
    solve_logits: Tensor | None = None
    cost_raw: Tensor | None = None
    policy_logits: Tensor | None = None
    per_layer: dict[str, Tensor] = field(default_factory=dict)


def _head(proj_dim: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(proj_dim, proj_dim), nn.GELU(), nn.Linear(proj_dim, out))


def _policy_head(proj_dim: int, entries: int) -> nn.Sequential:
    """Says identity for every state until it is trained."""
    head = _head(proj_dim, entries)
    last = head[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    with torch.no_grad():
        last.bias[IDENTITY] = 2.0
    return head


class MetacogHeads(nn.Module):
    """The metacognitive layer. It only reads taps; the backbone is untouched."""

    layer_index: Tensor

    def __init__(self, config: MetacogConfig) -> None:
        super().__init__()
        self.config = config
        n_layers, proj_dim = len(config.used_layers), config.proj_dim
        self.register_buffer("layer_index", torch.tensor(config.used_layers), persistent=False)
        self.trunk = PerLayerTrunk(n_layers, config.hidden_size, proj_dim, config.width, config.dropout)
        self.experts = LayerExperts(n_layers, proj_dim, config.n_plans, config.experts_per_layer)
        self.aggregator = LayerAggregator(n_layers, proj_dim, config.aggregator)
        self.plan_head = _head(proj_dim, config.n_plans)
        self.budget_head = _head(proj_dim, 1)
        self.conf_head = _head(proj_dim, 1)
        self.value_head = _head(proj_dim, 2 * config.n_plans) if config.values else None
        self.policy_head = _policy_head(proj_dim, config.policy) if config.policy else None

    def forward(self, taps: Tensor, site: Tensor, used: Tensor, *, per_layer: bool = False) -> MetacogOutput:
        """taps [N, L, C] of all backbone layers, site [N] int64 (see SITES), used [N] tokens -> MetacogOutput.

        Raises ModelError when the taps do not fit the configured backbone.
        """
        want = (self.config.n_layers, self.config.hidden_size)
        if taps.ndim != 3 or tuple(taps.shape[1:]) != want:
            raise ModelError(
                f"taps must be [N, {want[0]}, {want[1]}] for these heads, got {list(taps.shape)}; "
                "the heads belong to another base model"
            )
        taps = taps.detach()
        if not self.config.linked_all_layers:
            taps = taps.index_select(1, self.layer_index)
        z = self.trunk(taps, site, used)
        g, alpha = self.aggregator(z)
        detail: dict[str, Tensor] = {}
        if per_layer:
            plan_pl, budget_pl, conf_pl = self.experts(z)
            detail = {"plan_logits_pl": plan_pl, "budget_raw_pl": budget_pl, "conf_raw_pl": conf_pl}
        values = (None, None) if self.value_head is None else self.value_head(g).chunk(2, dim=-1)
        return MetacogOutput(
            solve_logits=values[0],
            cost_raw=values[1],
            policy_logits=None if self.policy_head is None else self.policy_head(g),
            plan_logits=self.plan_head(g),
            budget_raw=self.budget_head(g).squeeze(-1),
            conf_raw=self.conf_head(g).squeeze(-1),
            alpha=alpha,
            g=g,
            per_layer=detail,
        )

    @torch.no_grad()
    def start_from(self, budget_mean: float, conf_mean: float) -> None:
        """Set the output biases to the training means, so that training starts at the constant predictor.

        budget_mean: mean of log1p(tokens); conf_mean: mean share correct in (0, 1).
        """
        logit = float(torch.logit(torch.tensor(conf_mean).clamp(0.01, 0.99)))
        k = self.config.n_plans
        for head, value in ((self.budget_head, budget_mean), (self.conf_head, logit)):
            last = head[-1]
            assert isinstance(last, nn.Linear)
            last.bias.fill_(value)
            last.weight.mul_(0.1)
        self.experts.bias[..., k] = budget_mean
        self.experts.bias[..., k + 1] = logit

    def fingerprint(self) -> str:
        """Hash of configuration and weights; a calibration card is bound to it."""
        # A field that older layers lack does not enter, so that their cards still belong to them.
        absent = {name for name in ("values", "policy", "closing") if not getattr(self.config, name)}
        digest = hashlib.sha256(self.config.model_dump_json(exclude=absent).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@torch.no_grad()
def plan_agreement(out: MetacogOutput) -> Tensor:
    """Share of rows in which each layer's plan is the global one, [L]; needs the per-layer record."""
    return (out.per_layer["plan_logits_pl"].argmax(-1) == out.plan_logits.argmax(-1, keepdim=True)).float().mean(0)


@torch.no_grad()
def telemetry(out: MetacogOutput) -> dict[str, float]:
    """Gauges of one batch: alpha min/mean/max/entropy and, with per-layer records, agreement and spread.

    alpha/entropy is in nats (log L = uniform); plan_agreement is the share of layers whose plan is the global one (it
    means something at the prompt, where plans are read); layers/budget_var is the variance over layers of
    log1p(tokens); policy/identity is the share of rows that keep the sampler's own settings.
    """
    alpha = out.alpha
    entropy = -(alpha * alpha.clamp_min(1e-12).log()).sum(-1).mean()
    gauges = {
        "alpha/min": float(alpha.min()),
        "alpha/mean": float(alpha.mean()),
        "alpha/max": float(alpha.max()),
        "alpha/entropy": float(entropy),
    }
    if out.per_layer:
        gauges["layers/plan_agreement"] = float(plan_agreement(out).mean())
        gauges["layers/budget_var"] = float(out.per_layer["budget_raw_pl"].var(-1, unbiased=False).mean())
    if out.policy_logits is not None:
        gauges["policy/identity"] = float((out.policy_logits.argmax(-1) == IDENTITY).float().mean())
    return gauges


def site_ids(name: str, n: int, device: torch.device | str = "cpu") -> Tensor:
    """[n] int64 filled with the number of a site name."""
    return torch.full((n,), SITES.index(name), dtype=torch.int64, device=device)
