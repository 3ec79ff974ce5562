"""One protocol over our decoder, in torch and in C, and over Hugging Face models: slots, rows, positions, taps."""

from __future__ import annotations

import pytest
import torch
from tests.model.nets import CONTEXT, VOCAB, alone, decoder, draw, gap, hf_model, log_gap, used_cache

from gnomon.model.backbone import Backbone, OwnBackbone, row_bucket
from gnomon.model.foreign import HFBackbone
from gnomon.model.llama import LlamaBackbone
from gnomon.model.llama_native import NativeLlama
from gnomon.model.native import NativeBackbone, library
from gnomon.model.slots import TensorSlots, start_pass

KINDS = ("own", "own plain", "native", "native plain", "hf", "lean", "native llama")


def backbone(kind: str) -> Backbone:
    if kind in ("hf", "lean"):
        return (HFBackbone if kind == "hf" else LlamaBackbone)(hf_model("llama"))
    if kind.startswith("native") and library() is None:
        pytest.skip("no C compiler here, or GNOMON_NATIVE=0")
    if kind == "native llama":
        return NativeLlama(hf_model("llama"))
    model = decoder(1 if kind.endswith("plain") else 4)
    return NativeBackbone(model) if kind.startswith("native") else OwnBackbone(model)


@pytest.fixture(params=KINDS, scope="module")
def net(request: pytest.FixtureRequest) -> Backbone:
    return backbone(request.param)


def test_shapes(net: Backbone) -> None:
    rows = [draw(4, "shape"), draw(7, "shape")]
    cache = net.new_cache(2, 16)
    out = net.extend(cache, rows, taps=True)
    assert (net.n_layers, net.hidden_size, net.vocab_size, net.context) == (3, 32, VOCAB, CONTEXT)
    assert out.logits is not None and out.logits.shape == (2, VOCAB) and out.logits.dtype == torch.float32
    assert out.taps is not None and out.taps.shape == (2, 3, 32) and out.taps.dtype == torch.float32
    assert cache.lengths[:2].tolist() == [4, 7]
    every = net.extend(net.new_cache(2, 16), rows, logits="all")
    assert every.logits is not None and every.logits.shape == (11, VOCAB) and every.taps is None
    assert gap(every.logits[[3, 10]], out.logits) <= 1e-5
    assert net.extend(net.new_cache(2, 16), rows, logits="none").logits is None


@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 1, 1, 5), (11, 1)])
def test_cached_equals_full(net: Backbone, cuts: tuple[int, ...]) -> None:
    rows = [draw(12, "cached", r) for r in range(3)]
    cache, at, seen = net.new_cache(3, 16), 0, []
    for cut in cuts:
        at += cut
        out = net.extend(cache, [row[at - cut : at] for row in rows], logits="all", taps=True)
        assert out.logits is not None
        seen.append(out.logits.view(3, cut, VOCAB))
    for r, row in enumerate(rows):
        full = alone(net, row, logits="all", taps=True)
        assert full.logits is not None and full.logits.std() > 0.1
        assert gap(torch.cat(seen, 1)[r], full.logits) <= 1e-5
        assert out.taps is not None and gap(out.taps[r : r + 1], full.taps) <= 1e-5


def test_row_alone_equals_row_in_company(net: Backbone) -> None:
    """Ragged prompts in slots that held longer sequences, then ragged continuations, at any first slot."""
    rows = [draw(n, "ragged") for n in (20, 9, 26, 1, 13)]
    heads = (3, 7, 20, 1, 12)
    cache = used_cache(net, 7)
    net.extend(cache, [draw(30, "stranger")], 0, logits="none")
    net.extend(cache, [row[:n] for row, n in zip(rows, heads, strict=True)], 1, logits="none")
    later = [row[n:] or (5,) for row, n in zip(rows, heads, strict=True)]
    out = net.extend(cache, later, 1, taps=True)
    assert out.logits is not None and out.taps is not None
    assert cache.lengths[:6].tolist() == [30, *(n + len(t) for n, t in zip(heads, later, strict=True))]
    for r, (row, n) in enumerate(zip(rows, heads, strict=True)):
        wanted = alone(net, row[:n] + later[r], taps=True)
        assert log_gap(out.logits[r : r + 1], wanted.logits) <= 1e-4
        assert gap(out.taps[r : r + 1], wanted.taps) <= 1e-4


