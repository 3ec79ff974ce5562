"""Random streams from hashed names. Names, not sums, make seeds: neighbouring streams share nothing."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    import torch


def derive(*names: object) -> int:
    """A 63-bit seed from any sequence of names (strings, numbers); order matters."""
    text = "\x1f".join(f"{type(n).__name__}:{n}" for n in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rng(*names: object) -> random.Random:
    """A private Python generator for the named stream."""
    return random.Random(derive(*names))


def fraction(*names: object) -> float:
    """A number in [0, 1) that depends on the names alone; used to assign splits."""
    return derive(*names) / 2**63


def torch_generator(*names: object, device: str = "cpu") -> torch.Generator:
    """A private torch generator for the named stream."""
    import torch

    return torch.Generator(device=device).manual_seed(derive(*names))


def seed_torch(*names: object) -> None:
    """Seed torch's global generator (parameter initialisation only)."""
    import torch

    torch.manual_seed(derive(*names))


def numpy_generator(*names: object) -> numpy.random.Generator:
    """A private numpy generator for the named stream."""
    import numpy

    return numpy.random.default_rng(derive(*names))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leave torch's global CPU generator as it was (building a module draws initial weights)."""
    import torch

    with torch.random.fork_rng(devices=[]):
        yield
