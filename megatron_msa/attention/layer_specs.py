"""Layer specs: which modules make an MSA layer, for Megatron's local and Transformer Engine implementations.

Megatron's own block spec decides everything else (dense-first and MoE layers, pipeline and virtual stages); here
the self attention of the MSA layers is replaced, and the modules that need replacing without Transformer Engine.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_msa.attention.dense_attention import DocumentAttention
from megatron_msa.attention.index_branch import IndexBranchSubmodules
from megatron_msa.attention.rms_norm import RMSNorm
from megatron_msa.attention.self_attention import MSASelfAttention, MSASelfAttentionSubmodules
from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError

# Where the norm before the QKV projection lives in a checkpoint: Transformer Engine's dense layers fuse it into
# the projection, so one name for all implementations lets dense and MSA checkpoints load into each other.
_INPUT_NORM_KEY = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}


def msa_layer_specs(config: MSATransformerConfig) -> list[ModuleSpec]:
    """One layer spec per decoder layer of the whole model."""
    use_te = config.transformer_impl == "transformer_engine"
    specs = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=use_te,
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
        layer_specs=[specs[layer_id] for layer_id in layer_ids], layer_norm=_norm(config, for_qk=False)
    )


def _layer_spec(spec: ModuleSpec, config: MSATransformerConfig, *, is_msa: bool) -> ModuleSpec:
    """A copy of Megatron's layer spec (layers share spec objects, so nothing is changed in place)."""
    layer = spec.submodules
    assert isinstance(layer, TransformerLayerSubmodules)
    attention = layer.self_attention.submodules
    qk_norm = _norm(config, for_qk=True) if config.qk_layernorm else None
    changes: dict = {}
    if config.transformer_impl != "transformer_engine":
        attention = replace(
            attention,
            core_attention=DocumentAttention,
            q_layernorm=qk_norm if config.qk_layernorm else attention.q_layernorm,
            k_layernorm=qk_norm if config.qk_layernorm else attention.k_layernorm,
        )
        norm = _norm(config, for_qk=False)
        changes = {"input_layernorm": norm}
        if layer.pre_mlp_layernorm is not IdentityOp:
            changes["pre_mlp_layernorm"] = norm
    if is_msa:
        linear, input_norm = _unfused_projection(config)
        attention = MSASelfAttentionSubmodules(
            linear_qkv=linear,
            core_attention=attention.core_attention,
            linear_proj=attention.linear_proj,
            q_layernorm=attention.q_layernorm,
            k_layernorm=attention.k_layernorm,
            index_branch=IndexBranchSubmodules(linear_index_q=linear, index_norm=qk_norm),
        )
        changes["input_layernorm"] = input_norm
        changes["sharded_state_dict_keys_map"] = layer.sharded_state_dict_keys_map | _INPUT_NORM_KEY
    module = MSASelfAttention if is_msa else layer.self_attention.module
    changes["self_attention"] = replace(layer.self_attention, module=module, submodules=attention)
    return replace(spec, submodules=replace(layer, **changes))


def _unfused_projection(config: MSATransformerConfig) -> tuple[type, type]:
    """A column-parallel projection without a norm inside, and the norm that stands before it.

    The index branch reads the normalised hidden states too, so Transformer Engine's fused norm + projection
    cannot be used in an MSA layer.
    """
    if config.transformer_impl != "transformer_engine":
        return LocalSpecProvider().column_parallel_linear(), _norm(config, for_qk=False)
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider().column_parallel_linear(), _norm(config, for_qk=False)


def _norm(config: MSATransformerConfig, *, for_qk: bool) -> type:
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider().layer_norm(for_qk=for_qk)
    if config.normalization == "RMSNorm":
        return RMSNorm
    if config.layernorm_zero_centered_gamma or config.sequence_parallel:
        raise ConfigError(
            f"--normalization {config.normalization} with --transformer-impl local supports neither "
            "--apply-layernorm-1p nor --sequence-parallel; use --normalization RMSNorm"
        )
    return LocalSpecProvider().layer_norm(for_qk=for_qk)
