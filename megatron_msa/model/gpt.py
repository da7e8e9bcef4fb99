"""The GPT backbone with MSA layers, behind one configuration and one builder class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_msa.attention.kl_loss import set_loss_scale
from megatron_msa.attention.layer_specs import msa_block_spec, msa_layer_specs
from megatron_msa.config import MSATransformerConfig


@dataclass(kw_only=True)
class MSAModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig around an MSATransformerConfig."""

    builder: ClassVar[str] = "megatron_msa.model.gpt.MSAModelBuilder"
    transformer: MSATransformerConfig


class MSAModelBuilder(GPTModelBuilder):
    """Builds one pipeline stage of the model; wrapping and virtual stages are Megatron's."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """See `GPTModelBuilder.build_model`. Multi-token-prediction layers are built like the last layer."""
        model_config = self._model_config
        config = model_config.transformer
        assert isinstance(config, MSATransformerConfig)
        config.experimental_attention_variant_loss_scale_func = set_loss_scale

        mtp_spec = None
        if config.mtp_num_layers is not None:
            mtp_spec = get_gpt_mtp_block_spec(
                config,
                msa_layer_specs(config)[-1],
                use_transformer_engine=config.transformer_impl == "transformer_engine",
                vp_stage=vp_stage,
            )
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        return GPTModel(
            config=config,
            transformer_layer_spec=msa_block_spec(config, vp_stage),
            mtp_block_spec=mtp_spec,
            vocab_size=padded_vocab_size(model_config),
            max_sequence_length=model_config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=model_config.fp16_lm_cross_entropy,
            parallel_output=model_config.parallel_output,
            share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
            position_embedding_type=model_config.position_embedding_type,
            rotary_percent=model_config.rotary_percent,
            rotary_base=model_config.rotary_base,
            rope_scaling=model_config.rope_scaling,
            rope_scaling_factor=model_config.rope_scaling_factor,
            seq_len_interpolation_factor=model_config.seq_len_interpolation_factor,
            scatter_embedding_sequence_parallel=model_config.scatter_embedding_sequence_parallel,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )


def padded_vocab_size(model_config: GPTModelConfig) -> int:
    """The vocabulary size of the embedding, padded so that it divides by TP."""
    assert model_config.vocab_size is not None
    if not model_config.should_pad_vocab:
        return model_config.vocab_size
    return calculate_padded_vocab_size(
        model_config.vocab_size,
        model_config.make_vocab_size_divisible_by,
        model_config.transformer.tensor_model_parallel_size,
    )
