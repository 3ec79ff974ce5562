"""Our decoder on a CPU as one C function per step (`decoder.c`), behind the backbone protocol.

Legend: R rows, L blocks, H heads, S capacity, D head size, V vocabulary.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnomon.base import native
from gnomon.base.errors import ModelError
from gnomon.base.native import Pointer, pointer
from gnomon.model.backbone import BackboneOutput, Logits, OwnBackbone, Taps, Tokens, wanted
from gnomon.model.decoder import Decoder
from gnomon.model.hyper import HyperConnection
from gnomon.model.slots import rounded
from gnomon.model.steering import Steer, Steering

SOURCE: Final = Path(__file__).with_name("decoder.c")
KEY_BLOCK: Final = 16  # KB of decoder.c
_INTS: Final = ("vocab_size", "channels", "layers", "heads", "ffn", "context", "before", "streams", "sinkhorn")


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in _INTS]


class _Hyper(ctypes.Structure):
    _fields_ = [(name, Pointer) for name in ("phi", "alpha", "bias", "table")]


class _Layer(ctypes.Structure):
    _fields_ = [*((name, Pointer) for name in ("qkv", "out", "gain", "up", "down")), ("hyper", _Hyper * 2)]


class _Cache(ctypes.Structure):
    _fields_ = [*((name, Pointer) for name in ("keys", "values", "lengths", "ids")),
                ("slots", ctypes.c_int64), ("capacity", ctypes.c_int64)]  # fmt: skip


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None where it cannot be had."""
    lib = native.library(SOURCE)
    if lib is not None:
        lib.gn_model_size.restype = ctypes.c_int64
    return lib


