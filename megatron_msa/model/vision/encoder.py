"""The vision encoder with its projector: patches of pixels -> one embedding per token of the language model.

    patches [n, values of a patch]
     -> patch embedding (linear), layer norm                     [n, vision hidden]
     -> transformer layers: full attention within each segment   [n, vision hidden]
     -> projector: linear, GELU, linear                          [n, hidden]
     -> m x m neighbours side by side: linear, GELU, linear      [n / m^2, hidden]

The layers and both two-layer networks are Megatron's, cut over tensor-parallel ranks like the language
model's. There is no sequence parallelism inside: the patches need not divide by the ranks. There is no norm
behind the last layer (as in MiniMax-M3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_msa.model.vision.attention import SegmentAttention, VisionSelfAttention
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.flops import projector_width
from megatron_msa.model.vision.rotary import rotary_angles
from megatron_msa.model.vision.segments import PackedSegments, Segment

_MLP = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


class VisionModel(MegatronModule):
    """Patch embedding, encoder, projector and merge of one tensor-parallel group.

    Args:
        vision: the settings.
        language: of the language model: width, types, tensor parallelism, recomputation, initialisation.
        pg_collection: its process groups.
    """

    def __init__(
        self, vision: VisionConfig, language: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        config = encoder_config(vision, language)
        super().__init__(config=config)
        self.vision = vision
        groups = _tensor_parallel_only(pg_collection)
        self.patch_embedding = PatchEmbedding(vision, config)
        self.pre_norm = WrappedTorchNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.encoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[_layer_spec()] * config.num_layers),
            post_layer_norm=False,
            pg_collection=groups,
        )
        width, hidden = projector_width(vision, language.hidden_size), language.hidden_size
        two_layers = partial(
            MLP, _projection_config(config, width, hidden), _MLP, ffn_hidden_size=width, tp_group=groups.tp
        )
        self.projector = two_layers(input_size=config.hidden_size)
        self.merge = two_layers(input_size=vision.vision_merge_size**2 * hidden)
        self.to(config.params_dtype)
        if vision.vision_mode == "freeze":
            for module in (self.patch_embedding, self.pre_norm, self.encoder):
                module.requires_grad_(False)

    def forward(self, patches: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Encode segments.

        Args:
            patches: [n, values of a patch], those of the segments, one behind the other.
            segments: at least one. Where they start is not read.

        Returns:
            [n / merge^2, hidden], in reading order within each time.
        """
        # Nothing flows back into a frozen encoder: keep no activations of it.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision.vision_mode != "freeze"):
            hidden = self.pre_norm(self.patch_embedding(patches)).unsqueeze(1)
            hidden = self.encoder(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=rotary_angles(segments, self.vision, hidden.device),
                packed_seq_params=PackedSegments.build(segments, hidden.device),
            ).squeeze(1)
        projected = _apply(self.projector, hidden)
        return _apply(
            self.merge, projected.reshape(-1, self.vision.vision_merge_size**2 * projected.shape[1])
        )


class PatchEmbedding(MegatronModule):
    """A linear layer without bias over the values of a patch: a convolution whose stride is its kernel.

    Every tensor-parallel rank has all of it; their gradients are equal.
    """

    def __init__(self, vision: VisionConfig, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = nn.Parameter(torch.empty(config.hidden_size, vision.patch_values))
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(self.weight)

    def forward(self, patches: Tensor) -> Tensor:
        """[n, values of a patch] in any float type -> [n, vision hidden]."""
        return F.linear(patches.to(self.weight.dtype), self.weight)


def encoder_config(vision: VisionConfig, language: TransformerConfig) -> TransformerConfig:
    """The encoder's layers in Megatron's terms, with the language model's types and parallel sizes."""
    recompute = language.recompute_granularity == "full"
    return TransformerConfig(
        num_layers=vision.vision_num_layers,
        hidden_size=vision.vision_hidden_size,
        ffn_hidden_size=vision.vision_ffn_hidden_size,
        num_attention_heads=vision.vision_num_attention_heads,
        kv_channels=vision.head_dim,
        normalization="LayerNorm",
        layernorm_epsilon=vision.vision_layernorm_epsilon,
        add_bias_linear=True,
        activation_func=F.gelu,
        bias_activation_fusion=False,  # Megatron's fused GELU is the tanh approximation
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        tensor_model_parallel_size=language.tensor_model_parallel_size,
        init_method_std=language.init_method_std,
        perform_initialization=language.perform_initialization,
        use_cpu_initialization=language.use_cpu_initialization,
        params_dtype=language.params_dtype,
        bf16=language.bf16,
        fp16=language.fp16,
        deterministic_mode=language.deterministic_mode,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )


def _projection_config(config: TransformerConfig, width: int, hidden: int) -> TransformerConfig:
    """For projector and merge: two layers of which the second makes the language model's width."""
    names = (
        "tensor_model_parallel_size",
        "init_method_std",
        "perform_initialization",
        "use_cpu_initialization",
        "params_dtype",
        "bf16",
        "fp16",
        "deterministic_mode",
    )
    return TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        ffn_hidden_size=width,
        num_attention_heads=config.num_attention_heads,  # not used, but Megatron wants a divisor
        kv_channels=config.kv_channels,
        add_bias_linear=True,
        activation_func=F.gelu,
        bias_activation_fusion=False,
        transformer_impl="local",
        **{name: getattr(config, name) for name in names},
    )


def _layer_spec() -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchNorm,
            self_attention=ModuleSpec(
                module=VisionSelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SegmentAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchNorm,
            mlp=partial(MLP.as_mlp_submodule, submodules=_MLP),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _tensor_parallel_only(groups: ProcessGroupCollection) -> ProcessGroupCollection:
    """The whole encoder is on one pipeline stage, and a context-parallel rank encodes whole segments."""
    result = ProcessGroupCollection()
    result.tp = groups.tp
    result.cp = result.pp = None
    return result


def _apply(network: MLP, x: Tensor) -> Tensor:
    output, bias = network(x)
    return output if bias is None else output + bias
