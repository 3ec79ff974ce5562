"""The Llama family on a CPU without a C compiler: a lean forward pass in torch over a Hugging Face model's weights.

A step of a small model is mostly reading weights; what is left of the time goes to calling operations, so that their
number is kept small: fused projections, no transformers code, one attention call without repeated keys and values.
Legend: R rows, T new tokens, N = R·T, L blocks, C channels, H heads, K heads of keys and values, G = H/K, D head size,
V vocabulary, S positions in view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnomon.base.errors import ModelError, unknown
from gnomon.model.backbone import BackboneOutput, Logits, Taps, Tokens, laid_out, picked, row_bucket, stacked, wanted
from gnomon.model.slots import Pass, SlotCache, TensorSlots, start_pass
from gnomon.model.steering import Steer

WEIGHTS: Final = ("float", "int8")
Product = Callable[[Tensor], Tensor]  # [N, inputs] -> [N, outputs]
FAMILY: Final = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class _Block:
    attention_gain: Tensor
    qkv: Product
    out: Product
    mlp_gain: Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class _Step:
    """What all blocks of one pass share. cos, sin [N, 1, D] (sin with the signs of the rotation); where [N·2·K]: the
    new keys and values as rows of a flattened layer store; mask [R, 1, T, S]: 0 or -inf."""

    run: Pass
    cos: Tensor
    sin: Tensor
    where: Tensor
    mask: Tensor


class LlamaBackbone:
    """Same results as `HFBackbone` on the same model. `module` stays the Hugging Face model, untouched.

    Products run on copies of the weights in the order of memory that suits them: build a new one after training steps.
    Raises ModelError where `unsupported` names a reason.
    """

    def __init__(self, model: Any):
        if reason := unsupported(model):
            raise ModelError(f"the lean Llama pass cannot run this model: {reason}; use HFBackbone")
        self.module = model.eval()
        config, base = model.config, model.model
        self.n_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.vocab_size, self.context = config.vocab_size, config.max_position_embeddings
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._size = base.layers[0].self_attn.head_dim
        self._eps = config.rms_norm_eps
        self._frequencies = base.rotary_emb.inv_freq.float()
        with torch.no_grad():
            self._blocks = [self._block(layer) for layer in base.layers]
            self._head = self._product([model.lm_head])

    @property
    def device(self) -> torch.device:
        return self._frequencies.device

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        return TensorSlots(self.n_layers, row_bucket(slots), self._shared, capacity, self._size, self._frequencies)

    @torch.inference_mode()
    def extend(
        self,
        cache: Any,
        tokens: Tokens,
        first: int = 0,
        *,
        logits: Logits = "last",
        taps: Taps = False,
        steer: Steer | None = None,
    ) -> BackboneOutput:
        rows, asked = len(tokens), wanted(taps, len(tokens))
        run = start_pass(cache, tokens, first, self.context)
        shape = (*run.ids.shape, self.hidden_size)
        step, guided = self._step(run), laid_out(steer, run)
        x = F.embedding(run.ids.flatten(), self.module.model.embed_tokens.weight)
        states = []
        for index, block in enumerate(self._blocks):
            x += block.out(self._attend(block.qkv(self._norm(x, block.attention_gain)), cache.store[index], step))
            gate, up = block.gate_up(self._norm(x, block.mlp_gain)).chunk(2, -1)
            x += block.down(F.silu(gate).mul_(up))
            if guided is not None:
                x = guided(index, x.view(shape)).view(x.shape)
            if asked and index + 1 < self.n_layers:
                states.append(picked(x.view(shape), run, rows, "last").clone())
        run.advance(shape[1])
        hidden = self._norm(x, self.module.model.norm.weight).view(shape)
        if asked:
            states.append(picked(hidden, run, rows, "last"))
        return BackboneOutput(self._scores(hidden, run, rows, logits), stacked(states, asked))

    def _scores(self, hidden: Tensor, run: Pass, rows: int, logits: Logits) -> Tensor | None:
        if logits == "none":
            return None
        if logits == "all":
            return self._head(picked(hidden, run, rows, logits))
        # With the padding rows: a product of another shape rounds differently.
        return self._head(picked(hidden, run, len(hidden), logits))[:rows]

    def _step(self, run: Pass) -> _Step:
        rows, width = run.ids.shape
        angle = run.places.view(-1, 1) * self._frequencies
        cos, sin = angle.cos(), angle.sin()
        _, slots, heads, positions, _ = run.cache.store[0].shape
        part = torch.arange(2)[:, None] * slots
        slot = torch.arange(run.first, run.first + rows)[:, None, None, None]
        where = ((part + slot) * heads + torch.arange(heads)) * positions + run.positions[..., None, None]
        mask = torch.zeros((rows, 1, width, run.view)).masked_fill_(~run.mask, -torch.inf)
        return _Step(
            run=run,
            cos=torch.cat((cos, cos), -1)[:, None],
            sin=torch.cat((-sin, sin), -1)[:, None],
            where=where.flatten(),
            mask=mask,
        )

    def _attend(self, qkv: Tensor, store: Tensor, step: _Step) -> Tensor:
        """qkv [N, (H + 2K)·D], written over; store [2, slots, K, S + 1, D] -> [N, H·D]."""
        run, size, shared = step.run, self._size, self._shared
        rows, width = run.ids.shape
        heads = qkv.view(rows * width, -1, size)
        turned = heads[:, : self._heads + shared]
        # The rotation pairs channel i with i + D/2, which a roll by D/2 brings together.
        other = turned.roll(size // 2, -1)
        turned.mul_(step.cos).addcmul_(other, step.sin)
        store.view(-1, size).index_copy_(0, step.where, heads[:, self._heads :].reshape(-1, size))
        keys, values = store[:, run.first : run.first + rows, :, : run.view]
        q = heads[:, : self._heads].view(rows, width, shared, -1, size)
        if width == 1:  # heads that share keys stand where queries of one head would
            out = F.scaled_dot_product_attention(q[:, 0], keys, values, attn_mask=step.mask)
            return out.reshape(rows, -1)
        group = [
            F.scaled_dot_product_attention(q[:, :, :, g].transpose(1, 2), keys, values, attn_mask=step.mask)
            for g in range(q.shape[3])
        ]
        return torch.stack(group, 2).permute(0, 3, 1, 2, 4).reshape(rows * width, -1)

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return F.rms_norm(x, (self.hidden_size,), gain, self._eps)

    def _block(self, layer: Any) -> _Block:
        attention, mlp = layer.self_attn, layer.mlp
        return _Block(
            attention_gain=layer.input_layernorm.weight,
            qkv=self._product([attention.q_proj, attention.k_proj, attention.v_proj]),
            out=self._product([attention.o_proj]),
            mlp_gain=layer.post_attention_layernorm.weight,
            gate_up=self._product([mlp.gate_proj, mlp.up_proj]),
            down=self._product([mlp.down_proj]),
        )

    def _product(self, parts: Sequence[nn.Linear]) -> Product:
        """The outputs of all `parts`, one behind the other, as one product."""
        weight = torch.cat([p.weight for p in parts])
        bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
        return _float_product(weight, bias)


def check_weights(weights: str) -> None:
    """Raises for a name that is not in WEIGHTS."""
    if weights not in WEIGHTS:
        raise unknown("kind of weights", weights, WEIGHTS)


def _float_product(weight: Tensor, bias: Tensor | None) -> Product:
    """weight [outputs, inputs]. In oneDNN's own order of memory, a product of one row takes half the time that BLAS
    takes and one of 16 rows a third (EPYC, 576 x 3072); the price is this copy beside the module's weights."""
    if not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def unsupported(model: Any) -> str | None:
    """Why `LlamaBackbone` cannot run a model, None where it can."""
    name, config = type(model).__name__, model.config
    if name not in FAMILY:
        return f"it is a {name}, not one of {', '.join(FAMILY)}"
    weights = list(model.parameters())
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in weights):
        return "its weights are not float32 on a CPU"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act!r}, not 'silu'"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its positions are turned in another way: {rope}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "it has layers that do not look at every position"
    if name == "MistralForCausalLM" and config.sliding_window is not None:
        return "it has layers that do not look at every position"
    block = model.model.layers[0]
    if any(type(m) is not nn.Linear for m in _linears(block)):
        return "its linear layers are not plain ones (quantised or adapted)"
    return None


def _linears(block: Any) -> list[Any]:
    a, m = block.self_attn, block.mlp
    return [a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj]
