"""The heads in C (`heads.c`) for decoding on a CPU: a read of a few rows costs tens of microseconds, not a thousand.

Legend: N rows, A tapped layers of the backbone, C hidden size, K plans, P proj_dim.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from gnomon.base import native
from gnomon.base.errors import ModelError
from gnomon.base.native import Pointer, pointer
from gnomon.metacognition.calibration import Domain
from gnomon.metacognition.heads import MetacogHeads

SOURCE: Final = Path(__file__).with_name("heads.c")
_INTS: Final = ("all", "layers", "hidden", "width", "proj", "plans", "attention")
_ARRAYS: Final = (
    "index", "mean", "inverse", "inp", "inp_bias", "layer", "site", "gain", "used", "out", "out_bias", "norm",
    "norm_bias", "query", "prior",
)  # fmt: skip
_HEADS: Final = ("hidden_w", "hidden_b", "last_w", "last_b")
Floats = NDArray[np.float32]


class _Heads(ctypes.Structure):
    _fields_ = [*((n, ctypes.c_int32) for n in _INTS), *((n, Pointer) for n in _ARRAYS),
                *((n, Pointer * 4) for n in _HEADS)]  # fmt: skip


class Reading(NamedTuple):
    """plan_logits [N, K], budget_raw [N] in log1p(tokens), conf_raw [N] logit, g [N, P]; float32.

    solve_logits, cost_raw [N, K]: None where the heads have no values.
    """

    plan_logits: Floats
    budget_raw: Floats
    conf_raw: Floats
    g: Floats
    solve_logits: Floats | None = None
    cost_raw: Floats | None = None


class NativeHeads:
    """MetacogHeads with its weights copied into `heads.c`. Raises ModelError where there is no compiled kernel."""

    def __init__(self, heads: MetacogHeads) -> None:
        lib = native.library(SOURCE)
        if lib is None or heads.layer_index.device.type != "cpu":
            raise ModelError("the compiled heads are not available here; use MetacogHeads")
        self._lib, self._arrays, config = lib, native.Arrays(lib), heads.config
        self.shape = config.n_layers, config.hidden_size
        self.plans, self.proj, self.values = config.n_plans, config.proj_dim, config.values
        self._index = np.asarray(config.used_layers, dtype=np.int32)
        self._struct = self._build(heads)

    def __call__(self, taps: Tensor, site: int, used: Tensor | None = None) -> Reading:
        """taps float32 [N, A, C] at one site, used [N] tokens (default 0) -> Reading."""
        if taps.ndim != 3 or tuple(taps.shape[1:]) != self.shape:
            raise ModelError(f"taps must be [N, {self.shape[0]}, {self.shape[1]}], got {list(taps.shape)}")
        states = np.ascontiguousarray(taps.numpy(), dtype=np.float32)
        n = len(states)
        sites = np.full(n, site, dtype=np.int32)
        tokens = np.zeros(n, dtype=np.float32) if used is None else np.log1p(np.maximum(used.float().numpy(), 0.0))
        shapes = ((n, self.plans), (n,), (n,), (n, self.proj), (n, 2 * self.plans))
        out = [np.empty(shape, dtype=np.float32) for shape in shapes]
        done = self._lib.gn_heads(
            ctypes.byref(self._struct), n, pointer(states), pointer(sites), pointer(tokens), *map(pointer, out)
        )
        if not done:
            raise MemoryError("no memory to read the heads")
        *rest, values = out
        return Reading(*rest, *np.split(values, 2, axis=1)) if self.values else Reading(*rest)

    def _build(self, heads: MetacogHeads) -> _Heads:
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


class NativeDistance:
    """Domain.distance in C. Not numpy: its threads, once woken, stand in the way of the decoder's for a while."""

    def __init__(self, domain: Domain) -> None:
        lib = native.library(SOURCE)
        assert lib is not None, "the caller asks `available` first"
        root, centres = domain.whitened
        self._lib, self._arrays = lib, native.Arrays(lib)
        self._mean = np.asarray(domain.centres, dtype=np.float64).mean(0)  # float32 keeps small gaps only near zero
        self._root = Pointer(self._arrays.packed(root.T))
        self._centres = Pointer(self._arrays.plain(centres - np.einsum("c,cd->d", self._mean, root)))
        self._shape = centres.shape[1], centres.shape[0]

    def __call__(self, states: NDArray[np.float64]) -> NDArray[np.float64]:
        """States [N, C] -> distance [N] to the nearest centre."""
        near = np.ascontiguousarray(states - self._mean, dtype=np.float32)
        found = np.empty(len(near), dtype=np.float32)
        if not self._lib.gn_distance(len(near), *self._shape, pointer(near), self._root, self._centres, pointer(found)):
            raise MemoryError("no memory to measure distances")
        return found.astype(np.float64)


def available(heads: MetacogHeads) -> bool:
    """Whether `NativeHeads` can serve these heads here."""
    return heads.layer_index.device.type == "cpu" and native.library(SOURCE) is not None
