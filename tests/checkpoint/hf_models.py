"""Tiny Hugging Face models with random weights, one of each family, made with transformers itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()  # before anything imports Megatron

from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxM2Config,
    MiniMaxM2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import (  # noqa: E402
    MiniMaxM3VLConfig,
    MiniMaxM3VLTextConfig,
)
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (  # noqa: E402
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
)

VOCABULARY = 90
"""Not a multiple of anything that Megatron pads to."""
LAYERS, GROUPS, HEADS, HEAD_DIM, HIDDEN = 3, 2, 6, 8, 36
"""Heads times head dimension is not the hidden size; three heads a group."""

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, **values}}


def llama() -> Any:
    """Longer contexts as in Llama 3.1; the file also holds the rotary buffer of old releases."""
    scaling = {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return LlamaForCausalLM(LlamaConfig(**_SIZES, **_rope(**scaling), intermediate_size=56))


def qwen3() -> Any:
    """Tied embeddings."""
    config = Qwen3Config(**_SIZES, **_rope(), intermediate_size=56, tie_word_embeddings=True)
    return Qwen3ForCausalLM(config)


def qwen3_moe() -> Any:
    """A dense layer among expert layers; weights of the chosen experts renormalised."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **_SIZES,
            **_rope(),
            intermediate_size=56,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            mlp_only_layers=[1],
        )
    )


def minimax_m2() -> Any:
    rope = _rope(partial_rotary_factor=0.5)
    return MiniMaxM2ForCausalLM(
        MiniMaxM2Config(**_SIZES, **rope, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
    )


def _m3_text() -> MiniMaxM3VLTextConfig:
    return MiniMaxM3VLTextConfig(
        **_SIZES,
        **_rope(partial_rotary_factor=0.5),
        rotary_dim=4,
        intermediate_size=16,
        dense_intermediate_size=56,
        shared_intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        index_n_heads=GROUPS,
        index_head_dim=6,
        index_block_size=4,
        index_topk_blocks=3,
        mlp_layer_types=["dense", "sparse", "sparse"],
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    )


def minimax_m3_text() -> Any:
    return MiniMaxM3VLForCausalLM(_m3_text())


def minimax_m3() -> Any:
    """With a vision tower of one layer."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MiniMaxM3VLConfig(
        text_config=_m3_text(),
        vision_config=vision | {"image_size": 28},
        projector_hidden_size=16,
        image_token_index=VOCABULARY - 2,
        video_token_index=VOCABULARY - 1,
    )
    return MiniMaxM3SparseForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "minimax_m2": minimax_m2,
    "minimax_m3_text": minimax_m3_text,
    "minimax_m3": minimax_m3,
}


def save_model(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """Make the model with every parameter random, gains and biases too, and save it in small shards."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and "inv_freq" not in key:
                tensor.add_(0.15 * torch.randn_like(tensor))
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model
