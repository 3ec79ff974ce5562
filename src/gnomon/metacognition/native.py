"""Heads and card in C (`heads.c`) for decoding on a CPU: a read of a few rows costs tens of microseconds.

Legend: N rows, A tapped layers of the backbone, C hidden size, K plans.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from gnomon.base import native
from gnomon.base.errors import ModelError
from gnomon.base.native import Pointer
from gnomon.metacognition.calibration import Card, numbers
from gnomon.metacognition.config import BOUNDARY, END, PROMPT, SITES, THINK_SITE
from gnomon.metacognition.gate import FeedbackGate
from gnomon.metacognition.heads import MetacogHeads

SOURCE: Final = Path(__file__).with_name("heads.c")
_INTS: Final = ("all", "layers", "hidden", "width", "proj", "plans", "attention")
_ARRAYS: Final = (
    "index", "mean", "inverse", "inp", "inp_bias", "layer", "site", "gain", "used", "out", "out_bias", "norm",
    "norm_bias", "query", "prior", "gate", "gate_bias",
)  # fmt: skip
_HEADS: Final = ("hidden_w", "hidden_b", "last_w", "last_b")
_WIDTHS: Final = ((THINK_SITE, 5), (END, 2), (BOUNDARY, 4))  # numbers a row
Numbers = list[float]


class _Heads(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_int32) for n in _INTS), *((n, Pointer) for n in _ARRAYS),
                *((n, Pointer * 4) for n in _HEADS)]  # fmt: skip


class _Card(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_int32) for n in ("present", "layer", "centres")),
                *((n, Pointer) for n in ("order", "root", "centre", "mean")),
                *((n, ctypes.c_double) for n in ("threshold", "price")),
                *((n, ctypes.c_double * len(SITES)) for n in ("temperature", "shift", "offset"))]  # fmt: skip


class NativeReader:
    """`readers.TorchReader` with weights and card copied into `heads.c`, one call a read.

    Raises ModelError where there is no compiled kernel.
    """

    def __init__(self, heads: MetacogHeads, card: Card | None, gate: FeedbackGate | None = None) -> None:
        lib = native.library(SOURCE)
        if lib is None or heads.layer_index.device.type != "cpu":
            raise ModelError("the compiled heads are not available here; use TorchReader")
        self._arrays, config = native.Arrays(lib), heads.config
        self._tail = (config.n_layers, config.hidden_size)
        self._index = np.asarray(config.used_layers, dtype=np.int32)
        self._widths = {PROMPT: 1 + config.n_plans, **dict(_WIDTHS)}
        self._call = lib.gn_read
        self._call.argtypes = [*[Pointer] * 2, *[ctypes.c_int] * 2, *[Pointer] * 6, *[ctypes.c_int] * 2]
        self._heads = self._build(heads, gate)
        self._gated = gate is not None
        self._card = _Card() if card is None else self._build_card(card)
        self._fixed = ctypes.addressof(self._heads), ctypes.addressof(self._card)

    def plan(self, taps: Tensor) -> list[Numbers]:
        """taps [N, A, C] -> [chosen, probability of each plan] a row."""
        return self._read(taps, PROMPT)

    def budget(self, taps: Tensor, plans: Sequence[int]) -> tuple[list[Numbers], Tensor | None]:
        """As TorchReader.budget."""
        if not self._gated:
            return self._read(taps, THINK_SITE), None
        vectors = torch.empty((len(plans), self._tail[1]))
        return self._read(taps, THINK_SITE, plans=plans, vectors=vectors), vectors

    def after(self, taps: Tensor, used: Sequence[int]) -> list[Numbers]:
        """taps [N, A, C], used [N] tokens -> [confidence, its logit] a row; NaN without a card."""
        return self._read(taps, END, used)

    def running(self, taps: Tensor, used: Sequence[int]) -> list[Numbers]:
        """taps [N, A, C], used [N] tokens -> [expected remainder, upper bound, confidence, its logit] a row."""
        return self._read(taps, BOUNDARY, used)

    def reached(self, taps: Tensor, ends: Sequence[bool], used: Sequence[int]) -> list[Numbers]:
        """As TorchReader.reached."""
        return self._read(taps, BOUNDARY, used, sites=[END if end else BOUNDARY for end in ends])

    def _read(
        self,
        taps: Tensor,
        site: int,
        used: Sequence[int] | None = None,
        sites: Sequence[int] = (),
        plans: Sequence[int] = (),
        vectors: Tensor | None = None,
    ) -> list[Numbers]:
        n, *tail = taps.shape
        if tuple(tail) != self._tail:
            raise ModelError(f"taps must be [N, {self._tail[0]}, {self._tail[1]}], got {list(taps.shape)}")
        if taps.dtype != torch.float32 or not taps.is_contiguous() or not taps.is_cpu:
            taps = taps.float().cpu().contiguous()
        tokens = None if used is None else native.many(ctypes.c_float, n)(*used)
        each = native.many(ctypes.c_int32, n)(*sites) if sites else None
        width = self._widths[site]
        out = native.many(ctypes.c_double, n * width)()
        chosen, to = (None, None) if vectors is None else (native.many(ctypes.c_int32, n)(*plans), vectors.data_ptr())
        done = self._call(
            *self._fixed, site, n, taps.data_ptr(), tokens, each, chosen, to, out, width, torch.get_num_threads()
        )
        if not done:
            raise MemoryError("no memory to read the heads")
        if done < 0:
            numbers(np.asarray(np.nan))
        flat = out[:]
        return [flat[at : at + width] for at in range(0, n * width, width)]

    def _build_card(self, card: Card) -> _Card:
        """The card as a structure; temperatures, shifts and offsets by site."""
        root, centres = card.domain.whitened
        self._mean = np.asarray(card.domain.centres, dtype=np.float64).mean(0)
        self._order = np.asarray([card.plans.index(p) for p in card.cost_order], dtype=np.int32)
        running, n = card.running, len(SITES)
        heat, shift, offset = [1.0] * n, [0.0] * n, [0.0] * n
        heat[THINK_SITE], heat[END] = card.temperature.before, card.temperature.after
        shift[THINK_SITE], shift[END] = card.shift.before, card.shift.after
        offset[THINK_SITE] = card.budget_clip.operating_offset
        if running is not None:
            heat[BOUNDARY], shift[BOUNDARY], offset[BOUNDARY] = running.temperature, running.shift, running.offset
        by_site = ctypes.c_double * n
        return _Card(
            1, card.domain.layer, len(centres), self._order.ctypes.data, self._arrays.packed(root.T),
            self._arrays.plain(centres - np.einsum("c,cd->d", self._mean, root)), self._mean.ctypes.data,
            card.plan_threshold, -1.0 if card.plan_price is None else card.plan_price,
            by_site(*heat), by_site(*shift), by_site(*offset),
        )  # fmt: skip

    def _build(self, heads: MetacogHeads, gate: FeedbackGate | None) -> _Heads:
        c, trunk, aggregator = heads.config, heads.trunk, heads.aggregator
        plain = lambda t: self._arrays.plain(t.detach().numpy())  # noqa: E731
        packed = lambda t: self._arrays.packed(t.detach().numpy())  # noqa: E731
        attention = aggregator.kind == "attention"
        values = {
            "index": int(self._index.ctypes.data),
            "mean": plain(trunk.mean),
            "inverse": plain(1.0 / trunk.scale),
            "inp": packed(trunk.inp.weight),
            "inp_bias": plain(trunk.inp.bias),
            "layer": plain(trunk.layer_offset),
            "site": plain(trunk.site_offset),
            "gain": plain(trunk.site_gain),
            "used": plain(trunk.used_offset),
            "out": packed(trunk.out.weight),
            "out_bias": plain(trunk.out.bias),
            "norm": plain(trunk.norm.weight),
            "norm_bias": plain(trunk.norm.bias),
            "query": plain(aggregator.query) if attention else None,
            "prior": plain(aggregator.prior) if attention else None,
            "gate": None if gate is None else packed(gate.out.weight),
            "gate_bias": None if gate is None else plain(gate.out.bias),
        }
        sizes = (c.n_layers, len(c.used_layers), c.hidden_size, c.width, c.proj_dim, c.n_plans, int(attention))
        parts: dict[str, list[int]] = {name: [] for name in _HEADS}
        every = (heads.plan_head, heads.budget_head, heads.conf_head, heads.value_head)
        for head in every:
            if head is None:
                for name in _HEADS:
                    parts[name].append(0)
                continue
            first, last = head[0], head[2]
            assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
            for name, address in zip(
                _HEADS,
                (packed(first.weight), plain(first.bias), packed(last.weight), plain(last.bias)),
                strict=True,
            ):
                parts[name].append(address)
        return _Heads(*sizes, *values.values(), *((Pointer * 4)(*parts[name]) for name in _HEADS))


def available(heads: MetacogHeads) -> bool:
    """Whether `NativeReader` can serve these heads here."""
    return heads.layer_index.device.type == "cpu" and native.library(SOURCE) is not None
