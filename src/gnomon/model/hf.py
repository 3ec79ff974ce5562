"""gnomon's decoder as a Hugging Face citizen. `import gnomon.hf` registers the Auto classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from gnomon.base.errors import ModelError
from gnomon.model.cache import DecoderCache, attention_view, positions_of
from gnomon.model.decoder import Decoder, DecoderConfig, previous_tokens
from gnomon.model.hyper import HyperConnection


class GnomonConfig(PreTrainedConfig):  # type: ignore[misc]
    """Hugging Face view of DecoderConfig; its fields carry the same names."""

    model_type = "gnomon"

    def __init__(self, **kwargs: Any):
        fields = {k: kwargs.pop(k) for k in list(kwargs) if k in DecoderConfig.model_fields}
        for key, value in DecoderConfig.model_validate({"vocab_size": 1024, **fields}).model_dump().items():
            setattr(self, key, value)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        return int(self.channels)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.layers)

    @property
    def num_attention_heads(self) -> int:
        return int(self.heads)

    @property
    def max_position_embeddings(self) -> int:
        return int(self.context)

    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig.model_validate({k: getattr(self, k) for k in DecoderConfig.model_fields})


class GnomonForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """`AutoModelForCausalLM` and `generate` on our decoder; weights live under `decoder.`."""

    config_class = GnomonConfig
    base_model_prefix = "decoder"
    _no_split_modules = ("Block",)
    _keep_in_fp32_modules_strict = ("hyper",)  # mHC parameters stay float32 when the rest is loaded in bfloat16
    _supports_sdpa = True
    _is_stateful = True  # the cache below is our own object: no assisted decoding that would crop it

    def __init__(self, config: GnomonConfig):
        super().__init__(config)
        self.decoder = Decoder(config.decoder_config())
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """Tables that are not on disk: transformers builds the model without storage and asks for them here.

        Parameters are left alone: Decoder.initialise drew them, or the file brings them.
        """
        if isinstance(module, (Decoder, HyperConnection)):
            module.make_tables()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.decoder.embed

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.decoder.unembed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, T]; attention_mask [B, S + T] with padding on either side (0 = padding).

        logits_to_keep: 0 = every position, 1 = each row's last real new token (what `generate` asks for, so that
        right-padded prompts continue from their text), k > 1 = the last k positions. Raises ModelError beyond the
        context.
        """
        cache = past_key_values if isinstance(past_key_values, DecoderCache) else None
        batch, new = input_ids.shape
        start = cache.length if cache else 0
        if start + new > self.config.context:
            raise ModelError(
                f"{start + new} positions (padding included) exceed this model's context of {self.config.context}; "
                "shorten the prompt or generate fewer tokens."
            )
        if cache is None and use_cache and not torch.is_grad_enabled():
            cache = self.decoder.new_cache(batch, self.config.context)
        mask = torch.ones(batch, start + new, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        mask = mask.to(input_ids.device)
        positions = positions_of(mask, new) if position_ids is None else position_ids
        view = attention_view(mask, new)
        last = input_ids.new_full((batch, self.config.before), -1) if cache is None else cache.last
        previous, last = previous_tokens(input_ids, mask, last)
        if cache is not None:
            cache.last = last
        out = self.decoder(
            input_ids,
            positions,
            view,
            cache,
            previous=previous,
            want_states=bool(output_hidden_states),
            logits="none",
        )
        hidden, loss = out.hidden, None
        if labels is not None:
            scores = self.decoder.unembed(hidden[:, :-1]).float()
            loss = F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        if logits_to_keep == 1:
            index = torch.arange(new, device=mask.device)
            end = (index * mask[:, -new:]).argmax(-1)
            hidden = hidden[torch.arange(batch, device=mask.device), end].unsqueeze(1)
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.decoder.unembed(hidden).float()
        states = (self.decoder.input(input_ids, positions, previous), *out.states) if output_hidden_states else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not seen go through the model."""
        seen = past_key_values.length if isinstance(past_key_values, DecoderCache) else 0
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": kwargs.get("attention_mask"),
            "past_key_values": past_key_values if seen else None,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 1),
        }

    def _reorder_cache(self, past_key_values: DecoderCache, beam_idx: Tensor) -> DecoderCache:
        """Beam search: row i goes on from row beam_idx[i]."""
        past_key_values.select(beam_idx)
        return past_key_values

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """`forward` makes the cache of our decoder itself."""
