"""The microbatch that a rank sees: plain or with separated documents, on each stage and rank.

The ranks of a layout are played one after the other in this process: broadcasts are recorded on
tensor-parallel rank 0 and played back on the others.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch.utils.data import default_collate

from megatron_msa.data import batch as batch_module
from megatron_msa.data.batch import Batch, get_batch, max_seqlen_bound, packed_seq_params
from megatron_msa.data.datasets import build_datasets
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig

MakeArgs = Callable[..., argparse.Namespace]
MakeDataset = Callable[..., str]

SEQ = 16


class Rank:
    """Sets what Megatron's parallel state answers; broadcasts go through a recording."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.recorded: list[torch.Tensor] = []
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.distributed, "broadcast", self._broadcast)
        self.be()

    def be(
        self, *, tp: int = 0, tp_size: int = 1, pp: int = 0, pp_size: int = 1, cp: int = 0, cp_size: int = 1
    ):
        self.tp = tp
        if tp == 0:
            self.recorded = []
        self.played = 0
        answers = {
            "get_tensor_model_parallel_rank": tp,
            "get_tensor_model_parallel_world_size": tp_size,
            "get_tensor_model_parallel_src_rank": 0,
            "get_tensor_model_parallel_group": None,
            "get_context_parallel_world_size": cp_size,
            "get_context_parallel_rank": cp,
            "get_pipeline_model_parallel_world_size": pp_size,
            "get_pipeline_model_parallel_rank": pp,
        }
        for name, value in answers.items():
            self.patch.setattr(parallel_state, name, lambda value=value: value)
        self.patch.setattr(parallel_state, "is_pipeline_first_stage", lambda **_: pp == 0)
        self.patch.setattr(parallel_state, "is_pipeline_last_stage", lambda **_: pp == pp_size - 1)

    def _broadcast(self, tensor: torch.Tensor, source: int, group: object = None) -> None:
        if self.tp == 0:
            self.recorded.append(tensor.clone())
            return
        sent = self.recorded[self.played]
        self.played += 1
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Rank:
    return Rank(monkeypatch)


@pytest.fixture
def load(
    make_args: MakeArgs, make_dataset: MakeDataset, byte_tokenizer: Any
) -> Callable[..., tuple[argparse.Namespace, list[dict[str, torch.Tensor]]]]:
    """Collated microbatches of a dataset with documents of the given lengths."""

    def run(lengths: list[int], *flags: str) -> tuple[argparse.Namespace, list[dict[str, torch.Tensor]]]:
        args = make_args("--data-path", make_dataset("data", lengths), "--split", "1,0,0", *flags)
        train, _, _ = build_datasets(args, byte_tokenizer, (None, 0, 0))
        size = args.micro_batch_size
        samples = [train[index] for index in range(len(train))]
        groups = [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]
        assert groups
        return args, [default_collate(group) for group in groups]

    return run


NOT_HELD = {
    *(("first", name) for name in ("labels", "loss_mask")),
    *(("last", name) for name in ("tokens", "position_ids")),
}
MASKING = "--dataloader-inter-document-masking"


