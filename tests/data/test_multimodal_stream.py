"""Multimodal sequences: deterministic, split over ranks, resumable, and honest about bad samples."""

import itertools
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_msa.data.multimodal.checks import check_multimodal_data, prepare_args
from megatron_msa.data.multimodal.counts import Counts, DataCounts
from megatron_msa.data.multimodal.format import Sample, Text, Visual
from megatron_msa.data.multimodal.loaders import LoaderFactory, Place, read_state
from megatron_msa.data.multimodal.mixture import TextSource, collate, mix, multimodal_before
from megatron_msa.data.multimodal.packing import TrainingSequence
from megatron_msa.data.multimodal.shards import list_shards
from megatron_msa.data.multimodal.stream import SequenceStream, StreamSettings, read_samples
from megatron_msa.errors import ConfigError
from tests.data.multimodal_samples import (
    EOD,
    IMAGE,
    SEQ_LENGTH,
    VIDEO,
    ByteTokenizer,
    encoder,
    picture,
    run_args,
    samples,
    written,
)

TORN = Sample("torn", (Text("a"), Visual((picture(16, 16)[:400],))))
LONG = Sample("long", (Text("a" * 100),))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(tmp_path_factory.mktemp("multimodal"))


def stream(path: str, **settings) -> SequenceStream:
    settings = {"part": "train", "seed": 1, "packing_buffer": 5, "shuffle_buffer": 3, **settings}
    return SequenceStream(
        StreamSettings(path=path, **settings), encoder(), filler=EOD, placeholder_ids=(IMAGE, VIDEO)
    )


def take(sequences, count: int) -> list[TrainingSequence]:
    return list(itertools.islice(sequences, count))


def equal(one: TrainingSequence, other: TrainingSequence) -> bool:
    tensors = (one.grid_thw, one.patches, *one.values.values())
    others = (other.grid_thw, other.patches, *other.values.values())
    return (
        one.keys == other.keys
        and one.counts == other.counts
        and all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
    )


def first_epoch(sequences, samples: int) -> list[str]:
    """The keys of a stream until it has given as many as there are."""
    keys: list[str] = []
    while len(keys) < samples:
        keys += next(sequences).keys
    return keys


# -- order ---------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_sequences_and_another_seed_another_order(path):
    one, again, other = (take(stream(path, seed=seed), 6) for seed in (1, 1, 2))
    assert all(equal(a, b) for a, b in zip(one, again, strict=True))
    assert [each.keys for each in one] != [each.keys for each in other]


def test_an_epoch_has_every_sample_once(path):
    keys = Counter(first_epoch(stream(path), 10 * 24))
    assert set(keys) == {each.key for each in samples(24)}
    # The buffers hold up to 8 samples back: the last epoch is not complete and the next one has begun.
    assert max(keys.values()) - min(keys.values()) <= 2
    assert sum(abs(count - 10) for count in keys.values()) <= 2 * 8


def test_validation_reads_its_part_in_order_and_again_from_the_start(path):
    keys = first_epoch(stream(path, part="val"), 12)
    assert keys[:6] == keys[6:]
    assert sorted(keys[:6]) == [each.key for each in samples(6, start=900)]


