"""`MultimodalGPT`: the GPT backbone with visual embeddings in place of placeholder tokens.

Images and videos may stand anywhere, any number of them in a document. Their embeddings enter before the
first layer like those of words; positions, documents, blocks and causality are those of the token stream, and
attention goes through the same layers.

Who encodes what: the first pipeline stage has the encoder. Its tensor-parallel ranks compute each segment
together; the segments of a microbatch are dealt over the context-parallel ranks by their work (`segments`),
and every embedding travels to the rank that holds its token (`exchange`).

A microbatch without visuals gives exactly what the text model gives. A rank that has nothing to encode in
training encodes one blank token, which nothing reads, where something waits for it: Megatron's overlapped
reduction of gradients waits for every parameter, and its overlapped gathering of parameters for the forward
pass of every module, on all data-parallel ranks in the same order.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model
from torch import Tensor, nn

from megatron_msa.attention.kl_loss import attach_loss
from megatron_msa.attention.packing import token_layout
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.encoder import VisionModel
from megatron_msa.model.vision.exchange import check_count, plan_route
from megatron_msa.model.vision.inputs import VisualInput, placeholder_mask
from megatron_msa.model.vision.segments import Segment, cut_into_segments, deal


class MultimodalGPT(GPTModel):
    """One pipeline stage of a multimodal model.

    Args:
        vision: settings of the encoder.
        args, kwargs: of `GPTModel`.

    Attributes:
        vision_model: the encoder with its projector; None on later pipeline stages.
        runs_idle_encoder: whether the encoder runs in training when there is nothing to encode.
    """

    def __init__(self, *args: Any, vision: VisionConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.vision = vision
        self.vision_model: VisionModel | None = None
        self.runs_idle_encoder = True
        if self.pre_process:
            # Behind the backbone, whose random initial values are then those of the text model.
            self.vision_model = VisionModel(vision, self.config, self.pg_collection)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        visual_input: VisualInput | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See `GPTModel.forward`.

        Args:
            visual_input: the visuals of the microbatch, the same on all tensor- and context-parallel ranks;
                read on the first pipeline stage.

        Raises:
            ConfigError: placeholders and visuals do not match, or a grid does not divide by the merge.
        """
        if self.vision_model is not None and decoder_input is None:
            decoder_input = self._embed(input_ids, position_ids, packed_seq_params, visual_input)
        return super().forward(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input,
            *args,
            packed_seq_params=packed_seq_params,
            **kwargs,
        )

    def _embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        packed_seq_params: PackedSeqParams | None,
        visual_input: VisualInput | None,
    ) -> Tensor:
        """[s, b, hidden] of this rank's tokens; with sequence parallelism of its part of them."""
        words = self.embedding(input_ids=input_ids, position_ids=position_ids)
        if visual_input is None or not len(visual_input.grid_thw):
            return self._encode_nothing(words)
        visual_input.check(self.vision.patch_values)
        segments = cut_into_segments(visual_input.grid_thw.tolist(), self.vision)
        placeholders = placeholder_mask(input_ids, self.vision.placeholder_ids)
        # Megatron's layers take [s, b, ...]; the token layout asks for that shape.
        tokens = token_layout(input_ids.t(), packed_seq_params, self.config, self.pg_collection.cp)
        if tokens is None:
            places = placeholders.nonzero()
            check_count(len(places), sum(segment.tokens for segment in segments))
            visuals = self._encode(visual_input.patches, segments, words)
        else:
            size = get_pg_size(self.pg_collection.cp)
            owner = deal(segments, self.vision, self.config.hidden_size, size)
            route = plan_route(placeholders.flatten(), tokens, segments, owner, self.pg_collection.cp)
            mine = [segment for segment, rank in zip(segments, owner, strict=True) if rank == tokens.rank]
            places = placeholders.nonzero()
            visuals = route.carry(self._encode(visual_input.patches, mine, words))
        return self._scatter(words, visuals, places)

    def _encode(self, patches: Tensor, segments: list[Segment], words: Tensor) -> Tensor:
        """[tokens of the segments, hidden]; of the type of ``words``."""
        assert self.vision_model is not None
        if not segments:
            return self._encode_nothing(words.new_zeros(0, words.shape[-1]))
        if sum(segment.patches for segment in segments) < patches.shape[0]:
            patches = torch.cat([patches[each.start : each.start + each.patches] for each in segments])
        return self.vision_model(patches, segments).to(words.dtype)

    def _scatter(self, words: Tensor, visuals: Tensor, places: Tensor) -> Tensor:
        """Replace the embeddings of placeholders.

        Args:
            words: [s, b, hidden], with sequence parallelism this rank's part of s.
            visuals: [placeholders, hidden].
            places: int64 [placeholders, 2], (sequence, position) of each.
        """
        length, batch, hidden = words.shape
        sequence, position = places.unbind(1)
        if self.config.sequence_parallel:
            # Each rank uses a part of what all of them made: their gradients add up.
            visuals = copy_to_tensor_model_parallel_region(visuals, group=self.pg_collection.tp)
            position = position - length * get_pg_rank(self.pg_collection.tp)
            here = ((position >= 0) & (position < length)).nonzero().squeeze(1)
            visuals, sequence, position = visuals[here], sequence[here], position[here]
        rows = position * batch + sequence
        return words.reshape(-1, hidden).index_copy(0, rows, visuals).view(length, batch, hidden)

    def _encode_nothing(self, output: Tensor) -> Tensor:
        """``output`` unchanged; if it ``runs_idle_encoder``, the encoder has run and gets zero gradients."""
        assert self.vision_model is not None
        if not (torch.is_grad_enabled() and self.runs_idle_encoder):
            return output
        merge = self.vision.vision_merge_size
        # Blank patches have finite features and derivatives (norms divide by the root of their epsilon), so
        # that times zero they are zero.
        blank = output.new_zeros(merge * merge, self.vision.patch_values)
        features = self.vision_model(blank, [Segment(start=0, t=1, h=merge, w=merge, tokens=1)])
        return attach_loss(output, features.float().sum() * 0.0)


def let_encoder_idle(model: Sequence[nn.Module], args: Namespace) -> None:
    """Spare the encoder its blank token where nothing waits for its parameters.

    Args:
        model: the chunks of this rank, in Megatron's wrappers.
        args: Megatron's.
    """
    for chunk in model:
        language = unwrap_model(chunk)
        if isinstance(language, MultimodalGPT):
            # Context-parallel ranks exchange embeddings backward too, also those without a segment.
            language.runs_idle_encoder = (
                args.overlap_grad_reduce or args.overlap_param_gather or args.context_parallel_size > 1
            )
