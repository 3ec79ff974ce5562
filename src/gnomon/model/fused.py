"""Training on a CPU in few, large calls: what `attention.py`, `decoder.py`, `hyper.py` define, with gradients by hand.

Attention inside records, residual add with RMSNorm, and a hyper-connection are one call of `train.c` each. Products go
to oneDNN: in float32 torch sends them to MKL, which runs at less than half of the speed on AMD processors (log.md).
Used where gradients are wanted, on a CPU with a C compiler; elsewhere the plain modules serve (a GPU compiles them).

Legend: N tokens, S records, H heads, D head size, C channels, n streams, P and Q coefficients before and after their
projection.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnomon.base import native
from gnomon.base.native import Pointer

SOURCE: Final = Path(__file__).with_name("train.c")
_READ: Final = ("y", "y_inverse", "inverse", "raw", "weights", "next")
_POINTERS: Final = ("x", "z", "coef", "to", "phi", "scale", "bias", "order", *_READ, "phi_back", "gto", "gy", "gnext",
                    "graw", "part", "gx", "gz", "gcoef")  # fmt: skip


class _Hyper(ctypes.Structure):
    _fields_ = [("tokens", ctypes.c_int64), *((n, ctypes.c_int32) for n in ("streams", "channels", "threads")),
                *((n, Pointer) for n in _POINTERS), ("failed", ctypes.c_int)]  # fmt: skip


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled `train.c`, on the threads of torch's own OpenMP where that is found; None without a compiler."""
    lib = native.library(SOURCE)
    if lib is None:
        return None
    lib.gn_attend.argtypes = [*[Pointer] * 10, *[ctypes.c_int] * 5]
    lib.gn_norm.argtypes = [*[Pointer] * 8, ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    lib.gn_hyper.argtypes = [Pointer, ctypes.c_int]
    lib.gn_hyper_chunks.argtypes = [ctypes.c_int64]
    lib.gn_pack.argtypes = [Pointer, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int, Pointer]
    openmp = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if openmp.is_file():
        lib.gn_use_openmp(ctypes.cast(ctypes.CDLL(str(openmp)).GOMP_parallel, Pointer))
    return lib


def usable(x: Tensor) -> bool:
    """Whether gradients are wanted of a pass that this file can make: float32 streams on a CPU."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor  # no fake one, whose memory is not there
        and x.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _packed(w: Tensor) -> Tensor:
    """w [out, in] of any strides -> panels of matrix.h."""
    outputs, inputs = w.shape
    to = torch.empty(library().gn_packed_size(outputs, inputs))
    library().gn_pack(w.data_ptr(), *w.stride(), outputs, inputs, to.data_ptr())
    return to


# --- products --------------------------------------------------------------------------------------------------------


def product(x: Tensor, w: Tensor, then: str = "none") -> Tensor:
    """x [N, in] times w [out, in] transposed, -> [N, out]; then "relu": of it. Any strides; not differentiable."""
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available() and x.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.mkldnn._linear_pointwise(x, w, None, then, [], "")  # type: ignore[no-any-return]
    made = F.linear(x, w)
    return F.relu(made) if then == "relu" else made


def product_of_tokens(a: Tensor, b: Tensor) -> Tensor:
    """Sum over tokens: a [N, out], b [N, in] -> [out, in]. oneDNN is faster with the smaller side first."""
    return product(a.t(), b.t()) if a.shape[1] <= b.shape[1] else product(b.t(), a.t()).t()


def _compute_dtype() -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        g = g.contiguous()
        gx = product(g, w.t()) if ctx.needs_input_grad[0] else None
        return gx, product_of_tokens(g, x) if ctx.needs_input_grad[1] else None


class Linear(nn.Linear):
    """A linear layer without bias; the same parameters and numbers as torch's."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not usable(x) or _compute_dtype() != torch.float32 or self.weight.dtype != torch.float32:
            return F.linear(x, self.weight)
        return _Linear.apply(x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class _SquaredReLU(torch.autograd.Function):
    """out(relu(up(x)) ** 2) as a whole; up [F, C], out [C, F]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
        x, up, out = x.to(dtype), up.to(dtype), out.to(dtype)
        held = product(x, up, "relu")
        ctx.save_for_backward(x, up, out, held)
        return product(held * held, out).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, up, out, held = ctx.saved_tensors
        g = g.to(x.dtype).contiguous()
        gx = gup = gout = None
        if ctx.needs_input_grad[2]:
            gout = product_of_tokens(g, held * held).float()
        half = product(g, out.t()).mul_(held)  # half of the gradient: doubling a weight is cheaper
        if ctx.needs_input_grad[0]:
            gx = product(half, (2 * up).t()).float()
        if ctx.needs_input_grad[1]:
            gup = 2 * product_of_tokens(half, x).float()
        return gx, gup, gout, None


def squared_relu_mlp(x: Tensor, up: Tensor, out: Tensor) -> Tensor:
    """relu(x up') ** 2 out' with x [..., C], up [F, C], out [C, F] -> float32 [..., C]; autocast is followed."""
    flat = x.reshape(-1, x.shape[-1])
    return _SquaredReLU.apply(flat, up, out, _compute_dtype()).view(x.shape)  # type: ignore[no-any-return]


# --- attention -------------------------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """Records of flattened rows. starts int32 [S + 1]: their first tokens, and N; at int64 [N]: row of the table."""

    starts: Tensor
    at: Tensor


def segments(rows: int, length: int, positions: Tensor | None, table: Tensor) -> Segments:
    """Records of `rows` rows of `length` tokens: one begins where positions (int64 [rows, length]) are 0; None: rows.

    table [rows or 1, length, 2, D/2]: the rotary table of the rows.
    """
    tokens = rows * length
    if table.shape[0] * table.shape[1] not in (tokens, length):
        raise ValueError(f"rows of {length} tokens, but the model's context is {table.shape[1]}; shorten the rows.")
    at = torch.arange(tokens) if table.shape[0] == rows else torch.arange(length).repeat(rows)
    if positions is None:
        return Segments(torch.arange(0, tokens + 1, length, dtype=torch.int32), at)
    begins = positions == 0
    begins[:, 0] = True
    found = begins.flatten().nonzero().flatten()
    return Segments(torch.cat([found, found.new_tensor([tokens])]).int(), at)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, gain: Tensor, rope: Tensor, starts: Tensor, at: Tensor) -> Tensor:
        tokens, _, heads, size = qkv.shape
        out, lse = qkv.new_empty(tokens, heads * size), qkv.new_empty(heads, tokens)
        gain = gain.contiguous()
        _attend(qkv, gain, rope, starts, at, out, lse)
        ctx.save_for_backward(qkv, gain, rope, starts, at, out, lse)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, gain, *rest = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        gains = gain.new_empty(len(rest[1]) - 1, len(gain))
        _attend(qkv, gain, *rest, g.contiguous(), grad, gains)
        return grad, gains.sum(0), None, None, None


def _attend(qkv: Tensor, gain: Tensor, rope: Tensor, starts: Tensor, at: Tensor, *rest: Tensor) -> None:
    tokens, _, heads, size = qkv.shape
    arrays = [_address(t) for t in (qkv, rope, gain, starts, at, *rest)]
    arrays += [None] * (10 - len(arrays))
    if not library().gn_attend(*arrays, len(starts) - 1, tokens, heads, size, torch.get_num_threads()):
        raise MemoryError("no memory for attention; lower the rows of a step")


def attend(qkv: Tensor, gain: Tensor, rope: Tensor, starts: Tensor, at: Tensor) -> Tensor:
    """Causal attention inside segments, with QK-norm, rotation and gain.

    qkv [N, 3, H, D]; gain [H]; rope float32 [any, 2, D/2] (cosine, sine); starts int32 [S + 1]: the first token of each
    segment, and N; at int64 [N]: each token's row of `rope` -> float32 [N, H * D].
    """
    return _Attend.apply(qkv.float().contiguous(), gain.float(), rope.contiguous(), starts, at)  # type: ignore[no-any-return]


# --- residual and norm -----------------------------------------------------------------------------------------------


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x.contiguous() if z is not None else x
        z = z.contiguous() if z is not None else None
        total = x if z is None else torch.empty_like(x)
        y, inverse = torch.empty_like(x), x.new_empty(x.shape[0])
        _norm(x, z, total, y, inverse, None, None, None)
        ctx.added = z is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, inverse)
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gsum: Tensor | None, gy: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, inverse = ctx.saved_tensors
        if gy is None:
            return gsum, gsum if ctx.added else None
        gx = torch.empty_like(y)
        gsum = None if gsum is None else gsum.contiguous()
        _norm(None, None, None, y, inverse, gsum, gy.contiguous(), gx)
        return gx, gx if ctx.added else None


def _norm(*arrays: Tensor | None) -> None:
    y = arrays[3]
    assert y is not None
    library().gn_norm(*map(_address, arrays), y.shape[0], y.shape[1], torch.get_num_threads())


def add_norm(x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
    """x + z, and its RMSNorm; both float32 [N, C]; z None: x itself (contiguous), and its norm."""
    return _AddNorm.apply(x.contiguous(), z if z is None else z.float())  # type: ignore[no-any-return]


# --- hyper-connections -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _order(n: int) -> Tensor:
    """Column of every row in every permutation matrix, int32 [n!, n], in the order of `permutation_matrices`."""
    return torch.tensor(list(itertools.permutations(range(n))), dtype=torch.int32)


class _HyperStep(torch.autograd.Function):
    """Write (with `z`), then read (with `phi`); see hyper_read, hyper_write and hyper_pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, z: Tensor | None, coef: Tensor | None, phi: Tensor | None, scale: Tensor | None,
        bias: Tensor | None,
    ) -> Any:  # fmt: skip
        tokens, n, channels = x.shape
        to = x if z is None else torch.empty_like(x)
        call = _Hyper(
            tokens, n, channels, torch.get_num_threads(), _address(x), _address(z), _address(coef), _address(to)
        )
        read: list[Tensor] = []
        if phi is not None:
            square = math.factorial(n)
            sizes = ((channels,), (), (), (2 * n + square,), (square,), (2 * n + n * n,))
            read = [x.new_empty(tokens, *size) for size in sizes]
            packed = _packed(phi.t())
            _fill(call, phi=packed, scale=scale, bias=bias, order=_order(n))
            _fill(call, **dict(zip(_READ, read, strict=True)))
        _run(call, backward=False)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, z, coef, to, phi, scale, *read)
        return (to, read[0], read[5]) if read else to

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gto: Tensor | None, gy: Tensor | None = None, gnext: Tensor | None = None) -> Any:  # type: ignore[override]
        x, z, coef, to, phi, scale, *read = ctx.saved_tensors
        tokens, n, channels = x.shape
        gto = None if gto is None else gto.contiguous()
        call = _Hyper(
            tokens, n, channels, torch.get_num_threads(), _address(x), _address(z), _address(coef), _address(to)
        )
        gx, gphi, gscale, gbias = torch.empty_like(x), None, None, None
        gz = None if z is None else torch.empty_like(z)
        gcoef = None if coef is None else torch.empty_like(coef)
        _fill(call, gto=gto, gx=gx, gz=gz, gcoef=gcoef)
        if phi is not None:
            entries = phi.shape[1]
            gy = torch.zeros_like(read[0]) if gy is None else gy.contiguous()
            gnext = torch.zeros_like(read[5]) if gnext is None else gnext.contiguous()
            back = _packed(phi)
            graw = x.new_empty(tokens, entries)
            part = x.new_empty(library().gn_hyper_chunks(tokens), 2, entries)
            _fill(call, **dict(zip(_READ, read, strict=True)))
            _fill(call, phi=back, phi_back=back, scale=scale, order=_order(n))  # phi: that there is a read
            _fill(call, gy=gy, gnext=gnext, graw=graw, part=part)
        _run(call, backward=True)
        if phi is not None:
            gphi = product_of_tokens(to.view(tokens, -1), graw)
            gbias, gscale = part.sum(0)
        return gx, gz, gcoef, gphi, gscale, gbias


