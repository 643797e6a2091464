"""Tiny random causal language models of many families, with weights large enough for mistakes to show."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data_utils.schema import PairColumns, TokenizedPair
from dpo.pretrained import Pretrained

VOCABULARY = 67
WINDOW = 5
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATE = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "router_jitter_noise": 0.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": _ALTERNATE | {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _ALTERNATE | {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {
        "logits_scaling": 0.5,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
    },
    "gpt_neox": {"rotary_pct": 0.5},
    "cohere2": _ALTERNATE | {"logit_scale": 0.3},
    "gpt_oss": _ALTERNATE | _EXPERTS | {"num_local_experts": 4},
    "mixtral": _EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 24},
    "olmo3": _ALTERNATE,
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": True},
    "starcoder2": {"sliding_window": WINDOW},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
    | {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    },
}
"""Families whose layers are all attention: what distinguishes each, on top of the common sizes."""


STATEFUL: dict[str, dict[str, Any]] = {
    "qwen3_next": _EXPERTS
    | {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": WINDOW},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 3.0},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "lm_head_multiplier": 0.5},
}
"""Families with layers that carry state, or chunks, across a row."""


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """A configuration of about 20 thousand parameters; sliding windows are shorter than the test sequences."""
    return AutoConfig.for_model(family, **(_COMMON | (FAMILIES | STATEFUL).get(family, {}) | changes))


def in_double(model: PreTrainedModel) -> PreTrainedModel:
    """The model in fp64; experts go through the loop, since the grouped products know no fp64."""
    if any("experts" in key for key in model.config.to_dict()):
        model.set_experts_implementation("eager")
    return model.double()


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random fp32 model in evaluation mode; biases and norms are random too, and the head is scaled up."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
        model.get_output_embeddings().weight *= 3
    return model.eval()


def perturbed(model: PreTrainedModel, size: float, seed: int = 1) -> PreTrainedModel:
    """A copy with noise on every weight: the policy some steps away from its reference."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return other


def described(model: PreTrainedModel) -> Pretrained:
    """The model's configuration as the trainer sees it."""
    return Pretrained("tiny", model.config, {}, trust_remote_code=False)


def random_pairs(num_pairs: int, seed: int = 0, with_columns: bool = False) -> list[TokenizedPair]:
    """Pairs of random tokens, 1-9 in the prompt and 1-14 in each response; every third has a beta, every fourth a
    weight of its own."""
    draw = random.Random(seed)

    def tokens(most: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, most))]

    pairs = []
    for index in range(num_pairs):
        columns = PairColumns(
            beta=draw.uniform(0.05, 0.5) if with_columns and index % 3 == 0 else None,
            weight=draw.uniform(0.2, 3.0) if with_columns and index % 4 == 0 else None,
        )
        pairs.append(TokenizedPair(tokens(9), tokens(14), tokens(14), columns, f"made:{index}", index))
    return pairs
