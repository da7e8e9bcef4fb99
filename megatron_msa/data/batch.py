"""The microbatch of this rank: what the model's forward pass takes.

Layouts, with B = micro batch size, S = sequence length, C = context-parallel size:

- plain: tokens, labels, loss_mask, position_ids are [B, S/C]. Attention sees hidden states [S/C, B, H]
  (S/C/TP with sequence parallelism), positions run over the whole sequence, and `packed_seq_params` is None.
- separated documents (`--dataloader-inter-document-masking`): the B samples are laid end to end, [1, B*S/C],
  sample 0 first. Attention sees hidden states [B*S/C, 1, H] (B*S/C/TP before the QKV projection with sequence
  parallelism), and after the batch dimension has been dropped q, k, v are [B*S/C, heads, dim]. The documents
  are in `packed_seq_params` (qkv_format "thd"), those of all context-parallel ranks: cu_seqlens_q and
  cu_seqlens_kv are the same int32 tensor [documents + 1], from 0 to B*S. A sample's start always is a
  document's start: the part of a document that a sample begins with is a document of its own, at position 0.
  position_ids restart with each document, and so does RoPE.

With C > 1 `megatron_msa.attention.context_parallel` says which tokens are this rank's (`--msa-cp-layout`).

What Megatron 0.19.2 does with that flag, as read and tried: GPTDataset returns cu_seqlens per sample, padded
to S + 1 entries, plus max_seqlen, and restarts position_ids; nothing else in the wheel but the FLOP count and
the mask flag looks at it. Every pipeline stage needs the offsets, so datasets are built on every stage. The
label of a document's last token is the next document's first token, as in plain GPT data; `--eod-mask-loss`
drops that term. Megatron's DotProductAttention refuses packed sequences, so full-attention layers need
Transformer Engine or this package's own.

Not supported with separated documents, and refused: pipeline stages with B > 1 (the stages exchange [S, B, H]
buffers, which a [B*S, 1, H] tensor fills without an error but in another order), and C > 1 with multi-token
prediction, unless every document is cut by itself (Megatron's shift of packed labels expects that).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_tp_rank,
)

from megatron_msa.attention.context_parallel import batch_layout, layout_kind
from megatron_msa.attention.packing import attached_token_layout
from megatron_msa.data.multimodal.visuals import visuals_on_this_rank
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.inputs import VisualInput

# What the helpers of Megatron look up in a batch; other keys (dataset_id of a blend) are left out.
_BATCH_KEYS = (
    "tokens",
    "labels",
    "loss_mask",
    "position_ids",
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
    "hybrid_cp_group",
)
_TOKEN_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class Batch(NamedTuple):
    """One microbatch on this rank; the pipeline stage decides which tensors are None. Layouts: see above."""

    tokens: torch.Tensor | None
    """[B, S/C] or [1, B*S/C], int64; first stage (and stages with multi-token prediction)."""
    labels: torch.Tensor | None
    """Like tokens, shifted by one; last stage (and stages with multi-token prediction)."""
    loss_mask: torch.Tensor | None
    """float32, 1 where the loss counts; where labels are."""
    attention_mask: None
    """Always None: causality and documents are the attention layer's to apply."""
    position_ids: torch.Tensor | None
    """int64; where tokens are."""
    packed_seq_params: PackedSeqParams | None
    """The documents, on every stage; None when documents are not separated."""
    visual_input: VisualInput | None = None
    """The images and videos of all samples, also those whose tokens other context-parallel ranks hold; first
    stage of a multimodal model. None for a microbatch of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What `get_batch` needs to know of a run."""

    seq_length: int
    micro_batch_size: int
    eval_micro_batch_size: int
    separate_documents: bool = False
    """Keep attention and positions inside documents (`--dataloader-inter-document-masking`)."""
    context_parallel_size: int = 1
    cp_layout: str = "auto"
    """`--msa-cp-layout`."""
    mtp_num_layers: int | None = None
    pipeline_layout: PipelineParallelLayerLayout | None = None
    """The custom pipeline layout, if any; it says where multi-token prediction lies."""
    patch_values: int | None = None
    """Numbers in a patch of an image; None for a text model."""
    patch_dtype: torch.dtype = torch.float32
    placeholder_ids: tuple[int, ...] = ()
    """Tokens that stand for images; text must not hold them."""

    @classmethod
    def from_args(cls, args: Any) -> "BatchSettings":
        """From Megatron's arguments.

        Raises:
            ConfigError: separated documents in a parallel layout that cannot carry them.
        """
        layout = args.pipeline_model_parallel_layout
        if isinstance(layout, str):
            layout = _parse_layout(layout, args.pipeline_model_parallel_size)
        settings = cls(
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            # Megatron's sampler for full validation passes draws one sample at a time.
            eval_micro_batch_size=1 if args.full_validation else args.eval_micro_batch_size,
            separate_documents=args.dataloader_inter_document_masking,
            context_parallel_size=args.context_parallel_size,
            cp_layout=args.msa_cp_layout,
            mtp_num_layers=args.mtp_num_layers,
            pipeline_layout=layout,
            **_patches(args),
        )
        if settings.context_parallel_size > 1 and settings.mtp_num_layers:
            settings._check_shifted_labels()
        if settings.separate_documents:
            check_packed_microbatches(
                args.pipeline_model_parallel_size,
                max(settings.micro_batch_size, settings.eval_micro_batch_size),
            )
        return settings

    def _check_shifted_labels(self) -> None:
        """Megatron's multi-token prediction shifts labels across ranks in its own layouts only."""
        kind = layout_kind(self.cp_layout, packed=self.separate_documents)
        needed = "documents" if self.separate_documents else "zigzag"
        if kind != needed:
            raise ConfigError(
                f"--mtp-num-layers {self.mtp_num_layers} with --context-parallel-size "
                f"{self.context_parallel_size} needs --msa-cp-layout {needed}, got {self.cp_layout}: "
                "Megatron shifts the labels of that layout only. Change it, or leave out one of the others."
            )

    def holds_tokens(self, vp_stage: int | None) -> bool:
        """Whether this model chunk takes tokens or labels: first or last stage, or multi-token prediction."""
        return any(_stage(vp_stage)) or self.predicts_ahead(vp_stage)

    def predicts_ahead(self, vp_stage: int | None) -> bool:
        """Whether this model chunk has multi-token prediction layers."""
        return mtp_on_this_rank(
            layout=self.pipeline_layout,
            mtp_num_layers=self.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )

    def reads_data(self, vp_stage: int | None) -> bool:
        """Whether this model chunk needs a data iterator: every one does when documents are separated."""
        return self.separate_documents or self.holds_tokens(vp_stage)


