"""Tiny random models of the families that tests score: seeded, 2 to 4 layers, some 30,000 weights, built in milliseconds.

Head dims are 20 or 24, so that nothing relies on a power of two. Weights are drawn wide enough that attention is far
from uniform. With the usual 0.02 every row would be close to 1 / j, and nobody would see a wrong layer or scale.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 101
WINDOW = 5

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_FULL_THEN_SLIDING = {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
_HYBRID = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2]}

# What each family needs beyond _COMMON. The last layer is never the one to score where the family allows it.
_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "phi3": {"head_dim": 24, "num_attention_heads": 2, "sliding_window": WINDOW},
    "gemma2": {
        **_FULL_THEN_SLIDING,
        "query_pre_attn_scalar": 30,
        "attn_logit_softcapping": 2.0,
        "attn_implementation": "eager",  # what transformers takes by itself from 5.21 on
    },
    "gemma3": {"model_type": "gemma3_text", **_FULL_THEN_SLIDING, "query_pre_attn_scalar": 30},
    "gemma4": {
        "model_type": "gemma4_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": WINDOW,
        "global_head_dim": 40,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
    },
    "gpt_oss": {**_FULL_THEN_SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **_EXPERTS,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,  # of the rotary part; q and k have 12 + 8
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "qwen3_next": {**_HYBRID, **_LINEAR_ATTENTION, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "qwen3_5": {"model_type": "qwen3_5_text", **_HYBRID, **_LINEAR_ATTENTION},
    "glm4_moe": {**_EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1},
    "olmo3": _FULL_THEN_SLIDING,
    "mistral": {"sliding_window": WINDOW},
    "qwen2_moe": {
        **_FULL_THEN_SLIDING,
        **_EXPERTS,
        "use_sliding_window": True,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
    },
    "phimoe": {**_EXPERTS, "num_local_experts": 4, "sliding_window": WINDOW},
    "cohere2": {**_FULL_THEN_SLIDING, "logit_scale": 0.0625},
}

_RIGHT_FROM = {"gemma2": Version("5.21")}  # before, its SDPA attention drops the softcap
_TRANSFORMERS = Version(transformers.__version__)

FAMILIES: tuple[str, ...] = tuple(
    family
    for family, fields in _FAMILIES.items()
    if fields.get("model_type", family) in CONFIG_MAPPING and _RIGHT_FROM.get(family, _TRANSFORMERS) <= _TRANSFORMERS
)
"""Every family that `build` knows and this transformers has (Gemma 4 is new in 5.5) and computes rightly."""


def build(family: str, **overrides: Any) -> PreTrainedModel:
    """A seeded random causal LM of `family` in float32 and eval mode; the same call gives the same weights.

    `overrides` are config fields, `attn_implementation`, or `dtype`.
    """
    fields = {"model_type": family, **_COMMON, **_FAMILIES[family], **overrides}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.random.fork_rng():
        torch.manual_seed(20260112)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms, biases, and sinks start as all ones or zeros
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()
