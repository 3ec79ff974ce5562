"""Plain `generate` of transformers keeps the budget: row by row what the engine does, counted by the controller."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from tests.decoding.tiny import ATOMIC, TEXT, V
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LogitsProcessor,
    StoppingCriteria,
)

import gnomon.hf  # noqa: F401
from gnomon.base import seeds
from gnomon.base.errors import BudgetError, ConfigError, GnomonError, ModelError, TagError, UnknownNameError
from gnomon.decoding.engine import Engine
from gnomon.decoding.generate import BudgetLogitsProcessor, BudgetStoppingCriteria, left_padded
from gnomon.model.backbone import OwnBackbone
from gnomon.model.foreign import HFBackbone
from gnomon.protocol.layout import Layout
from gnomon.protocol.parser import token_splitter
from gnomon.protocol.trace import Request, Trace
from gnomon.reasoner import Reasoner, shipped

CONTEXT = 160
BUDGETS = (0, 1, 4, 16, None)
LEANS = {
    "atomic": (ATOMIC, {2: 1.5, 4: 1.5, 5: 0.8}),
    "endless": (ATOMIC, {2: -30.0, 4: -30.0, 5: -30.0}),
    "text": (TEXT, {12: 1.5, 13: 1.8, 2: 1.2, 4: 1.6, 18: 0.6, 0: 0.5}),
}
LENGTHS = (5, 17, 1, 9, 30) * 6
PROMPTS = [tuple(seeds.rng("generate", i, k).randrange(19, 32) for k in range(n)) for i, n in enumerate(LENGTHS)]


@cache
def llama(kind: str) -> Any:
    """A tiny random Llama whose output layer leans towards the tags."""
    seeds.seed_torch("generate", kind)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=CONTEXT, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=5,
        )
    )  # fmt: skip
    head = nn.Linear(32, V)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight * 0.6)
        head.bias.zero_()
        for token, value in LEANS[kind][1].items():
            head.bias[token] = value
    model.lm_head = head
    return model.eval()


def settings(layout: Layout, **more: Any) -> GenerationConfig:
    return GenerationConfig(pad_token_id=layout.pad, eos_token_id=list(layout.eos), do_sample=False, **more)


def generated(
    model: Any, layout: Layout, prompts: Sequence[Sequence[int]], more: dict[str, Any] | None = None, **options: Any
) -> tuple[list[Trace], Tensor, int]:
    """Traces, the whole output [B, T + new], and T."""
    ids, mask = left_padded(prompts, layout.pad)
    keeper = BudgetLogitsProcessor(layout, ids, mask, **{"context": CONTEXT, "max_answer_tokens": 12, **options})
    out = model.generate(
        input_ids=ids, attention_mask=mask, logits_processor=[keeper],
        stopping_criteria=[BudgetStoppingCriteria(keeper)],
        **{"generation_config": settings(layout), "max_new_tokens": keeper.max_new_tokens, **(more or {})},
    )  # fmt: skip
    return keeper.traces(), out, ids.shape[1]


def same(got: Trace, want: Trace) -> bool:
    names = ("ids", "roles", "used", "forced", "stop", "finish", "think_span", "answer_span", "plan")
    return [getattr(got, name) for name in names] == [getattr(want, name) for name in names]


def recounted(layout: Layout, trace: Trace) -> int:
    """Sampled think tokens, found by splitting the ids again at the tags."""
    splitter = token_splitter(layout, bare=not layout.answer)
    pieces = splitter.feed(trace.ids) + splitter.close()
    forced = trace.roles[trace.think_span[0] : trace.think_span[1]].count("forced")
    return sum(len(p.data) for p in pieces if p.place == "think") - forced


@pytest.mark.parametrize("kind", ["atomic", "text"])
def test_greedy_equals_the_engine_row_by_row(kind: str) -> None:
    """Ragged prompts, every budget in one batch, and a limit for those that have none."""
    layout, model = LEANS[kind][0], llama(kind)
    budgets = [BUDGETS[i % 5] for i in range(len(PROMPTS))]
    plans = [("steps", "direct")[i % 2] for i in range(len(PROMPTS))]
    traces, out, width = generated(model, layout, PROMPTS, budgets=budgets, plans=plans, max_think=40)
    engine = Engine(HFBackbone(model), layout, max_think=40)
    asked = [Request(f"{i}", p, plan=plans[i], budget=budgets[i], max_answer_tokens=12) for i, p in enumerate(PROMPTS)]
    seen = set()
    for row, got, want in zip(out.tolist(), traces, engine.run(asked), strict=True):
        assert same(got, want)
        assert max(abs(a - b) for a, b in zip(got.logprobs, want.logprobs, strict=True)) < 1e-3
        assert row[width : width + len(got.ids)] == list(got.ids)
        assert set(row[width + len(got.ids) :]) <= {layout.pad}
        assert got.overshoot == 0 and recounted(layout, got) == got.used
        seen |= {got.stop, got.finish}
    assert seen >= {"hard", "natural", "end"}


@pytest.mark.parametrize("kind", ["atomic", "text"])
def test_sampling_keeps_every_cap_and_the_rest_of_the_rule(kind: str) -> None:
    layout, model = LEANS[kind][0], llama(kind)
    seeds.seed_torch("generate sampled", kind)
    budgets = [BUDGETS[i % 4] for i in range(len(PROMPTS))]
    heat = {"generation_config": GenerationConfig(
        pad_token_id=layout.pad, eos_token_id=list(layout.eos), do_sample=True, temperature=1.3, top_k=20, top_p=0.95,
        num_return_sequences=4,
    )}  # fmt: skip
    traces, out, width = generated(model, layout, PROMPTS, heat, budgets=budgets, samples=4)
    assert [t.sample for t in traces] == [0, 1, 2, 3] * len(PROMPTS) and len({t.ids for t in traces}) > 60
    for i, (row, trace) in enumerate(zip(out.tolist(), traces, strict=True)):
        budget = budgets[i // 4]
        assert budget is not None and trace.used <= budget and recounted(layout, trace) == trace.used
        assert row[width : width + len(trace.ids)] == list(trace.ids)
        assert (trace.stop == "hard") <= (trace.forced > 0)
        assert not set(trace.answer_ids) & layout.masked(False)
        assert not any(
            trace.answer_ids[k : k + len(t)] == t for t in (layout.end_think, layout.think) for k in range(40)
        )
        assert not set(trace.think_ids) & set(layout.eos)
    assert {t.stop for t in traces} == {"hard", "natural"}
    for budget in (1, 4, 16):
        assert any(t.used == budget and t.stop == "hard" for i, t in enumerate(traces) if budgets[i // 4] == budget)


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Reasoner]:
    return AutoModelForCausalLM.from_pretrained(shipped("nano")).eval(), Reasoner.load("nano")


def test_nano_through_auto_model_equals_the_engine(nano: tuple[Any, Reasoner]) -> None:
    model, reasoner = nano
    layout = reasoner.codec.layout
    texts = [
        "Compute 34 + 27 - 15.",
        "Sort 34 12 78 5.",
        "How many times does r occur in strawberry?",
        "Compute 3 * 14.",
    ]
    prompts = [tuple(reasoner.codec.encode_prompt(t)) for t in texts for _ in BUDGETS]
    plans = [reasoner.codec.strategies[i % 4] for i in range(len(prompts))]
    budgets = list(BUDGETS) * len(texts)
    context = model.config.max_position_embeddings
    traces, _, _ = generated(
        model, layout, prompts, budgets=budgets, plans=plans, context=context, max_answer_tokens=32, max_think=48
    )
    engine = Engine(OwnBackbone(model.decoder), layout, max_think=48)
    wanted = engine.run(
        [Request(f"{i}", p, plan=plans[i], budget=budgets[i], max_answer_tokens=32) for i, p in enumerate(prompts)]
    )
    for got, want in zip(traces, wanted, strict=True):
        assert same(got, want), (got.ids, want.ids)
        assert not set(got.answer_ids) & layout.structure
    assert {t.stop for t in traces} >= {"hard", "natural"} and {t.finish for t in traces} >= {"end"}


@pytest.mark.parametrize("kind", ["atomic", "text"])
@pytest.mark.parametrize("thought", [0, 3])
def test_a_prompt_that_ends_in_an_open_block_is_resumed(kind: str, thought: int) -> None:
    """With the plan recognised, with a template's think tag alone, and with think tokens that count."""
    layout, model = LEANS[kind][0], llama(kind)
    prefix = (20, 21, 22)[:thought]
    engine = Engine(HFBackbone(model), layout)
    for budget in (thought, 4, 16):
        opened = [(*p, *layout.plans["direct"], *layout.think, *prefix) for p in PROMPTS[:5]]
        traces, out, width = generated(model, layout, opened, budgets=budget)
        asked = [
            Request(f"{i}", p, plan="direct", budget=budget, max_answer_tokens=12, think_prefix=prefix)
            for i, p in enumerate(PROMPTS[:5])
        ]
        for row, got, want in zip(out.tolist(), traces, engine.run(asked), strict=True):
            assert same(got, want) and got.resumed == thought
            here = got.ids[len(layout.plans["direct"] + layout.think) + thought :]
            assert row[width : width + len(here)] == list(here)
    bare, _, _ = generated(model, layout, [(*PROMPTS[0], *layout.think, *prefix)], budgets=5)
    assert bare[0].ids[: len(layout.think)] == layout.think and bare[0].used <= 5
    with pytest.raises(BudgetError, match="think prefix has 3 tokens, but only 2"):
        generated(model, layout, [(*PROMPTS[0], *layout.think, 20, 21, 22)], budgets=2)