def check_packed_microbatches(pipeline_size: int, samples: int) -> None:
    """Refuse microbatches of several packed samples between pipeline stages.

    Raises:
        ConfigError: there are such.
    """
    if pipeline_size > 1 and samples > 1:
        raise ConfigError(
            f"--dataloader-inter-document-masking with --pipeline-model-parallel-size {pipeline_size} "
            f"and a micro batch of {samples} is not supported: pipeline stages would exchange the packed "
            "samples in the wrong order. Use --micro-batch-size 1 and --eval-micro-batch-size 1."
        )


def get_batch(
    data_iterator: Iterator[dict[str, Any]] | None,
    args: Any,
    *,
    vp_stage: int | None = None,
    evaluating: bool = False,
) -> Batch:
    """Take the next microbatch and bring it to this rank; a collective of the tensor-parallel group.

    Args:
        data_iterator: yields collated samples; read on tensor-parallel rank 0 only.
        args: Megatron's arguments (those that `BatchSettings.from_args` reads).
        vp_stage: this model chunk's virtual pipeline stage, None without virtual stages.
        evaluating: the batch comes from a validation or test iterator (its micro batch size may differ).
    """
    settings = BatchSettings.from_args(args)
    holds_tokens = settings.holds_tokens(vp_stage)
    if not settings.reads_data(vp_stage):
        return Batch(None, None, None, None, None, None)

    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    sample = _next_sample(data_iterator, settings) if tp_rank == 0 else None
    is_first, is_last = _stage(vp_stage)
    visual_input = None
    if settings.patch_values is not None and is_first:
        visual_input = visuals_on_this_rank(
            sample,
            patch_values=settings.patch_values,
            placeholder_ids=settings.placeholder_ids,
            dtype=settings.patch_dtype,
            device=_device(),
        )
    batch = _on_device(sample) if sample is not None else {}
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=settings.separate_documents,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=1,  # with more ranks it asks for padded offsets, which only Megatron's own cut needs
        tp_rank=tp_rank,
        micro_batch_size=settings.eval_micro_batch_size if evaluating else settings.micro_batch_size,
        seq_length=settings.seq_length,
        mtp_on_this_rank=settings.predicts_ahead(vp_stage),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        is_pipeline_first_stage=is_first,
        is_pipeline_last_stage=is_last,
    )

    documents = None
    samples = 1
    if settings.separate_documents:
        samples = batch["cu_seqlens"].shape[0]
        batch = flatten_batch_for_packed_sequences(batch)
        documents = packed_seq_params(
            batch["cu_seqlens"][0], longest=int(batch["max_seqlen"].item()), samples=samples
        )
    _cut_for_this_cp_rank(batch, documents, settings, samples)
    if not holds_tokens:
        return Batch(None, None, None, None, None, documents)
    return Batch(
        tokens=batch["tokens"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        attention_mask=None,
        position_ids=batch["position_ids"],
        packed_seq_params=documents,
        visual_input=visual_input,
    )


def _cut_for_this_cp_rank(
    batch: dict[str, Any], documents: PackedSeqParams | None, settings: BatchSettings, samples: int
) -> None:
    """Leave this context-parallel rank's tokens in the batch; note the layout in ``documents``."""
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return
    cut = {"size": size, "rank": parallel_state.get_context_parallel_rank()}
    layout = None
    if documents is not None:
        layout = attached_token_layout(documents, settings.cp_layout, samples=samples, **cut)
        if documents.tokens_per_sample is not None:
            # Only this layout leaves each rank the same part of each sample.
            is_zigzag = layout_kind(settings.cp_layout, packed=True) == "zigzag"
            documents.tokens_per_sample = documents.tokens_per_sample // size if is_zigzag else None
    for name in _TOKEN_KEYS:
        values = batch.get(name)
        if values is not None:
            if layout is None:
                layout = batch_layout(
                    settings.cp_layout, batch=1, length=values.shape[1], device=values.device, **cut
                )
            batch[name] = values.index_select(1, layout.local)


def packed_seq_params(cu_seqlens: torch.Tensor, *, longest: int, samples: int = 1) -> PackedSeqParams:
    """Describe packed documents the way Megatron's RoPE, attention and MoE layers read them.

    Args:
        cu_seqlens: document offsets, [documents + 1] int32, from 0 to the number of tokens in all samples.
        longest: tokens in the longest document.
        samples: equally long samples laid end to end.
    """
    total = int(cu_seqlens[-1].item())
    bound = max_seqlen_bound(longest, total)
    # MoE layers restore the samples from this for their per-sequence auxiliary loss. A rank of a
    # sequence-parallel group holds total/TP tokens: unless those are whole samples, Megatron's reshape has
    # nothing to restore (or fails).
    whole_samples = samples > 1 and samples % parallel_state.get_tensor_model_parallel_world_size() == 0
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_kv=bound,
        tokens_per_sample=total // samples if whole_samples else None,
    )


