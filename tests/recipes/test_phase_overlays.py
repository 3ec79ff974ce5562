"""What phases change of a base: the same in memory, where a card is fitted on it, and from disk."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import own
from tests.recipes.test_phases import DRAW, SMALL, layered
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import CheckpointError, ConfigError, ModelError
from gnomon.evaluation import runner
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig
from gnomon.model import decoder, load
from gnomon.model.backbone import OwnBackbone
from gnomon.model.overlay import FILE, Overlay
from gnomon.reasoner import Reasoner
from gnomon.recipes import metacog, phases
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.tasks.procedural import problems
from gnomon.training.adapt import AdaptConfig, LoraOptions, adapt
from gnomon.training.objectives import LossWeights
from gnomon.training.phase_fit import PhaseConfig

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the lora extra")


def logits(backbone: Any) -> Tensor:
    out = backbone.extend(backbone.new_cache(1, 16), [(5, 6, 7, 8, 9)], logits="all").logits
    assert isinstance(out, Tensor)
    return out.clone()


def phase(reasoner: Reasoner, letter: str, mode: str) -> Reasoner:
    adapt = AdaptConfig.model_validate({"mode": mode, "lora": LoraOptions(rank=2)})
    config = SMALL.model_copy(update={"adapt": adapt, "lr": 0.05, "steps": 3})
    return phases.run_phase(reasoner, config, DRAW, letter, LossWeights(), lambda _: None)


@pytest.mark.slow
@needs_peft
@pytest.mark.parametrize("modes", [("lora",), ("ln", "last_k"), ("lora", "lora")])
def test_a_base_in_torch_serves_what_is_saved_of_all_phases(
    modes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled passes hold copies; a pass in torch reads the module, from which LoRA is taken out behind a phase."""
    folder = own.save(own.taught(steps=40), tmp_path / "base")
    monkeypatch.setattr(load, "own_backbone", OwnBackbone)
    reasoner = layered(folder)
    reasoner = replace(reasoner, backbone=OwnBackbone(reasoner.backbone.module))  # type: ignore[attr-defined]
    seen = [logits(reasoner.backbone)]
    for letter, mode in zip("BC", modes, strict=False):
        reasoner = phase(reasoner, letter, mode)
        seen.append(logits(reasoner.backbone))
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in zip(seen, seen[1:], strict=False))
    reasoner.save_layer(tmp_path / "layer")
    again = Reasoner.load(tmp_path / "layer").backbone.module  # type: ignore[attr-defined]
    assert float((logits(OwnBackbone(again)) - seen[-1]).abs().max()) < 1e-5


def test_halves_and_wrong_shapes_of_lora_are_named_and_change_nothing() -> None:
    module = own.decoder()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    out, wide = before["blocks.0.mlp.out.weight"].shape
    name = "blocks.0.mlp.out"
    for a, b, message in (
        ((2, wide), None, "without 'blocks.0.mlp.out.lora_B.weight'"),
        (None, (out, 2), "without 'blocks.0.mlp.out.lora_A.weight'"),
        ((3, wide), (out, 2), "multiplies"),
        ((2, wide), (1, 2), "the base has"),  # a sum would spread it over all rows
    ):
        parts = {"A": a, "B": b}
        tensors = {f"{name}.lora_{k}.weight": torch.ones(*shape) for k, shape in parts.items() if shape is not None}
        with pytest.raises(CheckpointError, match=message):
            Overlay(tensors).apply(module)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    good = Overlay({f"{name}.lora_A.weight": torch.ones(2, wide), f"{name}.lora_B.weight": torch.ones(out, 2)}, 0.5)
    assert good.targets == {f"{name}.weight"}
    good.apply(module)
    assert torch.allclose(module.state_dict()[f"{name}.weight"], before[f"{name}.weight"] + 1.0)


def test_what_cannot_be_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Reasoner.load(own.save(own.decoder(), tmp_path / "base"))
    monkeypatch.setattr(metacog, "draw_labels", lambda *_: pytest.fail("labelled first"))
    for values, error, message in (
        ({"phases": "AB", "steer": {"gate_layer": 9}}, ModelError, "the blocks of this base are 0 to 1"),
        ({"phases": "ABC", "c": {"adapt": {"mode": "last_k", "last_k": 9}}}, ConfigError, "last_k = 9"),
    ):
        config = MetacogRunConfig.model_validate(values)
        with pytest.raises(error, match=message):
            metacog.train(base, config, tmp_path / "labels")
    with pytest.raises(ValueError, match="make no such loss"):
        PhaseConfig.model_validate({"weights": {"over_budget": 1.0}})


def test_a_layer_of_fewer_plans_is_calibrated_and_swept_with_those(tmp_path: Path) -> None:
    base = Reasoner.load(own.save(own.decoder(), tmp_path / "base"))
    plans = ("direct", "steps")
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16, plans=plans)).eval()
    heads.start_from(1.0, 0.6)
    reasoner = phases.with_steerer(replace(base, decider=Decider(heads)), SteerConfig(), 0)
    config = MetacogRunConfig(tasks="boolean", levels=(1,), calibration_n=20, max_think=4)
    asked: list[Any] = []

    def told(*args: Any) -> Any:
        asked.append(args[2].strategies)
        return None, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metacog, "calibrate", told)
        metacog.recalibrate(reasoner, config)
    assert asked == [plans]
    items = problems("boolean", "test", "two-plans", 2, (1,))
    assert runner.sweep_problems(reasoner, items, budgets=(2, None), cap=4, quiet=True).strategies == plans


