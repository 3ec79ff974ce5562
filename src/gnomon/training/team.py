"""The processes that train one model together: torchrun starts them, this says who is who and carries small facts.

What is said between processes is numbers and JSON, never pickles. Alone, every function is the identity.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from gnomon.base.errors import ModelError
from gnomon.model.device import resolve

T = TypeVar("T")
# One process may wait for another one's corpus or evaluation; a dead one is noticed by torchrun, not by this.
PATIENCE: Final = timedelta(hours=6)


@dataclass(frozen=True)
class Team:
    """rank: number of this process. size: how many there are. device: where this one computes."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leader(self) -> bool:
        """Whether this process writes files, reads commands and talks."""
        return self.rank == 0

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes, in float64; every process must name the same values."""
        if self.size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether one process at least says yes."""
        return flag if self.size == 1 else self.total({"flag": float(flag)})["flag"] > 0

    def tell(self, value: Any) -> Any:
        """The leader's value (JSON-able) on every process; what the others give is not looked at."""
        if self.size == 1:
            return value
        raw = json.dumps(value).encode() if self.leader else b""
        length = torch.tensor([len(raw)])
        dist.broadcast(length, 0)
        body = torch.zeros(int(length), dtype=torch.uint8)
        body[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        dist.broadcast(body, 0)
        return json.loads(bytes(body.tolist()))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of `items`: every size-th one."""
        return items[self.rank :: self.size]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE: Final = Team()


def own_device(name: str, local_rank: int) -> torch.device:
    """The device of process number `local_rank` of this machine. Raises ModelError for one that is not there."""
    place = resolve(name)
    if place.type != "cuda" or place.index is not None:
        return place
    if local_rank >= torch.cuda.device_count():
        raise ModelError(
            f"process {local_rank} of this machine has no CUDA device of its own ({torch.cuda.device_count()} there); "
            "lower --nproc_per_node, or write --device cpu"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Team]:
    """The team that torchrun has started this process in; alone without torchrun.

    Backends: gloo for the CPU, NCCL for CUDA tensors.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = own_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1 or dist.is_initialized():
        yield Team(rank, size, place) if size > 1 else Team(device=place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(rank, size, place)
    finally:
        dist.destroy_process_group()
