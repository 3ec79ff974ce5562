"""What the metacognitive layer costs in decoding: reads, boundary reads, gate and adapters, soft rules."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import interval, workload

from gnomon.base import seeds
from gnomon.decoding.engine import Engine
from gnomon.decoding.slack import FixedCut, Margin, RuleConfig, Rules, Sure, factory
from gnomon.metacognition.calibration import BudgetClip, Card, Domain, Fitted, Quality, Running, Temperatures
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig, Steerer
from gnomon.protocol.trace import Request
from gnomon.reasoner import Reasoner


def bench_layer(n: int, repeats: int) -> dict[str, Any]:
    """Cost of the layer: the same requests with and without it, natural closes, equal tokens.

    heads: reads at prompt, think tag, boundaries and end tag. whole: gate and adapters too, as they are initialised:
    the identity, at the full price.
    """
    reasoner = Reasoner.load("nano")
    assert reasoner.decider is not None
    layers = {"heads": reasoner.decider, "whole": with_steerer(reasoner.decider)}
    return {
        f"{kind}_b{batch}": layer_cost(reasoner, layers[kind], batch, size, 96, repeats)
        for kind in layers
        for batch, size in ((1, max(8, n // 8)), (32, n))
    }


def bench_rules(n: int, repeats: int) -> dict[str, Any]:
    """Cost of soft rules that never close, on the layer without them: the same requests, equal tokens.

    cut: a rule is asked at every position. margin: it looks at the logits. sure: every boundary is read. The heads
    stand in for some that were trained on trial answers: what is read costs the same.
    """
    reasoner = Reasoner.load("nano")
    assert reasoner.decider is not None
    decider = closing(reasoner.decider)
    never = {"cut": FixedCut(10_000), "margin": Margin(0.0), "sure": Sure(-1.0, 1.0)}
    return {
        f"{name}_b{batch}": rule_cost(reasoner, decider, config, batch, thoughts(reasoner, size), repeats)
        for name, config in never.items()
        for batch, size in ((1, max(8, n // 8)), (32, n))
    }


def closing(decider: Decider) -> Decider:
    """The layer as if its confidence at boundaries were that of closing there, for every plan that thinks."""
    heads = MetacogHeads(decider.heads.config.model_copy(update={"closing": True})).eval()
    heads.load_state_dict(decider.heads.state_dict())
    card = decider.card
    assert card is not None and card.running is not None
    plans = tuple(name for name in card.plans if name != "direct")
    running = card.running.model_copy(update={"closing_plans": plans})
    return Decider(heads, card.model_copy(update={"running": running}))


def thoughts(reasoner: Reasoner, size: int, plan: str = "verify", budget: int | None = 96) -> list[Request]:
    """Requests that think for themselves, under a budget that few reach."""
    work = workload(reasoner.codec.encode_prompt, size, "uniform")
    return [
        Request(str(i), p, plan=plan, budget=budget, use_prediction=False, max_answer_tokens=16)
        for i, p in enumerate(work.prompts)
    ]


def rule_cost(
    reasoner: Reasoner, decider: Decider, config: RuleConfig, batch: int, asked: Sequence[Request], repeats: int
) -> dict[str, Any]:
    """CPU seconds with the rule / without - 1 over interleaved pairs, beside the share of think tokens saved.

    seconds: median of the CPU seconds without and with it; closed: share of thoughts that it closed.
    """

    def run(rules: Rules | None) -> tuple[float, list[Any]]:
        engine = Engine(reasoner.backbone, reasoner.codec.layout, decider, max_batch=batch, rules=rules)
        start = time.process_time()
        traces = engine.run(asked)
        return time.process_time() - start, traces

    rules = factory(config)
    plain, ruled = run(None)[1], run(rules)[1]
    pairs = []
    for i in range(repeats):
        (on, _), (off, _) = [run(rules), run(None)] if i % 2 else [run(None), run(rules)][::-1]
        pairs.append((on, off))
    ratios = [on / off - 1.0 for on, off in pairs]
    used, total = (sum(t.used for t in found) for found in (ruled, plain))
    name = type(config).__name__
    print(f"rule {name} b{batch}: {statistics.median(ratios):+.3f}, tokens {used / total - 1:+.3f}", file=sys.stderr)
    return {
        "median": statistics.median(ratios), "interval": list(interval(ratios)), "pairs": repeats,
        "seconds": [statistics.median(off for _, off in pairs), statistics.median(on for on, _ in pairs)],
        "saved": 1.0 - used / total, "closed": sum(t.stop == "confidence" for t in ruled) / len(ruled),
        "reads": sum(len(t.running) for t in ruled) / len(ruled),
    }  # fmt: skip


def bench_layer_smollm2(repeats: int) -> dict[str, Any]:
    """The same on SmolLM2 with random heads: what is read costs the same, and thinking runs to its budget."""
    reasoner = Reasoner.load("smollm2")
    decider = with_steerer(random_layer(reasoner))
    return {
        f"whole_b{batch}": layer_cost(reasoner, decider, batch, size, budget, repeats)
        for batch, size, budget in ((1, 1, 64), (32, 32, 24))
    }


def with_steerer(decider: Decider) -> Decider:
    """The layer with a fresh gate and adapters at every block."""
    return Decider(decider.heads, decider.card, Steerer(SteerConfig(), decider.heads.config))


def random_layer(reasoner: Reasoner) -> Decider:
    """Untrained heads with a card that reads boundaries, for any base."""
    backbone = reasoner.backbone
    seeds.seed_torch("bench-heads")
    heads = MetacogHeads(
        MetacogConfig(
            n_layers=backbone.n_layers, hidden_size=backbone.hidden_size, plans=reasoner.codec.strategies, values=True
        )
    )
    centre = (0.0,) * backbone.hidden_size
    unit = tuple(tuple(float(i == j) for j in range(backbone.hidden_size)) for i in range(backbone.hidden_size))
    quality = Quality(n=1, ece=0.0, brier=0.0, auroc=None)
    card = Card(
        weights=heads.fingerprint(), plans=heads.config.plans, cost_order=heads.config.plans, plan_threshold=0.5,
        temperature=Temperatures(before=1.0, after=1.0),
        budget_clip=BudgetClip(tested_offset=0.0, level=0.9, operating_offset=0.0, n=1),
        domain=Domain(layer=0, centres=(centre,) * 4, precision=unit, threshold=1.0), fitted_plans=heads.config.plans,
        running=Running(offset=9.0, level=0.9, temperature=1.0, shift=0.0, n=1),
        fitted=Fitted(dataset="bench", stream="bench", n=1, before=quality, after=quality),
    )  # fmt: skip
    return Decider(heads, card)


def layer_cost(
    reasoner: Reasoner, decider: Decider, batch: int, size: int, budget: int, repeats: int
) -> dict[str, Any]:
    """Median and 95 % interval of time with the layer / without - 1 over interleaved pairs."""
    work = workload(reasoner.codec.encode_prompt, size, "uniform")
    asked = [
        Request(str(i), p, plan="steps", budget=budget, use_prediction=False, max_answer_tokens=16)
        for i, p in enumerate(work.prompts)
    ]

    def run(layer: Decider | None) -> tuple[float, list[Any]]:
        engine = Engine(reasoner.backbone, reasoner.codec.layout, layer, max_batch=batch, running=layer is not None)
        start = time.perf_counter()
        traces = engine.run(asked)
        return time.perf_counter() - start, [t.ids for t in traces]

    run(None), run(decider)
    ratios = []
    for i in range(repeats):
        (on, ids_on), (off, ids_off) = [run(decider), run(None)] if i % 2 else [run(None), run(decider)][::-1]
        assert ids_on == ids_off, "the layer may not change what is decoded here"
        ratios.append(on / off - 1.0)
        print(f"layer b{batch} {i + 1}/{repeats}: {ratios[-1]:+.3f}", file=sys.stderr)
    low, high = interval(ratios)
    return {
        "median": statistics.median(ratios), "interval": [low, high], "pairs": repeats,
        "boundary_reads": decider.reads_boundaries,
    }  # fmt: skip