@needs_peft
def test_steps_compute_blocks_again_and_drop_and_serving_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base stays in eval mode; what a phase switched on is off again where rollouts are drawn."""
    module, ids, again = own.decoder(), torch.tensor([[5, 6, 7]]), []
    monkeypatch.setattr(decoder, "checkpoint", lambda call, *args, **_: (again.append(1), call(*args))[1])
    adapted = adapt(module, AdaptConfig(mode="lora", lora=LoraOptions(rank=2, dropout=0.9), checkpointing=True))
    with torch.no_grad():
        for p in adapted.lora.values():
            p += 0.3

    def said() -> Tensor:
        with seeds.undisturbed():
            seeds.seed_torch("drops", len(again))
            out = module(ids).logits
        assert isinstance(out, Tensor)
        return out.detach()

    served = said()
    assert not again and torch.equal(said(), served), "serving neither drops nor computes again"
    adapted.learning(True)
    assert not torch.equal(said(), served) and len(again) == len(module.blocks)
    adapted.learning(False)
    assert torch.equal(said(), served) and len(again) == len(module.blocks)


def test_a_layer_without_its_changes_to_the_base_or_with_others_is_refused(tmp_path: Path) -> None:
    base = Reasoner.load(own.save(own.decoder(), tmp_path / "base"))
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16)).eval()
    name, weight = next(iter(base.backbone.module.named_parameters()))  # type: ignore[attr-defined]
    overlay = Overlay({name: weight.detach() + 1.0}, 2.0 / 3.0)
    replace(base, decider=Decider(heads), overlay=overlay).save_layer(tmp_path / "layer")
    again = Reasoner.load(tmp_path / "layer").overlay
    assert again is not None and again.fingerprint() == overlay.fingerprint()
    Overlay({name: weight.detach() + 2.0}).save(tmp_path / "layer")
    with pytest.raises(ModelError, match="of another layer"):
        Reasoner.load(tmp_path / "layer")
    (tmp_path / "layer" / FILE).unlink()
    with pytest.raises(ModelError, match="missing"):
        Reasoner.load(tmp_path / "layer")


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_layers_that_change_their_base_leave_it_to_the_next_one(kind: str, tmp_path: Path) -> None:
    base = Reasoner.load(own.save(own.decoder(), tmp_path / "base"))
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16)).eval()
    name = "blocks.1.mlp.out.weight"
    weight = dict(base.backbone.module.named_parameters())[name].detach().clone()  # type: ignore[attr-defined]
    if kind == "whole":
        overlay = Overlay({name: weight + 0.5})
    else:
        a, b = torch.full((2, weight.shape[1]), 0.1), torch.full((weight.shape[0], 2), 0.2)
        stem = name.removesuffix(".weight")
        overlay = Overlay({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, 0.5)
    with_it = replace(base, decider=Decider(heads), overlay=overlay)
    with_it.save_layer(tmp_path / "layer")
    bare = logits(base.backbone)
    first, second = base.with_layer(tmp_path / "layer"), base.with_layer(tmp_path / "layer")
    assert torch.equal(logits(base.backbone), bare), "who asks for a layer keeps the base"
    assert not torch.equal(logits(first.backbone), bare) and torch.equal(
        logits(first.backbone), logits(second.backbone)
    )
    assert torch.equal(logits(Reasoner.load(tmp_path / "layer").backbone), logits(first.backbone))
    shared = dict(base.backbone.module.named_parameters())  # type: ignore[attr-defined]
    for other, p in first.backbone.module.named_parameters():  # type: ignore[attr-defined]
        assert (p is shared[other]) == (other != name), "memory is taken for what differs only"
    with pytest.raises(ModelError, match="load the base, then with_layer"):
        first.with_layer(tmp_path / "layer")
    replace(base, decider=Decider(heads)).save_layer(tmp_path / "plain")
    assert base.with_layer(tmp_path / "plain").backbone is base.backbone


def test_a_layer_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    base = Reasoner.load(own.save(own.decoder(), tmp_path / "base"))
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16)).eval()
    name, weight = next(iter(base.backbone.module.named_parameters()))  # type: ignore[attr-defined]
    changed = replace(base, decider=Decider(heads), overlay=Overlay({name: weight.detach() + 1.0}))
    changed.save_layer(tmp_path / "layer")
    before = {p.name: p.read_bytes() for p in (tmp_path / "layer").iterdir()}
    with pytest.raises(CheckpointError, match="NaN"):
        bad = Overlay({name: weight.detach() * float("nan")})
        replace(changed, overlay=bad).save_layer(tmp_path / "layer")
    assert {p.name: p.read_bytes() for p in (tmp_path / "layer").iterdir()} == before
    replace(base, decider=Decider(heads)).save_layer(tmp_path / "layer")
    assert {p.name for p in (tmp_path / "layer").iterdir()} == before.keys() - {FILE}
