"""Our decoder in C: equal to torch, and a row's numbers are bit-identical whatever else is in a step."""

from __future__ import annotations

import pytest
import torch
from tests.model.nets import alone, decoder, draw, gap, log_gap, used_cache

from gnomon.base import native
from gnomon.base.errors import ModelError
from gnomon.model.backbone import OwnBackbone
from gnomon.model.native import NativeBackbone, library, own_backbone

needs_library = pytest.mark.skipif(library() is None, reason="no C compiler here, or GNOMON_NATIVE=0")
NETS = [(1, "exact"), (2, "exact"), (4, "exact"), (2, "sinkhorn"), (4, "sinkhorn")]


@needs_library
@pytest.mark.parametrize(("streams", "projection"), NETS)
def test_equals_torch(streams: int, projection: str) -> None:
    """Non-zero output projections everywhere (`nets.decoder`), ragged prompts and steps, used slots."""
    model = decoder(streams, projection)
    rows = [draw(n, "native") for n in (30, 17, 1, 16, 33)]
    outs = []
    for net in (OwnBackbone(model), NativeBackbone(model)):
        cache = used_cache(net, 6)
        first = net.extend(cache, rows, 1, logits="all", taps=True)
        second = net.extend(cache, [(3,), (4, 5), (6,), (7,), (8,)], 1, taps=True)
        outs.append((first.logits, first.taps, second.logits, second.taps))
    for wanted, got in zip(*outs, strict=True):
        assert wanted is not None and wanted.std() > 0.05
        assert gap(wanted, got) <= 1e-4
    assert log_gap(outs[0][0], outs[1][0]) <= 1e-4 and log_gap(outs[0][2], outs[1][2]) <= 1e-4


@needs_library
@pytest.mark.parametrize(("streams", "projection"), NETS)
@pytest.mark.parametrize("company", [1, 2, 5, 11])
def test_bit_identical_in_any_company(streams: int, projection: str, company: int) -> None:
    """The same row: in another slot, beside other rows, beside long prompts, its prompt in pieces."""
    net = NativeBackbone(decoder(streams, projection))
    row = draw(19, "row")
    wanted = alone(net, row[:12], taps=True)
    cache = net.new_cache(1, 64)
    net.extend(cache, [row[:12]], logits="none")
    steps = [net.extend(cache, [(t,)], taps=True) for t in row[12:]]
    cache = used_cache(net, company + 1)
    at = company // 2
    prompts = [draw(5 + 3 * r, "neighbour", r) for r in range(company)]
    prompts[at] = row[:12]
    out = net.extend(cache, prompts, 1, taps=True)
    assert out.logits is not None and out.taps is not None and wanted.logits is not None and wanted.taps is not None
    assert torch.equal(out.logits[at], wanted.logits[0]) and torch.equal(out.taps[at], wanted.taps[0])
    for k, (token, step) in enumerate(zip(row[12:], steps, strict=True)):
        others: list[tuple[int, ...]] = [(r + 1,) * (1 + (r + k) % 3) for r in range(company)]
        others[at] = (token,)
        out = net.extend(cache, others, 1, taps=True)
        assert out.logits is not None and out.taps is not None and step.logits is not None and step.taps is not None
        assert torch.equal(out.logits[at], step.logits[0]) and torch.equal(out.taps[at], step.taps[0])


@needs_library
def test_number_of_threads_changes_nothing() -> None:
    net = NativeBackbone(decoder(4))
    rows = [draw(n, "threads") for n in (20, 3, 9)]
    threads = torch.get_num_threads()
    outs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(net.extend(net.new_cache(3, 64), rows, logits="all").logits)
    finally:
        torch.set_num_threads(threads)
    assert gap(outs[0], outs[1]) == gap(outs[0], outs[2]) == 0.0


@needs_library
def test_bad_calls_are_refused_before_anything_is_written() -> None:
    net = NativeBackbone(decoder(1))
    cache = net.new_cache(2, 16)
    for tokens in ([(1,), ()], [(64,)], [(-1,)], [(1,) * 17], [(1,)] * 3):
        with pytest.raises(AssertionError):
            net.extend(cache, tokens)
    assert cache.lengths.tolist() == [0, 0]


def test_without_a_library_the_torch_path_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.SWITCH, "0")
    native.library.cache_clear()
    try:
        assert type(own_backbone(decoder(1))) is OwnBackbone
        with pytest.raises(ModelError, match="use OwnBackbone"):
            NativeBackbone(decoder(1))
    finally:
        native.library.cache_clear()
