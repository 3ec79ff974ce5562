"""Any Hugging Face causal LM behind the backbone protocol; the model's own code is not touched.

Models differ in ways that no configuration names in full, so that every model is tried once when it is wrapped: what
slots, masks and positions give must be what its plain forward pass gives.
Legend: R rows, T new tokens, L blocks, C channels, V vocabulary, S positions in view.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import Cache

from gnomon.base.errors import ModelError
from gnomon.model.backbone import BackboneOutput, Logits, Taps, Tokens, laid_out, picked, row_bucket, stacked, wanted
from gnomon.model.blocks import block_list
from gnomon.model.slots import Pass, SlotCache, TensorSlots, start_pass
from gnomon.model.steering import Steer, steered

FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"
# Greatest difference of logits in the trial, in their standard deviations; half precisions round every state.
_TOLERANCE: Final = {torch.float64: 1e-3, torch.float32: 1e-3}
_LOW_TOLERANCE: Final = 0.25
_TRIAL: Final = ((3, 4), (1, 1), (4, 2))  # three rows: tokens of the first and of the second call
# One pass at a time through one model, whoever wraps it: the hook of a pass sits on the output layer that all share.
_TURNS: Final[WeakKeyDictionary[Any, threading.RLock]] = WeakKeyDictionary()
_MAKING: Final = threading.Lock()


def _turn(module: Any) -> threading.RLock:
    with _MAKING:
        return _TURNS.setdefault(module, threading.RLock())


class _PassCache(Cache):  # type: ignore[misc]
    """One pass as the cache that a transformers model writes to; lengths, masks and positions are told explicitly."""

    def __init__(self, run: Pass):
        super().__init__(layers=[])
        self.run = run

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self.run.append(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.run.view - self.run.ids.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.run.view, 0


class HFBackbone:
    """Threads may share one: they pass through the model one after the other, each with a cache of its own.

    Raises ModelError for a model whose sequences cannot be kept as keys and values in slots.
    """

    def __init__(self, model: Any):
        self.module = model.eval()
        config = model.config.get_text_config()
        self.n_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.vocab_size, self.context = config.vocab_size, _context(config)
        self._kinds, self._window = _attention_kinds(config)
        self._additive = _mask_is_added(config)
        self._blocks = block_list(model)
        try:
            self._layers, self._heads, self._head_size = self._shapes()
            self._try()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            if isinstance(error, ModelError):
                raise
            reason = str(error).split("\n", 1)[0]
            raise _refusal(
                config, f"its forward pass fails with slots, a mask or positions given ({reason})"
            ) from error

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device  # type: ignore[no-any-return]

    def new_cache(self, slots: int, capacity: int) -> SlotCache:
        like = self.module.get_input_embeddings().weight
        return TensorSlots(self._layers, row_bucket(slots), self._heads, capacity, self._head_size, like)

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
        hooks = steered(self._blocks, laid_out(steer, run))
        with _turn(self.module), self._head_sees(run, rows, logits), hooks as touched:
            out = self.module(
                input_ids=run.ids,
                attention_mask=self._masks(run),
                position_ids=run.places,
                past_key_values=_PassCache(run),
                use_cache=True,
                output_hidden_states=bool(asked),
            )
        run.advance(run.ids.shape[1])
        found = list(out.hidden_states[1:]) if asked else []
        for index in set(touched) & set(range(len(found) - 1)):  # what the model keeps is older than the hooks
            found[index] = touched[index]
        states = [picked(s, run, rows, "last") for s in found]
        scores = None if logits == "none" else out.logits[0].float()
        return BackboneOutput(scores, stacked(states, asked))

    @contextmanager
    def _head_sees(self, run: Pass, rows: int, logits: Logits) -> Any:
        """For one pass, the output layer gets only the positions that are asked for: [1, N, C], N = 0 for "none".

        `logits_to_keep` keeps the same columns of every row; rows of different lengths end in different ones.
        """

        def pick(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden = inputs[0]
            kept = hidden[0, :0] if logits == "none" else picked(hidden, run, rows, logits)
            return kept[None], *inputs[1:]

        hook = self.module.get_output_embeddings().register_forward_pre_hook(pick)
        try:
            yield
        finally:
            hook.remove()

    def _masks(self, run: Pass) -> Any:
        """[R, 1, T, S] as the model wants it: True = may look, or numbers to add; one per kind of layer if they differ.

        Sliding layers keep all positions and look at the newest of them.
        """
        masks = {}
        for kind in self._kinds:
            mask = run.mask
            if kind == SLIDING:
                # Padding looks at position 0, see `start_pass`.
                at = torch.where(run.positions < run.cache.capacity, run.positions, 0)
                near = torch.arange(run.view, device=mask.device) > at[..., None] - self._window
                mask = mask & near[:, None]
            if self._additive:
                dtype = self.module.dtype
                mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
            masks[kind] = mask
        return masks if len(masks) > 1 else masks[self._kinds[0]]

    @torch.inference_mode()
    def _shapes(self) -> tuple[int, int, int]:
        """(layers that keep keys and values, heads, head size), read off a short pass with the model's own cache."""
        with _turn(self.module):
            out = self.module(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=self.device), use_cache=True)
        config = self.module.config
        layers = getattr(out.get("past_key_values"), "layers", None) or ()
        found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
        states = [s for s in found if isinstance(s, Tensor) and s.ndim == 4]
        if not states or len(states) < len(found):
            raise _refusal(config, "it keeps something else than keys and values of every position")
        shapes = {(s.shape[1], s.shape[3]) for s in states}
        if len(shapes) > 1:
            raise _refusal(config, f"its keys and values have different shapes (heads, size): {sorted(shapes)}")
        return len(layers), *shapes.pop()

    @torch.inference_mode()
    def _try(self) -> None:
        """Three rows in two calls, with padding and a used slot, against the plain forward pass of each row."""
        rows = [[(7 * r + 3 * k + 1) % self.vocab_size for k in range(sum(n))] for r, n in enumerate(_TRIAL)]
        cache = self.new_cache(len(rows) + 1, 16)
        self.extend(cache, [[1 % self.vocab_size] * 9] * 2, 0, logits="none")
        for slot in range(2):
            cache.cut(slot)
        self.extend(cache, [row[:n] for row, (n, _) in zip(rows, _TRIAL, strict=True)], logits="none")
        got = self.extend(cache, [row[n:] for row, (n, _) in zip(rows, _TRIAL, strict=True)]).logits
        assert got is not None
        for row, scores in zip(rows, got, strict=True):
            with _turn(self.module):
                wanted = self.module(input_ids=torch.tensor([row], device=self.device)).logits[0, -1].float()
            allowed = _TOLERANCE.get(self.module.dtype, _LOW_TOLERANCE) * float(wanted.std())
            off = float((scores - wanted).abs().max())
            if not off <= allowed + 1e-6:
                raise _refusal(
                    self.module.config,
                    f"decoding in slots gives logits that are off by {off:.2g} from its plain forward pass, more than "
                    f"{allowed:.2g}; it takes masks, positions or states in another way",
                )


