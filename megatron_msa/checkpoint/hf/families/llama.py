"""Llama and its likes (LlamaForCausalLM): dense, no norm on q and k."""

from megatron_msa.checkpoint.hf.families.base import Family, Requires, Same
from megatron_msa.checkpoint.hf.families.common import (
    DENSE,
    DENSE_MLP,
    FULL_ATTENTION_ONLY,
    HEAD_DIM,
    LLAMA_LIKE,
    OLD_ROTARY_BUFFER,
    ROPE,
    SIZES,
    TIED,
    WHOLE_HEAD_ROPE,
    backbone,
    separate_mlp,
)

LLAMA = Family(
    name="Llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    rules=(*backbone(qk_norm=False), *separate_mlp(DENSE_MLP, "model.layers.{layer}.mlp")),
    constants=LLAMA_LIKE | DENSE,
    translations=(
        *SIZES,
        Same("intermediate_size", "ffn_hidden_size"),
        Requires("pretraining_tp", (1,), "it changes the order of rounding"),
        HEAD_DIM,
        ROPE,
        WHOLE_HEAD_ROPE,
        TIED,
        FULL_ATTENTION_ONLY,
    ),
    ignored=(OLD_ROTARY_BUFFER,),
)