class NativeSlots:
    """Slots in the layout of `decoder.c`: keys [L, N, H, S/16, D, 16], values [L, N, H, S, D].

    `place` says where a slot's contents lie, so that a row moves without a copy.
    """

    def __init__(self, layers: int, slots: int, heads: int, capacity: int, size: int) -> None:
        capacity = rounded(capacity, KEY_BLOCK)
        self.keys = np.empty((layers, slots, heads, capacity // KEY_BLOCK, size, KEY_BLOCK), dtype=np.float32)
        self.values = np.empty((layers, slots, heads, capacity, size), dtype=np.float32)
        self.ids = np.zeros((slots, capacity), dtype=np.int32)
        self.held = np.zeros(slots, dtype=np.int32)  # lengths by place
        self.place = np.arange(slots, dtype=np.int32)
        self.capacity = capacity
        self.struct = _Cache(*(a.ctypes.data for a in (self.keys, self.values, self.held, self.ids)), slots, capacity)

    @property
    def lengths(self) -> NDArray[np.int32]:
        return self.held[self.place]

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        a, b = self.place[source], self.place[target]
        n = int(self.held[a]) if length is None else length
        blocks = -(-n // KEY_BLOCK)
        self.keys[:, b, :, :blocks] = self.keys[:, a, :, :blocks]
        self.values[:, b, :, :n] = self.values[:, a, :, :n]
        self.ids[b, :n] = self.ids[a, :n]
        self.held[b] = n

    def move(self, source: int, target: int) -> None:
        self.place[[source, target]] = self.place[[target, source]]
        self.held[self.place[source]] = 0

    def cut(self, slot: int, length: int = 0) -> None:
        assert 0 <= length <= self.held[self.place[slot]]
        self.held[self.place[slot]] = length

    def resized(self, slots: int, capacity: int) -> NativeSlots:
        layers, old, heads, _, size = self.values.shape
        new = NativeSlots(layers, max(slots, old), heads, max(capacity, self.capacity), size)
        n = int(self.held.max())
        blocks = -(-n // KEY_BLOCK)
        new.keys[:, :old, :, :blocks] = self.keys[:, self.place, :, :blocks]
        new.values[:, :old, :, :n] = self.values[:, self.place, :, :n]
        new.ids[:old, :n] = self.ids[self.place, :n]
        new.held[:old] = self.lengths
        return new


def run_step(
    lib: ctypes.CDLL,
    model: Any,
    net: Any,
    cache: NativeSlots,
    tokens: Tokens,
    first: int,
    logits: Logits,
    taps: Taps,
    steer: Any = None,
) -> BackboneOutput:
    """One call of a kernel's `gn_step`; `net` says context, vocabulary and the shape of taps. As Backbone.extend.

    steer: from `NativeSteering`.
    """
    rows = len(tokens)
    counts = np.fromiter(map(len, tokens), dtype=np.int32, count=rows)
    ids = np.fromiter((t for row in tokens for t in row), dtype=np.int32)
    slots = cache.place[first : first + rows]
    # Not assert statements: beyond these bounds C would read and write foreign memory, with python -O too.
    if not rows or counts.min() < 1 or len(slots) != rows:
        raise AssertionError("every row needs a slot and at least one token")
    if int((cache.held[slots] + counts).max()) > min(cache.capacity, net.context):
        raise AssertionError("no room for these tokens")
    if ids.min() < 0 or ids.max() >= net.vocab_size:
        raise AssertionError("an id is not in the vocabulary")
    scores = states = places = None
    if logits != "none":
        scores = torch.empty((rows if logits == "last" else len(ids), net.vocab_size))
    asked = wanted(taps, rows)
    if asked:
        states = torch.empty((len(asked), net.n_layers, net.hidden_size))
        place = [-1] * rows
        for i, row in enumerate(asked):
            place[row] = i
        places = native.many(ctypes.c_int32, rows)(*place)
    done = lib.gn_step(
        model, ctypes.byref(cache.struct), rows, pointer(slots), pointer(counts), pointer(ids), int(logits == "all"),
        None if scores is None else Pointer(scores.data_ptr()),
        None if states is None else Pointer(states.data_ptr()), places, steer, torch.get_num_threads(),
    )  # fmt: skip
    if not done:
        raise MemoryError(f"no memory for a step of {len(ids)} tokens")
    return BackboneOutput(scores, states)


class _Adapter(ctypes.Structure):
    _fields_ = [*((n, Pointer) for n in ("down", "up", "weight")), ("bias", ctypes.c_float)]


class _Steer(ctypes.Structure):
    _fields_ = [("gate_layer", ctypes.c_int32), ("rank", ctypes.c_int32),
                *((n, Pointer) for n in ("adapters", "vectors", "at"))]  # fmt: skip


class _Adapters:
    """One Steering's adapters as `gn_step` reads them: copies, which live as long as this object."""

    def __init__(self, lib: ctypes.CDLL, layers: int, steering: Steering) -> None:
        self._arrays = native.Arrays(lib)
        self.rank = 0
        found = [_Adapter() for _ in range(layers)]
        for index, a in steering.adapters.items():
            down, up, weight = (t.detach().float().cpu().numpy() for t in (a.down, a.up.T, a.weight))
            self.rank = len(down)
            found[index] = _Adapter(*map(self._arrays.plain, (down, up, weight)), float(a.bias))
        self.rows = (_Adapter * layers)(*found)


class NativeSteering:
    """Steering for `gn_step`: the adapters' weights are copied when a `Steering` is seen first, and kept with it.

    Several layers may act on one backbone, from several threads: what a call reads is never changed or freed under it.
    """

    def __init__(self, lib: ctypes.CDLL, layers: int) -> None:
        self._lib, self._layers = lib, layers
        self._made: WeakKeyDictionary[Steering, _Adapters] = WeakKeyDictionary()

    def __call__(self, steer: Steer | None) -> Any:
        """The argument of one call, None where no token is steered. It lives as long as what is returned."""
        if steer is None or steer.idle:
            return None
        adapters = self._made.get(steer.steering)
        if adapters is None:  # two threads may both come here: each uses its own copy, one of them is kept
            adapters = self._made[steer.steering] = _Adapters(self._lib, self._layers, steer.steering)
        vectors = steer.vectors.contiguous()
        at = native.many(ctypes.c_int32, len(steer.at))(*steer.at)
        gate = steer.steering.gate_layer
        made = _Steer(
            -1 if gate is None else gate, adapters.rank, ctypes.addressof(adapters.rows), vectors.data_ptr(),
            ctypes.addressof(at),
        )  # fmt: skip
        made.kept = adapters, vectors, at
        return ctypes.byref(made)


class Compiled:
    """What the compiled backbones share: slots of their layout, and a step that is one call of `gn_step`."""

    n_layers: int
    hidden_size: int
    vocab_size: int
    context: int

    def __init__(self, lib: ctypes.CDLL, heads: int, size: int) -> None:
        """heads: of keys and values; size: of one. The subclass builds the model's structure, `_model`."""
        self._lib, self._heads, self._size = lib, heads, size
        self._steers = NativeSteering(lib, self.n_layers)
        self._model: Any = None

    def new_cache(self, slots: int, capacity: int) -> NativeSlots:
        return NativeSlots(self.n_layers, slots, self._heads, capacity, self._size)

    def extend(
        self,
        cache: Any,
        tokens: Tokens,
        first: int = 0,
        *,
        logits: Logits = "last",
        taps: Taps = False,
        steer: Steer | None = None,
    ) -> BackboneOutput:
        return run_step(self._lib, self._model, self, cache, tokens, first, logits, taps, self._steers(steer))


class NativeBackbone(Compiled, OwnBackbone):
    """Our decoder in float32 on a CPU, through `decoder.c`. `module` stays the torch decoder with the same weights.

    Weights are copied when it is built: build a new one after training steps. A row's results do not depend on what
    else is in a step. Raises ModelError where the library or this decoder's shape is not supported (see `supported`).
    """

    def __init__(self, decoder: Decoder):
        OwnBackbone.__init__(self, decoder)
        lib, c = library(), decoder.config
        if lib is None or not supported(decoder):
            raise ModelError("the compiled kernel cannot run this decoder here; use OwnBackbone")
        Compiled.__init__(self, lib, c.heads, c.channels // c.heads)
        self._arrays = native.Arrays(lib)  # what the structure below points to
        self._model = self._build(decoder)

    def _build(self, decoder: Decoder) -> Any:
        c = decoder.config
        exact = c.projection == "exact"
        shape = _Shape(*(getattr(c, name) for name in _INTS[:-1]), 0 if exact else c.sinkhorn_iterations)
        buffer = ctypes.create_string_buffer(self._lib.gn_model_size(ctypes.byref(shape)))
        layers = []
        for block in decoder.blocks:
            hyper = [self._hyper(h) for h in block.hyper] if c.streams > 1 else [_Hyper(), _Hyper()]
            attention, mlp = block.attention, block.mlp
            packed = (attention.qkv.weight, attention.out.weight, mlp.up.weight, mlp.out.weight)
            qkv, out, up, down = map(self._pack, packed)
            layers.append(_Layer(qkv, out, self._plain(attention.gain), up, down, (_Hyper * 2)(*hyper)))
        head = (self._plain(decoder.embed.weight), self._pack(decoder.before.weight),
                self._pack(decoder.unembed.weight), self._plain(decoder.rope))  # fmt: skip

        class Model(ctypes.Structure):
            _fields_ = [("shape", _Shape), *((n, Pointer) for n in ("embed", "before", "unembed", "rope")),
                        ("layer", _Layer * len(layers))]  # fmt: skip

        model = Model(shape, *head, (_Layer * len(layers))(*layers))
        assert ctypes.sizeof(model) == len(buffer)
        ctypes.memmove(buffer, ctypes.byref(model), len(buffer))
        return buffer

    def _hyper(self, h: HyperConnection) -> _Hyper:
        table = self._plain(h.permutations) if h.projection == "exact" else None
        return _Hyper(self._pack(h.phi.T), self._plain(h.alpha), self._plain(h.bias), table)

    def _plain(self, tensor: Tensor) -> int:
        return self._arrays.plain(tensor.detach().float().numpy())

    def _pack(self, weight: Tensor) -> int:
        return self._arrays.packed(weight.detach().float().numpy())


def supported(decoder: Decoder) -> bool:
    """Whether `decoder.c` can run it: float32 on a CPU, at most 16 streams."""
    weight = decoder.unembed.weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and decoder.config.streams <= 16


def own_backbone(decoder: Decoder) -> OwnBackbone:
    """The fastest backbone that can run this decoder where it lies."""
    return NativeBackbone(decoder) if supported(decoder) and library() is not None else OwnBackbone(decoder)
