"""The training, validation and test datasets, built by Megatron from Megatron's own data flags."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

from megatron_msa.data.batch import BatchSettings
from megatron_msa.data.checks import validate_data_paths
from megatron_msa.data.multimodal.counts import DataCounts

__all__ = ["build_datasets", "dataset_config_from_args", "make_datasets_provider", "validate_data_paths"]


def dataset_config_from_args(args: Any, tokenizer: Any) -> GPTDatasetConfig:
    """Megatron's dataset settings from its arguments.

    No dense attention mask is ever made ([S, S] per sample, 1 GiB at 32K): attention is causal by
    construction, and documents are separated through offsets (see `batch`). The entry must therefore set
    `args.create_attention_mask_in_dataloader = False`, which Megatron's loop reads too.
    """
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as stream:
            sequences_per_dataset = json.load(stream)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        object_storage_cache_path=args.object_storage_cache_path,
        sequences_per_dataset=sequences_per_dataset,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def build_datasets(
    args: Any, tokenizer: Any, num_samples: Sequence[int | None], *, vp_stage: int | None = None
) -> list[Any]:
    """Build the train, validation and test datasets on the ranks that read data.

    Every rank must call it: Megatron builds on rank 0 first and lets the others wait. The result holds None
    on ranks that read no data, and for splits without a share.

    Args:
        args: Megatron's arguments.
        tokenizer: the tokenizer of the run.
        num_samples: samples wanted from train, validation and test; None for one pass.
        vp_stage: this model chunk's virtual pipeline stage.
    """
    settings = BatchSettings.from_args(args)

    def is_built_on_rank() -> bool:
        # One rank of each tensor-parallel group reads; get_batch broadcasts to the rest.
        return parallel_state.get_tensor_model_parallel_rank() == 0 and settings.reads_data(vp_stage)

    dataset_class = MockGPTDataset if args.mock_data else GPTDataset
    config = dataset_config_from_args(args, tokenizer)
    return BlendedMegatronDatasetBuilder(dataset_class, list(num_samples), is_built_on_rank, config).build()


def make_datasets_provider(
    args: Any, get_tokenizer: Callable[[], Any], data_counts: DataCounts | None = None
) -> Callable[..., list[Any]]:
    """The `train_valid_test_datasets_provider` that Megatron's `pretrain()` takes.

    Args:
        args: Megatron's arguments.
        get_tokenizer: returns the run's tokenizer; called when the datasets are built, because Megatron
            builds the tokenizer after the provider is handed over. Training passes
            `megatron.training.get_tokenizer`.
        data_counts: where multimodal data is counted.
    """

    def train_valid_test_datasets_provider(
        train_val_test_num_samples: Sequence[int | None], vp_stage: int | None = None
    ) -> list[Any]:
        train, valid, test = train_val_test_num_samples
        if getattr(args, "multimodal_data_path", None) is not None:
            return _build_multimodal(args, get_tokenizer(), (train, valid, test), data_counts)
        if valid is not None and getattr(args, "eval_at_start", False):
            # Megatron counts the validations of the loop and the last one; without these samples the first
            # one would take those of the last, and its iterator would run dry.
            valid += args.eval_iters * args.eval_global_batch_size
        return build_datasets(args, get_tokenizer(), (train, valid, test), vp_stage=vp_stage)

    # Megatron then calls it on every rank, as the builder needs, and not on tensor-parallel rank 0 alone.
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    return train_valid_test_datasets_provider


def _build_multimodal(
    args: Any, tokenizer: Any, num_samples: Sequence[int | None], data_counts: DataCounts | None
) -> list[Any]:
    """The loaders of multimodal data, and of the text that is mixed in; Megatron takes them as they are."""
    # Imports Energon, which is optional.
    from megatron_msa.data.multimodal.loaders import LoaderFactory, Place

    factory = LoaderFactory(args, tokenizer, Place.of_this_process())
    train, valid, test = num_samples
    text: list[Any] = [None, None, None]
    if factory.config.share < 1:
        # Validation reads the same sequences each time.
        evaluation = args.eval_iters * args.eval_global_batch_size
        wanted = (train, valid and evaluation, test and evaluation)
        text = build_datasets(
            args, tokenizer, [each and max(1, factory.text_sequences(each)) for each in wanted]
        )
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return [None, None, None]
    return [
        None if args.skip_train else factory.train(text[0], data_counts),
        factory.evaluation("val", text[1]) if args.eval_iters and factory.has("val") else None,
        factory.evaluation("test", text[2]) if args.eval_iters and factory.has("test") else None,
    ]
