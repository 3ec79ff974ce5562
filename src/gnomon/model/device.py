"""Devices by the names that people type."""

from __future__ import annotations

import torch

from gnomon.base.errors import ModelError


def resolve(name: str) -> torch.device:
    """A device that is there; "auto" is the first GPU, where there is one, else the CPU. Raises ModelError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.zeros(1, device=place).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", 1)[0]
        raise ModelError(
            f'there is no device {name!r} here ({reason}); write "cpu", "auto", or "cuda" where torch has it'
        ) from None
    return place
