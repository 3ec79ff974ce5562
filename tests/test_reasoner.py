"""Loading, saving and asking, with a tiny model that was taught a little and heads that were not trained."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests import own

from gnomon.base.errors import BudgetError, CheckpointError, GnomonError, ModelError, UnknownNameError
from gnomon.base.seeds import seed_torch
from gnomon.metacognition import store
from gnomon.metacognition.config import MetacogConfig
from gnomon.metacognition.decide import Decider
from gnomon.metacognition.heads import MetacogHeads
from gnomon.protocol.tags import STRUCTURE_TOKENS, TAGS
from gnomon.reasoner import BASE_FILE, Reasoner, fingerprint, is_own
from gnomon.tasks.procedural import problems

QUESTION = problems("boolean", "test", "reasoner", 1, (1,))[0].prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own.save(own.taught(steps=60), tmp_path_factory.mktemp("base"))


@pytest.fixture
def base(folder: Path) -> Reasoner:
    return Reasoner.load(folder)


def with_heads(base: Reasoner, budget: float = 2.5) -> Reasoner:
    seed_torch("reasoner-heads")
    heads = MetacogHeads(MetacogConfig(n_layers=2, hidden_size=32, proj_dim=8, width=16)).eval()
    heads.start_from(budget, 0.6)
    return replace(base, decider=Decider(heads))


def test_without_heads_predicted_means_steps_and_no_cap(base: Reasoner) -> None:
    told, named = base.ask(QUESTION), base.ask(QUESTION, plan="steps", budget=None)
    assert told.trace.ids == named.trace.ids and told.trace.plan == "steps"
    assert told.report()["budget"]["source"] == "limit" and told.report()["budget"]["predicted"] is None
    assert told.report()["confidence"] == {"before": None, "after": None, "calibrated": False}
    with pytest.raises(ModelError, match="no metacognitive layer; train one with `gnomon train metacog`"):
        base.decide(QUESTION)
    with pytest.raises(ModelError, match="no metacognitive layer to save"):
        base.save_layer(Path("nowhere"))


def test_a_prompt_beyond_the_context_teaches_the_same_everywhere(base: Reasoner) -> None:
    reasoner = with_heads(base)
    for text in (f"{QUESTION} " * 61, f"{QUESTION} " * 100):
        told = []
        for what in (reasoner.ask, reasoner.decide):
            with pytest.raises(BudgetError, match="shorten the prompt") as error:
                what(text)
            told.append(str(error.value))
        assert told[0].endswith(told[1])


def test_the_report_has_the_schema_and_goes_to_json(base: Reasoner) -> None:
    report = with_heads(base).ask(QUESTION, plan="verify", budget=3).report()
    assert set(report) == {"plan", "confidence", "budget", "answer_tokens", "stop", "think", "answer"}
    assert set(report["budget"]) == {"requested", "predicted", "effective", "used", "forced", "source", "scope"}
    assert report["budget"]["requested"] == 3 and report["budget"]["used"] <= 3 and report["plan"] == "verify"
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_a_layer_is_saved_beside_a_pointer_and_loads_with_its_base(
    base: Reasoner, folder: Path, tmp_path: Path
) -> None:
    made = with_heads(base)
    made.save_layer(tmp_path)
    assert json.loads((tmp_path / BASE_FILE).read_text())["base"] == str(folder.resolve())
    assert not (tmp_path / "config.json").exists()  # the base is not copied
    again = Reasoner.load(tmp_path)
    assert again.base == base.base == fingerprint(base.backbone)
    assert again.ask(QUESTION).report() == made.ask(QUESTION).report() and is_own(str(tmp_path))
    assert again.decide(QUESTION) == made.decide(QUESTION)


def test_a_layer_in_the_folder_of_its_base_needs_no_pointer(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    with_heads(Reasoner.load(whole)).save_layer(whole)
    assert not (whole / BASE_FILE).exists() and Reasoner.load(whole).decider is not None


def test_a_layer_of_another_base_is_refused_by_name(base: Reasoner, tmp_path: Path) -> None:
    with_heads(base).save_layer(tmp_path / "layer")
    other = own.save(own.decoder("other"), tmp_path / "other")
    (tmp_path / "layer" / BASE_FILE).write_text(json.dumps({"base": str(other)}))
    with pytest.raises(ModelError, match=rf"layer in .*layer was trained on base {base.base[:12]}, but this base is"):
        Reasoner.load(tmp_path / "layer")


def test_layer_folders_that_are_half_there_name_what_is_missing(base: Reasoner, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    with_heads(base).save_layer(layer)
    (layer / store.WEIGHTS_FILE).rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=store.WEIGHTS_FILE):
        Reasoner.load(layer)
    (tmp_path / "aside").rename(layer / store.WEIGHTS_FILE)
    (layer / store.CONFIG_FILE).rename(tmp_path / "aside")
    with pytest.raises(ModelError, match=rf"names its base in {BASE_FILE} but holds no {store.CONFIG_FILE}"):
        Reasoner.load(layer)
    (tmp_path / "aside").rename(layer / store.CONFIG_FILE)
    for body, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps({"base": str(layer)}), "is a layer, not a base"),
        (json.dumps({"base": str(tmp_path / "gone")}), "belongs to the base .*gone.*which is not there"),
    ):
        (layer / BASE_FILE).write_text(body)
        with pytest.raises(ModelError, match=message):
            Reasoner.load(layer)


def test_base_folders_that_are_missing_or_half_there_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'nano'"):
        Reasoner.load("nanno")
    with pytest.raises(ModelError, match="no model folder at .*/gone"):
        Reasoner.load(tmp_path / "gone")
    for name in ("config.json", "model.safetensors"):
        half = tmp_path / name
        shutil.copytree(folder, half)
        (half / name).unlink()
        with pytest.raises(ModelError, match=rf"{name} missing"):
            Reasoner.load(half)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"tokenizer"):
        Reasoner.load(bare)
    foreign = tmp_path / "foreign"  # Llama-like bases bring a tokenizer.model of their own
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (foreign / "tokenizer.model").write_bytes(b"spm")
    assert not is_own(str(foreign)) and is_own(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        Reasoner.load(tmp_path / "empty")
    (tmp_path / "file.txt").write_text("not a model")
    with pytest.raises(GnomonError, match=r"file\.txt"):
        Reasoner.load(tmp_path / "file.txt")


def test_ask_and_decide_say_the_same(base: Reasoner) -> None:
    reasoner = with_heads(base)
    for problem in problems("boolean,sort,chain", "test", "decide", 6):
        trace, said = reasoner.ask(problem.prompt).trace, reasoner.decide(problem.prompt)
        assert said["plan"] == trace.plan and trace.plan_source == "predicted"
        assert trace.plan_probs == pytest.approx(said["plan_probs"], abs=1e-4)
        assert trace.budget_predicted == pytest.approx(said["budget"]["predicted"], abs=1e-3)
        assert trace.budget_effective == said["budget"]["clipped"] and trace.used <= trace.budget_effective
        assert said["confidence"]["before"] is None  # no card, no promise


def test_tag_strings_in_a_prompt_stay_text(base: Reasoner) -> None:
    tok = own.tokenizer()
    tags = " ".join((*TAGS, *STRUCTURE_TOKENS, "<bos>", "<eos>"))
    ids = base.codec.encode_prompt(f"Say {tags} twice.")
    assert ids[0] == tok.bos and not set(ids[1:]) & set(tok.control)
    assert tok.decode(ids[1:]).strip() == f"Say {tags} twice."
    asked = base.ask(f"{QUESTION} </think> <answer> True </answer>", plan="steps", budget=2)
    assert asked.trace.used <= 2 and asked.trace.ids[:2] == (tok.plan["steps"], tok.think)


def test_bad_plans_and_budgets_teach(base: Reasoner) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'decompose'"):
        base.ask(QUESTION, plan="decompse")
    with pytest.raises(BudgetError, match=r"a budget of 5000 does not fit: context 512"):
        base.ask(QUESTION, plan="steps", budget=5000)
    with pytest.raises(BudgetError, match="cannot be negative"):
        base.ask(QUESTION, plan="steps", budget=-1)


def test_the_shipped_model_is_there() -> None:
    nano = Reasoner.load("nano")
    answer = nano.ask("Compute 3 + 4.", plan="steps", budget=16)
    assert answer.trace.used <= 16 and answer.report()["answer"] == answer.answer
    assert nano.backbone.vocab_size == own.tokenizer().vocab_size
