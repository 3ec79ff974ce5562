"""What training changed of a base, beside the untouched base: whole parameters, or low-rank additions to them."""

from __future__ import annotations

import copy
import hashlib
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

    @property
    def targets(self) -> set[str]:
        """The parameters that it changes."""
        return {
            f"{name.removesuffix(_A).removesuffix(_B)}.weight" if name.endswith((_A, _B)) else name
            for name in self.tensors
        }

    def fingerprint(self) -> str:
        """Hash of all values: a layer is bound to the base as it was changed."""
        digest = hashlib.sha256(str(torch.tensor(self.lora_scale).item()).encode())
        for name, tensor in sorted(self.tensors.items()):
            values = tensor.detach().float().cpu().contiguous().numpy()
            digest.update(f"{name}:{tuple(tensor.shape)}".encode() + values.tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the file. Raises CheckpointError for values that are not finite."""
        save_tensors(folder, FILE, {**self.tensors, _SCALE: torch.tensor(self.lora_scale)})

    @classmethod
    def load(cls, folder: Path) -> Overlay | None:
        """The overlay of a folder, None where it holds none."""
        if not (folder / FILE).is_file():
            return None
        tensors = load_tensors(folder, FILE)
        if _SCALE not in tensors or tensors[_SCALE].numel() != 1:
            raise CheckpointError(f"{folder / FILE} names no {_SCALE}; it was not written by gnomon")
        return cls({k: v for k, v in tensors.items() if k != _SCALE}, float(tensors[_SCALE]))

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Put it into a base, in place. Raises CheckpointError, with nothing changed, where it does not fit."""
        own = dict(module.named_parameters())
        changed: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            layer = name.removesuffix(_A).removesuffix(_B)
            target = layer + ".weight" if layer != name else name
            if target not in own:
                raise CheckpointError(f"the adaptation changes {target!r}, which this base does not have")
            if layer != name:
                other = layer + (_B if name.endswith(_A) else _A)
                if other not in self.tensors:
                    raise CheckpointError(f"the adaptation holds {name!r} without {other!r}")
                if name.endswith(_B):
                    continue
                value = self._delta(layer, module)
            if value.shape != own[target].shape:
                raise CheckpointError(
                    f"the adaptation of {target!r} is {list(value.shape)}, the base has {list(own[target].shape)}"
                )
            value = value.to(own[target].device)
            changed[target] = own[target].float() + value if layer != name else value
        for name, value in changed.items():
            own[name].copy_(value)

    def over(self, module: nn.Module) -> Any:
        """A copy of a base with it, which shares every weight that it does not change. Raises as `apply`."""
        targets = self.targets
        held = [p for name, p in module.named_parameters() if name not in targets]
        changed = copy.deepcopy(module, {id(x): x for x in (*held, *module.buffers())})
        self.apply(changed)
        return changed

    def _delta(self, layer: str, module: nn.Module) -> Tensor:
        """lora_scale · B · A in the shape of the layer's weight."""
        a, b = (self.tensors[layer + part].float() for part in (_A, _B))
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            raise CheckpointError(f"the adaptation of {layer!r} multiplies {list(b.shape)} by {list(a.shape)}")
        owner: Any = module.get_submodule(layer)
        delta = self.lora_scale * (b @ a)
        return delta if isinstance(owner, nn.Linear) else delta.T  # GPT-2 keeps its matrices the other way round