def max_seqlen_bound(longest: int, total: int) -> int:
    """An upper bound of the document lengths that takes few different values: the next power of two.

    Megatron builds a RoPE table of this length and caches the last 32 lengths it was asked for; with the
    exact length each microbatch would add one (64 MiB at 128K positions and 128 channels), and kernels that
    specialise on the length would compile anew. It must stay below `total` unless one document fills the
    pack: Megatron takes a table of exactly `total` positions as numbering the whole pack, and positions would
    not restart with the documents.
    """
    if longest >= total:
        return total
    return min(1 << (longest - 1).bit_length(), total - 1)


@functools.cache  # settings are read for every microbatch, and Megatron logs each parse
def _parse_layout(layout: str, pipeline_size: int) -> PipelineParallelLayerLayout:
    return PipelineParallelLayerLayout.from_str(layout, pipeline_size)


def _stage(vp_stage: int | None) -> tuple[bool, bool]:
    """Whether this model chunk is the pipeline's first, and its last."""
    ignore_virtual = vp_stage is None
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=ignore_virtual, vp_stage=vp_stage),
    )


def _patches(args: Any) -> dict[str, Any]:
    """The settings of `BatchSettings` that only a multimodal model has."""
    vision = VisionConfig.from_args(args)
    if vision is None:
        return {}
    return {
        "patch_values": vision.patch_values,
        "patch_dtype": args.params_dtype,
        "placeholder_ids": vision.placeholder_ids,
    }


def _next_sample(data_iterator: Iterator[dict[str, Any]] | None, settings: BatchSettings) -> dict[str, Any]:
    if data_iterator is None:
        raise ConfigError(
            "this rank has no data iterator but needs one: build the datasets with make_datasets_provider, "
            "which builds them on every rank that get_batch reads from."
        )
    sample = next(data_iterator)
    if settings.separate_documents and sample.get("cu_seqlens") is None:
        raise ConfigError(
            "the dataset gives no document offsets (cu_seqlens): it was built without "
            "--dataloader-inter-document-masking."
        )
    return sample


def _on_device(sample: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    return {
        key: sample[key].to(_device(), non_blocking=True) if sample.get(key) is not None else None
        for key in _BATCH_KEYS
    }


def _device() -> torch.device | int:
    return torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
