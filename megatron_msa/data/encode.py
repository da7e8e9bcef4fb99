"""Documents -> token ids, in parallel and in order."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import DType

from megatron_msa.data.corpus import Document
from megatron_msa.errors import ConfigError

# One task for a worker: this many characters of text, or one document where that is longer.
_TASK_CHARACTERS = 1 << 20


class Encoder:
    """Turns documents into token ids, in order, in `workers` processes (1: in this process).

    A context manager: the processes live inside the `with` block.
    """

    def __init__(self, tokenizer: Any, *, append_eod: bool = True, workers: int = 1) -> None:
        if workers < 1:
            raise ConfigError(f"--workers is {workers}; it must be at least 1.")
        self.tokenizer = tokenizer
        self.vocab_size: int = tokenizer.vocab_size
        self.eod: int | None = tokenizer.eod if append_eod else None
        if append_eod and self.eod is None:
            raise ConfigError(
                "the tokenizer has no end-of-document (eos) token. Add one to it, or pass --no-append-eod; "
                "document boundaries are kept in the .idx file either way."
            )
        self.dtype = DType.optimal_dtype(self.vocab_size)
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self.workers > 1:
            # Rust threads inside the tokenizer would multiply with the processes, and do not survive a fork.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            # fork: a spawned process would import torch and Megatron again (over ten seconds, 0.8 GB each).
            self._pool = ProcessPoolExecutor(
                self.workers,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_start_worker,
                initargs=(self,),
            )
            # Start the processes now, while this process has no other thread (the progress bar starts one).
            self._pool.submit(os.getpid).result()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def encode(self, document: Document) -> numpy.ndarray:
        """The ids of one document, [tokens] of `self.dtype`, with its end token; none for empty text."""
        if not document.text:
            return numpy.empty(0, dtype=self.dtype)
        ids = numpy.asarray(self.tokenizer.tokenize(document.text), dtype=numpy.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise ConfigError(
                f"{document.name}: the tokenizer gave id {ids.max() if ids.min() >= 0 else ids.min()}, "
                f"outside its vocabulary of {self.vocab_size}. Its special tokens are not part of the "
                "vocabulary it reports."
            )
        # Some tokenizers append their end token themselves; one is enough.
        if self.eod is not None and ids.size and ids[-1] != self.eod:
            ids = numpy.append(ids, self.eod)
        return ids.astype(self.dtype)

    def encode_all(self, documents: Iterable[Document]) -> Iterator[tuple[Document, numpy.ndarray]]:
        """Yield each document with its ids, in order. At most four tasks per worker are read ahead."""
        if self._pool is None:
            for document in documents:
                yield document, self.encode(document)
            return
        waiting: deque[tuple[list[Document], Future[list[numpy.ndarray]]]] = deque()
        for task in _tasks(documents):
            waiting.append((task, self._pool.submit(_encode_task, task)))
            if len(waiting) > 4 * self.workers:
                yield from _finish(*waiting.popleft())
        while waiting:
            yield from _finish(*waiting.popleft())


def _finish(
    task: list[Document], future: "Future[list[numpy.ndarray]]"
) -> Iterator[tuple[Document, numpy.ndarray]]:
    return zip(task, future.result(), strict=True)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    # Ctrl-C reaches the whole process group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _encode_task(task: list[Document]) -> list[numpy.ndarray]:
    assert _worker_encoder is not None
    return [_worker_encoder.encode(document) for document in task]


def _tasks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    task: list[Document] = []
    characters = 0
    for document in documents:
        task.append(document)
        characters += len(document.text)
        if characters >= _TASK_CHARACTERS:
            yield task
            task, characters = [], 0
    if task:
        yield task
