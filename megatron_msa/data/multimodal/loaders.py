"""What Megatron's training loop reads with --multimodal-data-path (`--dataloader-type external`).

Who reads: tensor-parallel rank 0 of every pipeline stage and context-parallel rank, as for text; ranks of the
same data-parallel rank read the same. Only the first pipeline stage needs pixels. The others read the headers
of the images; with --multimodal-on-error skip they decode too, so that all stages skip the same samples.

The state is saved by Megatron (`maybe_save_dataloader_state`) within the checkpoint's folder, one file for
each data-parallel rank, and lets a run continue in the middle of an epoch with the very next sequence.
Validation reads the same sequences each time, from the beginning of its part, and needs no state.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_msa.data.multimodal.config import MultimodalDataConfig
from megatron_msa.data.multimodal.counts import DataCounts
from megatron_msa.data.multimodal.encode import SampleEncoder
from megatron_msa.data.multimodal.images import ImageSettings
from megatron_msa.data.multimodal.mixture import TextSource, microbatches, mix, multimodal_before
from megatron_msa.data.multimodal.shards import Shard, has_part, list_shards
from megatron_msa.data.multimodal.stream import SequenceStream, StreamSettings
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.config import VisionConfig, vision_field_names

_STATE_FORMAT = 2


@dataclass(frozen=True)
class Place:
    """This process among those that read."""

    rank: int
    """Of the data-parallel group without context parallelism."""
    ranks: int
    is_first_stage: bool = True
    leads: bool = True
    """Whether it counts and saves for its data-parallel rank, of which others read the same."""

    @classmethod
    def of_this_process(cls) -> Place:
        first_stage = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        return cls(
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            is_first_stage=first_stage,
            leads=first_stage
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0,
        )


class TrainLoader:
    """An endless iterator of a rank's microbatches, with the state that Megatron saves.

    Args:
        stream: multimodal sequences.
        text: text sequences, None without.
        config: of the data.
        micro_batch_size: sequences of a microbatch.
        place: of this process.
        identity: what the data is; a state of other data is refused.
        seq_length: tokens of a sequence. The samples of sequences that wait in the state must fit into it.
        workers: processes that read.
        counts: where to count.
    """

    def __init__(
        self,
        stream: SequenceStream,
        text: TextSource | None,
        config: MultimodalDataConfig,
        *,
        micro_batch_size: int,
        place: Place,
        identity: list[tuple[str, int]],
        seq_length: int,
        workers: int = 0,
        counts: DataCounts | None = None,
    ) -> None:
        self._stream = stream
        self._text = text
        self._share = config.share
        self._size = micro_batch_size
        self._place = place
        self._count = counts.add if counts is not None and place.leads else None
        self._settings = {
            "format": _STATE_FORMAT,
            "shards": identity,
            "data-parallel size": place.ranks,
            "--num-workers": workers,
            "--multimodal-weight": config.multimodal_weight,
            "--multimodal-packing-buffer": config.multimodal_packing_buffer,
            "--multimodal-shuffle-buffer": config.multimodal_shuffle_buffer,
            # Of other sizes are other numbers of tokens, and the sequences that wait no longer fit.
            "--multimodal-min-pixels": config.multimodal_min_pixels,
            "--multimodal-max-pixels": config.multimodal_max_pixels,
        }
        self._seq_length = seq_length
        self.sequences = 0
        """That this rank has read since training began."""
        self._batches: Iterator[dict[str, Any]] | None = None

    def start_at(self, sequences: int, state: dict[str, Any] | None) -> None:
        """Continue behind ``sequences`` sequences; before reading.

        Args:
            sequences: that this rank has read since training began.
            state: of the stream after them, as saved; None to read it from its beginning.

        Raises:
            ConfigError: the state is of other data or another layout.
        """
        self.sequences = sequences
        if state is None:
            return
        for name, value in self._settings.items():
            if state["settings"].get(name) != value:
                shown = "" if name == "shards" else f" {state['settings'].get(name)}, now {value}"
                raise ConfigError(
                    f"the multimodal data of the checkpoint was read with other {name}{shown}, so its "
                    "place in the data means nothing here; use the same, or --multimodal-restart to read the "
                    "data from its beginning"
                )
        if state["seq_length"] > self._seq_length:
            raise ConfigError(
                f"the multimodal data of the checkpoint was packed for --seq-length {state['seq_length']}, "
                f"and what waits in it may not fit into {self._seq_length}: use at least the same, or "
                "--multimodal-restart to read the data from its beginning"
            )
        if state["sequences"] != sequences:
            raise ConfigError(
                f"the state of the multimodal data was saved after {state['sequences']} sequences of each "
                f"rank, but the checkpoint counts {sequences} (consumed samples over data-parallel size): "
                "they are not of the same iteration"
            )
        self._stream.restore_state(state["stream"])

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._batches is None:
            sequences = mix(self._stream, self._text, self._share, start=self.sequences)
            self._batches = microbatches(sequences, self._size, self._count)
        batch = next(self._batches)
        self.sequences += self._size
        return batch

    def save_state(self) -> dict[str, Any] | None:
        """Called by Megatron when it saves a checkpoint, on every rank that writes the same file."""
        if not self._place.leads:
            return None
        return {
            "settings": self._settings,
            "seq_length": self._seq_length,
            "sequences": self.sequences,
            "stream": self._stream.save_state(),
        }


def repeated(make: Callable[[], Iterator[dict[str, Any]]], length: int) -> Iterator[dict[str, Any]]:
    """The first ``length`` microbatches again and again: one evaluation each time."""
    while True:
        batches = make()
        for _ in range(length):
            yield next(batches)


class LoaderFactory:
    """Builds the loaders of a run.

    Args:
        args: Megatron's arguments.
        tokenizer: of the run.
        place: of this process.

    Raises:
        ConfigError: settings or data that cannot be used.
    """

    def __init__(self, args: Any, tokenizer: Any, place: Place) -> None:
        config = MultimodalDataConfig.from_args(args)
        assert config is not None
        self.args, self.config, self.place = args, config, place
        # With --vision-mode none, too: the blind control reads the same samples.
        vision = VisionConfig(**{name: getattr(args, name) for name in vision_field_names()})
        self._ids = vision.placeholder_ids
        self._filler = tokenizer.eod
        self.encoder = SampleEncoder(
            tokenizer, ImageSettings.build(config, vision), vision, seq_length=args.seq_length
        )

    def shards(self, part: str) -> list[Shard]:
        """The shards of a part of the data, checked."""
        path = str(self.config.multimodal_data_path)
        shards = list_shards(path, part)
        samples = sum(shard.samples for shard in shards)
        readers = self.place.ranks * max(1, self.args.num_workers)
        if samples < readers:
            raise ConfigError(
                f"the part {part!r} of {path} has {samples} samples for {readers} readers (data-parallel "
                "ranks times --num-workers), and each needs one; use fewer workers or more data"
            )
        return shards

    def has(self, part: str) -> bool:
        """Whether the data has this part."""
        return has_part(str(self.config.multimodal_data_path), part)

    def stream(self, part: str) -> tuple[SequenceStream, list[tuple[str, int]]]:
        """The sequences of a part of the data, and what identifies the data."""
        config, place = self.config, self.place
        shards = self.shards(part)
        pixels = "all"
        if config.multimodal_blind or not place.is_first_stage:
            pixels = "check" if config.multimodal_on_error == "skip" else "none"
        settings = StreamSettings(
            path=str(config.multimodal_data_path),
            part=part,
            seed=self.args.seed,
            rank=place.rank,
            ranks=place.ranks,
            workers=self.args.num_workers,
            packing_buffer=config.multimodal_packing_buffer,
            shuffle_buffer=config.multimodal_shuffle_buffer,
            skip_errors=config.multimodal_on_error == "skip",
            pixels=pixels,
        )
        stream = SequenceStream(settings, self.encoder, filler=self._filler, placeholder_ids=self._ids)
        return stream, [(shard.name, shard.samples) for shard in shards]

    def train(self, text: Sequence[Any] | None, counts: DataCounts | None = None) -> TrainLoader:
        """The training data, at the place where the checkpoint left it."""
        args = self.args
        stream, identity = self.stream("train")
        loader = TrainLoader(
            stream,
            self._text(text),
            self.config,
            micro_batch_size=args.micro_batch_size,
            place=self.place,
            identity=identity,
            seq_length=args.seq_length,
            workers=args.num_workers,
            counts=counts,
        )
        state = None
        if args.iteration and not self.config.multimodal_restart:
            state = read_state(args.load, args.iteration, self.place.rank)
        loader.start_at(args.consumed_train_samples // self.place.ranks, state)
        return loader

    def evaluation(self, part: str, text: Sequence[Any] | None) -> Iterator[dict[str, Any]]:
        """The microbatches of every validation or test, the same each time."""
        args = self.args

        def make() -> Iterator[dict[str, Any]]:
            stream, _ = self.stream(part)
            return microbatches(mix(stream, self._text(text), self.config.share), args.eval_micro_batch_size)

        per_rank = args.eval_iters * args.eval_global_batch_size // self.place.ranks
        return repeated(make, per_rank // args.eval_micro_batch_size)

    def text_sequences(self, sequences: int) -> int:
        """Of so many sequences of all ranks: how many are text."""
        per_rank = -(-sequences // self.place.ranks)
        return (per_rank - multimodal_before(per_rank, self.config.share)) * self.place.ranks

    def _text(self, dataset: Sequence[Any] | None) -> TextSource | None:
        if dataset is None:
            return None
        place = self.place
        return TextSource(dataset, rank=place.rank, ranks=place.ranks, placeholder_ids=self._ids)


def read_state(load: str, iteration: int, rank: int) -> dict[str, Any]:
    """The state that Megatron saved for a data-parallel rank.

    Raises:
        ConfigError: there is none.
    """
    folder = Path(load) / f"iter_{iteration:07d}"
    # The name of the folder in between depends on the pipeline size of the run that saved.
    found = glob.glob(f"{glob.escape(str(folder))}/mp_rank_*/train_dataloader_dprank{rank:03d}.pt")
    if not found:
        raise ConfigError(
            f"{folder} has no state of the multimodal data for data-parallel rank {rank}: it was saved by "
            "a run without --multimodal-data-path or with fewer data-parallel ranks. Use the same layout, or "
            "--multimodal-restart to read the data from its beginning"
        )
    # Energon's state is made of its own classes. It is as trustworthy as the checkpoint that it lies in.
    return torch.load(sorted(found)[0], weights_only=False)["dataloader_state_dict"]
