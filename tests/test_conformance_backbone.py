"""`check backbone` finds sound bases sound, and every kind of broken one by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.test_foreign import tiny
from tests.model.nets import FAMILIES
from transformers import AutoModelForCausalLM

from gnomon.base import seeds
from gnomon.base.errors import ConfigError, ModelError
from gnomon.conformance import backbone as check
from gnomon.conformance.backbone import MEANING, BackboneReport, Finding, check_backbone
from gnomon.data.foreign import TextCodec
from gnomon.interfaces import cli
from gnomon.interfaces.commands.check import BREACH
from gnomon.model.backbone import BackboneOutput
from gnomon.model.foreign import HFBackbone
from gnomon.model.slots import TensorSlots
from gnomon.model.steering import Steer
from gnomon.reasoner import Reasoner, from_parts

CONTEXT = 512
KINDS = ("llama", "gpt2", "qwen2", "gemma2", "neox")
N = 6


def model(family: str) -> Any:
    """A tiny random model of the family for the tiny tokenizer."""
    config = FAMILIES[family]()
    config.vocab_size = len(tiny())
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    setattr(config, name, CONTEXT)
    seeds.seed_torch("check backbone", family)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for family in KINDS:
        found[family] = tmp_path_factory.mktemp(family)
        model(family).save_pretrained(found[family])
        tiny(padding_side="right").save_pretrained(found[family])
    return found


def broken(report: BackboneReport) -> set[str]:
    return {name for name, found in report.checks.items() if not found.ok}


def wrapped(family: str = "qwen2") -> Reasoner:
    return from_parts("mine", HFBackbone(model(family)), TextCodec(tiny()))


@pytest.mark.parametrize("family", KINDS)
def test_five_families_from_their_folders_are_sound(folders: dict[str, Path], family: str) -> None:
    report = check_backbone(Reasoner.load(folders[family]), N)
    assert report.ok and set(report.checks) == set(MEANING), broken(report)
    assert report.family == model(family).config.model_type and report.context == CONTEXT
    assert 0 < report.checks["plain"].worst < 1e-4 and 0 < report.checks["left_padding"].worst < 1e-4
    # A tokenizer that arrives right-padded is corrected, and the report says so.
    assert "'right'" in report.checks["padding_side"].note and any("padding_side" in n for n in report.notes)


def test_nano_is_sound() -> None:
    report = check_backbone(Reasoner.load("nano"), 4)
    assert report.ok and report.family == "gnomon" and set(report.checks) == set(MEANING)
    assert report.checks["plain"].worst > 0  # compiled C against torch: two computations, not one twice


def test_a_model_that_ignores_its_mask() -> None:
    """The loader refuses it. One that begins to later, or whose slots do not go through its forward, is caught here."""
    blind = model("qwen2")
    forward = blind.forward
    blind.forward = lambda **given: forward(**{**given, "attention_mask": None})
    with pytest.raises(ModelError, match="logits that are off by"):
        HFBackbone(blind)
    late = wrapped()
    module = late.backbone.module  # type: ignore[attr-defined]
    straight = module.forward
    module.forward = lambda **given: straight(**{**given, "attention_mask": None})
    assert broken(check_backbone(late, N)) >= {"plain", "alone", "order", "pieces"}


def test_a_compiled_pass_beside_a_broken_module(folders: dict[str, Path]) -> None:
    """Slots run through C and are right; plain `generate` would look at the padding."""
    reasoner = Reasoner.load(folders["llama"])
    module = reasoner.backbone.module  # type: ignore[attr-defined]
    straight = module.forward

    def blind(**given: Any) -> Any:
        # No mask at all would not do: transformers then reads one off the positions.
        return straight(**{**given, "attention_mask": torch.ones_like(given["input_ids"])})

    module.forward = blind
    assert broken(check_backbone(reasoner, N)) == {"left_padding"}


Change = Callable[[Any, list[Any], BackboneOutput], BackboneOutput]


class Meddled:
    """A sound backbone whose output is changed on the way out."""

    def __init__(self, inner: Any, change: Change) -> None:
        self.inner, self.change, self.seen = inner, change, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def extend(self, cache: Any, tokens: Any, first: int = 0, **options: Any) -> BackboneOutput:
        return self.change(cache, tokens, self.inner.extend(cache, tokens, first, **options))


def among_others(cache: Any, tokens: Any, out: BackboneOutput) -> BackboneOutput:
    if out.logits is None or len(tokens) == 1:
        return out
    tilt = torch.linspace(0, 0.01, out.logits.shape[-1])
    return replace(out, logits=out.logits + tilt)


def spoilt(cache: Any, tokens: Any, out: BackboneOutput) -> BackboneOutput:
    if out.taps is None:
        return out
    found = out.taps.clone()
    found[0, 0, 0] = torch.nan
    return replace(out, taps=found)


def missing_layer(cache: Any, tokens: Any, out: BackboneOutput) -> BackboneOutput:
    return replace(out, taps=None if out.taps is None else out.taps[:, 1:])


def shifted(cache: Any, tokens: Any, out: BackboneOutput) -> BackboneOutput:
    return replace(out, taps=None if out.taps is None else out.taps.roll(1, 1))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (among_others, {"plain", "alone", "order"}),
        (spoilt, {"taps", "states"}),
        (missing_layer, {"taps", "states"}),
        (shifted, {"states"}),
    ],
)
def test_a_backbone_that_says_something_else(change: Change, names: set[str]) -> None:
    sound = wrapped()
    report = check_backbone(replace(sound, backbone=Meddled(sound.backbone, change)), N)
    assert broken(report) >= names and not report.ok
    assert ("plain" in broken(report)) == ("plain" in names)


def test_slots_that_remember_or_mix_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cut that keeps what stood there, and a copy that brings a position too few."""
    sound, copy = wrapped(), TensorSlots.copy
    with monkeypatch.context() as m:
        m.setattr(TensorSlots, "copy", lambda self, a, b, n=None: copy(self, a, b, (n or 2) - 1))
        assert broken(check_backbone(sound, N)) == {"copied"}
    monkeypatch.setattr(TensorSlots, "cut", lambda self, slot, length=0: self.lengths.__setitem__(slot, 1))
    assert broken(check_backbone(sound, N)) >= {"plain"}


