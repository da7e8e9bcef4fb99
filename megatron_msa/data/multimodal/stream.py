"""Shards -> training sequences, through Megatron-Energon.

Energon reads WebDataset shards in a random order that follows from the seed, gives each data-parallel rank
and each of its workers its own part, repeats the data for ever, and can save and restore its place: which
slices of which shards are open, and which samples wait in the shuffling and packing buffers. This module says
how a sample becomes a part of a sequence, and what happens to one that cannot be used.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    SavableDataLoader,
    SkipSample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    stateless,
)
from megatron.energon.errors import reraise_exception
from megatron.energon.wrappers import RepeatDataset

from megatron_msa.data.multimodal.counts import Counts
from megatron_msa.data.multimodal.encode import Document, Measured, SampleEncoder
from megatron_msa.data.multimodal.format import Sample as Unencoded
from megatron_msa.data.multimodal.format import SampleError, parse
from megatron_msa.data.multimodal.packing import TrainingSequence, choose, join
from megatron_msa.data.multimodal.shards import energon_refusals, name_shards_in_errors
from megatron_msa.errors import ConfigError

# With --multimodal-on-error skip: so many unusable samples in a row are no accident.
_BAD_IN_A_ROW = 100
_SHOWN = 100


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What a stream of sequences is made of.

    Attributes:
        path: folder of an Energon dataset, or a metadataset.
        part: "train", "val" or "test". Only "train" is shuffled.
        rank: of the data-parallel group without context parallelism, as `ranks`.
        workers: processes that read, in each rank; 0: this process reads.
        skip_errors: leave unusable samples out instead of stopping.
        pixels: what this rank needs: "all", "none", or "check" (decode, to skip what other ranks skip).
    """

    path: str
    part: str
    seed: int
    rank: int = 0
    ranks: int = 1
    workers: int = 0
    packing_buffer: int = 256
    shuffle_buffer: int = 256
    skip_errors: bool = False
    pixels: str = "all"


@edataclass
class _Raw(Sample):
    members: dict


@edataclass
class _Measured(Sample):
    value: Measured

    @property
    def length(self) -> int:
        return self.value.length


@edataclass
class _Decoded(Sample):
    value: Document


@edataclass
class _Packed(Sample):
    value: TrainingSequence


@stateless
def _cook(crude: dict) -> _Raw:
    members = {name: data for name, data in crude.items() if not name.startswith("__")}
    return _Raw(**basic_sample_keys(crude), members=members)


class BadSamples:
    """Stops or skips at samples that cannot be used, as configured.

    One for each process that reads.
    """

    def __init__(self, *, skip: bool) -> None:
        self._skip = skip
        self._in_a_row = {"measure": 0, "decode": 0}
        self._seen = 0
        self.skipped = 0
        """Since the last `take`."""

    @contextlib.contextmanager
    def handled(self, step: str) -> Iterator[None]:
        """Around what may raise a `SampleError`.

        Args:
            step: "measure" or "decode". Each has a row of its own: a torn image has a good header, so that
                samples which all fail to decode have all been measured before.

        Raises:
            SampleError: without skipping, or with too many in a row.
            SkipSample: Energon then goes on with the next sample.
        """
        try:
            yield
        except SampleError as error:
            if not self._skip:
                raise
            self._in_a_row[step] += 1
            self._seen += 1
            self.skipped += 1
            if self._in_a_row[step] >= _BAD_IN_A_ROW:
                raise ConfigError(
                    f"{self._in_a_row[step]} multimodal samples in a row cannot be used; the last: {error}"
                ) from error
            if self._seen <= _SHOWN:
                more = "; further ones are only counted" if self._seen == _SHOWN else ""
                print(f"WARNING: skipped {error}{more}", file=sys.stderr, flush=True)
            raise SkipSample from error
        self._in_a_row[step] = 0

    def take(self) -> int:
        """How many were skipped since the last call."""
        skipped, self.skipped = self.skipped, 0
        return skipped


