"""The pretraining recipe: what the corpus shows, that a tiny model learns from it, who optimises what."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.base import seeds
from gnomon.base.errors import DataError
from gnomon.data.corpus import Bins
from gnomon.data.encode import Encoded, encode_nodes
from gnomon.data.tokenizer import Tokenizer
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.protocol.graph import Node
from gnomon.protocol.tags import STRATEGIES
from gnomon.recipes import pretrain as recipe
from gnomon.recipes.pretrain import CorpusConfig, PretrainConfig, mixture_of, prepare, pretrain, record
from gnomon.tasks.procedural import LEVELS, REGISTRY
from gnomon.tasks.splits import split_of
from gnomon.training import optim
from gnomon.training.optim import OptimConfig

SHOWN = 5_000


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    """What 5,000 records are made of, before tokenization, with their mixture items."""
    config = CorpusConfig(records=SHOWN)
    seen: list[dict[str, Any]] = []

    def spy(
        tok: object, prompt: str, strategy: str, nodes: Sequence[Node], answer: str, cut: float | None = None
    ) -> Encoded:
        seen.append({"prompt": prompt, "strategy": strategy, "nodes": nodes, "answer": answer, "cut": cut})
        return Encoded([], [])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "encode_record", spy)
        mixture = mixture_of(config)
        for index in range(SHOWN):
            record(None, mixture, config, index)  # type: ignore[arg-type]
            seen[-1]["item"] = mixture.item(index, index / SHOWN)
    assert len(seen) == SHOWN
    return seen


def share(part: int, whole: int) -> float:
    return part / whole


def test_no_problem_of_another_split_is_shown(corpus: list[dict[str, Any]]) -> None:
    """Neither as the question nor as a worked example: the hash of every text says train.

    `rules` with two of its three examples is a text that no split draws (drawn ones have three).
    """
    checked = 0
    for row in corpus:
        problem = row["item"].problem
        assert problem.split == "train" and split_of(problem.prompt) == "train"
        *examples, question = [row["prompt"]] if problem.task == "rules" else split_examples(row, problem.prompt)
        if problem.task == "rules":
            assert question == problem.prompt or question.count("->") == problem.prompt.count("->") - 1
        else:
            assert question == problem.prompt
        for example in examples:
            text, _, _ = example.rpartition(" Answer: ")
            assert split_of(text) == "train"
            checked += 1
    assert checked > 500


def split_examples(row: dict[str, Any], question: str) -> list[str]:
    """The worked examples (one per ` Answer: `) and the question of a prompt."""
    before = row["prompt"].removesuffix(question)
    assert before + question == row["prompt"]
    lines, parts = before.split("\n")[:-1], []
    held = ""
    for line in lines:  # a problem may itself have several lines; an example ends with its answer
        held = f"{held}\n{line}" if held else line
        if " Answer: " in line:
            parts.append(held)
            held = ""
    assert not held
    return [*parts, question]


def test_shares(corpus: list[dict[str, Any]]) -> None:
    """Cuts in 15-25 % of the records with thinking, demonstrations in the stated share; families and plans even."""
    thinking = [row for row in corpus if row["nodes"]]
    assert 0.18 < share(sum(row["cut"] is not None for row in thinking), len(thinking)) < 0.22
    assert not [row for row in corpus if row["cut"] is not None and not row["nodes"]]
    cuts = [row["cut"] for row in thinking if row["cut"] is not None]
    assert min(cuts) < 0.05 and max(cuts) > 0.95 and 0.45 < sum(cuts) / len(cuts) < 0.55
    others = [row for row in corpus if row["item"].problem.task != "rules"]
    counts = [len(split_examples(row, row["item"].problem.prompt)) - 1 for row in others]
    assert 0.10 < share(sum(c > 0 for c in counts), len(counts)) < 0.14
    assert {c for c in counts if c} == {1, 2, 3}
    for strategy in STRATEGIES:
        assert 0.22 < share(sum(row["strategy"] == strategy for row in corpus), SHOWN) < 0.28
    for task in REGISTRY:
        assert 0.06 < share(sum(row["item"].problem.task == task for row in corpus), SHOWN) < 0.095
    assert all(not row["nodes"] for row in corpus if row["strategy"] == "direct")


def test_levels_fade_in(corpus: list[dict[str, Any]]) -> None:
    early = {row["item"].problem.level for row in corpus[: SHOWN // 20]}
    late = [row["item"].problem.level for row in corpus[SHOWN // 2 :]]
    assert early == {1} and all(0.16 < share(late.count(level), len(late)) < 0.24 for level in LEVELS)


def test_records_depend_on_their_number_alone(tok: Tokenizer) -> None:
    config = CorpusConfig(records=400)
    mixture = mixture_of(config)
    forward = [record(tok, mixture, config, i) for i in range(100)]
    again = [record(tok, mixture_of(config), config, i) for i in reversed(range(100))][::-1]
    assert forward == again
    other = CorpusConfig(records=400, stream="another")
    assert [record(tok, mixture_of(other), other, i) for i in range(20)] != forward[:20]


def test_records_fit_or_lose_their_examples(tok: Tokenizer) -> None:
    """With the shipped limit hardly a record is dropped."""
    config = CorpusConfig(records=1_000)
    sizes = [len(record(tok, mixture_of(config), config, i).ids) for i in range(1_000)]
    assert share(sum(size > config.max_tokens for size in sizes), len(sizes)) < 0.01


def test_prepare_is_the_same_with_any_number_of_processes(tok: Tokenizer, tmp_path: Path) -> None:
    config = CorpusConfig(records=60, tasks=("chain", "sort"))
    ticks: list[int] = []
    assert prepare(tmp_path / "a", tok, config, workers=1, progress=ticks.append) == 60
    assert ticks == [60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "CHUNK", 40)
        prepare(tmp_path / "b", tok, config, workers=2)
    for name in ("train.bin", "train.loss", "train.idx", "train.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_verify_slips_reach_the_bins_masked(tok: Tokenizer) -> None:
    """Some verify records of the corpus carry slips, and their texts have loss 0 in the record."""
    config = CorpusConfig(records=300, tasks=("chain",), demonstrations=0.0, cut=0.0, all_levels_at=0.0)
    mixture, masked = mixture_of(config), 0
    for index in range(300):
        item = mixture.item(index, index / 300)
        if any(node.slip for node in item.gold.nodes):
            made = record(tok, mixture, config, index)
            start = made.ids.index(tok.think) + 1
            block = encode_nodes(tok, item.gold.nodes)
            assert made.loss[start : start + len(block.ids)] == block.loss and 0 in block.loss
            masked += 1
    assert masked >= 10


def tiny(tok: Tokenizer) -> Decoder:
    seeds.seed_torch("tiny")
    return Decoder(DecoderConfig(vocab_size=tok.vocab_size, channels=48, layers=2, heads=2, context=128))


@pytest.fixture(scope="module")
def bins(tok: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Bins:
    folder = tmp_path_factory.mktemp("bins")
    config = CorpusConfig(records=600, tasks=("chain", "sort", "count"), levels=(1, 2), max_tokens=128)
    prepare(folder, tok, config, workers=1)
    return Bins(folder)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_loss_falls(tok: Tokenizer, bins: Bins, precision: str) -> None:
    losses: list[float] = []
    config = PretrainConfig(steps=30, rows=4, row_length=128, precision=precision)  # type: ignore[arg-type]
    model = tiny(tok)
    result = pretrain(model, bins, config, on_step=lambda _, row: losses.append(row["loss"]))
    assert result["steps"] == 30 and result["skipped"] == 0 and len(losses) == 30
    assert losses[0] > 6 and sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_resumed_run_sees_the_same_rows(tok: Tokenizer, bins: Bins) -> None:
    """Steps 0-5 at once, and 0-2 then 3-5 with the same optimisers, end in the same weights; past an epoch too."""
    config = PretrainConfig(steps=6, rows=40, row_length=128, precision="fp32")
    assert len(bins.plan(128)) // 40 < 6
    whole, parts = tiny(tok), tiny(tok)
    pretrain(whole, bins, config)
    held = optim.build(parts, config.optim)
    pretrain(parts, bins, config, optimizers=held, on_step=lambda step, _: step == 3)
    pretrain(parts, bins, config, optimizers=held, start=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_too_few_records_for_one_step_are_refused(tok: Tokenizer, bins: Bins) -> None:
    with pytest.raises(DataError, match="600 records fill .* rows of 128 tokens, but one step takes 900"):
        pretrain(tiny(tok), bins, PretrainConfig(steps=1, rows=900, row_length=128))


@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("projection", ["exact", "sinkhorn"])
def test_every_parameter_has_one_optimiser(streams: int, projection: str) -> None:
    """Hidden matrices go to Muon, mHC parameters and embeddings never; the rates are those of the config."""
    model = Decoder(
        DecoderConfig.model_validate(
            {"vocab_size": 64, "channels": 32, "layers": 2, "heads": 2, "streams": streams, "projection": projection}
        )
    )
    config = OptimConfig()
    muon, adamw = optim.build(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    held = [names[id(p)] for o in (muon, adamw) for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(names.values())
    mine = [names[id(p)] for g in muon.param_groups for p in g["params"]]
    assert len(mine) == 2 * 4 + 1 and not [n for n in mine if "hyper" in n or "embed" in n]

    def kind(name: str) -> str:
        return next(k for k in ("hyper", "gain", "unembed", "embed") if k in name)

    rates = {kind(names[id(p)]): g["lr"] for g in adamw.param_groups for p in g["params"]}
    wanted = {"embed": config.embed_lr, "unembed": config.unembed_lr, "gain": config.hyper_lr, "hyper": config.hyper_lr}
    assert rates == {k: v for k, v in wanted.items() if k != "hyper" or streams > 1}
    assert all(g["weight_decay"] == 0 for g in adamw.param_groups)  # our Muon has none


def test_frozen_parameters_are_left_out() -> None:
    model = Decoder(DecoderConfig(vocab_size=64, channels=32, layers=1, heads=2))
    model.embed.weight.requires_grad_(False)
    held = [p for o in optim.build(model, OptimConfig()) for g in o.param_groups for p in g["params"]]
    assert len(held) == len(list(model.parameters())) - 1
    assert not any(p is model.embed.weight for p in held)


def test_schedule() -> None:
    """Warm-up, plateau at 1, linear decay to the floor."""
    config = OptimConfig(warmup=0.1, decay=0.4, floor=0.05)
    values = [optim.schedule(config, i / 100) for i in range(101)]
    assert values[0] == pytest.approx(0.01) and values[5] == pytest.approx(0.5)
    assert values[10:61] == pytest.approx([1.0] * 51)
    assert values[80] == pytest.approx(0.05 + 0.95 * 0.5) and values[100] == pytest.approx(0.05)
    assert optim.schedule(OptimConfig(warmup=0.0, decay=0.0), 0.99) == 1.0
    with pytest.raises(ValueError, match=r"optim.warmup 0.7 \+ optim.decay 0.5 exceed 1"):
        OptimConfig(warmup=0.7, decay=0.5)