def copies(batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """A data iterator over one batch, as Megatron's helpers change the dict that they get."""
    return iter([dict(batch)])


def test_plain_batches_arrive_as_they_are(rank: Rank, load: Any) -> None:
    args, batches = load([100, 80])
    for source in batches:
        batch = get_batch(copies(source), args)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            torch.testing.assert_close(getattr(batch, name), source[name])
        assert batch.tokens is not None
        assert batch.tokens.shape == (2, SEQ)
        assert batch.attention_mask is None
        assert batch.packed_seq_params is None


def test_text_with_placeholders_is_refused_where_a_model_sees_images(rank: Rank, load: Any) -> None:
    """Also without multimodal data: the model would take the placeholders for words."""
    args, (source, *_) = load([100, 80])
    vars(args).update(vars(VisionConfig(vision_mode="train", vision_image_token_id=7)))
    args.params_dtype = torch.float32
    assert get_batch(copies(source), args).visual_input is None
    source["tokens"][1, 3] = 7
    with pytest.raises(ConfigError, match=r"text data .* holds placeholder tokens \(7,\)"):
        get_batch(copies(source), args)
    args.vision_mode = "none"  # a text model has no placeholders
    assert get_batch(copies(source), args).visual_input is None


def offsets_by_hand(tokens: torch.Tensor, eod: int) -> list[int]:
    """Document offsets of [B, S] tokens laid end to end: a document ends after its eod or with its sample."""
    offsets = [0]
    for row, sample in enumerate(tokens.tolist()):
        start = row * len(sample)
        offsets += [start + index + 1 for index, token in enumerate(sample) if token == eod]
        if offsets[-1] != start + len(sample):
            offsets.append(start + len(sample))
    return offsets


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([200], id="one document longer than every sample"),
        pytest.param([SEQ] * 20, id="each document ends exactly with a sample"),
        pytest.param([SEQ + 1] * 20, id="documents one token longer than a sample"),
        pytest.param([SEQ - 1] * 20, id="documents one token shorter than a sample"),
        pytest.param([2] * 120, id="many tiny documents"),
        pytest.param([3, 40, 2, 2, 29, 5, 16, 33, 2, 64, 7, 31], id="mixed lengths"),
    ],
)
def test_documents_are_cut_exactly_at_their_ends(
    rank: Rank, load: Any, byte_tokenizer: Any, lengths: list[int], micro_batch_size: int
) -> None:
    args, batches = load(lengths, MASKING, "--micro-batch-size", str(micro_batch_size))
    total = micro_batch_size * SEQ
    for source in batches:
        batch = get_batch(copies(source), args)
        params = batch.packed_seq_params
        assert params is not None
        assert batch.tokens is not None
        assert batch.position_ids is not None
        assert params.qkv_format == "thd"
        assert params.cu_seqlens_q.dtype == torch.int32
        assert params.cu_seqlens_q is params.cu_seqlens_kv

        expected = offsets_by_hand(source["tokens"], byte_tokenizer.eod)
        assert params.cu_seqlens_q.tolist() == expected
        longest = max(end - start for start, end in pairwise(expected))
        assert isinstance(params.max_seqlen_q, int)
        assert longest <= params.max_seqlen_q == params.max_seqlen_kv <= total

        # Samples end to end, first one first; positions restart with each document.
        for name in ("tokens", "labels", "loss_mask"):
            torch.testing.assert_close(getattr(batch, name), source[name].reshape(1, total))
        positions = [index for a, b in pairwise(expected) for index in range(b - a)]
        assert batch.position_ids.tolist() == [positions]


def test_a_sample_that_starts_with_the_last_token_of_a_document(rank: Rank, load: Any) -> None:
    """Samples overlap by one token, so this one begins with a document of one token: the end marker."""
    args, batches = load([SEQ + 1, 200], MASKING, "--micro-batch-size", "1")
    starts = [batch["cu_seqlens"][0, :2].tolist() for batch in batches]
    assert [0, 1] in starts
    for source in batches:
        params = get_batch(copies(source), args).packed_seq_params
        assert params is not None
        assert params.cu_seqlens_q[-1] == SEQ