class _Encoder(DefaultTaskEncoder):
    """Energon's view of `SampleEncoder` and `packing`."""

    decoder = None  # files stay bytes until a sample has its place in a sequence
    cookers: ClassVar[list[Cooker]] = [Cooker(_cook)]

    def __init__(self, encoder: SampleEncoder, settings: StreamSettings, filler: int, ids: tuple[int, ...]):
        super().__init__()
        self._encoder = encoder
        self._pixels = settings.pixels
        self._bad = BadSamples(skip=settings.skip_errors)
        self._filler, self._ids = filler, ids

    @stateless
    def preencode_sample(self, sample: _Raw) -> _Measured:
        with self._bad.handled("measure"):
            value = self._encoder.measure(parse(sample.__key__, sample.members))
        return _Measured.derive_from(sample, value=value)

    def build_batch(self, *args: Any, **kwargs: Any) -> Any:
        packing = super().build_batch(*args, **kwargs)
        fill = packing._fill_reading_buffer
        # Each process would show a progress bar while it fills its buffer for the first time.
        packing._fill_reading_buffer = lambda source, log_progress=False: fill(source)
        return packing

    def select_samples_to_pack(self, samples: list[_Measured]) -> list[list[_Measured]]:
        return choose(samples, self._encoder.seq_length)

    @stateless
    def postencode_sample(self, sample: _Measured) -> _Decoded:
        with self._bad.handled("decode"):
            if self._pixels == "none":
                value = self._encoder.without_pixels(sample.value)
            else:
                value = self._encoder.decode(sample.value)
                if self._pixels == "check":
                    value = self._encoder.without_pixels(sample.value)
        return _Decoded.derive_from(sample, value=value)

    @stateless
    def pack_selected_samples(self, samples: list[_Decoded]) -> _Packed:
        if not samples:  # all of them were skipped
            raise SkipSample
        sequence = join(
            [sample.value for sample in samples],
            seq_length=self._encoder.seq_length,
            filler=self._filler,
            placeholder_ids=self._ids,
        )
        sequence.counts.add(Counts(skipped_samples=self._bad.take()))
        return _Packed.derive_from(samples[0], value=sequence)


class _Reader(DefaultTaskEncoder):
    decoder = None
    cookers: ClassVar[list[Cooker]] = [Cooker(_cook)]


def read_samples(path: str, part: str) -> Iterator[Unencoded]:
    """The samples of one part of a dataset, each once, in its order.

    Raises:
        ConfigError: no such data or part, or a shard that cannot be read.
        SampleError: not in the format.
    """
    name_shards_in_errors()
    alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
    with energon_refusals(path, part):
        dataset = get_val_dataset(
            path, split_part=part, worker_config=alone, batch_size=None, task_encoder=_Reader()
        )
    for sample in get_loader(dataset):
        yield parse(sample.__key__, sample.members)


class SequenceStream:
    """An endless iterator of `TrainingSequence`s of one data-parallel rank.

    Args:
        settings: see there.
        encoder: of samples.
        filler: token of unused positions.
        placeholder_ids: tokens that are never predicted.

    Raises:
        ConfigError: no such data, a part or a shard is missing, or a shard is cut short; from `__next__` also
            a shard whose content is not what its index says.
    """

    def __init__(
        self,
        settings: StreamSettings,
        encoder: SampleEncoder,
        *,
        filler: int,
        placeholder_ids: tuple[int, ...],
    ) -> None:
        workers = WorkerConfig(
            rank=settings.rank,
            world_size=settings.ranks,
            num_workers=settings.workers,
            seed_offset=settings.seed,
            global_error_handler=reraise_exception,
        )
        shared: dict[str, Any] = {
            "split_part": settings.part,
            "worker_config": workers,
            "batch_size": None,
            "packing_buffer_size": settings.packing_buffer,
            "task_encoder": _Encoder(encoder, settings, filler, placeholder_ids),
        }
        name_shards_in_errors()
        with energon_refusals(settings.path, settings.part):
            if settings.part == "train":
                dataset = get_train_dataset(
                    settings.path,
                    shuffle_buffer_size=settings.shuffle_buffer,
                    max_samples_per_sequence=None,
                    **shared,
                )
            else:
                dataset = RepeatDataset(get_val_dataset(settings.path, **shared), worker_config=workers)
        self._loader: SavableDataLoader = get_savable_loader(dataset, watchdog_timeout_seconds=600)
        self._iterator: Iterator[_Packed] | None = None

    def __iter__(self) -> SequenceStream:
        return self

    def __next__(self) -> TrainingSequence:
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator).value

    def save_state(self) -> Any:
        """Its place, to be pickled."""
        return self._loader.save_state_rank()

    def restore_state(self, state: Any) -> None:
        """Continue at a saved place of the same data, rank and readers; before reading."""
        self._loader.restore_state_rank(state)
