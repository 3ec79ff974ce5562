"""fit_heads(): train the metacognitive heads on cached states, in seconds on a CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gnomon.base.seeds import seed_torch, torch_generator
from gnomon.metacognition.config import BOUNDARY, END, PROMPT, THINK_SITE, MetacogConfig
from gnomon.metacognition.heads import MetacogHeads, MetacogOutput, plan_agreement, telemetry
from gnomon.training import objectives
from gnomon.training.head_rows import HeadRows, split
from gnomon.training.labels import LabelSet, Rollout
from gnomon.training.loop import each, fit
from gnomon.training.objectives import LossWeights
from gnomon.training.trials import Trials

SITES_IN_ORDER = (PROMPT, THINK_SITE, END, BOUNDARY, BOUNDARY)  # of the rows of a batch


class HeadsConfig(BaseModel):
    """How the heads are trained.

    batch: rows per site and step; inner_val: share of problems (by hash of their id) held out for early stopping;
    patience: evaluations without improvement before stopping.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    proj_dim: int = Field(default=64, ge=2)
    width: int = Field(default=128, ge=2)
    aggregator: Literal["attention", "mean"] = "attention"
    layers: tuple[int, ...] | None = None
    experts_per_layer: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    steps: int = Field(default=1600, ge=1)
    batch: int = Field(default=256, ge=2)
    lr: float = Field(default=2e-3, gt=0.0)
    weight_decay: float = Field(default=0.02, ge=0.0)
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    inner_val: float = Field(default=0.15, gt=0.0, lt=0.9)
    eval_every: int = Field(default=40, ge=1)
    patience: int = Field(default=10, ge=1)
    plan_smoothing: float = Field(default=0.05, ge=0.0, lt=1.0)
    weights: LossWeights = LossWeights()

    def metacog(
        self, n_layers: int, hidden_size: int, plans: tuple[str, ...], policy: int = 0, closing: bool = False
    ) -> MetacogConfig:
        """The shape of the heads for a backbone with these taps; policy: entries of its grid, 0 = no such head."""
        shared = self.model_dump(include={"proj_dim", "width", "aggregator", "layers", "experts_per_layer", "dropout"})
        return MetacogConfig(
            n_layers=n_layers, hidden_size=hidden_size, plans=plans, values=True, policy=policy, closing=closing,
            **shared,
        )  # fmt: skip


def head_losses(
    heads: MetacogHeads, data: HeadRows, rows: Sequence[Tensor], smoothing: float = 0.0
) -> tuple[dict[str, Tensor], MetacogOutput]:
    """Losses on rows of the prompt, think, end, boundary and trial states (in this order); one forward pass.

    What is only seen at boundaries is left out where there are none: a loss of 0 would read as learned.
    """
    p, t, e, m, r = rows
    n = (len(p), len(t), len(e), len(m), len(r))
    taps = torch.cat([data.prompt[p], data.think[t], data.end[e], data.boundary[m], data.closing[r]])
    used = torch.cat([torch.zeros(n[0] + n[1], device=taps.device), data.used[e], data.spent[m], data.closing_used[r]])
    out: MetacogOutput = heads(taps, _sites(n, taps.device), used, per_layer=True)
    a, b, c, d = n[0], n[0] + n[1], sum(n[:3]), sum(n[:4])
    plan_pl, budget_pl, conf_pl = (out.per_layer[k] for k in ("plan_logits_pl", "budget_raw_pl", "conf_raw_pl"))
    need, cut, share, right = data.budget[t], data.censored[t], data.share[t], data.correct[e]
    parts = {
        "plan": objectives.plan_ce(out.plan_logits[:a], data.plan[p], smoothing),
        **_values(out, a, data.solve[p], data.cost[p]),
        "budget": objectives.budget_error(out.budget_raw[a:b], need, cut),
        "budget_quantile": objectives.budget_pinball(out.budget_raw[a:b], need, 0.5, cut),
        "conf_before": objectives.confidence_bce(out.conf_raw[a:b], share),
        "conf_after": objectives.confidence_bce(out.conf_raw[b:c], right),
        "conf_rank": objectives.confidence_rank(out.conf_raw[a:b], share)
        + objectives.confidence_rank(out.conf_raw[b:c], right),
        "layer_plan": objectives.plan_ce(plan_pl[:a], data.plan[p], smoothing),
        "layer_budget": objectives.budget_error(budget_pl[a:b], need, cut),
        "layer_conf": objectives.confidence_bce(conf_pl[a:b], share) + objectives.confidence_bce(conf_pl[b:c], right),
        "layer_budget_var": objectives.layer_variance(budget_pl[a:b]),
        "style_entropy": objectives.style_entropy(out.plan_logits[:a]),
    }
    if len(m):
        parts["boundary_budget"] = objectives.budget_error(out.budget_raw[c:d], data.need[m], data.need_censored[m])
    parts |= _at_boundaries(heads, out.conf_raw[c:d], data.outcome[m], out.conf_raw[d:], data.closing_right[r])
    if out.policy_logits is not None:
        parts["policy"] = objectives.policy_ce(out.policy_logits[a:b], data.policy[t])
    return parts, out


