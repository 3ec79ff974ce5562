"""The parts of a causal LM by structure: its transformer blocks, their linear layers, its norms.

Works on any Hugging Face causal LM and on our own decoder, on what the modules hold and not on what they are called.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gnomon.base.errors import ModelError
from gnomon.model.decoder import Decoder


def block_list(module: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal LM, first to last.

    Of a Hugging Face model: the one outermost list of `num_hidden_layers` modules that each hold an attention and an
    MLP. Raises ModelError that names the model type when there is none or more than one.
    """
    if isinstance(module, Decoder):
        return module.blocks
    return next(iter(_found(module).values()))


def block_path(module: nn.Module) -> str:
    """The name of the block list inside its module, e.g. `model.layers`. Raises as `block_list`."""
    if isinstance(module, Decoder):
        return "blocks"
    return next(iter(_found(module)))


def check_layer(index: int, n: int) -> int:
    """`index` if it names one of n blocks. Raises ModelError otherwise; negative numbers name no block."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < n:
        raise ModelError(f"there is no layer {index!r}: this model has {n} blocks; write 0 (first) to {n - 1} (last)")
    return index


def block_linears(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the blocks, by its name in `module`; GPT-2's `Conv1D` is one (a transposed weight)."""
    path = block_path(module)
    return {
        f"{path}.{name}": part
        for name, part in block_list(module).named_modules()
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
    }


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """Every norm with weights (LayerNorm, any RMSNorm) by its name in `module`; ours has none."""
    return {
        name: part
        for name, part in module.named_modules()
        if "norm" in type(part).__name__.lower() and any(True for _ in part.parameters(recurse=False))
    }


def final_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The norm behind the last block: norms outside the blocks that do not belong to the embeddings (Bloom's do)."""
    inside = block_path(module) + "."
    return {n: part for n, part in norms(module).items() if not n.startswith(inside) and "emb" not in n.lower()}


def model_type(module: nn.Module) -> str:
    """How an error names a model: the type in its configuration, else its class."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return str(kind or type(module).__name__)


def _found(module: nn.Module) -> dict[str, nn.ModuleList]:
    """The one list of blocks under its name."""
    config: Any = getattr(module, "config", None)
    text = getattr(config, "get_text_config", None)
    if text is None:
        raise ModelError(
            f"a {model_type(module)!r} is no causal LM with blocks; give a Hugging Face causal LM or gnomon's Decoder"
        )
    n = getattr(text(), "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, part in module.named_modules():
        if any(name.startswith(outer + ".") for outer in found):
            continue
        if isinstance(part, nn.ModuleList) and len(part) == n and all(map(_is_block, part)):
            found[name] = part
    if len(found) != 1:
        what = f"{len(found)} lists of {n} ({', '.join(found)})" if found else f"no list of {n}"
        raise ModelError(
            f"a {model_type(module)!r} model has {what} transformer blocks, so that its layers cannot be told; use a "
            "causal LM with one stack (Llama, Qwen, Gemma, GPT-2, GPT-NeoX and their like)"
        )
    return found


def _is_block(part: nn.Module) -> bool:
    """Two children or more that hold matrices: an attention and an MLP."""
    return sum(any(p.ndim > 1 for p in child.parameters()) for child in part.children()) >= 2
