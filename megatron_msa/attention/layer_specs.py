"""Layer specs: which modules make an MSA layer, for Megatron's local and Transformer Engine implementations.

Megatron's own block spec decides everything else (dense-first and MoE layers, pipeline and virtual stages);
here the self attention of the MSA layers is replaced, and what cannot be used without Transformer Engine.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs, get_gpt_mtp_block_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_msa.attention.cached_attention import CachedSelfAttention
from megatron_msa.attention.dense_attention import DocumentAttention
from megatron_msa.attention.full_attention import FullSelfAttention
from megatron_msa.attention.full_width_norm import full_width_norms
from megatron_msa.attention.index_branch import IndexBranchSubmodules
from megatron_msa.attention.rms_norm import RMSNorm
from megatron_msa.attention.self_attention import MSASelfAttention, MSASelfAttentionSubmodules
from megatron_msa.config import MSATransformerConfig

# Where the norm before the QKV projection lives in a checkpoint: Transformer Engine's dense layers fuse it
# into the projection, so one name for all lets dense and MSA checkpoints load into each other.
_INPUT_NORM_KEY = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def msa_layer_specs(config: MSATransformerConfig) -> list[ModuleSpec]:
    """One layer spec per decoder layer of the whole model."""
    specs = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=_uses_te(config),
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    return [
        _layer_spec(spec, config, is_msa=bool(is_msa))
        for spec, is_msa in zip(specs, config.msa_layer_pattern(), strict=True)
    ]


def msa_block_spec(config: MSATransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers that this pipeline stage builds, and the final norm."""
    specs = msa_layer_specs(config)
    if config.pipeline_model_parallel_layout is not None:
        layer_ids = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, vp_stage=vp_stage
        )
    else:
        offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
        layer_ids = range(offset, offset + get_num_layers_to_build(config, vp_stage=vp_stage))
    return TransformerBlockSubmodules(
        layer_specs=[specs[layer_id] for layer_id in layer_ids], layer_norm=_norm(config)
    )


def msa_mtp_spec(
    config: MSATransformerConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token-prediction layers of this pipeline stage, built like the last decoder layer, if any."""
    if config.mtp_num_layers is None:
        return None
    block = get_gpt_mtp_block_spec(
        config, msa_layer_specs(config)[-1], use_transformer_engine=_uses_te(config), vp_stage=vp_stage
    )
    if block is None:
        return None
    norms = dict.fromkeys(("enorm", "hnorm", "layer_norm"), _norm(config))
    return replace(
        block,
        layer_specs=[
            replace(spec, submodules=replace(spec.submodules, **norms)) for spec in block.layer_specs
        ],
    )


def _layer_spec(spec: ModuleSpec, config: MSATransformerConfig, *, is_msa: bool) -> ModuleSpec:
    """A copy of Megatron's layer spec (layers share spec objects, so nothing is changed in place)."""
    layer = spec.submodules
    assert isinstance(layer, TransformerLayerSubmodules)
    attention = layer.self_attention.submodules
    changes: dict = {}
    if not _uses_te(config):
        norm = _norm(config)
        changes["input_layernorm"] = norm
        if layer.pre_mlp_layernorm is not IdentityOp:
            changes["pre_mlp_layernorm"] = norm
        attention = replace(attention, core_attention=DocumentAttention)
        if config.qk_layernorm and not config.qk_l2_norm:
            attention = replace(attention, q_layernorm=norm, k_layernorm=norm)
    if config.msa_full_width_qk_norm:
        q_norm, k_norm = full_width_norms(config)
        attention = replace(attention, q_layernorm=q_norm, k_layernorm=k_norm)
    if is_msa:
        # The index branch reads the normalised hidden states too, so Transformer Engine's fused norm and
        # projection cannot be used: a projection without a norm inside, and the norm before it.
        linear = _backend(config).column_parallel_linear()
        index_norm = None if attention.q_layernorm is IdentityOp else attention.q_layernorm
        if config.msa_full_width_qk_norm:
            index_norm = _norm(config)
        attention = MSASelfAttentionSubmodules(
            linear_qkv=linear,
            core_attention=attention.core_attention,
            linear_proj=attention.linear_proj,
            q_layernorm=attention.q_layernorm,
            k_layernorm=attention.k_layernorm,
            # Never Transformer Engine's: 8-bit training would rank the blocks by 8-bit projections.
            index_branch=IndexBranchSubmodules(
                linear_index_q=LocalSpecProvider().column_parallel_linear(), index_norm=index_norm
            ),
        )
        changes["input_layernorm"] = _norm(config)
        changes["sharded_state_dict_keys_map"] = layer.sharded_state_dict_keys_map | _INPUT_NORM_KEY
    module = CachedSelfAttention
    if is_msa:
        module = MSASelfAttention
    elif config.context_parallel_size > 1:
        module = FullSelfAttention  # Megatron's takes the rotary embedding of its own layouts only
    changes["self_attention"] = replace(layer.self_attention, module=module, submodules=attention)
    return replace(spec, submodules=replace(layer, **changes))


def _uses_te(config: MSATransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def _backend(config: MSATransformerConfig) -> BackendSpecProvider:
    if not _uses_te(config):
        return LocalSpecProvider()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _norm(config: MSATransformerConfig) -> LayerNormBuilder:
    """The norm of hidden states; Megatron's local RMSNorm has no sequence parallelism and no 1 + weight."""
    if not _uses_te(config) and config.normalization == "RMSNorm":
        return RMSNorm
    return _backend(config).layer_norm()
