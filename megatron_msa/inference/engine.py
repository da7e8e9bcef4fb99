"""`InferenceEngine`: generates from prompts and scores sequences with a model of this project.

    prompts ── admitted while slots and pages last ── prefill in chunks ── decode, one token of each at a time
                          └──── finished ones give their pages to the next ────┘

The forward pass is Megatron's `GPTModel.forward` with an inference context of our own (docs/inference.md says
why). Every rank of a tensor-, context- or expert-parallel group must call the same methods with the same
arguments.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.utils import get_pg_size, unwrap_model
from torch import Tensor, nn

from megatron_msa.inference.cache import CacheFormat, PagedCache, Slots
from megatron_msa.inference.context import Attention, AttentionSettings
from megatron_msa.inference.decode import DecodeBatch
from megatron_msa.inference.limits import Limits, check_engine, check_memory
from megatron_msa.inference.outputs import log_probabilities_of, logits_of
from megatron_msa.inference.paged_rows import pages_for
from megatron_msa.inference.prefill import PrefillChunk, cut
from megatron_msa.inference.sampling import Sampler, Sampling
from megatron_msa.inference.step import DecodeStep, forward


@dataclass
class Speed:
    """What the last call of `generate` or `log_probabilities` did, and how long it took."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


@dataclass
class _Sequence:
    number: int
    tokens: Tensor
    """int64 [t], on the host."""
    slot: int
    new: list[int] = field(default_factory=list)