def _at_boundaries(
    heads: MetacogHeads, logit: Tensor, outcome: Tensor, closing: Tensor, right: Tensor
) -> dict[str, Tensor]:
    """Losses of the confidence at boundaries: closing there is right, or for heads without it, the whole thought is."""
    if not len(closing if heads.config.closing else logit):
        return {}
    if heads.config.closing:
        return {
            "closing": objectives.confidence_bce(closing, right),
            "closing_rank": objectives.confidence_rank(closing, right),
        }
    return {
        "boundary_conf": objectives.confidence_bce(logit, outcome),
        "boundary_rank": objectives.confidence_rank(logit, outcome),
    }


def _values(out: MetacogOutput, n: int, solve: Tensor, cost: Tensor) -> dict[str, Tensor]:
    """Losses of the plans' values on the first n rows; targets [n, K]."""
    if out.solve_logits is None or out.cost_raw is None:
        return {}
    return {
        "solve": objectives.confidence_bce(out.solve_logits[:n], solve),
        "cost": objectives.budget_error(out.cost_raw[:n], cost),
    }


def fit_heads(
    labels: LabelSet,
    config: HeadsConfig | None = None,
    seed: int = 0,
    *,
    policy_rates: NDArray[np.floating[Any]] | None = None,
    device: str = "cpu",
    on_step: Any = None,
    trials: Trials | None = None,
) -> tuple[MetacogHeads, dict[str, Any]]:
    """Train heads on a label set; the best state on the inner validation problems is kept.

    policy_rates [P, K, G]: share right of every problem and plan (in the label set's order) under each of the first G
    entries of policy.GRID, NaN = not measured; with them the heads get a decoding policy. trials: trial answers at
    boundaries; with them confidence there is that of closing there, without them that of the whole thought.
    on_step(step, row) sees every row of the loop (for progress and metrics), at evaluations with `gauges`. Returns
    (heads in eval mode on the CPU, report {train, val, steps, best_step, seconds, curve, telemetry, labels}). Raises
    DataError with too few problems.
    """
    config = config or HeadsConfig()
    train, val, entries = split(labels, policy_rates, config.inner_val, device, trials)
    seed_torch("heads", seed)
    heads = MetacogHeads(config.metacog(*train.shape, labels.strategies, entries, trials is not None)).to(device)
    _initialise(heads, train)
    best: dict[str, Any] = {"score": math.inf, "state": copy.deepcopy(heads.state_dict()), "step": 0, "stale": 0}
    curve: list[dict[str, float]] = []
    draw = torch_generator("heads-batches", seed)

    def step_loss(_: int) -> tuple[Tensor, dict[str, float]]:
        rows = [torch.randint(max(n, 1), (config.batch * (n > 0),), generator=draw).to(device) for n in train.sizes()]
        parts, _out = head_losses(heads, train, rows, config.plan_smoothing)
        return objectives.weighted(parts, config.weights)

    def watch(step: int, row: dict[str, Any]) -> bool:
        due = not step % config.eval_every or step == config.steps
        if on_step is not None and on_step(step, {**row, **named(gauges(heads, val, 512))} if due else row):
            return True
        if not due:
            return False
        scores = evaluate_heads(heads, val, config.weights)
        curve.append({"step": float(step), "train/loss": row["loss"]} | {f"val/{k}": v for k, v in scores.items()})
        if scores["loss"] < best["score"] - 1e-4:
            best.update(score=scores["loss"], state=copy.deepcopy(heads.state_dict()), step=step, stale=0)
        else:
            best["stale"] += 1
        return bool(best["stale"] >= config.patience)

    heads.train()
    optimizer = torch.optim.AdamW(_groups(heads, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
    plan = warm_cosine(config.warmup)
    result = fit(each(step_loss), [optimizer], config.steps, schedule=plan, clip=1.0, on_step=watch)
    heads.load_state_dict(best["state"])
    heads.eval()
    report = {
        **{name: evaluate_heads(heads, rows, config.weights) for name, rows in (("train", train), ("val", val))},
        **{name: result[name] for name in ("steps", "seconds")},
        "best_step": best["step"], "parameters": sum(p.numel() for p in heads.parameters()),
        "curve": curve, "telemetry": gauges(heads, val), "labels": labels.summary(),
    }  # fmt: skip
    return heads.cpu(), report


@torch.no_grad()
def evaluate_heads(heads: MetacogHeads, data: HeadRows, weights: LossWeights, limit: int = 4096) -> dict[str, float]:
    """Losses (unregularised, weighted sum as `loss`) and plan accuracy on up to `limit` rows per site."""
    was = heads.training
    heads.eval()
    rows = [torch.arange(0, n, max(1, math.ceil(n / limit))) for n in data.sizes()]
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    site_of = {
        "plan": 0,
        "solve": 0,
        "cost": 0,
        "budget": 1,
        "conf_before": 1,
        "conf_after": 2,
        "boundary_budget": 3,
        "boundary_conf": 3,
        "closing": 4,
        "policy": 1,
    }
    labelled = {
        "budget": ~torch.isnan(data.budget),
        "boundary_budget": ~torch.isnan(data.need),
        "policy": data.policy >= 0,
    }
    chunk = 512
    hits = 0.0
    for start in range(0, max(map(len, rows)), chunk):
        part_rows = [r[start : start + chunk] for r in rows]
        parts, out = head_losses(heads, data, part_rows)
        n_plan = len(part_rows[0])
        hits += float((out.plan_logits[:n_plan].argmax(-1) == data.plan[part_rows[0]]).sum())
        for name, k in site_of.items():
            known = labelled.get(name)
            if name not in parts:
                continue
            n = float(len(part_rows[k]) if known is None else known[part_rows[k]].sum())
            if n:
                sums[name] = sums.get(name, 0.0) + float(parts[name]) * n
                counts[name] = counts.get(name, 0.0) + n
    heads.train(was)
    scores = {name: sums[name] / counts[name] for name in sums}
    table = weights.model_dump()
    scores["loss"] = sum(table[name] * value for name, value in scores.items())
    scores["plan_accuracy"] = hits / max(1, int((data.plan[rows[0]] >= 0).sum()))
    return scores


def _initialise(heads: MetacogHeads, train: HeadRows) -> None:
    taps = torch.cat([train.prompt, train.think, train.end, train.boundary, train.closing])
    site = _sites(train.sizes(), taps.device)
    if heads.config.layers is not None:
        taps = taps.index_select(1, heads.layer_index)
    heads.trunk.set_statistics(taps, site)
    known = train.budget[~torch.isnan(train.budget)]
    heads.start_from(float(known.mean()) if len(known) else 3.0, float(train.share.mean()))


def _sites(sizes: Sequence[int], device: torch.device) -> Tensor:
    """Site numbers of a batch with so many rows of each of SITES_IN_ORDER, [N] int64."""
    return torch.cat([torch.full((n,), s, device=device) for n, s in zip(sizes, SITES_IN_ORDER, strict=True)])


def _groups(heads: MetacogHeads, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases, norms and embeddings of site and layer do not."""
    matrices = [p for n, p in heads.named_parameters() if n.endswith("weight") and p.ndim >= 2]
    ids = {id(p) for p in matrices}
    rest = [p for p in heads.parameters() if id(p) not in ids]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def warm_cosine(warmup: float) -> Any:
    """Share of the run in [0, 1) -> factor on the rate: linear to 1 over `warmup`, then a half cosine to 0."""

    def factor(done: float) -> float:
        if done < warmup:
            return 0.05 + 0.95 * done / warmup
        return 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / (1.0 - warmup)))

    return factor


@torch.no_grad()
def gauges(heads: MetacogHeads, data: HeadRows, limit: int = 2048) -> dict[str, Any]:
    """Telemetry at the think site on up to `limit` rows, and the mean alpha of every layer per site (for the plot).

    Plans are compared at the prompt, where they are read.
    """
    was = heads.training
    heads.eval()
    out: dict[str, Any] = {"alpha_by_site": {}}
    for name, site, taps, used in (
        ("prompt", PROMPT, data.prompt, None),
        ("think", THINK_SITE, data.think, None),
        ("end", END, data.end, data.used),
        ("boundary", BOUNDARY, data.boundary, data.spent),
    ):
        if not len(taps):
            continue
        taps = taps[:limit]
        tokens = torch.zeros(len(taps), device=taps.device) if used is None else used[:limit]
        read = heads(taps, torch.full((len(taps),), site, device=taps.device), tokens, per_layer=True)
        out["alpha_by_site"][name] = [float(a) for a in read.alpha.mean(0)]
        if name == "prompt":
            agreement = plan_agreement(read)
            out.update({"layers/plan_agreement": float(agreement.mean()), "agreement_by_layer": agreement.tolist()})
        if name == "think":
            out = {**telemetry(read), **out}
    heads.train(was)
    return out


def named(told: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of `gauges` for a row of metrics; the agreement of the i-th layer read as layers/plan_agreement/i."""
    by_layer = {f"layers/plan_agreement/{i}": x for i, x in enumerate(told.get("agreement_by_layer", ()))}
    return {k: v for k, v in told.items() if isinstance(v, float)} | by_layer


def domain_layer(heads: MetacogHeads) -> int:
    """The block whose state at the think tag tells home from abroad: an early one, not the first (docs/log.md).

    Later states of a well-trained base forget what is foreign about a prompt; the first one has read too little. A card
    names its block, so that cards of other versions keep theirs.
    """
    return min(max(1, heads.config.n_layers // 6), heads.config.n_layers - 1)


@torch.no_grad()
def read_greedy(heads: MetacogHeads, labels: LabelSet, chunk: int = 1024) -> dict[str, Any]:
    """What the heads say about every problem and strategy, beside what the greedy rollout did.

    Returns {plans, family, level, plan_probs, budget_raw, conf_before, conf_after, correct, used, closed,
    answer_logprob [N, K], state [N, K, C] of block `layer`} in numpy: what calibration fits on; and, for one node
    boundary of each rollout, {boundary_used, boundary_remaining (-1 where there is none), boundary_budget,
    boundary_conf (NaN where there is none) [N, K]}.
    """
    names = labels.strategies
    shape = (len(labels.problems), len(names))
    cells = [p.strategies[s] for p in labels.problems for s in names]
    greedy = [next((r for r in c.rollouts if r.greedy), c.rollouts[0]) for c in cells]
    prompt = _read(heads, [p.taps_prompt for p in labels.problems], PROMPT, chunk=chunk)
    think = _read(heads, [c.taps_think for c in cells], THINK_SITE, chunk=chunk)
    end = _read(heads, [r.taps_end for r in greedy], END, [r.used for r in greedy], chunk)
    logits = torch.cat([o.plan_logits for o in prompt])
    boundaries = _read_boundaries(heads, greedy, chunk)
    return {
        "plans": names,
        "family": tuple(p.family for p in labels.problems),
        "level": tuple(p.level for p in labels.problems),
        "plan_probs": logits.softmax(-1).double().numpy(),
        "solve": None if prompt[0].solve_logits is None else _joined(prompt, "solve_logits"),
        "cost": None if prompt[0].cost_raw is None else _joined(prompt, "cost_raw"),
        "budget_raw": _joined(think, "budget_raw").reshape(shape),
        "conf_before": _joined(think, "conf_raw").reshape(shape),
        "conf_after": _joined(end, "conf_raw").reshape(shape),
        "correct": np.array([r.correct for r in greedy]).reshape(shape),
        "used": np.array([r.used for r in greedy], dtype=np.int64).reshape(shape),
        "closed": np.array([r.closed for r in greedy]).reshape(shape),
        "answer_logprob": np.array([r.answer_logprob for r in greedy]).reshape(shape),
        "state": np.stack([c.taps_think[domain_layer(heads)] for c in cells]).reshape(*shape, -1),
        "layer": domain_layer(heads),
        **{name: values.reshape(shape) for name, values in boundaries.items()},
    }


@torch.no_grad()
def read_trials(heads: MetacogHeads, trials: Trials, chunk: int = 1024) -> NDArray[np.float64]:
    """Confidence logits [R] at boundaries with trial answers."""
    return _joined(_read(heads, list(trials.taps), BOUNDARY, trials.used.tolist(), chunk), "conf_raw")


def _read_boundaries(heads: MetacogHeads, rollouts: Sequence[Rollout], chunk: int) -> dict[str, NDArray[Any]]:
    """The `boundary_*` values of `read_greedy`, flat. Heads that never saw a boundary read none."""
    found = [(i, *r.boundary) for i, r in enumerate(rollouts) if r.boundary is not None]
    if not bool(heads.trunk.site_offset[BOUNDARY].any()):  # zero at initialisation, moved by the first step
        found = []
    used, remaining = np.full((2, len(rollouts)), -1, dtype=np.int64)
    budget, conf = np.full((2, len(rollouts)), np.nan)
    if found:
        at = np.array([i for i, _, _ in found])
        used[at] = [spent for _, spent, _ in found]
        remaining[at] = np.array([rollouts[i].used for i in at]) - used[at]
        outs = _read(heads, [taps for _, _, taps in found], BOUNDARY, [spent for _, spent, _ in found], chunk)
        budget[at], conf[at] = _joined(outs, "budget_raw"), _joined(outs, "conf_raw")
    return {
        "boundary_used": used, "boundary_remaining": remaining, "boundary_budget": budget, "boundary_conf": conf,
    }  # fmt: skip


def _read(
    heads: MetacogHeads, taps: list[NDArray[np.float32]], site: int, used: list[int] | None = None, chunk: int = 1024
) -> list[MetacogOutput]:
    """States [L, C] read at one site in chunks; used: tokens so far, default 0."""
    outs = []
    for start in range(0, len(taps), chunk):
        part = torch.from_numpy(np.stack(taps[start : start + chunk]))
        tokens = torch.zeros(len(part)) if used is None else torch.tensor(used[start : start + chunk]).float()
        outs.append(heads(part, torch.full((len(part),), site), tokens))
    return outs


def _joined(outs: list[MetacogOutput], name: str) -> NDArray[np.float64]:
    return np.concatenate([getattr(o, name).double().numpy() for o in outs])
