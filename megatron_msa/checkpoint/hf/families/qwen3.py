"""Qwen3, dense: as Llama, with an RMSNorm on every head of q and k."""

from megatron_msa.checkpoint.hf.families.base import Family, Same
from megatron_msa.checkpoint.hf.families.common import (
    DENSE,
    DENSE_MLP,
    FULL_ATTENTION_ONLY,
    HEAD_DIM,
    LLAMA_LIKE,
    NO_SLIDING_WINDOW,
    ROPE,
    SIZES,
    TIED,
    WHOLE_HEAD_ROPE,
    backbone,
    separate_mlp,
)

QWEN3 = Family(
    name="Qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    rules=(*backbone(), *separate_mlp(DENSE_MLP, "model.layers.{layer}.mlp")),
    constants=LLAMA_LIKE | DENSE | {"qk_layernorm": True},
    translations=(
        *SIZES,
        *NO_SLIDING_WINDOW,
        Same("intermediate_size", "ffn_hidden_size"),
        HEAD_DIM,
        ROPE,
        WHOLE_HEAD_ROPE,
        TIED,
        FULL_ATTENTION_ONLY,
    ),
)