def test_old_blocks_in_the_prompt_change_nothing() -> None:
    model = llama("atomic")
    old = (20, 7, 1, 21, 22, 2, 3, 23, 4)
    traces, _, _ = generated(model, ATOMIC, [(*old, 24, 25)], budgets=4)
    (want,) = Engine(HFBackbone(model), ATOMIC).run(
        [Request("r", (*old, 24, 25), plan="steps", budget=4, max_answer_tokens=12)]
    )
    assert same(traces[0], want)


def test_without_a_budget_the_context_is_the_limit_and_padding_takes_some_of_it() -> None:
    """`generate` never asks the model for a position that it does not have."""
    layout, model = ATOMIC, llama("endless")
    traces, out, _ = generated(model, layout, [PROMPTS[4], PROMPTS[2]], budgets=None, max_answer_tokens=None)
    (want,) = Engine(HFBackbone(model), layout).run([Request("r", PROMPTS[4], plan="steps", budget=None)])
    assert (traces[0].used, traces[0].stop) == (want.used, want.stop) and want.stop == "limit"
    assert traces[1].used == traces[0].used and traces[1].stop == "limit" and out.shape[1] - 1 <= CONTEXT


def test_generates_own_limit_and_other_criteria_are_reported() -> None:
    model = llama("endless")
    traces, _, _ = generated(model, ATOMIC, PROMPTS[:2], {"max_new_tokens": 9}, budgets=30)
    assert [(t.used, t.stop, t.finish) for t in traces] == [(7, "limit", "length")] * 2

    class Second(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return torch.tensor([False, input_ids.shape[1] >= 25])

    ids, mask = left_padded(PROMPTS[:2], 0)
    keeper = BudgetLogitsProcessor(ATOMIC, ids, mask, context=CONTEXT, budgets=30, max_answer_tokens=4)
    model.generate(
        input_ids=ids, attention_mask=mask, logits_processor=[keeper], generation_config=settings(ATOMIC),
        stopping_criteria=[BudgetStoppingCriteria(keeper), Second()], max_new_tokens=keeper.max_new_tokens,
    )  # fmt: skip
    first, second = keeper.traces()
    assert (first.used, first.stop) == (30, "hard")
    assert (second.used, second.stop, second.finish) == (25 - 17 - 2, "user", "user")


def test_a_processor_without_its_criterion_only_fills_up() -> None:
    model, (ids, mask) = llama("atomic"), left_padded(PROMPTS[:3], 0)
    keeper = BudgetLogitsProcessor(ATOMIC, ids, mask, context=CONTEXT, budgets=4, max_answer_tokens=6)
    out = model.generate(input_ids=ids, attention_mask=mask, logits_processor=[keeper], max_new_tokens=40,
                         generation_config=GenerationConfig(pad_token_id=0))  # fmt: skip
    whole, _, _ = generated(model, ATOMIC, PROMPTS[:3], budgets=4, max_answer_tokens=6)
    for row, got, want in zip(out[:, ids.shape[1] :].tolist(), keeper.traces(), whole, strict=True):
        assert same(got, want)
        assert row == [*got.ids, *[0] * (len(row) - len(got.ids))]


# -- refusals -------------------------------------------------------------------------------------------------------
def test_beams_and_undeclared_samples_are_refused() -> None:
    model = llama("atomic")
    for more in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        with pytest.raises(ConfigError, match="num_beams=1.*num_return_sequences=k"):
            generated(model, ATOMIC, PROMPTS[:2], more, budgets=4)
    with pytest.raises(ConfigError, match="num_beams=1"):  # as many rows as samples, but they change places
        generated(model, ATOMIC, PROMPTS[:2], {"num_beams": 3}, budgets=4, samples=3)


def test_rows_that_change_places_are_found() -> None:
    ids, mask = left_padded(PROMPTS[:2], 0)
    keeper = BudgetLogitsProcessor(ATOMIC, ids, mask, context=CONTEXT, budgets=9)
    for _ in range(2):
        best = keeper(ids, torch.zeros(2, V)).argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
    scores = torch.zeros(2, V)
    scores[0, 20] = scores[1, 21] = 5.0
    ids = torch.cat([ids, keeper(ids, scores).argmax(-1)[:, None]], 1)
    keeper(ids, scores)
    with pytest.raises(ConfigError, match="changed places"):
        keeper(torch.cat([ids.flip(0), torch.tensor([[20], [21]])], 1), scores)


class Meddler(LogitsProcessor):  # type: ignore[misc]
    """Stands behind the budget and prefers one token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, 30] = 1e9
        return scores


def test_what_breaks_the_rule_from_outside_is_named() -> None:
    model, (ids, mask) = llama("atomic"), left_padded(PROMPTS[:2], 0)
    make = lambda: BudgetLogitsProcessor(ATOMIC, ids, mask, context=CONTEXT, budgets=4)  # noqa: E731
    call = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 20, "generation_config": settings(ATOMIC)}
    with pytest.raises(ConfigError, match="row 0 got token 30.*Another logits processor"):
        model.generate(logits_processor=[make(), Meddler()], **call)
    with pytest.raises(ConfigError, match="without its processor"):
        model.generate(stopping_criteria=[BudgetStoppingCriteria(make())], **call)
    used = make()
    model.generate(logits_processor=[used], **call)
    with pytest.raises(ConfigError, match="make a new one"):
        model.generate(logits_processor=[used], **call)
    with pytest.raises(ConfigError, match="made for"):
        model.generate(logits_processor=[make()], **{**call, "input_ids": ids.flip(0)})
    with pytest.raises(ModelError, match="row 0.*NaN"):
        keeper = make()
        for _ in range(3):
            ids = torch.cat([ids, keeper(ids, torch.full((2, V), torch.nan)).argmax(-1)[:, None]], 1)
    big = BudgetLogitsProcessor(ATOMIC, call["input_ids"], mask, context=CONTEXT, budgets=4)
    with pytest.raises(TagError, match="names id 8, but the model gives scores for 6"):
        big(call["input_ids"], torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budgets": [1, 2, 3]}, ConfigError, "budgets has 3 values for 2 prompts"),
        ({"budgets": "predicted"}, ConfigError, "needs the metacognitive layer"),
        ({"budgets": -1}, BudgetError, "cannot be negative"),
        ({"budgets": True}, BudgetError, "whole number"),
        ({"budgets": 500}, BudgetError, "500 does not fit.*leaves"),
        ({"plans": "stepps"}, UnknownNameError, "did you mean 'steps'"),
        ({"context": 10}, BudgetError, "the prompt has 17 tokens"),
        ({"samples": 0}, ConfigError, "at least 1"),
        ({"right": True}, ConfigError, "padding_side = 'left'"),
        ({"attention_mask": torch.ones(2, 3)}, ConfigError, "differ in shape"),
        ({"input_ids": torch.ones(5, dtype=torch.int64)}, ConfigError, r"\[rows, positions\]"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    change: dict[str, Any], error: type[GnomonError], message: str
) -> None:
    ids, mask = left_padded(PROMPTS[:2], 0)
    if change.pop("right", False):
        ids, mask = ids.flip(1), mask.flip(1)
    given = {"input_ids": ids, "attention_mask": mask, "context": CONTEXT, "budgets": 4, **change}
    with pytest.raises(error, match=message):
        BudgetLogitsProcessor(ATOMIC, **given)