def test_samples_are_read_once_and_in_order(path):
    found = list(read_samples(path, "val"))
    assert found == samples(6, start=900)
    with pytest.raises(ConfigError, match="has no part 'test'"):
        next(read_samples(path, "test"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_samples_out(path, ranks):
    parts = [set(first_epoch(stream(path, rank=rank, ranks=ranks), 120)) for rank in range(ranks)]
    assert set.union(*parts) == {each.key for each in samples(24)}
    assert sum(len(part) for part in parts) == 24


@pytest.mark.parametrize("before", [0, 1, 4, 13])
def test_a_restored_stream_continues_like_the_one_that_was_not_interrupted(path, before):
    """In the middle of an epoch, with samples in both buffers, and beyond an epoch (about 6 sequences)."""
    uninterrupted = stream(path)
    take(uninterrupted, before)
    state = pickle.dumps(uninterrupted.save_state())
    restored = stream(path)
    restored.restore_state(pickle.loads(state))
    assert all(equal(a, b) for a, b in zip(take(restored, 9), take(uninterrupted, 9), strict=True))


def test_workers_that_read_change_nothing_about_resuming(path):
    uninterrupted = stream(path, workers=2)
    take(uninterrupted, 3)
    state = pickle.dumps(uninterrupted.save_state())
    restored = stream(path, workers=2)
    restored.restore_state(pickle.loads(state))
    assert all(equal(a, b) for a, b in zip(take(restored, 5), take(uninterrupted, 5), strict=True))


# -- what cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [TORN, LONG], ids=["corrupt", "too-long"])
def test_a_bad_sample_stops_the_run_with_its_key(bad, tmp_path):
    sequences = stream(written(tmp_path, count=4, extra=[bad]))
    with pytest.raises(Exception, match=f"sample {bad.key}: "):
        take(sequences, 5)


@pytest.mark.parametrize("pixels", ["all", "check"])
def test_bad_samples_are_skipped_counted_and_named(pixels, tmp_path, capsys):
    sequences = take(
        stream(written(tmp_path, count=8, extra=[TORN, LONG]), skip_errors=True, pixels=pixels), 30
    )
    keys = Counter(key for each in sequences for key in each.keys)
    assert not {"torn", "long"} & set(keys)
    # Every epoch meets each of the two once.
    epochs = sum(keys.values()) / 8
    assert abs(sum(each.counts.skipped_samples for each in sequences) - 2 * epochs) <= 4
    shown = capsys.readouterr().err
    assert "WARNING: skipped sample torn: visual 1: an image is corrupt" in shown
    assert "WARNING: skipped sample long: has 100 tokens" in shown


def test_stages_without_pixels_see_the_same_sequences(tmp_path):
    path = written(tmp_path, count=8, extra=[TORN])
    everything, checked = (take(stream(path, skip_errors=True, pixels=each), 8) for each in ("all", "check"))
    for one, other in zip(everything, checked, strict=True):
        assert one.keys == other.keys
        assert all(torch.equal(one.values[name], other.values[name]) for name in one.values)
        assert other.patches is None
    # Without decoding nobody finds the corrupt one.
    unchecked = take(stream(path, pixels="none"), 8)
    assert "torn" in {key for each in unchecked for key in each.keys}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("content", [b"\0", b"\x7f"], ids=["zeros", "noise"])
def test_a_shard_whose_content_is_lost_stops_the_run_with_its_name(skip, content, tmp_path):
    path = written(tmp_path)
    shard = Path(path) / "train-000002.tar"
    shard.write_bytes(content * shard.stat().st_size)
    with pytest.raises(ConfigError, match=r"the shard \S+train-000002\.tar cannot be read at byte \d+"):
        take(stream(path, skip_errors=skip), 20)


def test_data_of_nothing_but_bad_samples_stops_the_run(tmp_path):
    bad = [Sample(f"bad{number}", (Text("a" * 100),)) for number in range(3)]
    sequences = stream(written(tmp_path, count=0, extra=bad), skip_errors=True)
    with pytest.raises(Exception, match=r"100 multimodal samples in a row .*; the last: sample bad"):
        next(sequences)


@pytest.mark.timeout(60)  # it would read for ever
@pytest.mark.parametrize("buffer", [1, 5, 150])
def test_data_of_nothing_but_torn_images_stops_the_run(buffer, tmp_path):
    """Their headers are good, so that every one of them finds a place in a sequence before it is decoded."""
    torn = [Sample(f"torn{number}", TORN.pieces) for number in range(7)]
    path = written(tmp_path, count=0, extra=torn)
    sequences = stream(path, skip_errors=True, packing_buffer=buffer)
    with pytest.raises(Exception, match=r"100 multimodal samples in a row .*; the last: sample torn"):
        next(sequences)


# -- the mixture with text -----------------------------------------------------------------------------------


class TextData:
    """Sequence n holds nothing but the number n."""

    def __init__(self, token: int | None = None) -> None:
        self._token = token

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = torch.full((SEQ_LENGTH,), number if self._token is None else self._token)
        offsets = torch.full((SEQ_LENGTH + 1,), SEQ_LENGTH, dtype=torch.int32)
        offsets[0] = 0
        return {
            "tokens": tokens,
            "labels": tokens,
            "loss_mask": torch.ones(SEQ_LENGTH),
            "position_ids": torch.arange(SEQ_LENGTH),
            "cu_seqlens": offsets,
            "max_seqlen": torch.tensor(SEQ_LENGTH, dtype=torch.int32),
        }


@pytest.mark.parametrize("weight", [0.25, 1 / 3, 0.7])
def test_the_shares_of_the_mixture_are_exact_over_every_stretch(path, weight):
    share = Fraction(weight).limit_denominator(10**6)
    text = TextSource(TextData(), rank=1, ranks=2, placeholder_ids=(IMAGE,))
    sequences = take(mix(stream(path), text, share), 60)
    multimodal = [bool(each.keys) for each in sequences]
    for end in range(61):
        assert sum(multimodal[:end]) == int(end * share) == multimodal_before(end, share)
    # The text comes in order and without gaps: rank 1 of 2 has every second sequence.
    numbers = [int(each.values["tokens"][0]) for each in sequences if not each.keys]
    assert numbers == [1 + 2 * number for number in range(len(numbers))]


def test_a_mixture_continues_where_it_was(path):
    share = Fraction(1, 3)
    text = TextSource(TextData(), rank=0, ranks=1, placeholder_ids=(IMAGE,))
    whole = take(mix(stream(path), text, share), 12)
    rest = stream(path)
    take(rest, multimodal_before(7, share))
    continued = take(mix(rest, text, share, start=7), 5)
    for one, other in zip(whole[7:], continued, strict=True):
        assert torch.equal(one.values["tokens"], other.values["tokens"])


def test_text_that_holds_placeholders_is_refused():
    text = TextSource(TextData(IMAGE), rank=0, ranks=1, placeholder_ids=(IMAGE, VIDEO))
    with pytest.raises(ConfigError, match=r"text data .* holds placeholder tokens \(258, 259\)"):
        text[0]


def test_a_microbatch_has_the_visuals_of_its_samples_in_order(path):
    one, other = take(stream(path), 2)
    text = TextSource(TextData(), rank=0, ranks=1, placeholder_ids=(IMAGE,))[0]
    batch = collate([one, text, other])
    assert batch["tokens"].shape == (3, SEQ_LENGTH)
    assert batch["cu_seqlens"].shape == (3, SEQ_LENGTH + 1)
    assert torch.equal(batch["patches"], torch.cat([one.patches, other.patches]))
    assert torch.equal(batch["grid_thw"], torch.cat([one.grid_thw, other.grid_thw]))
    assert int((batch["tokens"] == IMAGE).sum()) == int(batch["grid_thw"].prod(1).sum()) // 4
    only_text = collate([text])
    assert only_text["patches"] is None
    assert only_text["grid_thw"].shape == (0, 3)


# -- loaders -------------------------------------------------------------------------------------------------


def loader_factory(path: str, rank: int = 0, ranks: int = 1, **values) -> LoaderFactory:
    return LoaderFactory(run_args(path, **values), ByteTokenizer(), Place(rank=rank, ranks=ranks))


def saved(tmp_path: Path, loader, iteration: int, rank: int = 0) -> str:
    """The state as Megatron writes it."""
    folder = tmp_path / f"iter_{iteration:07d}" / "mp_rank_00"
    folder.mkdir(parents=True)
    state = {"dataloader_state_dict": loader.save_state()}
    torch.save(state, folder / f"train_dataloader_dprank{rank:03d}.pt")
    return str(tmp_path)


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_continues_from_its_checkpoint_with_the_next_microbatch(path, tmp_path):
    uninterrupted = loader_factory(path).train(None)
    take(uninterrupted, 3)
    load = saved(tmp_path, uninterrupted, 3)
    resumed = loader_factory(path, load=load, iteration=3, consumed_train_samples=6).train(None)
    assert all(same(a, b) for a, b in zip(take(resumed, 4), take(uninterrupted, 4), strict=True))
    from_the_start = loader_factory(
        path, load=load, iteration=3, consumed_train_samples=6, multimodal_restart=True
    ).train(None)
    assert same(next(from_the_start), next(loader_factory(path).train(None)))


def test_a_run_continues_with_longer_sequences(path, tmp_path):
    buffer = {"multimodal_packing_buffer": 20}
    loader = loader_factory(path, **buffer).train(None)
    take(loader, 3)
    values = {"load": saved(tmp_path, loader, 3), "iteration": 3, "consumed_train_samples": 6, **buffer}
    longer = loader_factory(path, seq_length=2 * SEQ_LENGTH, **values).train(None)
    # What was packed when the state was saved comes first, then longer sequences.
    most, most_before = (
        max(int((batch["cu_seqlens"].diff() > 0).sum()) for batch in take(each, 6))
        for each in (longer, loader)
    )
    assert most > most_before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"multimodal_packing_buffer": 6}, "other --multimodal-packing-buffer 5, now 6"),
        ({"num_workers": 1}, "other --num-workers 0, now 1"),
        ({"multimodal_min_pixels": 256}, "other --multimodal-min-pixels 16, now 256"),
        ({"multimodal_max_pixels": 512}, "other --multimodal-max-pixels 1024, now 512"),
        ({"seq_length": 24}, "packed for --seq-length 64, .* may not fit into 24"),
        ({"consumed_train_samples": 8}, "saved after 6 sequences .* counts 8"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(path, tmp_path, values, message):
    loader = loader_factory(path).train(None)
    take(loader, 3)
    resumed = {"load": saved(tmp_path, loader, 3), "iteration": 3, "consumed_train_samples": 6, **values}
    with pytest.raises(ConfigError, match=message):
        loader_factory(path, **resumed).train(None)


def test_a_state_of_other_ranks_or_other_data_is_refused(path, tmp_path):
    loader = loader_factory(path).train(None)
    take(loader, 3)
    values = {"load": saved(tmp_path, loader, 3), "iteration": 3, "consumed_train_samples": 12}
    with pytest.raises(ConfigError, match="other data-parallel size 1, now 2"):
        loader_factory(path, ranks=2, **values).train(None)
    with pytest.raises(ConfigError, match="no state of the multimodal data for data-parallel rank 1"):
        loader_factory(path, rank=1, ranks=2, **values).train(None)
    other = written(tmp_path, count=25)
    with pytest.raises(ConfigError, match="read with other shards"):
        loader_factory(other, **{**values, "consumed_train_samples": 6}).train(None)


def test_one_process_counts_and_saves_for_a_data_parallel_rank(path):
    counts = DataCounts()
    place = Place(rank=0, ranks=1, leads=False)
    loader = LoaderFactory(run_args(path), ByteTokenizer(), place).train(None, counts)
    assert same(next(loader), next(loader_factory(path).train(None)))
    assert loader.save_state() is None
    assert counts.counts == Counts()


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no state of the multimodal data .*--multimodal-restart"):
        read_state(str(tmp_path), 3, 0)


def test_every_evaluation_reads_the_same(path):
    # Two evaluations of two microbatches.
    batches = take(loader_factory(path, eval_iters=1).evaluation("val", None), 4)
    assert same(batches[0], batches[2])
    assert same(batches[1], batches[3])


def test_counts_are_summed_and_begin_again(path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))  # as two equal ranks
    counts = DataCounts()
    batches = take(loader_factory(path).train(None, counts), 3)
    expected = Counts(
        sequences=12,
        documents=counts.counts.documents * 2,
        visuals=2 * sum(len(batch["grid_thw"]) for batch in batches),
        visual_tokens=2 * sum(int((batch["tokens"] == IMAGE).sum()) for batch in batches),
        padding_tokens=counts.counts.padding_tokens * 2,
    )
    assert counts.take("cpu") == vars(expected)
    assert counts.take("cpu") == vars(Counts())


