"""Tiny random targets of architectures that differ in attention, head, logits or rotary embedding."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from lightning_dataflow.targets.tiny import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def _make(name: str, **more: Any) -> Callable[[], torch.nn.Module]:
    """A causal language model by the prefix of its classes."""
    return lambda: getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES, **more))


def _bloom() -> torch.nn.Module:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=320, hidden_size=32, n_layer=5, n_head=4))


def _qwen2_5_vl() -> torch.nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 2, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**SIZES, "model_type": "qwen2_5_vl_text", "rope_parameters": rope},
        vision_config={**vision, "hidden_size": 32, "intermediate_size": 32},
        image_token_id=300,
        video_token_id=301,
        vision_start_token_id=302,
        vision_end_token_id=303,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": _make("Llama"),
    "gemma2": _make("Gemma2", head_dim=8, final_logit_softcapping=2.0),
    "granite": _make("Granite", logits_scaling=8.0, embedding_multiplier=3.0),
    "cohere": _make("Cohere", logit_scale=0.25),
    "phi": _make("Phi"),
    "gpt_oss": _make("GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "bloom": _bloom,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_next": _make(
        "Qwen3Next",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
    ),
    "llama3": _make("Llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}),
    "yarn": _make("Llama", rope_parameters={**YARN, "rope_theta": 1e4}),
    "linear": _make("Llama", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "dynamic": _make("Llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}),
}


def write_target(name: str, folder: Path) -> Path:
    """Save one of MODELS, and a tokenizer, with weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
