"""Which part of a base learns: nothing, its norms, LoRA, its last blocks or everything; and the way back.

`adapt` sets `requires_grad` exactly, puts LoRA in through peft and names the parameter groups: what belongs to the base
learns at a small share of the rate, LoRA (Hu et al. 2021, arXiv 2106.09685) at the full one.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gnomon.base import seeds
from gnomon.base.atomic import write_atomic
from gnomon.base.checkpoint import save_tensors
from gnomon.base.config import Config
from gnomon.base.errors import CheckpointError, ConfigError, ModelError, unknown
from gnomon.model.blocks import block_linears, block_list, block_path, final_norms, model_type, norms
from gnomon.model.decoder import Decoder

MODES: Final = ("frozen", "ln", "lora", "last_k", "all")
ADAPTER: Final = "default"  # peft's name for an adapter that has no other
_NAMED: Final = f".{ADAPTER}"  # stands in peft's modules, not in its files


class LoraOptions(Config):
    """W + (alpha / rank)·B·A on the targets, B zero at first. dropout acts on what A reads, while training.

    targets: last names of linear layers of the blocks (`q_proj`) or longer endings (`mlp.out`); empty = all of them.
    seed: names the stream that A is drawn from.
    """

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ()
    seed: int = 0


class AdaptConfig(Config):
    """What of the base learns.

    frozen: nothing. ln: every weight and bias of a norm; of our decoder, whose norms have none, every parameter with
    fewer than two axes (the heads' gains behind QK-norm, the scales and biases of the hyper-connections). lora:
    low-rank additions to the blocks' linear layers. last_k: the last K blocks and the norm behind them (ours has no
    weights). all: everything, tied embeddings once.
    base_lr_scale: factor on the learning rate for parameters of the base. checkpointing: blocks are computed again in
    the backward pass instead of kept; acts in train mode.
    """

    mode: Literal["frozen", "ln", "lora", "last_k", "all"] = "frozen"
    last_k: int = Field(default=1, ge=1)
    base_lr_scale: float = Field(default=0.05, gt=0)
    lora: LoraOptions = LoraOptions()
    checkpointing: bool = False

    @field_validator("mode", mode="before")
    @classmethod
    def _known(cls, mode: Any) -> Any:
        if mode not in MODES:
            raise unknown("adaptation mode", str(mode), MODES)
        return mode


def unfrozen(module: nn.Module, config: AdaptConfig) -> dict[str, nn.Parameter]:
    """The parameters of the base that the mode trains, by name, each once; none for frozen and lora.

    Raises ConfigError for more blocks than there are, ModelError where the mode finds nothing to train.
    """
    named = dict(module.named_parameters())
    if config.mode == "all":
        return named
    if config.mode == "ln":
        found = _scales(module, named)
        if not found:
            raise ModelError(
                f"the norms of this {model_type(module)!r} model have no weights, so that mode 'ln' would train "
                "nothing; use 'lora' or 'last_k'"
            )
        return found
    if config.mode == "last_k":
        n = len(block_list(module))
        if config.last_k > n:
            raise ConfigError(f"last_k = {config.last_k}, but this model has {n} blocks; write 1 to {n}")
        path = block_path(module)
        places = [f"{path}.{i}." for i in range(n - config.last_k, n)] + [f"{name}." for name in final_norms(module)]
        return {name: p for name, p in named.items() if name.startswith(tuple(places))}
    return {}


def adapt(module: nn.Module, config: AdaptConfig) -> Adapted:
    """Make `module` (a Hugging Face causal LM or our decoder) learn as `config` says, and nothing else of it.

    A compiled or lean pass over the same module may hold the weights as they lay when it was built: build it again
    after training, for LoRA inside `Adapted.merged()`. Raises as `unfrozen`, and ModelError without peft, for unknown
    targets, or for a module that is adapted already.
    """
    if lora_layers(module):
        raise ModelError("this model carries LoRA layers already; call restore() of what adapted it first")
    chosen = unfrozen(module, config)
    if config.mode == "lora":
        _targets(module, config.lora.targets)
        if importlib.util.find_spec("peft") is None:
            raise ModelError("mode 'lora' needs peft, which is not installed: pip install 'gnomon[lora]'")
    return Adapted(module, config, chosen)


class Adapted:
    """A module that learns in part. Make it with `adapt`; `restore` ends it.

    base: the unfrozen parameters of the base by name; lora: the factors, named as in peft's files
    (`model.layers.0.self_attn.q_proj.lora_A.weight`).
    """

    def __init__(self, module: nn.Module, config: AdaptConfig, chosen: dict[str, nn.Parameter]):
        self.module, self.config = module, config
        self._before = [(p, p.requires_grad) for p in module.parameters()]
        self.base = chosen
        self.lora: dict[str, nn.Parameter] = {}
        self._undo = _checkpointed(module) if config.checkpointing else []
        if config.mode == "lora":
            _inject(module, config.lora)
            self.lora = {
                f"{name}.{part.replace(_NAMED, '')}": p
                for name, layer in lora_layers(module).items()
                for part, p in layer.named_parameters()
                if part.startswith(("lora_A", "lora_B"))
            }
            for p in self.lora.values():
                p.data = p.data.float()  # small steps would be lost in a half precision of the base
            self.learning(module.training)  # peft's layers come in train mode, whatever the module is in
        learning = {id(p) for p in (*self.base.values(), *self.lora.values())}
        for p in module.parameters():
            p.requires_grad_(id(p) in learning)

    def learning(self, on: bool) -> None:
        """Train mode, for steps, of what acts in it: checkpointing and LoRA's dropout.

        The base's own dropout stays as it is: a pass of training is the pass of serving.
        """
        decoders = [part for part in self.module.modules() if isinstance(part, Decoder)]
        for part in (decoders or block_list(self.module)) if self.config.checkpointing else ():
            part.training = on  # not its children
        for layer in lora_layers(self.module).values():
            layer.train(on)

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser: `base` at lr · base_lr_scale, `lora` at lr; empty ones are left out."""
        rates = {"base": lr * self.config.base_lr_scale, "lora": lr}
        parts = {"base": list(self.base.values()), "lora": list(self.lora.values())}
        return [{"params": parts[name], "lr": rate, "name": name} for name, rate in rates.items() if parts[name]]

    def trained_state(self) -> dict[str, Tensor]:
        """Copies of everything that learns, by name; nothing that is frozen."""
        return {name: p.detach().clone() for name, p in {**self.base, **self.lora}.items()}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Write what `trained_state` gave. Raises CheckpointError, with nothing written, unless names and shapes fit
        and all values are finite."""
        own = {**self.base, **self.lora}
        if faults := misfits(own, state):
            raise CheckpointError(
                f"these tensors do not fit a {model_type(self.module)!r} model adapted with mode "
                f"{self.config.mode!r}: {faults}; load them with the config and base they were trained with"
            )
        for name, p in own.items():
            p.copy_(state[name])

    @contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """For a while, the plain module with W + ΔW in place of LoRA: for compiled passes, or to save it whole.

        Afterwards the weights are the very same bits. Without LoRA this is the module as it stands.
        """
        with folded(self.module, {name: delta(layer) for name, layer in lora_layers(self.module).items()}):
            yield self.module

    def restore(self) -> None:
        """Take LoRA and checkpointing out, and set `requires_grad` as it was; weights keep what they learned."""
        for name, layer in lora_layers(self.module).items():
            _put(self.module, name, layer.base_layer)
        if self.lora:
            del block_list(self.module).peft_config  # peft leaves it there
        for undo in self._undo:
            undo()
        self._undo = []
        for p, before in self._before:
            p.requires_grad_(before)
            p.grad = None
        self.base, self.lora = {}, {}


def export_lora(adapted: Adapted, folder: Path) -> None:
    """Write the LoRA factors as peft does, `adapter_config.json` and `adapter_model.safetensors`, so that
    `peft.PeftModel.from_pretrained(base, folder)` opens them. Raises ModelError where there are none."""
    if not adapted.lora:
        raise ModelError(f"mode {adapted.config.mode!r} has no LoRA factors to export; adapt with mode 'lora'")
    folder.mkdir(parents=True, exist_ok=True)
    options = adapted.config.lora
    body = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": options.dropout,
        "target_modules": list(lora_layers(adapted.module)),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in lora_layers(adapted.module).values()),
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(folder, "adapter_model.safetensors", {f"base_model.model.{n}": p for n, p in adapted.lora.items()})
    write_atomic(folder / "adapter_config.json", json.dumps(body, indent=2) + "\n")


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """In words, why `state` cannot be written over `own`; empty where it can."""
    faults = {
        "missing": own.keys() - state.keys(),
        "unknown": state.keys() - own.keys(),
        "of another shape": {n for n in own.keys() & state.keys() if own[n].shape != state[n].shape},
        "not finite": {n for n, value in state.items() if not bool(torch.isfinite(value).all())},
    }
    found = [(what, sorted(names)) for what, names in faults.items() if names]
    return "; ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in found)


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """peft's LoRA layers in a module by name."""
    if (peft := sys.modules.get("peft.tuners.lora")) is None:  # nobody has made one
        return {}
    return {name: part for name, part in module.named_modules() if isinstance(part, peft.LoraLayer)}