def _context(config: Any) -> int:
    """Positions the model knows: those below which its turning of positions does not depend on the longest row."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise ModelError(
            f"config.json of this {config.model_type!r} model does not say how many positions it knows; add "
            '"max_position_embeddings"'
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings")
        limit = min(limit, original or getattr(config, "original_max_position_embeddings", None) or limit)
    return limit


def _attention_kinds(config: Any) -> tuple[tuple[str, ...], int]:
    """(the kinds of attention among the layers, the window of the sliding ones; 0 = there are none)."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if not types:
        for field in ("attention_chunk_size", "attention_types", "attn_config"):
            if getattr(config, field, None):
                raise _refusal(config, f"its attention is made by {field!r}, which is not read here")
        types = [FULL if window is None else SLIDING]
    kinds = tuple(sorted(set(map(str, types))))
    if other := set(kinds) - {FULL, SLIDING}:
        raise _refusal(config, f"it has layers of the kind {', '.join(sorted(other))}")
    if SLIDING not in kinds:
        return kinds, 0
    if not isinstance(window, int) or window < 1:
        raise ModelError(f'config.json has sliding layers but "sliding_window" is {window!r}; it must be at least 1')
    return kinds, window


def _mask_is_added(config: Any) -> bool:
    """Whether attention adds its mask to the scores (eager) or takes it as truth values (sdpa)."""
    kind = config._attn_implementation or "eager"
    if kind not in ("eager", "sdpa"):
        raise ModelError(f"attention {kind!r} takes no mask of its own; load the model with attn_implementation='sdpa'")
    return bool(kind == "eager")


def _refusal(config: Any, reason: str) -> ModelError:
    return ModelError(
        f"a {config.model_type!r} model cannot be decoded here: {reason}. Use a causal LM with full or sliding-window "
        "attention (Llama, Qwen2, Qwen3, Mistral, Gemma 2 and 3, GPT-2, GPT-NeoX and their like)"
    )