class InferenceEngine:
    """A model, a cache for a number of sequences, and the two things to do with them.

    Args:
        model: a whole GPT model (no pipeline stages), on its device, in the dtype to compute in.
        max_tokens: that a sequence may have, prompt and new tokens together.
        max_sequences: that are in the cache at the same time; more prompts wait for their turn.
        cache_tokens: that the pages of all sequences hold together. Default: max_tokens for each.
        cache_dtype: of keys and values: None for the model's, or float8_e4m3fn.
        index_key_dtype: of index keys: None for the model's, or float8_e4m3fn.
        prefill_chunk: tokens of a prefill forward pass, which bounds the memory of its activations.
        attention: "as trained": each layer as its phase says, blocks in the sparse phase and otherwise full
            attention. "dense": full attention in every layer. "sparse": blocks in every MSA layer.
        memory_limit: bytes that the cache may take on this rank. Default: nine tenths of what is free.
        position_limit: longest sequence that the position embedding serves. Default: what the model was built
            for (its ``max_sequence_length``).
        vocab_size: of the tokenizer: ids from there on only pad the embedding and are never chosen. Default:
            the padded size.
        cuda_graphs: replay the decode step as a CUDA graph. Default: on a GPU without parallel ranks.

    Raises:
        ConfigError: sizes, layouts or dtypes that do not work, or a cache that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_tokens: int,
        max_sequences: int = 1,
        cache_tokens: int | None = None,
        cache_dtype: torch.dtype | None = None,
        index_key_dtype: torch.dtype | None = None,
        prefill_chunk: int = 8192,
        attention: Attention = "as trained",
        memory_limit: int | None = None,
        position_limit: int | None = None,
        vocab_size: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.model: GPTModel = unwrap_model(model)
        parameter = next(self.model.parameters())
        self.device = parameter.device
        block_size = self.model.config.msa_block_size
        if cache_tokens is None:
            cache_tokens = max_sequences * pages_for(max_tokens, block_size) * block_size
        if position_limit is None:
            position_limit = self.model.max_sequence_length
        check_engine(
            self.model,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            cache_tokens=cache_tokens,
            prefill_chunk=prefill_chunk,
            position_limit=position_limit,
        )
        self.limits = Limits(
            max_tokens=max_tokens,
            cache_tokens=cache_tokens,
            position_limit=position_limit,
            vocab_size=self.model.vocab_size if vocab_size is None else vocab_size,
            placeholder_ids=_placeholder_ids(self.model),
        )
        self._settings = AttentionSettings.of(self.model, attention)
        form = CacheFormat.of(
            self.model,
            self._settings.selects_blocks,
            dtype=parameter.dtype,
            cache_dtype=cache_dtype,
            index_key_dtype=index_key_dtype,
        )
        self.cache_bytes = check_memory(
            form, cache_tokens=cache_tokens, limit=memory_limit, device=self.device
        )
        """Memory of the cache on this rank."""
        self.prefill_chunk = prefill_chunk
        self.speed = Speed()
        self._max_sequences = max_sequences
        self._pages = pages_for(cache_tokens, block_size)
        self._cache = PagedCache(form, self._pages, self.device)
        self._slots = Slots(max_sequences, self._pages, block_size)
        groups = self.model.pg_collection
        self._agreeing_groups = [group for group in (groups.cp, groups.ep) if get_pg_size(group) > 1]
        """Groups whose ranks compute the same tokens, each by itself, and must go on with the same ones."""
        if cuda_graphs is None:
            alone = get_pg_size(groups.tp) == 1 and not self._agreeing_groups
            cuda_graphs = self.device.type == "cuda" and alone
        self._uses_graphs = cuda_graphs
        self._steps: dict[int, DecodeStep] = {}
        """Graphs by the number of their rows."""

    @property
    def bytes_per_token(self) -> int:
        """Memory that one token takes in the cache of this rank, all layers together."""
        return self._cache.form.bytes_per_token

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: set[int] | None = None,
    ) -> list[list[int]]:
        """Continue each prompt.

        Args:
            prompts: token ids, any number of prompts of any lengths.
            max_new_tokens: of each.
            sampling: how to draw; None for the most likely token each time.
            stop: a sequence ends behind the first of these ids.

        Returns:
            The new tokens of each prompt, the stop token included.

        Raises:
            ConfigError: an empty or too long prompt, or ids out of the vocabulary.
        """
        self.limits.check_prompts(prompts, max_new_tokens)
        sampler = Sampler(sampling, vocab_size=self.limits.vocab_size, device=self.device)
        results: list[list[int]] = [[] for _ in prompts]
        waiting = deque((number, torch.tensor(prompt)) for number, prompt in enumerate(prompts))
        running: list[_Sequence] = []
        step: DecodeStep | None = None
        with self._in_use():
            while waiting or running:
                started = time.perf_counter()
                admitted = self._admit(waiting, max_new_tokens)
                if admitted:
                    tokens = self._agreed(sampler(self._prefill(admitted)))
                    running += admitted
                    step = None
                    self._count_prefill(admitted, started)
                else:
                    step = step or self._load_decode(running)
                    tokens = self._agreed(sampler(step()[: len(running)]))
                    step.batch.tokens[: len(running)] = tokens
                chosen = tokens.tolist()
                if not admitted:
                    self.speed.decode_seconds += time.perf_counter() - started
                    self.speed.decode_tokens += len(chosen)
                for sequence, token in zip(admitted or running, chosen, strict=True):
                    sequence.new.append(token)
                finished = [
                    each
                    for each in running
                    if len(each.new) == max_new_tokens or each.new[-1] in (stop or ())
                ]
                for sequence in finished:
                    results[sequence.number] = sequence.new
                    self._slots.release(sequence.slot)
                    running.remove(sequence)
                    step = None
        return results

    def log_probabilities(
        self, sequences: Sequence[Sequence[int]], *, start: Sequence[int] | None = None
    ) -> list[Tensor]:
        """How likely the model finds each token of the sequences, in nats.

        Args:
            sequences: token ids.
            start: per sequence, the first token of interest. Default: 1, the first that has a past.

        Returns:
            Per sequence log P(token i | tokens before i) for i >= max(start, 1): fp32, on the CPU. The
            softmax is over the padded vocabulary, as in training.

        Raises:
            ConfigError: an empty or too long sequence, or ids out of the vocabulary.
        """
        self.limits.check_sequences(sequences, start)
        first = [max(1, each) for each in start] if start is not None else [1] * len(sequences)
        results = [
            torch.empty(max(0, len(sequence) - begin), dtype=torch.float32)
            for sequence, begin in zip(sequences, first, strict=True)
        ]
        whole = [torch.tensor(sequence) for sequence in sequences]
        # Nothing follows the last token, so it is not read; a sequence without anything to score is left out.
        waiting = deque((number, x[:-1]) for number, x in enumerate(whole) if results[number].numel())
        with self._in_use():
            while waiting:
                started = time.perf_counter()
                admitted = self._admit(waiting, 1)
                for chunk, tokens in self._chunks(admitted):
                    rows, labels, targets = [], [], []
                    row = 0
                    for piece in chunk.pieces:
                        number = admitted[piece.number].number
                        # The row of position p - 1 predicts the token at position p.
                        begin, end = max(piece.start + 1, first[number]), piece.stop + 1
                        if begin < end:
                            rows.append(torch.arange(begin - 1, piece.stop) - piece.start + row)
                            labels.append(whole[number][begin:end])
                            targets.append(results[number][begin - first[number] : end - first[number]])
                        row += piece.stop - piece.start
                    output = log_probabilities_of(chunk, self._joined(rows), self._joined(labels))
                    found = forward(self.model, tokens, chunk, output).cpu()
                    for target, part in zip(targets, found.split([len(x) for x in targets]), strict=True):
                        target.copy_(part)
                self._count_prefill(admitted, started)
                for sequence in admitted:
                    self._slots.release(sequence.slot)
        return results

    # -- the parts of both ----------------------------------------------------------------------------------

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The model in evaluation mode; whatever happens, no slot stays taken."""
        self.speed = Speed()
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)
            self._slots = Slots(self._max_sequences, self._pages, self._cache.form.block_size)

    def _admit(self, waiting: deque[tuple[int, Tensor]], new_tokens: int) -> list[_Sequence]:
        """Give slots to as many waiting sequences as fit, in their order."""
        admitted = []
        while waiting:
            number, tokens = waiting[0]
            slot = self._slots.admit(len(tokens) + new_tokens - 1)  # the last new token is never read
            if slot is None:
                break
            waiting.popleft()
            admitted.append(_Sequence(number, tokens, slot))
        return admitted

    def _chunks(self, admitted: Sequence[_Sequence]) -> Iterator[tuple[PrefillChunk, Tensor]]:
        """The chunks of these sequences, and this rank's tokens of each."""
        lengths = [len(sequence.tokens) for sequence in admitted]
        pages = [self._slots.pages(sequence.slot) for sequence in admitted]
        for pieces in cut(lengths, pages, self.prefill_chunk):
            chunk = PrefillChunk(self._cache, self._settings, self._positions(), pieces)
            tokens = [admitted[piece.number].tokens[piece.start : piece.stop] for piece in pieces]
            padding = torch.zeros(chunk.padding, dtype=torch.int64)
            yield chunk, self._joined([*tokens, padding])[chunk.own]

    def _prefill(self, admitted: Sequence[_Sequence]) -> Tensor:
        """Fill the cache with these prompts; the logits of what follows each, [n, padded vocabulary]."""
        logits = []
        for chunk, tokens in self._chunks(admitted):
            last, row = [], 0
            for piece in chunk.pieces:
                row += piece.stop - piece.start
                if piece.stop == len(admitted[piece.number].tokens):
                    last.append(torch.tensor([row - 1]))
            found = forward(self.model, tokens, chunk, logits_of(chunk, self._joined(last)))
            if found is not None:
                logits.append(found)
        return torch.cat(logits)

    def _load_decode(self, running: Sequence[_Sequence]) -> DecodeStep:
        """A step for the sequences that run now: they are its first rows."""
        step = self._step_for(running)
        step.batch.load(
            [sequence.new[-1] for sequence in running],
            [len(sequence.tokens) + len(sequence.new) - 1 for sequence in running],
            [self._slots.pages(sequence.slot) for sequence in running],
        )
        return step

    def _step_for(self, running: Sequence[_Sequence]) -> DecodeStep:
        multiple = self._settings.row_multiple
        if not self._uses_graphs:
            rows = len(running) + -len(running) % multiple
            pages = max(len(self._slots.pages(sequence.slot)) for sequence in running)
            return DecodeStep(self.model, self._decode_batch(rows, pages), as_graph=False)
        # A graph for each power of two: few to capture, and at most half of the rows idle.
        rows = max(multiple, 1 << (len(running) - 1).bit_length())
        if rows not in self._steps:
            pages = pages_for(self.limits.max_tokens, self._cache.form.block_size)
            self._steps[rows] = DecodeStep(self.model, self._decode_batch(rows, pages), as_graph=True)
        return self._steps[rows]

    def _decode_batch(self, rows: int, pages: int) -> DecodeBatch:
        return DecodeBatch(self._cache, self._settings, self._positions(), rows=rows, pages_per_row=pages)

    def _positions(self) -> int:
        return min(self.limits.max_tokens, self.limits.position_limit)

    def _agreed(self, tokens: Tensor) -> Tensor:
        """The tokens of the first rank, where rounding on several could choose different ones."""
        for group in self._agreeing_groups:
            torch.distributed.broadcast(tokens, group=group, group_src=0)
        return tokens

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """int64 parts on the host -> one tensor on the device; of no parts an empty one."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *parts]).to(self.device)

    def _count_prefill(self, admitted: Sequence[_Sequence], started: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.speed.prefill_seconds += time.perf_counter() - started
        self.speed.prefill_tokens += sum(len(sequence.tokens) for sequence in admitted)


def _placeholder_ids(model: GPTModel) -> frozenset[int]:
    vision = getattr(model, "vision", None)
    return frozenset() if vision is None else frozenset(vision.placeholder_ids)
