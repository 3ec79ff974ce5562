"""The decoder: plain-net parity with random output projections, stream spread, gradients, health."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gnomon.base import seeds
from gnomon.base.errors import UnknownNameError
from gnomon.model.attention import rms_norm
from gnomon.model.decoder import PRESETS, Decoder, DecoderConfig, preset, previous_tokens
from gnomon.training import optim

VOCAB = 32


def build(streams: int, projection: str = "exact", layers: int = 4, channels: int = 64) -> Decoder:
    seeds.seed_torch("decoder test")
    return Decoder(
        DecoderConfig(
            vocab_size=VOCAB, channels=channels, layers=layers, heads=4, context=48, streams=streams,
            projection=projection,  # type: ignore[arg-type]
        )
    )  # fmt: skip


@torch.no_grad()
def randomise_outputs(model: Decoder, unembed: float = 0.02) -> None:
    """Zero output projections would make parity vacuous (decisions.md §6). unembed: its standard deviation."""
    generator = seeds.torch_generator("outputs")
    for name, parameter in model.named_parameters():
        if name.endswith("out.weight"):
            parameter.normal_(std=0.1, generator=generator)
    model.unembed.weight.normal_(std=unembed, generator=generator)


def ids(rows: int = 4, length: int = 32) -> Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=seeds.torch_generator("ids"))


@pytest.mark.parametrize("projection, unembed", [("exact", 0.02), ("exact", 0.125), ("sinkhorn", 0.02)])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_parity_with_the_plain_net(n: int, projection: str, unembed: float) -> None:
    """At initialisation n streams compute what one stream with the same weights computes (goal 1: <= 1e-5).

    Measured: exact 4e-7 with the unembedding's own initial size, 4e-6 with logits of standard deviation 1; Sinkhorn
    2e-6 with the own size. (It leaks 1e-6 of the stream per sublayer by its eps: 1.1e-5 with logits of size 1.)
    """
    model = build(n, projection)
    randomise_outputs(model, unembed)
    plain = build(1)
    shared = {k: v for k, v in model.state_dict().items() if "hyper" not in k}
    plain.load_state_dict(shared, strict=True)
    with torch.no_grad():
        ours, wanted = model(ids()).logits, plain(ids()).logits
    assert wanted.std() > 5 * unembed
    quiet = build(1)
    quiet.unembed.load_state_dict(plain.unembed.state_dict())
    with torch.no_grad():
        assert (quiet(ids()).logits - wanted).abs().max() > 2 * unembed  # the blocks do contribute
    assert (ours - wanted).abs().max() <= 1e-5


def test_one_stream_has_no_hyper_parameters() -> None:
    assert not [name for name, _ in build(1).named_parameters() if "hyper" in name]
    assert build(1).health(ids()) == []
    assert len([name for name, _ in build(4).named_parameters() if "hyper" in name]) == 4 * 2 * 3


def toy_loss(model: Decoder, step: int) -> Tensor:
    """Next token = (3 x previous + 5) mod V with one random start per row, and every fourth token noise."""
    generator = seeds.torch_generator("toy", step)
    rows = torch.randint(0, VOCAB, (8, 25), generator=generator)
    for t in range(1, 25):
        if t % 4:
            rows[:, t] = (3 * rows[:, t - 1] + 5) % VOCAB
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: Decoder, steps: int) -> tuple[float, float]:
    optimizers = optim.build(model, optim.OptimConfig())
    losses = []
    for step in range(steps):
        loss = toy_loss(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@pytest.mark.parametrize("projection", ["exact", "sinkhorn"])
def test_streams_spread_while_learning(projection: str) -> None:
    """Spread >= 1e-2 after 60 steps (goal 1): identical streams would give H_res no gradient. Measured .03-.04."""
    model = build(4, projection, layers=2, channels=32)
    randomise_outputs(model)
    fresh = model.health(ids())
    assert max(reading["spread"] for reading in fresh) < 1e-5
    first, last = train(model, 60)
    assert last < 0.6 * first
    trained = model.health(ids())
    assert len(trained) == 4 and all(math.isfinite(v) for reading in trained for v in reading.values())
    assert trained[-1]["spread"] >= 1e-2
    assert all(reading["row_error"] < 1e-4 for reading in trained)
    if projection == "exact":
        assert all(reading["column_error"] <= 1e-6 for reading in trained)


def test_gradient_reaches_every_parameter() -> None:
    """From the second step on; at the first, zero output projections and equal streams still block some."""
    for projection in ("exact", "sinkhorn"):
        model = build(4, projection, layers=2, channels=32)
        train(model, 3)
        toy_loss(model, 4).backward()  # type: ignore[no-untyped-call]
        silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert silent == []


def test_health_leaves_the_model_as_it_was() -> None:
    model = build(4)
    randomise_outputs(model)
    before = model(ids()).logits
    first = model.health(ids())
    assert torch.equal(model(ids()).logits, before)
    assert model.health(ids()) == first


def test_fresh_blocks_add_nothing() -> None:
    """Zero output projections: the states of all blocks are the normalised embedding."""
    model = build(4)
    out = model(ids(), want_states=True)
    embedded = F.rms_norm(model.embed(ids()), (64,), eps=1e-6)
    assert len(out.states) == 4
    for state in out.states:
        assert torch.allclose(state, embedded, atol=1e-5)


def test_causal() -> None:
    """Changing a token changes no logit before it."""
    model = build(4)
    randomise_outputs(model)
    a, b = ids(), ids()
    b[:, 20] = (b[:, 20] + 1) % VOCAB
    with torch.no_grad():
        x, y = model(a).logits, model(b).logits
    assert (x[:, :20] - y[:, :20]).abs().max() < 1e-6
    assert (x[:, 20:] - y[:, 20:]).abs().max() > 1e-3


def test_logits_last_and_none() -> None:
    model = build(2)
    randomise_outputs(model)
    with torch.no_grad():
        full = model(ids())
        last = model(ids(), logits="last").logits
        assert last is not None and torch.allclose(last, full.logits[:, -1:], atol=1e-6)
        assert model(ids(), logits="none").logits is None
    assert full.logits.dtype == torch.float32


def test_activation_checkpointing_gives_the_same_gradient() -> None:
    model = build(4, layers=2, channels=32)
    randomise_outputs(model)
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        toy_loss(model, 0).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_presets() -> None:
    """Sizes of issue 2: micro ~1 M, nano 2-5 M, small ~30 M, base ~120 M (built without storage)."""
    sizes = {}
    for name in PRESETS:
        with torch.device("meta"):
            model = Decoder(preset(name, 1024 if name in ("micro", "nano") else 8192))
        sizes[name] = sum(p.numel() for p in model.parameters()) / 1e6
    assert 0.7 < sizes["micro"] < 1.6 and 2 <= sizes["nano"] <= 5
    assert 25 < sizes["small"] < 45 and 95 < sizes["base"] < 150, sizes
    assert preset("nano", 1024, streams=1).streams == 1
    with pytest.raises(UnknownNameError, match="did you mean 'nano'"):
        preset("nanoo", 1024)


def test_a_bad_shape_is_named() -> None:
    with pytest.raises(ValueError, match="channels 60 must split into 8 heads"):
        Decoder(DecoderConfig(vocab_size=VOCAB, channels=60, heads=8))


@pytest.mark.parametrize("depth", [1, 3])
def test_the_tokens_before_wherever_padding_stands(depth: int) -> None:
    ids = torch.tensor([[9, 9, 5, 6], [9, 4, 9, 7], [3, 4, 5, 6], [9, 9, 9, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    some = torch.tensor([[-1, 2, 1], [-1, -1, -1], [7, 5, 2], [-1, -1, 1]])[:, -depth:]
    for last, cached in ((torch.full((4, depth), -1), 0), (some, 2)):
        whole = torch.cat([torch.ones(4, cached, dtype=torch.bool), mask], 1)
        previous, newest = previous_tokens(ids, whole, last)
        for row in range(4):  # the slow, obvious version
            seen = last[row].tolist()
            for t in range(4):
                if mask[row, t]:
                    assert previous[row, t].tolist() == seen[::-1][:depth]
                    seen.append(int(ids[row, t]))
            assert newest[row].tolist() == seen[-depth:]


def test_gains_and_the_tokens_before_are_the_identity_at_first() -> None:
    model = build(4)
    randomise_outputs(model)
    seen: list[torch.Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        wanted = model(ids()).logits
        assert torch.equal(seen[0][:, :, 0], rms_norm(model.embed(ids())))
        assert all(torch.equal(b.attention.gain, torch.ones(4)) for b in model.blocks)
        model.before.weight.normal_(std=0.1, generator=seeds.torch_generator("before"))
        changed = model(ids()).logits
    hook.remove()
    assert torch.equal(changed[:, 0], wanted[:, 0])  # nothing stands before the first token
    assert (changed[:, 1:] - wanted[:, 1:]).abs().amax(-1).min() > 1e-4


def test_records_of_a_packed_row_do_not_see_the_tokens_before_their_own() -> None:
    model = build(2)
    randomise_outputs(model)
    with torch.no_grad():
        model.before.weight.normal_(std=0.1, generator=seeds.torch_generator("before"))
        whole = ids(1, 12)
        positions = torch.tensor([[*range(5), *range(7)]])
        segment = torch.tensor([0] * 5 + [1] * 7)
        mask = ((segment[:, None] == segment[None]) & torch.ones(12, 12).tril().bool())[None, None]
        packed = model(whole, positions, mask).logits
        alone = model(whole[:, 5:]).logits
    assert (packed[:, 5:] - alone).abs().max() < 1e-5
