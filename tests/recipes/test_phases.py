"""Phases B and C in small: what they learn from, change and must leave alone, and the way to disk."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import own

from gnomon.attempts import Job, run
from gnomon.base.errors import CheckpointError, ConfigError, DataError, ModelError
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.metacognition.steerer import SteerConfig
from gnomon.model.overlay import FILE, Overlay
from gnomon.reasoner import Reasoner
from gnomon.recipes import claims, demo, metacog, phases
from gnomon.recipes.metacog import MetacogRunConfig
from gnomon.tasks.procedural import problems
from gnomon.training.adapt import AdaptConfig, LoraOptions
from gnomon.training.head_rows import whole
from gnomon.training.heads_fit import HeadsConfig, gauges
from gnomon.training.lm_objectives import LMLossWeights
from gnomon.training.objectives import LossWeights
from gnomon.training.phase_fit import PhaseConfig

SMALL = PhaseConfig(problems=20, label_n=26, samples=1, steps=4, batch=4, head_batch=8)
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the lora extra")
DRAW = phases.Draw("boolean", (1, 2), "mini/phases", None, None, 32, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=80), tmp_path_factory.mktemp("base"))


def layered(folder: Path, steer: SteerConfig | None = None) -> Reasoner:
    """The base with fresh heads, and a steerer that is still the identity."""
    base = Reasoner.load(folder)
    backbone = base.backbone
    shape = {"n_layers": backbone.n_layers, "hidden_size": backbone.hidden_size, "proj_dim": 8, "width": 16}
    heads = MetacogHeads(MetacogConfig(**shape, plans=base.codec.strategies)).eval()  # type: ignore[arg-type]
    heads.start_from(2.0, 0.6)
    return phases.with_steerer(replace(base, decider=Decider(heads)), steer or SteerConfig(), 0)


def state(module: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def changed(module: Any, before: dict[str, torch.Tensor]) -> set[str]:
    return {k for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


def test_phase_b_changes_the_layer_and_not_the_base(folder: Path) -> None:
    reasoner = layered(folder)
    decider = reasoner.decider
    assert decider is not None and decider.steerer is not None
    base, heads, steerer = (state(m) for m in (reasoner.backbone.module, decider.heads, decider.steerer))  # type: ignore[attr-defined]
    rows: list[dict[str, Any]] = []
    weights = LMLossWeights(consistency=0.5, forced_close=0.1)
    after = phases.run_phase(
        reasoner, SMALL.model_copy(update={"weights": weights}), DRAW, "B", LossWeights(), rows.append
    )
    assert after.decider is not None and after.decider.steerer is not None and after.overlay is None
    assert not changed(after.backbone.module, base), "the base is frozen"  # type: ignore[attr-defined]
    assert {"trunk.inp.weight", "plan_head.0.weight"} <= changed(after.decider.heads, heads)
    assert changed(after.decider.steerer, steerer) == set(steerer), "gate and adapters learn, every part of them"
    steps, rounds = [r for r in rows if "step" in r], [r for r in rows if "round" in r]
    assert len(steps) == 4 and len(rounds) == 1
    names = {"loss/think_ce", "loss/answer_ce", "loss/l0", "loss/consistency", "loss/forced_close", "loss/plan"}
    assert names | {"gate/rms", "gate/activity", "gate/coverage"} <= set(steps[0])
    facts = rounds[0]
    assert facts["valid"] + facts["empty"] + facts["truncated"] == pytest.approx(1.0, abs=0.2)
    assert set(facts["think_rate_by_level"]) == {1, 2} and 0 < facts["thoughts"] <= 20
    assert all(p.requires_grad for p in after.backbone.module.parameters()), "left as they were found"  # type: ignore[attr-defined]


def learned_by(reasoner: Reasoner) -> list[torch.Tensor]:
    """Every parameter of steerer, heads and base."""
    assert reasoner.decider is not None and reasoner.decider.steerer is not None
    parts = (reasoner.decider.steerer, reasoner.decider.heads, reasoner.backbone.module)  # type: ignore[attr-defined]
    return [p for part in parts for p in part.parameters()]


def test_the_moving_average_takes_the_place_of_what_learned(folder: Path) -> None:
    ends = {}
    for ema in (0.0, 1.0, 0.1):
        config = SMALL.model_copy(update={"ema": ema, "adapt": AdaptConfig(mode="ln")})
        after = phases.run_phase(layered(folder), config, DRAW, "E", LossWeights(), lambda _: None)
        assert after.decider is not None and after.decider.steerer is not None
        module = after.backbone.module  # type: ignore[attr-defined]
        ends[ema] = [
            p.detach().clone() for m in (after.decider.steerer, after.decider.heads, module) for p in m.parameters()
        ]
    first = learned_by(layered(folder))
    assert all(torch.allclose(a, b) for a, b in zip(ends[0.0], ends[1.0], strict=True)), "a share of 1 is no average"
    moved = [
        (a - s).norm() / (b - s).norm() for a, b, s in zip(ends[0.1], ends[0.0], first, strict=True) if (b - s).any()
    ]
    assert len(moved) > 10 and all(0.0 < float(m) < 0.6 for m in moved), "four steps at a tenth lag behind"


@needs_peft
def test_an_average_of_lora_factors_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="ema cannot be kept as LoRA factors"):
        config = SMALL.model_copy(update={"ema": 0.1, "adapt": AdaptConfig(mode="lora")})
        phases.run_phase(layered(folder), config, DRAW, "E", LossWeights(), lambda _: None)


@pytest.mark.parametrize(
    "adapt",
    [
        AdaptConfig(mode="last_k"),
        pytest.param(AdaptConfig(mode="lora", lora=LoraOptions(rank=2)), marks=needs_peft),
    ],
)
def test_phase_c_changes_what_it_names_and_all_of_it_comes_back_from_disk(
    adapt: AdaptConfig, folder: Path, tmp_path: Path
) -> None:
    reasoner = layered(folder)
    before = state(reasoner.backbone.module)  # type: ignore[attr-defined]
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    config = SMALL.model_copy(update={"adapt": adapt, "capped": 0.5, "rounds": 2, "lr": 0.02})
    after = phases.run_phase(reasoner, config, DRAW, "C", LossWeights(), lambda _: None)
    assert after.overlay is not None
    after.save_layer(tmp_path / "layer")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == files, "the base's folder is untouched"
    again = Reasoner.load(tmp_path / "layer")
    moved = changed(again.backbone.module, before)  # type: ignore[attr-defined]
    wanted = {"last_k": "blocks.1.", "lora": "blocks."}[adapt.mode]
    assert moved and all(name.startswith(wanted) for name in moved)
    items = problems("boolean", "val", "phases", 8, (1, 2))
    jobs = [Job(p, "steps", 20, use_prediction=False) for p in items]
    got, want = ([g[0].trace for g in run(r, jobs)] for r in (again, after))
    assert [t.ids for t in got] == [t.ids for t in want]
    assert (
        max(abs(a - b) for x, y in zip(got, want, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))
        < 1e-4
    )
    assert again.base == reasoner.base, "it still belongs to the base that it was trained on"


def test_an_overlay_of_another_base_is_refused_and_changes_nothing(folder: Path, tmp_path: Path) -> None:
    module = Reasoner.load(folder).backbone.module  # type: ignore[attr-defined]
    before = state(module)
    good = {"blocks.0.mlp.out.weight": torch.ones_like(before["blocks.0.mlp.out.weight"])}
    for bad, message in (
        ({"blocks.9.mlp.out.weight": torch.ones(2, 2)}, "does not have"),
        ({"blocks.1.mlp.out.weight": torch.ones(2, 2)}, "the base has"),
        ({"blocks.1.mlp.out.lora_A.weight": torch.ones(2, 2)}, "without"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Overlay({**good, **bad}).apply(module)
        assert not changed(module, before)
    Overlay(good).save(tmp_path)
    loaded = Overlay.load(tmp_path)
    assert loaded is not None and loaded.lora_scale == 1.0 and Overlay.load(folder) is None
    loaded.apply(module)
    assert changed(module, before) == set(good)
    (tmp_path / FILE).write_bytes(b"\x00" * 40)
    with pytest.raises(CheckpointError):
        Overlay.load(tmp_path)


def test_the_shortest_right_thought_is_learned_from(folder: Path) -> None:
    reasoner = layered(folder)
    found = phases.collect(reasoner, SMALL.model_copy(update={"samples": 3, "problems": 30}), DRAW, "shortest")
    best = phases.shortest_right(found)
    assert all(len(group) == 4 for group in found) and 0 < len(best) <= 30
    by_prompt = {a.problem.prompt: a for a in best}
    for group in found:
        right = [a for a in group if a.correct and a.trace.closed_naturally]
        chosen = by_prompt.get(group[0].problem.prompt)
        assert (chosen is None) == (not right)
        assert chosen is None or chosen.trace.used == min(a.trace.used for a in right)
    report = phases.think_report(found)
    every = [a for group in found for a in group]
    assert report["correct"] == sum(a.correct for a in every) / len(every)
    assert report["empty"] == sum(a.trace.used == 0 for a in every) / len(every)


def test_nothing_right_is_told_and_bad_blocks_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "shortest_right", lambda found: [])
    with pytest.raises(DataError, match="no rollout of this round was right"):
        phases.run_phase(layered(folder), SMALL, DRAW, "B", LossWeights(), lambda _: None)
    with pytest.raises(ModelError, match="the blocks of this base are 0 to 1"):
        layered(folder, SteerConfig(gate_layer=5))


def test_the_recipe_runs_all_phases_and_fits_a_card_for_the_end(folder: Path, tmp_path: Path) -> None:
    config = MetacogRunConfig.model_validate(
        {
            "base": str(folder), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini-phases",
            "label_n": 26, "calibration_n": 26, "val_n": 26, "test_n": 26, "phases": "ABC", "b": SMALL,
            "heads": HeadsConfig(steps=10, proj_dim=8, width=16),
            "c": SMALL.model_copy(update={"adapt": AdaptConfig(mode="ln")}),
        }
    )  # fmt: skip
    trained = metacog.train(Reasoner.load(folder), config, tmp_path / "labels")
    decider = trained.reasoner.decider
    assert decider is not None and decider.card is not None and decider.steerer is not None
    kept = [p.name for made in (tmp_path / "labels").iterdir() for p in made.iterdir()]
    assert kept.count("labels.json") == 7, "val and calibration again by the steered model, and one set a phase"
    assert kept.count("thoughts.json") == 2
    trained.reasoner.save_layer(tmp_path / "layer")
    again = Reasoner.load(tmp_path / "layer")  # the card belongs to heads and steerer together
    assert again.decider is not None and again.decider.card == decider.card
    prompt = "Work out (true and false) or true."
    assert again.ask(prompt).report() == trained.reasoner.ask(prompt).report()


def test_the_report_shows_the_phases_and_where_adapters_open(folder: Path, tmp_path: Path) -> None:
    config = MetacogRunConfig.model_validate(
        {
            "base": str(folder), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini-report",
            "label_n": 26, "calibration_n": 26, "val_n": 26, "test_n": 26, "phases": "AB", "b": SMALL,
            "heads": HeadsConfig(steps=10, proj_dim=8, width=16), "with_sweep": False,
        }
    )  # fmt: skip
    made = demo.run(config, tmp_path, lambda _: None)
    page = made.page.read_text()
    assert "<h2>Phases</h2>" in page and "thinks, level 2" in page and "B, round 1" in page
    assert (made.folder / "plots" / "gates_by_token.png").stat().st_size > 5000
    gates = made.outcome.gates
    assert len(gates["gates"]) == len(gates["blocks"]) == 2
    assert {len(row) for row in gates["gates"]} == {len(gates["tokens"])}
    metrics = (made.folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in metrics.splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 15)), "ten of the heads, then four of phase B"
    heads = {"alpha/min", "alpha/mean", "alpha/max", "alpha/entropy", "layers/plan_agreement", "layers/budget_var"}
    heads |= {f"layers/plan_agreement/{i}" for i in range(2)}
    assert heads <= set(rows[9]) and "alpha/entropy" not in rows[0], "at evaluations"
    assert heads <= set(rows[13])
    (told,) = made.outcome.phases
    for row in rows[10:]:  # every on-policy step, by the names of conventions.md (row T3)
        assert {"gate/coverage", "gate/rms", "mode/think", "mode/think/level_2", "rollouts/valid"} <= set(row)
        assert row["budget/used"] == told["think_tokens_mean"] and row["budget/predicted"] == told["predicted_mean"]
        assert sum(v for k, v in row.items() if k.startswith("plan/")) == pytest.approx(1.0)
    assert "<h2>Layers</h2>" in page and "variance of budgets" in page and "entropy" in page
    assert "Plan agreement by layer, at the end" in page and "B, round 1" in page
    results, trained = json.loads((made.folder / "results.json").read_text()), made.outcome.trained
    decider = trained.reasoner.decider
    assert decider is not None
    val = metacog.draw_labels(trained.reasoner, config, "val", config.val_n, 0, made.folder / "labels")
    now = gauges(decider.heads, whole(val))
    assert results["heads"]["telemetry"]["alpha_by_site"] == now["alpha_by_site"], "of the heads as they are in the end"
    kept = json.loads((made.folder / "report.json").read_text())
    assert kept["phase_marks"] == [[0.5, 1, "phase B"]] and [r["step"] for r in kept["phases"]] == [1, 2, 3, 4]
    assert (made.folder / "plots" / "phase_curves.png").stat().st_size > 5000
    made.page.unlink()
    assert "<h2>Phases</h2>" in claims.rewrite(made.folder).read_text(), "drawn again from what was kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steer": {"gate_layer": 9}}, "gate_layer names 9, but the blocks of this base are 0 to 1"),
        ({"steer": {"gate_layer": None, "adapter_layers": ()}}, "does nothing"),
        ({"c": {"adapt": {"mode": "last_k", "last_k": 7}}}, "last_k = 7, but this model has 2 blocks"),
        ({"c": {"adapt": {"mode": "lora", "lora": {"targets": ("nose",)}}}}, "nose"),
        ({"heads": {"layers": (1, 44)}}, "no layer 44: the base has 2 blocks, 0 to 1"),
        ({"strategies": ("steps", "verfy")}, "unknown strategy 'verfy'; did you mean 'verify'"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_labelled(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    config = MetacogRunConfig.model_validate({"base": str(folder), "tasks": "boolean", "phases": "ABC", **change})
    with pytest.raises((ModelError, ConfigError), match=message):
        metacog.train(Reasoner.load(folder), config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_right_answers_behind_a_cut_teach_the_end_tag(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = phases.fit_phase
    monkeypatch.setattr(phases, "fit_phase", lambda *args, **named: (seen.append(args[4]), real(*args, **named))[1])
    cut = phases.Draw("boolean", (1, 2), "mini/cut", None, 2, 32, 0)  # everything is cut at two tokens
    for weight in (0.0, 1.0):
        config = SMALL.model_copy(update={"weights": LMLossWeights(forced_close=weight), "problems": 40})
        phases.run_phase(layered(folder), config, cut, "F", LossWeights(), lambda _: None)
    plain, taught = seen
    assert not any(any(t.closed) for t in plain) and sum(any(t.closed) for t in taught) > 0


def test_a_steered_layer_is_no_base_and_a_failing_phase_keeps_the_heads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layered(folder).save_layer(tmp_path / "layer")
    config = {
        "base": str(folder), "tasks": "boolean", "levels": (1, 2), "samples": 1, "stream": "mini-keep", "phases": "AB",
        "label_n": 26, "calibration_n": 26, "val_n": 26, "b": SMALL,
        "heads": HeadsConfig(steps=10, proj_dim=8, width=16),
    }  # fmt: skip
    with pytest.raises(ModelError, match="name the base with --base"):
        metacog.train(Reasoner.load(tmp_path / "layer"), MetacogRunConfig.model_validate(config), tmp_path / "a")
    monkeypatch.setattr(phases, "shortest_right", lambda found: [])
    kept: list[Reasoner] = []
    with pytest.raises(DataError, match="no rollout"):
        metacog.train(Reasoner.load(folder), MetacogRunConfig.model_validate(config), tmp_path / "b", keep=kept.append)
    assert len(kept) == 1 and kept[0].decider is not None and kept[0].decider.card is not None
