"""`import gnomon.hf` registers our architecture with transformers' Auto classes: the one registration at import."""

from transformers import AutoConfig, AutoModelForCausalLM

from gnomon.model.hf import GnomonConfig, GnomonForCausalLM

AutoConfig.register("gnomon", GnomonConfig, exist_ok=True)
AutoModelForCausalLM.register(GnomonConfig, GnomonForCausalLM, exist_ok=True)

__all__ = ["GnomonConfig", "GnomonForCausalLM"]
