"""The GPT backbone with MSA layers, behind one configuration and one builder class."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_msa.attention.layer_specs import msa_block_spec, msa_mtp_spec
from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError
from megatron_msa.model.multimodal import MultimodalGPT
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.flops import projector_width


@dataclass(kw_only=True)
class MSAModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig around an MSATransformerConfig."""

    builder: ClassVar[str] = "megatron_msa.model.gpt.MSAModelBuilder"
    transformer: MSATransformerConfig
    vision: VisionConfig | None = None
    """The vision encoder of a multimodal model; None: text only."""

    def __post_init__(self) -> None:
        if self.transformer_layer_spec is not None:
            raise ConfigError("--spec is set; the layer specs of an MSA model are its own, leave it out")
        if self.position_embedding_type == "mrope":
            raise ConfigError(
                "--position-embedding-type is mrope; MSA layers take positions of one dimension, use rope"
            )
        self._check_rotary_dimensions()
        if self.vision is not None:
            self._check_vision(self.vision)

    @classmethod
    def from_args(cls, args: Namespace, transformer: MSATransformerConfig) -> MSAModelConfig:
        """The model that Megatron's and our arguments describe, around a transformer made of the same.

        Raises:
            ConfigError, AssertionError, ValueError: arguments that no model can be made of.
        """
        config = gpt_config_from_args(args, config=transformer, model_config_cls=cls)
        config.rope_scaling_factor = args.rope_scaling_factor  # which 0.19.2 forgets
        return config.with_vision(VisionConfig.from_args(args))

    def with_vision(self, vision: VisionConfig | None) -> MSAModelConfig:
        """This model with another vision part.

        Raises:
            ConfigError: a vision part that does not fit the model.
        """
        return replace(self, vision=vision)

    def _check_vision(self, vision: VisionConfig) -> None:
        config = self.transformer
        if not vision.placeholder_ids:
            raise ConfigError(
                "--vision-image-token-id is missing: which token of the vocabulary stands where an image is"
            )
        assert self.vocab_size is not None
        for token in vision.placeholder_ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"a placeholder token has the id {token} (--vision-image-token-id, "
                    f"--vision-video-token-id), but the vocabulary has {self.vocab_size} tokens"
                )
        if config.mtp_num_layers:
            raise ConfigError(
                f"--mtp-num-layers is {config.mtp_num_layers}: multi-token prediction embeds the following "
                "tokens as words and would see placeholders instead of images; leave it out with "
                "--vision-mode"
            )
        width, size = projector_width(vision, config.hidden_size), config.tensor_model_parallel_size
        for flag, value in (
            ("--vision-num-attention-heads", vision.vision_num_attention_heads),
            ("--vision-ffn-hidden-size", vision.vision_ffn_hidden_size),
            ("--vision-projector-hidden-size", width),
        ):
            if value % size:
                raise ConfigError(
                    f"{flag} {value} is not divisible by --tensor-model-parallel-size {size}; change one of "
                    "them"
                )

    def _check_rotary_dimensions(self) -> None:
        """The index branch gets the rotary embedding of the attention heads and must be as wide as it."""
        head_dim, rotary = self.transformer.msa_indexer_head_dim, rotary_dims(self)
        assert head_dim is not None
        if head_dim < rotary:
            raise ConfigError(
                f"--msa-indexer-head-dim is {head_dim} but the rotary embedding turns {rotary} dimensions of "
                f"each head (--kv-channels {self.transformer.kv_channels} times --rotary-percent "
                f"{self.rotary_percent}); use at least {rotary}, or a smaller --rotary-percent"
            )


class MSAModelBuilder(GPTModelBuilder):
    """Builds one pipeline stage of the model; wrapping and virtual stages are Megatron's."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """See `GPTModelBuilder.build_model`."""
        model_config = self._model_config
        config = model_config.transformer
        assert isinstance(config, MSATransformerConfig)
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(pg_collection.pp)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(pg_collection.pp)
        model_class = GPTModel
        if model_config.vision is not None:
            model_class = partial(MultimodalGPT, vision=model_config.vision)
        model = model_class(
            config=config,
            transformer_layer_spec=msa_block_spec(config, vp_stage),
            mtp_block_spec=msa_mtp_spec(config, vp_stage),
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
        if hasattr(model, "rotary_pos_emb"):
            # Without a group the table is not cut: the attention layers pick the rows of their own layout.
            model.rotary_pos_emb.cp_group = None
        return model


def rotary_dims(model_config: GPTModelConfig) -> int:
    """Number of leading dimensions of an attention head that the rotary embedding turns."""
    if model_config.position_embedding_type not in ("rope", "yarn"):
        return 0
    assert model_config.transformer.kv_channels is not None
    return int(model_config.transformer.kv_channels * min(model_config.rotary_percent, 1.0))


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
