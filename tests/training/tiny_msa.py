"""A tiny MSA mixture of experts with Megatron's optimizers, in this process and without a launcher."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import nn

from megatron_msa.config import MSATransformerConfig
from megatron_msa.model.gpt import MSAModelBuilder, MSAModelConfig

VOCABULARY, SEQUENCE = 32, 16

OPTIMIZERS: dict[str, dict[str, bool]] = {
    "FP32Optimizer": {},
    "Float16OptimizerWithFloat16Params": {"bf16": True},
    "DistributedOptimizer": {"use_distributed_optimizer": True},
    "DistributedOptimizer-bf16": {"use_distributed_optimizer": True, "bf16": True},
}


def tiny_config(*, bf16: bool = False) -> MSATransformerConfig:
    """Two layers, the second a mixture of experts with router biases."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    return MSATransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=32,
        num_moe_experts=4,
        moe_layer_freq=[0, 1],
        moe_ffn_hidden_size=16,
        moe_router_topk=2,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        bf16=bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        msa_block_size=4,
        msa_num_selected_blocks=2,
        msa_schedule="warmup@0",
    )


def tiny_model_config(config: MSATransformerConfig) -> MSAModelConfig:
    return MSAModelConfig(
        transformer=config,
        vocab_size=VOCABULARY,
        should_pad_vocab=False,
        seq_length=SEQUENCE,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def build_model(*, bf16: bool = False, use_distributed_optimizer: bool = False) -> list[nn.Module]:
    """The model with the same parameters each time, wrapped for data parallelism."""
    torch.manual_seed(1)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=use_distributed_optimizer
    )
    builder = MSAModelBuilder(tiny_model_config(tiny_config(bf16=bf16)))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return builder.build_distributed_models(groups, ddp_config=ddp, data_parallel_random_init=False)


def build_optimizer(
    model: list[nn.Module],
    *,
    bf16: bool = False,
    use_distributed_optimizer: bool = False,
    clip_grad: float = 1.0,
    overrides: Any = None,
) -> MegatronOptimizer:
    """AdamW with weight decay, so that no parameter stands still by itself."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=1e-2,
        min_lr=0.0,
        weight_decay=0.1,
        clip_grad=clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=use_distributed_optimizer,
    )
    return get_megatron_optimizer(config, model, config_overrides=overrides)


def training_step(model: list[nn.Module], optimizer: MegatronOptimizer) -> float:
    """Forward, backward and update on random tokens; returns the gradient norm."""
    (chunk,) = model
    chunk.zero_grad_buffer()
    optimizer.zero_grad()
    device = next(chunk.parameters()).device
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), device=device)
    positions = torch.arange(SEQUENCE, device=device).expand(2, -1)
    chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).float().mean().backward()
    finalize_model_grads(model)
    _, grad_norm, _ = optimizer.step()
    return float(grad_norm)
