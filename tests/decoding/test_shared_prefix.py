"""A long common prefix is prefilled once; the results are those of each row alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from tests.decoding.test_engine import CASES, requests
from tests.decoding.tiny import Tiny

from gnomon.base.seeds import seed_torch
from gnomon.decoding.engine import Engine
from gnomon.decoding.prefix import common_prefix
from gnomon.model.backbone import OwnBackbone
from gnomon.model.decoder import Decoder, DecoderConfig

HEAD = tuple(19 + i % 13 for i in range(70))


def test_common_prefix_leaves_one_id_and_ignores_short_ones() -> None:
    assert common_prefix([(*HEAD, 1), (*HEAD, 2, 3)]) == 70
    assert common_prefix([HEAD, (*HEAD, 2)]) == 69, "every row keeps an id of its own"
    assert common_prefix([(1, 2, 3), (1, 2, 4)]) == 0
    assert common_prefix([(*HEAD, 1)]) == 0
    assert common_prefix([(1, *HEAD), (*HEAD, 1)]) == 0


def test_rows_with_a_shared_prefix_equal_the_rows_alone() -> None:
    layout, lean = CASES[0]
    asked = [replace(r, prompt_ids=HEAD + r.prompt_ids) for r in requests(24, "prefix") if r.budget != 40]
    backbone = Tiny("prefix", context=220, lean=lean)
    together = Engine(backbone, layout, max_batch=24).run(asked)
    for request, trace in zip(asked, together, strict=True):
        alone = Engine(backbone, layout, max_batch=1).run([request])[0]
        assert trace.ids == alone.ids
        assert np.allclose(trace.logprobs, alone.logprobs, atol=1e-4)


def test_our_decoder_allows_padding_between_prefix_and_row() -> None:
    seed_torch("shared-prefix")
    decoder = Decoder(DecoderConfig(vocab_size=64, channels=32, layers=2, heads=2, context=256))
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.out.weight, std=0.2)
        torch.nn.init.normal_(block.mlp.out.weight, std=0.2)
    layout, _ = CASES[0]
    asked = [replace(r, prompt_ids=HEAD + r.prompt_ids, budget=12) for r in requests(12, "own")]
    backbone = OwnBackbone(decoder)
    together = Engine(backbone, layout, max_batch=12).run(asked)
    for request, trace in zip(asked, together, strict=True):
        alone = Engine(backbone, layout, max_batch=1).run([request])[0]
        assert trace.ids == alone.ids
        assert np.allclose(trace.logprobs, alone.logprobs, atol=1e-4)
