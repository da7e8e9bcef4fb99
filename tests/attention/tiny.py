"""A tiny MSA GPT for the tests of this folder, in fp64, so that "equal" means 1e-10 and not 1e-5.

What stays fp32 is Megatron's own: the angles of the rotary embedding, the sigmoid of the output gate. They
are the same in every run that is compared.
"""

import argparse
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.config import MSATransformerConfig
from megatron_msa.model.gpt import MSAModelBuilder, MSAModelConfig
from megatron_msa.phases import Phase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCABULARY = 64
SEQUENCE = 30
"""Not a multiple of the block size: the last block is short."""
BLOCK = 4
ALL_BLOCKS = 64
"""More blocks than any document has: nothing is left out."""


def tiny_config(**changes: Any) -> MSATransformerConfig:
    """Two layers, two GQA groups of two heads, an index head wider than the attention head."""
    values: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "ffn_hidden_size": 48,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.2,
        "transformer_impl": "local",
        "msa_block_size": BLOCK,
        "msa_num_selected_blocks": 3,
        "msa_indexer_head_dim": 12,
        "msa_schedule": "sparse@0",
        "msa_backend": "reference",
    }
    return MSATransformerConfig(**values | changes)


def tiny_arguments(**others: Any) -> argparse.Namespace:
    """What Megatron's arguments say of the model of `tiny_config`, as a checkpoint keeps them."""
    return argparse.Namespace(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        group_query_attention=True,
        num_query_groups=2,
        kv_channels=8,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        qk_layernorm=True,
        add_bias_linear=False,
        swiglu=True,
        untie_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_percent=0.5,
        **others,
    )


def initial_model(config: MSATransformerConfig | None = None, **model_changes: Any) -> GPTModel:
    """A model as Megatron initialises it, in fp32."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "seq_length": 64,
        "position_embedding_type": "rope",
        "rotary_percent": 0.5,
    }
    model_config = MSAModelConfig(transformer=config or tiny_config(), **values | model_changes)
    return MSAModelBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def tiny_model(config: MSATransformerConfig | None = None, **model_changes: Any) -> GPTModel:
    """A model in training mode, with random gains too; the same seed gives the same parameters."""
    model = initial_model(config, **model_changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(DEVICE, torch.float64).train()


def with_weights_of(source: GPTModel, config: MSATransformerConfig, **model_changes: Any) -> GPTModel:
    """Another model with the parameters of ``source``."""
    model = tiny_model(config, **model_changes)
    model.load_state_dict(source.state_dict())
    return model


def set_phase(model: GPTModel, phase: Phase) -> None:
    for layer in msa_layers(model):
        layer.phase = phase


def random_tokens(batch: int = 2, sequence: int = SEQUENCE) -> tuple[Tensor, Tensor]:
    """Tokens and labels, [batch, sequence] each."""
    tokens = torch.randint(VOCABULARY, (batch, sequence + 1), device=DEVICE)
    return tokens[:, :-1], tokens[:, 1:]


def token_losses(
    model: GPTModel, tokens: Tensor, labels: Tensor, packed: PackedSeqParams | None = None
) -> Tensor:
    """Cross entropy of every token in fp64, [batch, sequence]; Megatron's own is fp32."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    logits = model(tokens, positions, None, packed_seq_params=packed)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)


def packed_documents(lengths: Iterable[int]) -> PackedSeqParams:
    """Documents of these lengths, laid end to end in a batch of one."""
    lengths = list(lengths)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=offsets,
        cu_seqlens_kv=offsets,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )


def is_index(name: str) -> bool:
    return ".index_branch." in name


def gradients(model: GPTModel) -> dict[str, Tensor]:
    """Copies of all gradients by parameter name; every parameter must have one. Clears them."""
    result = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        result[name] = parameter.grad.clone()
        parameter.grad = None
    return result


def index_gradients(model: GPTModel) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients(model).items() if is_index(name)}


def backbone_gradients(model: GPTModel) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients(model).items() if not is_index(name)}


def kl_of(model: GPTModel) -> list[Tensor | None]:
    """Per MSA layer: (sum over rows and groups, number of rows times groups), if measured. Clears them."""
    sums = [layer.metrics.sums.get("kl") for layer in msa_layers(model)]
    for layer in msa_layers(model):
        layer.metrics.reset()
    return sums


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every tensor within ``tolerance`` of the largest entry of its expected value."""
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = expected[name].abs().max()
        assert scale > 0, f"{name}: the expected gradient is zero, so the comparison would say nothing"
        difference = (actual[name] - expected[name]).abs().max() / scale
        assert difference <= tolerance, f"{name}: differs by {difference:.1e} of its largest entry"


def assert_zero(tensors: dict[str, Tensor]) -> None:
    assert tensors
    for name, tensor in tensors.items():
        assert not tensor.any(), f"{name} is not exactly zero"
