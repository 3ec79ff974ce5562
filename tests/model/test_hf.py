"""Our decoder through `AutoModelForCausalLM`: round trip, generate, padding on either side, folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import gnomon.hf
from gnomon.base import seeds
from gnomon.base.checkpoint import load_tensors
from gnomon.base.errors import CheckpointError, ModelError
from gnomon.hf import GnomonConfig, GnomonForCausalLM
from gnomon.model.decoder import Decoder, DecoderConfig
from gnomon.model.folder import load_decoder, save_decoder

VOCAB = 48
PAD = 0


def decoder(projection: str = "exact", streams: int = 4) -> Decoder:
    seeds.seed_torch("hf test")
    shape = {"vocab_size": VOCAB, "channels": 32, "layers": 2, "heads": 2, "context": 64}
    model = Decoder(DecoderConfig.model_validate({**shape, "streams": streams, "projection": projection}))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="module")
def ours() -> GnomonForCausalLM:
    model = decoder()
    config = GnomonConfig(**model.config.model_dump(), pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    wrapped = GnomonForCausalLM(config)
    wrapped.decoder.load_state_dict(model.state_dict())
    return wrapped.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=seeds.torch_generator("hf ids", *shape))


@torch.no_grad()
def greedy(model: Decoder, ids: Tensor, steps: int) -> list[int]:
    """The slow way: the whole row again for every token, no cache."""
    row, out = ids.tolist(), []
    for _ in range(steps):
        scores = model(torch.tensor([row])).logits[0, -1]
        scores[2] = -1e9  # no early end, so that lengths are comparable
        out.append(int(scores.argmax()))
        row.append(out[-1])
    return out


def test_auto_round_trip_is_bit_equal(ours: GnomonForCausalLM, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is GnomonForCausalLM
    assert isinstance(AutoConfig.from_pretrained(tmp_path), GnomonConfig)
    ids = tokens(3, 20)
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert torch.equal(ours(ids).logits, ours.decoder(ids).logits) or (
        (ours(ids).logits - ours.decoder(ids).logits).abs().max() < 1e-6  # the mask is given instead of implied
    )
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    plain = load_decoder(tmp_path)
    assert torch.equal(plain(ids).logits, ours.decoder(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 1, "do_sample": False}])
def test_generate_equals_greedy_without_cache(ours: GnomonForCausalLM, side: str, options: dict[str, object]) -> None:
    """Each row goes on from its last real token, wherever the padding stands."""
    rows = [tokens(n) for n in (3, 8, 5)]
    ids = torch.full((3, 8), PAD)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    out = ours.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=10, suppress_tokens=[2], pad_token_id=PAD, **options
    )
    assert out.shape == (3, 18)
    for i, row in enumerate(rows):
        assert out[i, 8:].tolist() == greedy(ours.decoder, row, 10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_next_token_comes_from_the_last_real_token(ours: GnomonForCausalLM, side: str) -> None:
    rows = [tokens(n) for n in (2, 7, 4)]
    ids, mask = torch.full((3, 7), PAD), torch.zeros(3, 7, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(7 - len(row), 7) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    with torch.no_grad():
        kept = ours(ids, attention_mask=mask, logits_to_keep=1).logits
        every = ours(ids, attention_mask=mask).logits
        assert kept.shape == (3, 1, VOCAB) and every.shape == (3, 7, VOCAB)
        for i, row in enumerate(rows):
            alone = ours.decoder(row[None]).logits[0]
            assert (kept[i, 0] - alone[-1]).abs().max() <= 1e-5
            assert (every[i, mask[i].bool()] - alone).abs().max() <= 1e-5
        torch.testing.assert_close(
            ours(ids, attention_mask=mask, logits_to_keep=3).logits, every[:, -3:], atol=1e-6, rtol=0
        )


def test_beam_search_reorders_our_cache(ours: GnomonForCausalLM) -> None:
    ids = tokens(2, 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "suppress_tokens": [2], "pad_token_id": PAD}
    mask = torch.ones_like(ids)
    cached = ours.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(cached, ours.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))


def test_loss_is_shifted_cross_entropy(ours: GnomonForCausalLM) -> None:
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    wanted = torch.nn.functional.cross_entropy(ours.decoder(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert torch.allclose(ours(ids, labels=labels).loss, wanted, atol=1e-6)


def test_beyond_the_context_is_refused(ours: GnomonForCausalLM) -> None:
    with pytest.raises(ModelError, match="65 positions.*context of 64"):
        ours(tokens(1, 65))


@pytest.mark.parametrize("projection", ["exact", "sinkhorn"])
@pytest.mark.parametrize("matrices", ["bf16", "fp32"])
def test_folder_opens_both_ways(tmp_path: Path, matrices: str, projection: str) -> None:
    model = decoder(projection)
    save_decoder(tmp_path, model, matrices=matrices, eos=2, bos=1, pad=0)  # type: ignore[arg-type]
    stored = load_tensors(tmp_path, "model.safetensors")
    low = torch.bfloat16 if matrices == "bf16" else torch.float32
    assert {v.dtype for k, v in stored.items() if "hyper" in k or v.ndim < 2} == {torch.float32}
    assert {v.dtype for k, v in stored.items() if "hyper" not in k and v.ndim > 1} == {low}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ours = load_decoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not ours.training and {p.dtype for p in ours.parameters()} == {torch.float32}
    for (name, a), b in zip(model.named_parameters(), ours.parameters(), strict=True):
        kept = torch.float32 if "hyper" in name or a.ndim < 2 else low
        assert torch.equal(a.to(kept).float(), b), name
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id, theirs.config.pad_token_id) == (2, 1, 0)
    ids = tokens(2, 30)
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids).logits).abs().max() < 1e-6


def test_bfloat16_loading_keeps_hyper_parameters_and_tables_in_float32(tmp_path: Path) -> None:
    model = decoder()
    save_decoder(tmp_path, model, matrices="fp32")
    low = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for n, p in low.named_parameters() if "hyper" in n} == {torch.float32}
    assert {p.dtype for n, p in low.named_parameters() if "hyper" not in n} == {torch.bfloat16}
    assert low.decoder.rope.dtype == torch.float32 and torch.equal(low.decoder.rope, model.rope)
    ids = tokens(2, 30)
    with torch.no_grad():
        scores, wanted = low(ids).logits, model(ids).logits
    assert torch.nn.functional.cosine_similarity(scores, wanted, dim=-1).min() > 0.99


def test_plain_net_folder(tmp_path: Path) -> None:
    model = decoder(streams=1)
    save_decoder(tmp_path, model, matrices="fp32")
    ids = tokens(1, 9)
    assert torch.equal(load_decoder(tmp_path)(ids).logits, model(ids).logits)


def test_reading_a_folder_needs_no_transformers(tmp_path: Path) -> None:
    save_decoder(tmp_path, decoder())
    code = (
        "import sys; from gnomon.model.folder import load_decoder; load_decoder(sys.argv[1]);"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder .*nowhere"):
        load_decoder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config.json and model.safetensors missing \(there: nothing\)"):
        load_decoder(tmp_path)
    save_decoder(tmp_path, decoder())
    (tmp_path / "model.safetensors").rename(tmp_path / "model.part")
    with pytest.raises(ModelError, match=r"model.safetensors missing \(there: config.json, model.part\)"):
        load_decoder(tmp_path)
    (tmp_path / "model.part").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").rename(tmp_path / "config.txt")
    with pytest.raises(ModelError, match=r"whole model: config.json missing"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type 'llama', not 'gnomon'"),
        ({"streams": 0}, "streams: .*greater than or equal to 1"),
        ({"streams": 1}, r"16 unknown|12 unknown \(decoder.blocks.0.hyper"),
        ({"layers": 3}, r"missing \(decoder.blocks.2"),
        ({"vocab_size": 50}, r"of another shape \(decoder.embed.weight is \(48, 32\), config.json says \(50, 32\)"),
        ({"channels": None}, "lacks channels"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    save_decoder(tmp_path, decoder())
    body = json.loads((tmp_path / "config.json").read_text())
    body.update(change)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in body.items() if v is not None}))
    with pytest.raises(ModelError, match=message):
        load_decoder(tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    save_decoder(tmp_path, decoder())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors' is damaged"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        load_decoder(tmp_path)


def test_registration_is_repeatable() -> None:
    import importlib

    importlib.reload(gnomon.hf)
    assert AutoConfig.for_model("gnomon", vocab_size=64).channels == DecoderConfig(vocab_size=64).channels
