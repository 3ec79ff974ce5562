"""A module that several processes train: DDP (every process holds all of it) or FSDP2 (every process holds a part).

Losses are sums over the team divided by what the whole step counts, so gradients must add up; DDP and FSDP2 average,
which `Parallel.factor` undoes. Whole tensors are gathered for saving, so a checkpoint does not know how many wrote it.
(torch's DCP has files of its own, whose index is a pickle, and nothing here unpickles: reliability.md B1.)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gnomon.base.errors import unknown
from gnomon.training.team import ALONE, Team

Mode = Literal["ddp", "fsdp"]


class Parallel:
    """`module`, to be called through `network`. Sharding happens in place: build optimisers afterwards.

    blocks: the parts that FSDP2 gathers one after the other; what is outside of them is gathered for the whole pass.
    """

    def __init__(self, module: nn.Module, blocks: Iterable[nn.Module] = (), team: Team = ALONE, mode: Mode = "ddp"):
        if mode not in get_args(Mode):
            raise unknown("way to train in parallel", mode, get_args(Mode))
        self.team, self.mode, self.network = team, mode, module
        if team.size == 1:
            return
        if mode == "ddp":
            ids = [team.device] if team.device.type == "cuda" else None
            self.network = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
            return
        # Blocks return views of what they computed; nothing here writes into them in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(team.device.type, (team.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)

    @property
    def sharded(self) -> bool:
        """Whether no process holds the whole module."""
        return isinstance(self.network, FSDPModule)

    @property
    def factor(self) -> float:
        """On every loss, so that gradients are sums over the team."""
        return float(self.team.size)

    def micro(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward pass of a micro-batch: gradients travel with the last one only."""
        if isinstance(self.network, DistributedDataParallel) and not last:
            return self.network.no_sync()
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process (a collective call for a sharded one)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor`, which every process holds whole and alike, on the device of `like` and sharded as it is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # nothing is sent


def on_whole(function: Callable[[Sequence[Tensor]], list[Tensor]]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """`function` of whole tensors as one of sharded tensors: gathers, calls it on every process, shards again."""

    def called(tensors: Sequence[Tensor]) -> list[Tensor]:
        found = function([whole(t) for t in tensors])
        return [part_like(f.to(t.dtype), t) for f, t in zip(found, tensors, strict=True)]

    return called


@torch.no_grad()
def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a module, whole tensors; collective when it is sharded."""
    return {name: whole(value) for name, value in module.state_dict().items()}
