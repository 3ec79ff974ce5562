"""Training = serving: the same ids give the same tensors in the engine's passes and in the training pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gnomon.base.seeds import seed_torch
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig, Steerer
from gnomon.model.lm import LM
from gnomon.reasoner import Reasoner
from gnomon.tasks.procedural import problems
from gnomon.training.thoughts import beside, collate, guided, thought_of


def random_steerer(heads: MetacogHeads, scale: float = 0.5, **options: Any) -> Steerer:
    seed_torch("steerer", str(options))
    made = Steerer(SteerConfig(**options), heads.config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += scale * torch.randn_like(parameter) / (parameter.shape[-1] if parameter.ndim else 1) ** 0.5
    return made.eval()


def steered_nano(**options: Any) -> Reasoner:
    """nano with a steerer that changes what it thinks. Without a card: that one belongs to the layer without it."""
    base = Reasoner.load("nano")
    assert base.decider is not None
    heads = base.decider.heads
    return replace(base, decider=Decider(heads, None, random_steerer(heads, **options)))


def ask(reasoner: Reasoner, n: int, **options: Any) -> list[Any]:
    items = problems("all", "val", "thoughts", n, (1, 2, 3))
    asked = [reasoner.request(str(i), p.prompt, **options) for i, p in enumerate(items)]
    return reasoner.engine(8).run(asked, record_taps=True)


@pytest.mark.parametrize("options", [{}, {"gate_layer": None}, {"adapter_layers": ()}, {"gate_layer": 0, "rank": 3}])
def test_the_training_pass_gives_what_the_engine_gave(options: dict[str, Any]) -> None:
    reasoner = steered_nano(**options)
    decider = reasoner.decider
    assert decider is not None and decider.steerer is not None
    traces = [*ask(reasoner, 10, plan="steps", budget=None), *ask(reasoner, 6, plan="verify", budget=5)]
    assert any(not t.closed_naturally for t in traces) and any(t.closed_naturally for t in traces)
    plain = replace(reasoner, decider=replace_steerer(decider))
    unsteered = ask(plain, 10, plan="steps", budget=None)
    assert all(a.logprobs[2] == b.logprobs[2] != 0 for a, b in zip(unsteered, traces, strict=False)), "not before"
    assert all(a.logprobs[3] != b.logprobs[3] for a, b in zip(unsteered, traces, strict=False)), "the steerer acts"
    batch = collate([thought_of(t, reasoner.codec.layout, decider.plans) for t in traces], reasoner.codec.layout.pad)
    with torch.no_grad():
        got = guided(LM(reasoner.backbone.module), decider.heads, decider.steerer, batch)  # type: ignore[attr-defined]
    logp = got.logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
    for i, trace in enumerate(traces):
        said = decider.budget(torch.from_numpy(trace.taps["think"])[None], [trace.plan])[0]
        assert abs(said.raw - float(got.read.conf_raw[i])) < 1e-4
        if said.gate is not None:
            assert torch.allclose(said.gate, got.vectors[i], atol=1e-5)
        begin, (start, end) = len(trace.prompt_ids), trace.think_span
        # Thoughts have masked tokens in serving (tags that have no place); renormalise where one could be seen.
        for at in range(start, end):
            served, trained = trace.logprobs[at], float(logp[i, begin + at - 1])
            assert trained <= served + 1e-4 and served - trained < 0.05, (i, at)
    close = sum(abs(t.logprobs[a] - float(logp[i, len(t.prompt_ids) + a - 1])) < 1e-4 for i, t in enumerate(traces)
                for a in range(*t.think_span))  # fmt: skip
    assert close >= 0.9 * sum(t.used for t in traces)


def replace_steerer(decider: Decider) -> Decider:
    return Decider(decider.heads, decider.card)


def test_masks_are_those_of_the_trace() -> None:
    reasoner = steered_nano()
    assert reasoner.decider is not None
    layout = reasoner.codec.layout
    for trace in [
        *ask(reasoner, 4, budget=None),
        *ask(reasoner, 4, plan="steps", budget=3),
        *ask(reasoner, 2, budget=0),
    ]:
        t = thought_of(trace, layout, reasoner.decider.plans)
        n = len(trace.prompt_ids)
        assert t.ids[t.think_at] == layout.think[0] and len(t.ids) == len(t.inside) == len(t.think) == len(t.answer)
        assert sum(t.inside) == trace.used and not any(t.inside[: t.think_at + 1])
        assert sum(t.think) == trace.used + trace.closed_naturally
        ends = [i for i, token in enumerate(t.ids) if token == layout.end_think[0]]
        assert len(ends) == 1 and not t.inside[ends[0]] and t.think[ends[0]] == trace.closed_naturally
        first = n + trace.answer_span[0]
        assert all(t.answer[first:]) and not any(t.answer[:first])


def test_gradients_go_where_they_belong_and_nowhere_else() -> None:
    reasoner = steered_nano()
    decider = reasoner.decider
    assert decider is not None and decider.steerer is not None
    heads, steerer = MetacogHeads(decider.heads.config), decider.steerer.train()
    heads.load_state_dict(decider.heads.state_dict())
    module = reasoner.backbone.module  # type: ignore[attr-defined]
    traces = ask(reasoner, 6, plan="steps", budget=None)
    batch = collate([thought_of(t, reasoner.codec.layout, decider.plans) for t in traces], reasoner.codec.layout.pad)

    def grads(kind: str) -> dict[str, float]:
        got = guided(LM(module), heads, steerer, batch)
        loss = got.read.plan_logits.square().sum() + got.read.budget_raw.sum()
        if kind == "lm":
            logp = got.logits[:, :-1].log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
            loss = -logp[batch.answer[:, 1:]].mean()
        named = {f"{k}.{n}": p for k, m in (("base", module), ("heads", heads), ("steerer", steerer))
                 for n, p in m.named_parameters()}  # fmt: skip
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {n: 0.0 if g is None else float(g.abs().max()) for n, g in zip(named, found, strict=True)}

    own, lm = grads("heads"), grads("lm")
    assert all(v == 0 for n, v in own.items() if n.startswith(("base", "steerer"))), "head losses stop at the taps"
    assert own["heads.trunk.inp.weight"] > 0
    assert all(v > 0 for n, v in lm.items() if n.startswith(("base", "steerer"))), "LM losses reach gate and adapters"
    for name in ("heads.trunk.inp.weight", "heads.trunk.out.weight", "heads.aggregator.query"):
        assert lm[name] > 0, "and trunk and aggregator through g"
    assert all(lm[n] == 0 for n in lm if n.startswith(("heads.plan_head", "heads.budget_head", "heads.conf_head")))


def test_heads_come_back_from_the_device_of_the_base_whatever_happens() -> None:
    moved: list[str] = []

    class Part(torch.nn.Module):
        def to(self, device: Any) -> Any:  # type: ignore[override]
            moved.append(str(device))
            return self

    class There:
        device = torch.device("meta")

    with pytest.raises(KeyboardInterrupt), beside(There(), Part(), Part()):  # type: ignore[arg-type]
        assert moved == ["meta", "meta"]
        raise KeyboardInterrupt
    assert moved == ["meta", "meta", "cpu", "cpu"]