@torch.no_grad()
def delta(layer: Any) -> Tensor:
    """ΔW = (alpha / rank)·B·A of a LoRA layer, in the shape of its weight (GPT-2's is transposed)."""
    product = layer.lora_B[ADAPTER].weight @ layer.lora_A[ADAPTER].weight * layer.scaling[ADAPTER]
    return product.T if layer.fan_in_fan_out else product


@contextmanager
def folded(module: nn.Module, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """For a while, the plain layers with W + deltas[name] in place of the LoRA layers of those names.

    The weights are exchanged, not written over: they come back bit-equal, and a backward pass that waits for them
    (a student's, while its teacher runs) is not disturbed.
    """
    layers = {name: part for name, part in lora_layers(module).items() if name in deltas}
    kept = {name: part.base_layer.weight.data for name, part in layers.items()}
    try:
        for name, part in layers.items():
            weight = part.base_layer.weight
            weight.data = (kept[name].to(deltas[name].dtype) + deltas[name]).to(weight.dtype)
            _put(module, name, part.base_layer)
        yield
    finally:
        for name, part in layers.items():
            part.base_layer.weight.data = kept[name]
            _put(module, name, part)


def _scales(module: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What mode "ln" trains, see `AdaptConfig`."""
    if any(isinstance(part, Decoder) for part in module.modules()):
        return {name: p for name, p in named.items() if p.ndim < 2}
    inside = {id(p) for part in norms(module).values() for p in part.parameters(recurse=False)}
    return {name: p for name, p in named.items() if id(p) in inside}


def _put(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, part)


def _targets(module: nn.Module, endings: tuple[str, ...]) -> list[str]:
    """Names, inside the block list, of the linear layers that end in one of `endings`."""
    path = block_path(module) + "."
    linears = [name.removeprefix(path) for name in block_linears(module)]
    if not endings:
        return linears
    chosen = [name for name in linears if any(f".{name}".endswith(f".{end}") for end in endings)]
    for end in endings:
        if not any(f".{name}".endswith(f".{end}") for name in linears):
            whole = {name.partition(".")[2] for name in linears}
            raise unknown("LoRA target", end, whole if "." in end else {name.rpartition(".")[2] for name in whole})
    return chosen


def _inject(module: nn.Module, config: LoraOptions) -> None:
    """LoRA on the targets, A from a stream of its own; torch's global generator stays where it was."""
    import peft

    names = _targets(module, config.targets)
    blocks = block_list(module)  # peft reads configurations in ways that fit Hugging Face's only; a list has none
    transposed = any(not isinstance(blocks.get_submodule(name), nn.Linear) for name in names)
    options = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=names,
        fan_in_fan_out=transposed,
        bias="none",
    )
    with seeds.undisturbed():
        seeds.seed_torch("lora", config.seed)
        peft.inject_adapter_in_model(options, blocks, ADAPTER)


def _checkpointed(module: nn.Module) -> list[Any]:
    """Switch gradient checkpointing on; -> what switches it off again.

    A pass that is computed twice would write its keys and values twice (Hugging Face's layers silently drop the cache
    instead), so that a pass with a cache is refused while training.
    """

    def refuse(part: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        cached = [given.get(k) is not None for k in ("past_key_values", "cache")]
        cached += [bool(given.get("use_cache")), isinstance(part, Decoder) and len(args) > 3 and args[3] is not None]
        if part.training and any(cached):
            raise ModelError(
                "gradient checkpointing cannot train through a cache; give whole sequences, or leave checkpointing off"
            )

    decoders = [part for part in module.modules() if isinstance(part, Decoder)]
    others = () if decoders else tuple(block_list(module))
    if others and not all(isinstance(block, _checkpointing_layer()) for block in others):
        raise ModelError(f"the blocks of a {model_type(module)!r} model have no checkpointing; leave it off")
    undo: list[Any] = [module.register_forward_pre_hook(refuse, with_kwargs=True).remove]
    for decoder in decoders:
        undo.append(partial(setattr, decoder, "checkpointing", decoder.checkpointing))
        decoder.checkpointing = True
    for block in others:
        undo.append(partial(setattr, block, "gradient_checkpointing", block.gradient_checkpointing))
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return undo


def _checkpointing_layer() -> Any:
    """The class of Hugging Face's blocks that can be computed again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return GradientCheckpointingLayer
