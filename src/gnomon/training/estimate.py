"""What a training run would take: memory, disk and time, before it is started.

Memory is counted, not guessed: two steps run on fake tensors (shapes without contents) while every storage is watched
from its birth to its end. That needs neither the memory nor the time of the real step, and on the CPU it is exact for
what torch allocates; what kernels take inside themselves, and the allocator's waste, are not in it.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Optimizers = list[torch.optim.Optimizer]
MB: Final = 2**20
PACKED: Final = 64  # tokens of a record in the batch that is timed
# Measured on runs of three shapes on the CPU (tests/training/test_estimate.py): glibc keeps .9 to 1.2 times what lives
# in a real step, and a run loads 120 MB more than its start: small evaluation, checkpoint writer.
MARGIN: Final = 1.25
LATER: Final = 120 * MB
CUDA_MARGIN: Final = 1.1  # the caching allocator's rounding; not measured yet


class Watch(TorchDispatchMode):
    """Bytes of all storages that were made inside it and still live: `now`, and the most there were: `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._hold(value.untyped_storage())
        return out

    def _hold(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Traced:
    """Bytes of one process: weights and buffers, optimiser states, what the forward pass saves for the backward pass.

    peak: the most at any moment of a step. stored: of weights and states, what a checkpoint holds. outside: of the
    weights, what is in no block; block: the largest block.
    """

    parameters: int
    weights: int
    states: int
    saved: int
    peak: int
    stored: int
    outside: int
    block: int


def batch(rows: int, length: int, vocab: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """(ids, positions, targets) of `rows` packed rows of records of 64 tokens."""
    at = torch.arange(length, device=device)
    ids = (at * 7919 % vocab).repeat(rows, 1)
    return ids, (at % PACKED).repeat(rows, 1), ids.roll(-1, 1)


def step(network: nn.Module, optimizers: Optimizers, inputs: tuple[Tensor, ...], passes: int = 1) -> None:
    """One optimiser step of `passes` micro-batches, as the training loop does it, without its checks."""
    params = [p for group in (g for o in optimizers for g in o.param_groups) for p in group["params"]]
    for _ in range(passes):
        loss = network(*inputs)
        found = torch.autograd.grad(loss, params, allow_unused=True)
        del loss
        for parameter, gradient in zip(params, found, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:
                parameter.grad += gradient
        del found
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trace(
    objective: Callable[[], nn.Module],
    build: Callable[[nn.Module], Optimizers],
    rows: int,
    length: int,
    vocab: int,
    *,
    passes: int = 1,
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = lambda _: (),
    device: torch.device | str = "cpu",
) -> Traced:
    """Memory of a step with `rows` rows a pass. Takes neither memory nor random numbers; see `estimate`."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(), Watch() as watch:
        with torch.device(device):  # a fake module cannot be moved
            network = objective().train()
        weights, parts = watch.now, [_bytes(b.parameters()) for b in blocks(network)]
        optimizers = build(network)
        inputs = batch(rows, length, vocab, device)
        step(network, optimizers, inputs)  # makes the optimiser states
        del inputs
        states = watch.now - weights
        watch.peak = watch.now
        inputs = batch(rows, length, vocab, device)
        kept = {t.untyped_storage()._cdata for t in (*network.parameters(), *network.buffers(), *inputs)}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step(network, optimizers, inputs, min(passes, 2))
        count = sum(p.numel() for p in network.parameters())
        outside = _bytes(network.parameters()) - sum(parts)
        activations = sum(n for key, n in saved.items() if key not in kept) // min(passes, 2)
        stored = _bytes(network.state_dict().values()) + sum(
            _bytes(v for v in state.values() if isinstance(v, Tensor)) for o in optimizers for state in o.state.values()
        )
        return Traced(count, weights, states, activations, watch.peak, stored, outside, max(parts, default=0))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def shared(traced: Traced, world: int, parallel: Literal["ddp", "fsdp"]) -> int:
    """The most bytes of one of `world` processes. DDP: everything, and buckets for gradients that are always there.
    FSDP2: a part of weights, gradients and states; two blocks and what is outside of blocks whole while they work."""
    if world == 1:
        return traced.peak
    moving = traced.peak - traced.weights - traced.states
    if parallel == "ddp":
        return traced.peak + traced.weights
    gathered = 2 * traced.block + traced.outside
    return moving + (traced.weights + traced.states) // world + gathered + (traced.block + traced.outside)


def tried(
    objective: Callable[[], nn.Module],
    build: Callable[[nn.Module], Optimizers],
    inputs: tuple[Tensor, ...],
    passes: int = 1,
    seconds: float = 10.0,
) -> tuple[float, int]:
    """(median time of a real optimiser step in seconds, most bytes that lived in one).

    One step to warm up, then as many as fit into `seconds`, then one that is watched.
    """
    with Watch() as watch:
        network = objective().to(inputs[0].device).train()
        optimizers = build(network)
    took: list[float] = []
    end = time.monotonic() + seconds
    while len(took) < 2 or (time.monotonic() < end and len(took) < 20):
        began = time.monotonic()
        step(network, optimizers, inputs, passes)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        took.append(time.monotonic() - began)
        if took[0] > seconds:
            break
    held = watch.now + sum(
        _bytes(v for v in state.values() if isinstance(v, Tensor)) for o in optimizers for state in o.state.values()
    )
    with Watch() as watch:
        step(network, optimizers, inputs, passes)
    return statistics.median(took[1:] or took), held + watch.peak


def estimate(
    objective: Callable[[], nn.Module],
    build: Callable[[nn.Module], Optimizers],
    *,
    rows: int,
    length: int,
    vocab: int,
    steps: int,
    world: int = 1,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    micro_rows: int | None = None,
    blocks: Callable[[nn.Module], Iterable[nn.Module]] = lambda _: (),
    shaped: Callable[[], nn.Module] | None = None,
    average: bool = False,
    checkpoints: int = 3,
    folder: Path = Path("."),
    seconds: float = 10.0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Memory, disk and time of a run, and what of it does not fit here. Sizes in MB (2^20 bytes).

    objective(): a fresh module; called with (ids, positions, targets) it gives the loss. build(module): its optimisers.
    shaped(): the same where nothing depends on values, for fake tensors, if `objective` is not like that.
    blocks(module): what FSDP2 gathers one by one. rows: of a whole step, on all processes together;
    micro_rows: that pass at once through one process. average: a moving average of the weights is kept.
    checkpoints: that stay on disk. folder: where they go. seconds: for timing real steps; 0 = count only.
    Sequences of records shorter than `length` count as full. Compiled networks may need less than is said here.
    """
    micro, passes = _split(rows, world, micro_rows)
    cuda = torch.device(device).type == "cuda"
    margin, here = (CUDA_MARGIN, 0) if cuda else (MARGIN, psutil.Process().memory_info().rss)
    traced = trace(shaped or objective, build, micro, length, vocab, passes=passes, blocks=blocks, device=device)
    (free_memory, free_disk), took = _free(device, folder), None
    if seconds > 0 and traced.peak * margin < free_memory:
        took, peak = tried(objective, build, batch(micro, length, vocab, device), passes, seconds)
        traced = replace(traced, peak=peak)
    tensors = shared(traced, world, parallel) + (extra := traced.weights if average else 0)
    memory = here + LATER + int(tensors * margin)
    whole = (disk := traced.stored + extra) * (
        checkpoints + 2
    )  # one is written before the oldest goes, and room for the last one is held
    need = memory * (1 if cuda else world) - here  # processes on the CPU share its memory
    return {
        "parameters": traced.parameters,
        "processes": world,
        "tokens_per_step": rows * length,
        "tokens": steps * rows * length,
        "weights_mb": round(traced.weights / MB, 1),
        "optimizer_mb": round(traced.states / MB, 1),
        "activations_mb": round(traced.saved / MB, 1),
        "logits_mb": round(4 * micro * length * vocab / MB, 1),
        "step_peak_mb": round(tensors / MB, 1),
        "memory_mb": round(memory / MB),
        "memory_all_processes_mb": round(memory * world / MB),
        "checkpoint_mb": round(disk / MB, 1),
        "disk_mb": round(whole / MB, 1),
        "seconds_per_step": None if took is None else _digits(took),
        "minutes": None if took is None else _digits(took * steps / 60),
        "warnings": _warnings(need, free_memory, whole, free_disk, folder, seconds > 0 and took is None),
    }


def _split(rows: int, world: int, micro_rows: int | None) -> tuple[int, int]:
    """(rows of a pass through one process, passes of a step)."""
    mine = -(-rows // world)
    micro = min(micro_rows or mine, mine)
    return micro, -(-mine // micro)


def _warnings(need: int, memory: int, whole: int, disk: int, folder: Path, untimed: bool) -> list[str]:
    """What does not fit, each with what to do about it; all in bytes."""
    found = []
    if need > memory:
        found.append(
            f"memory: about {need / MB:,.0f} MB more are needed, {memory / MB:,.0f} MB are free; lower rows, set "
            "micro_rows or gradient_checkpointing"
        )
    if whole > disk:
        found.append(
            f"disk: the checkpoints, one being written and room for the last take {whole / MB:,.0f} MB, "
            f"{disk / MB:,.0f} MB are free in {str(folder)!r}; lower keep or name another --run"
        )
    if untimed:
        found.append("time: not measured, because a real step does not fit into the memory")
    return found


def _digits(value: float) -> float:
    """Three digits that count."""
    return round(value, max(0, 2 - math.floor(math.log10(max(value, 1e-9)))))


def _free(device: torch.device | str, folder: Path) -> tuple[int, int]:
    """Bytes of memory and disk that are free; a folder that is not there yet lies where its parent does."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    place = torch.device(device)
    memory = torch.cuda.mem_get_info(place)[0] if place.type == "cuda" else psutil.virtual_memory().available
    return int(memory), shutil.disk_usage(there).free