def test_rows_join_leave_and_move(net: Backbone) -> None:
    """copy and cut as the engine uses them: a shared prompt, a row moved into a slot that was left, a step undone."""
    prompt, other = draw(6, "prompt"), draw(11, "other")
    cache = used_cache(net, 4)
    net.extend(cache, [prompt, other], logits="none")
    cache.copy(0, 2)
    net.extend(cache, [(5, 6), (7,), (8, 9, 10)], logits="none")
    cache.cut(0)
    cache.copy(2, 0)
    cache.cut(2)
    assert cache.lengths[:3].tolist() == [9, 12, 0]
    net.extend(cache, [draw(5, "undone")], 1, logits="none")
    cache.cut(1, 12)
    out = net.extend(cache, [(3,), (4,), (5, 5)])
    assert out.logits is not None
    for r, row in enumerate((prompt + (8, 9, 10, 3), other + (7, 4), (5, 5))):
        assert log_gap(out.logits[r : r + 1], alone(net, row).logits) <= 1e-4


def test_one_slot_of_many_leaves_the_others_alone(net: Backbone) -> None:
    cache = used_cache(net, 8)
    rows = [draw(9 + r, "many", r) for r in range(8)]
    net.extend(cache, rows, logits="none")
    for r in (3, 0, 7):
        net.extend(cache, [draw(20, "lonely", r)], r, logits="none")
    out = net.extend(cache, [(1,)] * 8)
    assert out.logits is not None
    for r, row in enumerate(rows):
        text = row + (draw(20, "lonely", r) if r in (3, 0, 7) else ()) + (1,)
        assert log_gap(out.logits[r : r + 1], alone(net, text).logits) <= 1e-4


def test_up_to_the_last_position_of_the_context(net: Backbone) -> None:
    text = draw(CONTEXT, "context")
    cache = net.new_cache(2, CONTEXT)
    net.extend(cache, [text[:-1], text[:3]], logits="none")
    out = net.extend(cache, [text[-1:], text[3:5]])
    assert out.logits is not None and cache.lengths[0] == CONTEXT
    assert log_gap(out.logits[:1], alone(net, text).logits) <= 1e-4
    with pytest.raises(AssertionError, match="room"):
        net.extend(cache, [(1,)])


def test_taps_are_the_states_after_every_block(net: Backbone) -> None:
    """[R, L, C]: against the model's own list of states, at the last position."""
    ids = draw(6, "taps")
    taps = alone(net, ids, taps=True).taps
    with torch.no_grad():
        if isinstance(net, OwnBackbone):
            states = net.module(torch.tensor([ids]), want_states=True).states
        else:
            assert isinstance(net, (HFBackbone, LlamaBackbone, NativeLlama))
            states = net.module(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:]
    assert len(states) == net.n_layers and taps is not None
    for k, state in enumerate(states):
        assert gap(taps[:, k], state[:, -1]) <= 1e-4
    assert (taps[:, 0] - taps[:, -1]).abs().max() > 1e-2


def test_a_pass_is_padded_and_masked_row_by_row() -> None:
    cache = TensorSlots(1, 4, 1, 10, 2, torch.zeros(1))
    cache.lengths[:] = (2, 0, 5, 0)
    run = start_pass(cache, [(7, 8, 9), (4,)], 1, context=8, rows=3)
    spare = cache.capacity
    assert cache.capacity == 64 and run.view == 64 and run.start is None
    assert run.ids.tolist() == [[7, 8, 9], [4, 0, 0], [0, 0, 0]]
    assert run.positions.tolist() == [[0, 1, 2], [5, spare, spare], [spare] * 3]
    assert run.places.max() == 7 and run.last.tolist() == [2, 0, 0]
    assert run.mask.shape == (3, 1, 3, 64)
    assert run.mask[:, 0].sum(-1).tolist() == [[1, 2, 3], [6, 1, 1], [1, 1, 1]]
    run.advance(3)
    assert cache.lengths.tolist() == [2, 3, 6, 0]


def test_row_buckets() -> None:
    assert [row_bucket(n) for n in (1, 4, 5, 7, 9, 33, 256, 300)] == [1, 4, 6, 8, 12, 48, 256, 300]


def test_resized_keeps_everything_and_never_shrinks(net: Backbone) -> None:
    """More slots or more room, also where a cache was made with more slots than were asked for."""
    cache = net.new_cache(5, 24)
    rows = [tuple(draw(n, "resized")) for n in (9, 3, 17)]
    net.extend(cache, rows, logits="none")
    wanted = net.extend(cache, [(1,), (2,), (3,)]).logits
    again = net.new_cache(5, 24)
    net.extend(again, rows, logits="none")
    larger = again.resized(6, 40)
    assert larger.capacity >= 40 and len(larger.lengths) >= 6 and larger.lengths[:3].tolist() == [9, 3, 17]
    got = net.extend(larger, [(1,), (2,), (3,)]).logits
    assert wanted is not None and got is not None and torch.allclose(got, wanted, atol=1e-4)
    assert len(larger.resized(2, 8).lengths) >= 6 and larger.resized(2, 8).capacity >= 40