def test_tags_that_merge_with_their_neighbours_or_lie_outside() -> None:
    sound = wrapped()
    codec = sound.codec
    layout = codec.layout
    assert layout.end_think_also  # the tiny tokenizer merges; without these spellings ends go unseen
    codec.layout = replace(layout, end_think_also=())
    found = check_backbone(sound, N).checks["tags"]
    assert not found.ok and found.worst >= 1 and "unseen in" in found.note
    codec.layout = replace(layout, answer=(layout.answer[0],), eos=(*layout.eos, 10**6))
    report = check_backbone(sound, N)
    assert broken(report) == {"tags", "end_of_sequence"} and "<answer> does not read back" in report.checks["tags"].note
    codec.layout = layout
    codec.tokenizer.padding_side = "right"  # type: ignore[attr-defined]
    assert broken(check_backbone(sound, N)) == {"padding_side"}


def test_a_context_that_holds_no_question() -> None:
    sound = wrapped()
    sound.backbone.context = 40
    assert broken(check_backbone(sound, N)) == {"room"}


def test_nothing_that_is_not_a_number_is_sound() -> None:
    assert not Finding(float("nan"), 1.0).ok and Finding(1.0, 1.0).ok and not Finding(1.1, 1.0).ok
    with pytest.raises(ConfigError, match="at least 2 rows"):
        check_backbone(wrapped(), 1)


# -- the command ----------------------------------------------------------------------------------------------------
def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(("check", "backbone", *words))
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_one_object_with_json_and_a_table_without(capsys: pytest.CaptureFixture[str], folders: dict[str, Path]) -> None:
    code, out, _ = call(capsys, str(folders["gpt2"]), "--n", "4", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["ok"] and facts["model"] == str(folders["gpt2"]) and facts["family"] == "gpt2"
    assert set(facts["checks"]) == set(MEANING)
    assert all({"ok", "worst", "allowed"} <= set(c) for c in facts["checks"].values())
    code, out, err = call(capsys, str(folders["gpt2"]), "--n", "4")
    assert code == 0 and "left_padding" in out and "put right: padding_side was 'right'" in err


def test_a_breach_exits_with_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    monkeypatch.setattr(check, "OFF", 0.0)
    code, out, _ = call(capsys, str(folders["gpt2"]), "--n", "4", "--json")
    facts = json.loads(out)
    assert code == BREACH and not facts["ok"] and not facts["checks"]["plain"]["ok"]
    code, out, _ = call(capsys, str(folders["gpt2"]), "--n", "4")
    assert code == BREACH and "no" in out


def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["gpt2"], tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    for words, expected in (
        (["nanno"], "did you mean 'nano'"),
        (["/no/such/folder"], "no model folder"),
        ([str(tmp_path / "half")], "missing: model.safetensors"),
        (["nano", "--n", "1"], "at least 2"),
        (["nano", "--n", "many"], "many"),
        ([], "model"),
    ):
        code, out, err = call(capsys, *words)
        assert code == cli.USER_ERROR and expected.lower() in err.lower() and out == "" and "Traceback" not in err


def test_a_base_that_is_steered_where_it_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = Steer.__call__

    def everywhere(self: Steer, index: int, x: torch.Tensor) -> torch.Tensor:
        return sound(replace(self, at=self.at.clamp_min(0)), index, x)  # type: ignore[union-attr]

    def late(self: Steer, index: int, x: torch.Tensor) -> torch.Tensor:
        return sound(self, index, x) if x.shape[1] == 1 else x

    def loose(self: Steer, index: int, x: torch.Tensor) -> torch.Tensor:
        return sound(self, index, x) * (1.0 + 1e-6)

    for change, names in ((everywhere, {"outside"}), (late, {"acts"}), (loose, {"identity", "outside"})):
        monkeypatch.setattr(Steer, "__call__", change)
        assert names <= broken(check_backbone(wrapped(), 4)) <= {"identity", "outside", "acts", "trained"}