def _fill(call: _Hyper, **arrays: Tensor | None) -> None:
    for name, tensor in arrays.items():
        setattr(call, name, _address(tensor))


def _run(call: _Hyper, *, backward: bool) -> None:
    if not library().gn_hyper(ctypes.byref(call), int(backward)):
        raise MemoryError("no memory for the hyper-connections; lower the rows of a step")


Reading = tuple[Tensor, Tensor, Tensor]  # phi [n * C, P], factor and bias [P] of its columns: HyperConnection.reading


def hyper_read(x: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams for a sublayer: x float32 [N, n, C] -> x, the RMSNorm of what it reads [N, C], coef [N, Q].

    coef: pre, post, comb (row by row). The x given back is the one to go on with: both gradients then meet in one call.
    """
    return _HyperStep.apply(x.contiguous(), None, None, *reading)  # type: ignore[no-any-return]


def hyper_write(x: Tensor, z: Tensor, coef: Tensor) -> Tensor:
    """Write a sublayer's output z [N, C] to the streams x [N, n, C] -> [N, n, C]."""
    return _HyperStep.apply(x, z.float().contiguous(), coef, None, None, None)  # type: ignore[no-any-return]


def hyper_pass(x: Tensor, z: Tensor, coef: Tensor, reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
    """`hyper_write` and the `hyper_read` of the next sublayer while the streams are in the cache."""
    return _HyperStep.apply(x, z.float().contiguous(), coef, *reading)  # type: ignore[no-any-return]
