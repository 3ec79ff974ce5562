"""The exponential moving average of what learns: the teacher of self-distillation, the weights to ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gnomon.base.errors import CheckpointError, ConfigError
from gnomon.training.adapt import delta, folded, lora_layers, misfits

DELTA = ".delta"  # ends the names of averaged products


class Ema:
    """average ← (1 − rate)·average + rate·value, after every optimiser step (SDFT: rate 0.01 to 0.05).

    Covers every parameter of `module` that requires a gradient when this is made, starting from its value then. Of a
    LoRA layer the product ΔW = (alpha / rank)·B·A is averaged, kept dense: a mean of products has a higher rank than
    its parts, and the product of a mean of B (zero at first) and a mean of A lags quadratically (algorithms.md §2.5).
    Averages are float32 at least: in bfloat16 a step of 1 % would be lost in rounding.
    """

    def __init__(self, module: nn.Module, rate: float = 0.01):
        if not 0 < rate <= 1:
            raise ConfigError(f"EMA rate {rate} is not in (0, 1]: it is the share of the new value, for example 0.01")
        self.module, self.rate = module, rate
        layers = lora_layers(module)
        factors = {id(p) for part in layers.values() for n, p in part.named_parameters() if n.startswith("lora_")}
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad and id(p) not in factors}
        self._layers = {n: part for n, part in layers.items() if any(p.requires_grad for p in part.parameters())}
        if not self._parameters and not self._layers:
            raise ConfigError("there is nothing to average: no parameter of this module requires a gradient")
        self._average = {n: _wide(value).clone() for n, value in self._values()}
        self._inside = False

    @torch.no_grad()
    def update(self) -> None:
        """Move every average by `rate` towards the present value."""
        if self._inside:
            raise RuntimeError("update() inside applied() would average the averages; call it after the block")
        for name, value in self._values():
            self._average[name].lerp_(_wide(value), self.rate)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, LoRA folded in; afterwards the weights are the same bits again.

        Weights are exchanged, not written over: a backward pass that waits for them is not disturbed. Inside, no
        optimiser may step. A compiled or lean pass that was built before does not see the exchange; build one inside.
        """
        if self._inside:
            raise RuntimeError("applied() stands inside itself; leave the outer block first")
        kept = {name: p.data for name, p in self._parameters.items()}
        self._inside = True
        try:
            for name, p in self._parameters.items():
                p.data = self._average[name].to(p.dtype)
            with folded(self.module, {name: self._average[name + DELTA] for name in self._layers}):
                yield
        finally:
            for name, p in self._parameters.items():
                p.data = kept[name]
            self._inside = False

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the averages: parameters by name, products as `<layer>.delta`."""
        return {name: value.clone() for name, value in self._average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take averages over. Raises CheckpointError, with nothing written, unless names and shapes fit and
        all values are finite."""
        if faults := misfits(self._average, state):
            raise CheckpointError(f"these averages do not fit: {faults}; use the model that they belong to")
        for name, value in self._average.items():
            value.copy_(state[name])

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """What is averaged, now."""
        for name, p in self._parameters.items():
            yield name, p.detach()
        for name, layer in self._layers.items():
            yield name + DELTA, delta(layer)


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