# -- checks before a run -------------------------------------------------------------------------------------


def check(path: str, **values) -> None:
    check_multimodal_data(run_args(path, **values), ByteTokenizer())


def test_good_settings_pass(path):
    check(path, eval_iters=1)
    check(path, vision_mode="none", multimodal_blind=True)
    check(path, multimodal_weight=0.5, data_path=["text"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vision_mode": "none"}, "no encoder would see the images"),
        ({"multimodal_blind": True}, "--multimodal-blind with --vision-mode train"),
        ({"dataloader_inter_document_masking": False}, "needs --dataloader-inter-document-masking"),
        ({"calculate_per_token_loss": False}, "needs --calculate-per-token-loss"),
        ({"full_validation": True}, "--full-validation is set"),
        ({"virtual_pipeline_model_parallel_size": 2}, "--num-layers-per-virtual-pipeline-stage is set"),
        ({"multimodal_weight": 0.5}, "there is no text data"),
        ({"data_path": ["text"]}, "--multimodal-weight is 1"),
        ({"multimodal_weight": 1.5, "data_path": ["text"]}, "--multimodal-weight is 1.5"),
        ({"multimodal_weight": 1e-7, "data_path": ["text"]}, "1e-07, .* to no sequence at all: .* 1e-06"),
        ({"multimodal_min_pixels": 2000}, "--multimodal-min-pixels 2000 is above"),
        ({"multimodal_image_std": [0.0]}, "--multimodal-image-std is"),
        ({"vision_image_token_id": None}, "--vision-image-token-id is missing"),
        ({"data_parallel_size": 32}, "'train' of .* has 24 samples for 32 readers"),
        ({"multimodal_data_path": "nowhere"}, "--multimodal-data-path nowhere does not exist"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(path, values, message):
    with pytest.raises(ConfigError, match=message):
        check(path, **values)


def test_a_missing_part_a_missing_shard_and_a_short_one_are_found_before_the_run(tmp_path):
    path = written(tmp_path)
    with pytest.raises(ConfigError, match="has no part 'test'"):
        list_shards(path, "test")
    assert [shard.samples for shard in list_shards(path, "train")] == [5, 5, 5, 5, 4]
    shard = Path(path) / "train-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:5000])
    with pytest.raises(ConfigError, match=r"train-000002\.tar has 5000 bytes, but .* cut short"):
        check(path)
    shard.unlink()
    with pytest.raises(ConfigError, match=r"train-000002\.tar does not exist"):
        check(path)
    shard.write_bytes(content)
    for size in (0, 12):
        shard.with_suffix(".tar.idx").write_bytes(b"\0" * size)
        with pytest.raises(ConfigError, match=rf"train-000002\.tar\.idx of a shard has {size} bytes"):
            check(path)


def test_megatron_takes_our_loaders_and_saves_their_state(path):
    args = run_args(path, save="checkpoints")
    prepare_args(args)
    assert args.dataloader_type == "external"
    assert args.dataloader_save == "checkpoints"
    with pytest.raises(ConfigError, match="--dataloader-type is cyclic"):
        prepare_args(run_args(path, dataloader_type="cyclic"))
