"""Which split a problem belongs to: a hash of its canonical text decides, so no text is ever in two splits."""

from __future__ import annotations

from typing import Final

from gnomon.base import seeds
from gnomon.base.errors import unknown
from gnomon.tasks.problem import SPLITS

SHARES: Final[dict[str, float]] = {"train": 0.70, "val": 0.075, "calibration": 0.075, "test": 0.15}


def canonical(text: str) -> str:
    """Problem text with case folded and whitespace collapsed; equal canonical texts are one item."""
    return " ".join(text.casefold().split())


def split_of(prompt: str) -> str:
    """The split of a problem text. It depends on the text alone: not on the family, stream or seed."""
    position = seeds.fraction("split", canonical(prompt))
    edge = 0.0
    for name, share in SHARES.items():
        edge += share
        if position < edge:
            return name
    return SPLITS[-1]


def check_split(split: str) -> str:
    """`split` itself; UnknownNameError with the nearest name when it is none of the four."""
    if split not in SHARES:
        raise unknown("split", split, SHARES)
    return split