def test_rotary_positions_restart_with_each_document(rank: Rank) -> None:
    """Megatron's own RoPE, given these parameters, turns each document as if it stood alone."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    rope = RotaryEmbedding(kv_channels=8, rotary_percent=1.0, use_cpu_initialization=True, cp_group=group)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    for lengths in ([16], [1, 15], [15, 1], [9, 7], [1] * 16, [3, 4, 9], [16, 16], [8, 8, 16]):
        total = sum(lengths)
        offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        params = packed_seq_params(offsets, longest=max(lengths), samples=total // 16)
        table = rope(rope.get_rotary_seq_len(None, None, None, None, params), packed_seq=True)
        query = torch.randn(total, 2, 8, dtype=torch.float64)
        turned = apply_rotary_pos_emb(
            query, table.double(), config, cu_seqlens=params.cu_seqlens_q, cp_group=group
        )
        for part, result in zip(query.split(lengths), turned.split(lengths), strict=True):
            alone = apply_rotary_pos_emb(
                part.unsqueeze(1), table[: len(part)].double(), config, cp_group=group
            )
            torch.testing.assert_close(result, alone.squeeze(1))


def test_the_length_bound_takes_few_values_and_never_the_whole_pack() -> None:
    total = 4096
    bounds = {longest: max_seqlen_bound(longest, total) for longest in range(1, total + 1)}
    assert all(longest <= bound <= total for longest, bound in bounds.items())
    assert [longest for longest, bound in bounds.items() if bound == total] == [total]
    assert len(set(bounds.values())) <= math.log2(total) + 2


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("stage", ["only", "first", "middle", "last"])
def test_every_tensor_parallel_rank_gets_the_same_batch(
    rank: Rank, load: Any, stage: str, masking: bool
) -> None:
    micro_batch_size = 2 if stage == "only" else 1
    args, batches = load(
        [3, 40, 2, 29, 5, 64], *([MASKING] if masking else []), "--micro-batch-size", str(micro_batch_size)
    )
    pipeline = {"only": (0, 1), "first": (0, 3), "middle": (1, 3), "last": (2, 3)}[stage]
    got: list[Batch] = []
    for tp in (0, 1):
        rank.be(tp=tp, tp_size=2, pp=pipeline[0], pp_size=pipeline[1])
        needs_data = tp == 0 and (masking or stage != "middle")
        got.append(get_batch(copies(batches[0]) if needs_data else None, args))
    assert rank.played == len(rank.recorded)
    holds = {
        "only": {"tokens", "position_ids", "labels", "loss_mask"},
        "first": {"tokens", "position_ids"},
        "middle": set(),
        "last": {"labels", "loss_mask"},
    }[stage]
    for batch in got:
        names = ("tokens", "position_ids", "labels", "loss_mask")
        assert {name for name in names if getattr(batch, name) is not None} == holds
        assert (batch.packed_seq_params is not None) == masking
        for name in holds:
            expected = batches[0][name].reshape(1, -1) if masking else batches[0][name]
            torch.testing.assert_close(getattr(batch, name), expected)
    if masking:
        first, second = (batch.packed_seq_params for batch in got)
        assert first is not None
        assert second is not None
        assert first.cu_seqlens_q.tolist() == second.cu_seqlens_q.tolist()
        assert first.max_seqlen_q == second.max_seqlen_q


def test_the_middle_stage_has_the_documents_of_the_first(rank: Rank, load: Any) -> None:
    args, batches = load([3, 40, 2, 29, 5, 64], MASKING, "--micro-batch-size", "1")
    seen = []
    for pp in range(3):
        rank.be(pp=pp, pp_size=3)
        params = get_batch(copies(batches[0]), args).packed_seq_params
        assert params is not None
        seen.append((params.cu_seqlens_q.tolist(), params.max_seqlen_q))
    assert seen[0] == seen[1] == seen[2]


def test_multi_token_prediction_needs_tokens_on_the_last_stage(rank: Rank, load: Any) -> None:
    args, batches = load([100], "--mtp-num-layers", "1")
    rank.be(pp=1, pp_size=2)
    batch = get_batch(copies(batches[0]), args)
    assert batch.tokens is not None
    assert batch.labels is not None


def test_context_parallel_ranks_hold_two_mirrored_chunks(rank: Rank, load: Any) -> None:
    args, batches = load([100])
    # A blend adds a key that is no sequence.
    source = {**batches[0], "dataset_id": torch.tensor([0, 1])}
    args.msa_cp_layout = "zigzag"
    for cp, columns in ((0, [*range(0, 4), *range(12, 16)]), (1, [*range(4, 8), *range(8, 12)])):
        rank.be(cp=cp, cp_size=2)
        batch = get_batch(copies(source), args)
        for name in ("tokens", "labels", "loss_mask", "position_ids"):
            torch.testing.assert_close(getattr(batch, name), source[name][:, columns])


@pytest.mark.parametrize("setting", ["auto", "zigzag", "balanced"])
@pytest.mark.parametrize("stage", ["only", "first", "middle", "last"])
def test_context_parallel_ranks_share_out_packed_documents(
    rank: Rank, load: Any, stage: str, setting: str
) -> None:
    """Together the ranks hold every token once; all stages know all documents and whose tokens are whose."""
    samples = 2 if stage == "only" else 1
    args, batches = load([3, 40, 2, 29, 5, 64], MASKING, "--micro-batch-size", str(samples))
    args.msa_cp_layout = setting
    pipeline = {"only": (0, 1), "first": (0, 3), "middle": (1, 3), "last": (2, 3)}[stage]
    whole = get_batch(copies(batches[0]), args)
    assert whole.packed_seq_params is not None
    parts, owned = [], []
    for cp in range(4):
        rank.be(cp=cp, cp_size=4, pp=pipeline[0], pp_size=pipeline[1])
        parts.append(get_batch(copies(batches[0]), args))
        params = parts[-1].packed_seq_params
        assert params is not None
        assert torch.equal(params.cu_seqlens_q, whole.packed_seq_params.cu_seqlens_q)
        layout = params.msa_token_layout  # type: ignore[attr-defined]
        assert layout.rank == cp
        owned.append(layout.local)
        assert params.tokens_per_sample == (SEQ // 4 if samples > 1 and setting == "zigzag" else None)
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        values = [getattr(part, name) for part in parts]
        assert (values[0] is None) == (stage == "middle" or (stage, name) in NOT_HELD)
        if values[0] is not None:
            together = torch.empty_like(getattr(whole, name))
            together[:, torch.cat(owned)] = torch.cat(values, dim=1)
            assert torch.equal(together, getattr(whole, name))


def test_samples_are_marked_for_moe_only_where_ranks_hold_whole_ones(rank: Rank) -> None:
    offsets = torch.tensor([0, 5, 16, 32, 48, 64], dtype=torch.int32)
    assert packed_seq_params(offsets, longest=16, samples=4).tokens_per_sample == 16
    rank.be(tp_size=2)
    assert packed_seq_params(offsets, longest=16, samples=4).tokens_per_sample == 16
    rank.be(tp_size=8)
    assert packed_seq_params(offsets, longest=16, samples=4).tokens_per_sample is None
    rank.be()
    assert packed_seq_params(offsets[:3], longest=11, samples=1).tokens_per_sample is None


def test_evaluation_may_use_another_micro_batch(rank: Rank, load: Any) -> None:
    args, batches = load([200])
    args.micro_batch_size = 4
    for tp in (0, 1):
        rank.be(tp=tp, tp_size=2)
        batch = get_batch(copies(batches[0]) if tp == 0 else None, args, evaluating=True)
        assert batch.tokens is not None
        assert batch.tokens.shape == (2, SEQ)


def test_a_missing_iterator_or_missing_offsets_are_explained(rank: Rank, load: Any) -> None:
    args, batches = load([100])
    with pytest.raises(ConfigError, match="no data iterator"):
        get_batch(None, args)
    args.dataloader_inter_document_masking = True
    with pytest.raises(ConfigError, match="built without --dataloader-inter-document-masking"):
        get_batch(copies(batches[0]), args)


def test_a_custom_pipeline_layout_is_parsed_once(
    monkeypatch: pytest.MonkeyPatch, make_args: MakeArgs
) -> None:
    batch_module._parse_layout.cache_clear()
    args = make_args(pipeline_model_parallel_layout="Et|t|tmL", pipeline_model_parallel_size=3)
    first = batch_module.BatchSettings.from_args(args)
    assert first.pipeline_layout is batch_module.BatchSettings.from_args(args).pipeline_layout
