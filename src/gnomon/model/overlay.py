"""What training changed of a base, beside the untouched base: whole parameters, or low-rank additions to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from gnomon.base.checkpoint import load_tensors, save_tensors
from gnomon.base.errors import CheckpointError

FILE: Final = "adaptation.safetensors"
_SCALE: Final = "lora_scale"
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class Overlay:
    """tensors: parameter -> its value, or `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r].

    lora_scale: alpha / rank; the layer's weight becomes W + lora_scale · B · A.
    """

    tensors: Mapping[str, Tensor]
    lora_scale: float = 1.0

    def save(self, folder: Path) -> None:
        """Write the file. Raises CheckpointError for values that are not finite."""
        save_tensors(folder, FILE, {**self.tensors, _SCALE: torch.tensor(self.lora_scale)})

    @classmethod
    def load(cls, folder: Path) -> Overlay | None:
        """The overlay of a folder, None where it holds none."""
        if not (folder / FILE).is_file():
            return None
        tensors = load_tensors(folder, FILE)
        if _SCALE not in tensors:
            raise CheckpointError(f"{folder / FILE} names no {_SCALE}; it was not written by gnomon")
        return cls({k: v for k, v in tensors.items() if k != _SCALE}, float(tensors[_SCALE]))

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Put it into a base, in place. Raises CheckpointError, with nothing changed, where it does not fit."""
        own = dict(module.named_parameters())
        changed: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            if name.endswith(_B):
                continue
            layer = name.removesuffix(_A)
            target = layer + ".weight" if layer != name else name
            if target not in own:
                raise CheckpointError(f"the adaptation changes {target!r}, which this base does not have")
            if layer != name:
                if layer + _B not in self.tensors:
                    raise CheckpointError(f"the adaptation holds {name!r} without {layer + _B!r}")
                delta = self.lora_scale * (self.tensors[layer + _B].float() @ value.float())
                owner: Any = module.get_submodule(layer)
                # GPT-2 keeps its matrices the other way round.
                value = own[target].float() + (delta if isinstance(owner, nn.Linear) else delta.T)
            if value.shape != own[target].shape:
                raise CheckpointError(
                    f"the adaptation of {target!r} is {list(value.shape)}, the base has {list(own[target].shape)}"
                )
            changed[target] = value
        for name, value in changed.items():
            own[name].copy_(value)
