"""The Llama family on a CPU as one C function per step (`llama.c`), behind the backbone protocol.

Legend: L layers, K heads of keys and values, D head size, S capacity, V vocabulary.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from gnomon.base import native
from gnomon.base.errors import ModelError
from gnomon.base.native import Pointer
from gnomon.model.llama import check_weights, unsupported
from gnomon.model.native import Compiled

SOURCE: Final = Path(__file__).with_name("llama.c")
_LINEAR: Final = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_INTS: Final = ("vocab", "channels", "layers", "heads", "shared", "size", "ffn", "int8")
_LINE: Final = 64  # bytes of a cache line


class _Shape(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_int32) for name in _INTS), ("eps", ctypes.c_float)]


class _Matrix(ctypes.Structure):
    _fields_ = [("weights", Pointer), ("bias", Pointer), ("outputs", ctypes.c_int32), ("inputs", ctypes.c_int32)]


class _Layer(ctypes.Structure):
    _fields_ = [("attention_gain", Pointer), ("mlp_gain", Pointer), ("linear", _Matrix * len(_LINEAR))]


def library() -> ctypes.CDLL | None:
    """The compiled kernel, None where it cannot be had."""
    lib = native.library(SOURCE)
    if lib is not None:
        lib.gn_model_size.restype = lib.gn_int8_size.restype = ctypes.c_int64
    return lib


class NativeLlama(Compiled):
    """Same results as `HFBackbone` on the same model, which stays in `module`, untouched.

    weights: "float" reads the module's own weights, "int8" a rounded copy of them: build a new one after training
    steps. A row's results do not depend on what else is in a step. Raises ModelError where there is no compiler, or
    `unsupported` names a reason.
    """

    def __init__(self, model: Any, weights: str = "float"):
        if reason := unsupported(model):
            raise ModelError(f"the compiled Llama pass cannot run this model: {reason}; use HFBackbone")
        check_weights(weights)
        lib = library()
        if lib is None:
            raise ModelError("the compiled Llama pass needs a C compiler (gcc, cc or clang), and there is none here")
        self.module = model.eval()
        self.weights = weights
        config = model.config
        self.n_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.vocab_size, self.context = config.vocab_size, config.max_position_embeddings
        super().__init__(lib, config.num_key_value_heads, model.model.layers[0].self_attn.head_dim)
        self._kept: list[Tensor] = []  # what the structure below points to
        self._model = self._build()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _build(self) -> Any:
        model, config = self.module, self.module.config
        if self.weights == "float":
            _gather(model)
        blocks = model.model.layers
        linears = [[block.get_submodule(name) for name in _LINEAR] for block in blocks]
        packed = self._packed([*(linear for line in linears for linear in line), model.lm_head])
        size = self._lib.gn_model_size
        shape = _Shape(
            config.vocab_size, config.hidden_size, len(blocks), config.num_attention_heads, self._heads, self._size,
            linears[0][4].out_features, int(self.weights == "int8"), config.rms_norm_eps,
        )  # fmt: skip
        layers = [
            _Layer(
                self._address(block.input_layernorm.weight),
                self._address(block.post_attention_layernorm.weight),
                (_Matrix * len(_LINEAR))(*(packed[linear] for linear in line)),
            )
            for block, line in zip(blocks, linears, strict=True)
        ]

        class Model(ctypes.Structure):
            _fields_ = [("shape", _Shape), *((n, Pointer) for n in ("embed", "gain", "rope")), ("head", _Matrix),
                        ("layer", _Layer * len(layers))]  # fmt: skip

        plain = (model.model.embed_tokens.weight, model.model.norm.weight, self._positions())
        built = Model(shape, *map(self._address, plain), packed[model.lm_head], (_Layer * len(layers))(*layers))
        assert ctypes.sizeof(built) == size(ctypes.byref(shape))
        return ctypes.create_string_buffer(bytes(built))

    def _packed(self, linears: list[nn.Linear]) -> dict[nn.Linear, _Matrix]:
        """The matrices of all linear layers: where they lie, or all int8 panels in one run of memory."""
        found = {}
        panels, at = 0, 0
        if self.weights == "int8":
            sizes = [int(self._lib.gn_int8_size(n.out_features, n.in_features)) for n in linears]
            room = _run(sum(sizes))
            self._kept.append(room)
            panels = room.data_ptr()
        for linear in linears:
            outputs, inputs = linear.weight.shape
            where = self._address(linear.weight)
            if self.weights == "int8":
                self._lib.gn_int8_pack(Pointer(where), outputs, inputs, Pointer(panels + at))
                where = panels + at
                at += int(self._lib.gn_int8_size(outputs, inputs))
            bias = None if linear.bias is None else self._address(linear.bias)
            found[linear] = _Matrix(where, bias, outputs, inputs)
        return found

    def _positions(self) -> Tensor:
        """[context, 2, D/2]: cosines and sines."""
        angle = torch.arange(self.context)[:, None] * self.module.model.rotary_emb.inv_freq.float()
        return torch.stack((angle.cos(), angle.sin()), 1)

    def _address(self, tensor: Tensor) -> int:
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def _run(size: int) -> Tensor:
    """uint8 [size] from a cache line on. numpy asks for huge pages, which long runs of memory are read faster from."""
    room = torch.from_numpy(np.empty(size + _LINE, dtype=np.uint8))
    return room[-room.data_ptr() % _LINE :][:size]


@torch.no_grad()
def _gather(module: nn.Module) -> None:
    """Move parameters that do not begin on a cache line, as those mapped from a file, into one run of memory.

    They keep their names and values; reading them across lines takes twice the time or more.
    """
    loose = [p for p in module.parameters() if p.data_ptr() % _LINE or not p.is_contiguous()]
    sizes = [-(-p.nbytes // _LINE) * _LINE for p in loose]
    room = _run(sum(sizes))
    for p, part in zip(loose, room.split(sizes), strict=True):
        p.data = part[: p.nbytes].view(p.dtype).view(p.shape).copy_(p)
