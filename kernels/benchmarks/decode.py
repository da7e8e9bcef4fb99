"""Decoding: one new token per sequence over a paged cache, ours and dense kernels, every step a CUDA graph.

A step takes tens to hundreds of microseconds, so that starting kernels would count as much as running them:
all candidates are captured and replayed, as an inference engine does.

Letters in shapes: S sequences, N pages of a sequence, B block size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from msa_kernels import decode_attention, decode_select
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import checks, work
from benchmarks.baselines import require
from benchmarks.candidate import Call, Candidate, Unavailable
from benchmarks.checks import OUTPUT_LIMIT, SELECTION_SHARE, Verdict
from benchmarks.registry import DecodeShape, Heads

NAME = "msa_kernels"
EIGHT_BIT = torch.float8_e4m3fn


class Problem:
    """A batch of equally long sequences with shuffled pages.

    Attributes:
        query: [S, 1, Hq, d].
        key_cache: [pages, groups, B, d].
        value_cache: the same.
        index_query: [S, 1, groups, d_i].
        index_key_cache: [pages, B, d_i].
        page_table: int32 [S, N].
        lengths: int32 [S].
    """

    def __init__(self, shape: DecodeShape, heads: Heads, device: torch.device, *, seed: int = 0) -> None:
        self.shape, self.heads, self.device = shape, heads, device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=heads.dtype)

        per_sequence = -(-shape.tokens // heads.block_size)
        pages = shape.sequences * per_sequence
        self.query = normal(shape.sequences, 1, heads.query, heads.dim)
        self.key_cache = normal(pages, heads.groups, heads.block_size, heads.dim)
        self.value_cache = normal(pages, heads.groups, heads.block_size, heads.dim)
        self.index_query = normal(shape.sequences, 1, heads.groups, heads.index_dim)
        self.index_key_cache = normal(pages, heads.block_size, heads.index_dim)
        order = torch.randperm(pages, generator=generator, device=device)
        self.page_table = order.view(shape.sequences, per_sequence).int()
        self.lengths = torch.full((shape.sequences,), shape.tokens, dtype=torch.int32, device=device)
        # Never "auto": what cannot run must be seen, not replaced by the reference.
        self.backend: Any = "triton" if device.type == "cuda" else "reference"
        self._dense_output: Tensor | None = None
        self._index_8: tuple[Tensor, Tensor] | None = None

    @property
    def index_8(self) -> tuple[Tensor, Tensor]:
        """Index keys in e4m3 and their scales, fp32 [pages, B]."""
        if self._index_8 is None:
            self._index_8 = in_8_bits(self.index_key_cache)
        return self._index_8

    def select(self, *, eight_bit: bool, backend: str | None = None) -> Tensor:
        """Block ids, from index keys in the dtype of the model or in 8 bits."""
        cache, scale = self.index_8 if eight_bit else (self.index_key_cache, None)
        return decode_select(
            self.index_query,
            cache,
            self.page_table,
            self.lengths,
            top_k=self.heads.slots,
            index_key_scale=scale,
            backend=backend or self.backend,
        )

    def attend(self, block_ids: Tensor | None, *, backend: str | None = None) -> Tensor:
        """Attention over the blocks; over everything for None."""
        return decode_attention(
            self.query,
            self.key_cache,
            self.value_cache,
            self.page_table,
            self.lengths,
            block_ids,
            backend=backend or self.backend,
        )

    def check_selection(self, block_ids: Tensor, *, eight_bit: bool) -> Verdict:
        """Rows with the reference's blocks, and the local block last."""
        expected = self.select(eight_bit=eight_bit, backend="reference")
        agrees = (block_ids.sort(-1).values == expected.sort(-1).values).all(-1)
        valid = (expected >= 0).sum(-1, keepdim=True)
        place = (valid - 1).long()
        has_local = block_ids.gather(-1, place) == expected.gather(-1, place)
        # Sums of bf16 products in another order may swap two blocks; of few rows one may.
        limit = max(1 - SELECTION_SHARE, 1.5 / agrees.numel())
        return Verdict.of(
            [
                ("share of wrong selections", 1 - float(agrees.double().mean()), limit),
                ("share of rows without the local block last", 1 - float(has_local.double().mean()), 1e-9),
            ]
        )

    def check_output(self, output: Tensor, block_ids: Tensor | None) -> Verdict:
        """Row by row against the reference."""
        if block_ids is None:
            # The same for all dense candidates, and slow.
            if self._dense_output is None:
                self._dense_output = self.attend(None, backend="reference")
            expected = self._dense_output
        else:
            expected = self.attend(block_ids, backend="reference")
        return Verdict.of([("out", checks.row_error(output, expected), OUTPUT_LIMIT)])

    def dense_keys(self) -> tuple[Tensor, Tensor]:
        """Keys and values as dense kernels take them, [S, groups, tokens, d]: copies, not paged."""
        pages = self.page_table.long()

        def of(cache: Tensor) -> Tensor:
            return cache[pages].transpose(1, 2).flatten(2, 3)[:, :, : self.shape.tokens].contiguous()

        return of(self.key_cache), of(self.value_cache)


def in_8_bits(cache: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [..., d] and fp32 scales [...]: the largest entry of a row becomes the largest e4m3 number."""
    values = torch.empty(cache.shape, dtype=EIGHT_BIT, device=cache.device)
    scale = torch.empty(cache.shape[:-1], dtype=torch.float32, device=cache.device)
    for part, out, factor in zip(cache.split(4096), values.split(4096), scale.split(4096), strict=True):
        wide = part.float()
        factor.copy_(wide.abs().amax(-1) / torch.finfo(EIGHT_BIT).max)
        out.copy_((wide / factor[..., None]).to(EIGHT_BIT))
    return values, scale


def captured(call: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The call as a CUDA graph, whose replay returns the tensors it writes; the call itself on a CPU."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles, and chooses algorithms
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = call()
    return Replay(graph, call, written)


@dataclass(frozen=True, slots=True)
class Replay:
    """A captured call. It holds the call as well: the graph reads by address what the call closes over."""

    graph: torch.cuda.CUDAGraph
    call: Callable[[], Any]
    written: Any

    def __call__(self) -> Any:
        self.graph.replay()
        return self.written


def step(problem: Problem, *, eight_bit: bool) -> Candidate:
    """Selection and attention, with index keys in the model's dtype or in 8 bits."""

    def start() -> Call:
        if eight_bit:
            _ = problem.index_8  # quantised before the capture

        def run() -> tuple[Tensor, Tensor]:
            block_ids = problem.select(eight_bit=eight_bit)
            return block_ids, problem.attend(block_ids)

        def check(result: tuple[Tensor, Tensor]) -> Verdict:
            block_ids, output = result
            of_selection = problem.check_selection(block_ids, eight_bit=eight_bit)
            of_output = problem.check_output(output, block_ids)
            return Verdict(of_selection.errors + of_output.errors, max(of_selection.worst, of_output.worst))

        return Call(captured(run, problem.device), check)

    heads, shape = problem.heads, problem.shape
    return _candidate(
        "decode 8-bit index" if eight_bit else "decode",
        "index",
        start,
        flops=work.attention_forward(heads, shape.sequences * shape.selected_tokens(heads))
        + work.index_scores(heads, shape.sequences * shape.tokens),
        size=index_bytes(problem, eight_bit=eight_bit) + attended_bytes(problem),
    )


def selection(problem: Problem, *, eight_bit: bool) -> Candidate:
    """decode_select alone."""

    def start() -> Call:
        if eight_bit:
            _ = problem.index_8
        return Call(
            captured(lambda: problem.select(eight_bit=eight_bit), problem.device),
            lambda found: problem.check_selection(found, eight_bit=eight_bit),
        )

    shape = problem.shape
    return _candidate(
        "decode select 8-bit" if eight_bit else "decode select",
        "index",
        start,
        flops=work.index_scores(problem.heads, shape.sequences * shape.tokens),
        size=index_bytes(problem, eight_bit=eight_bit),
    )


def attention(problem: Problem) -> Candidate:
    """decode_attention alone, over the blocks that decode_select chose."""

    def start() -> Call:
        block_ids = problem.select(eight_bit=False)
        return Call(
            captured(lambda: problem.attend(block_ids), problem.device),
            lambda output: problem.check_output(output, block_ids),
        )

    heads, shape = problem.heads, problem.shape
    return _candidate(
        "decode attention",
        "index",
        start,
        flops=work.attention_forward(heads, shape.sequences * shape.selected_tokens(heads)),
        size=attended_bytes(problem),
    )


def dense(problem: Problem) -> Candidate:
    """Our kernel over the whole paged cache."""
    return _dense(
        problem, NAME, "", lambda: captured(lambda: problem.attend(None), problem.device), is_ours=True
    )


def sdpa(problem: Problem, name: str, backend: SDPBackend | None) -> Candidate:
    """PyTorch's attention over contiguous keys."""

    def prepare() -> Callable[[], Any]:
        keys, values = problem.dense_keys()
        query = problem.query.transpose(1, 2)

        def run() -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).transpose(1, 2)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).transpose(1, 2)

        return captured(run, problem.device)

    return _dense(problem, name, "torch", prepare)


def flash_attn_4(problem: Problem) -> Candidate:
    """flash-attn-4 over contiguous keys, if it is installed and takes one query."""

    def prepare() -> Callable[[], Any]:
        flash_attn_func = require("flash_attn.cute").flash_attn_func
        keys, values = (each.transpose(1, 2).contiguous() for each in problem.dense_keys())

        def run() -> Tensor:
            output = flash_attn_func(problem.query, keys, values, causal=False)
            return output[0] if isinstance(output, tuple) else output

        try:
            return captured(run, problem.device)
        except Exception as error:  # it compiles at the first call, and need not take this shape
            raise Unavailable(f"flash-attn-4 does not decode: {error}") from error

    return _dense(problem, "flash-attn-4", "flash-attn-4", prepare)


def index_bytes(problem: Problem, *, eight_bit: bool) -> int:
    """Index keys read once, with their scales."""
    heads, shape = problem.heads, problem.shape
    per_token = heads.index_dim + 4 if eight_bit else heads.index_dim * heads.dtype.itemsize
    return shape.sequences * shape.tokens * per_token + work.bytes_of(problem.index_query)


def attended_bytes(problem: Problem) -> int:
    """Keys and values of the chosen blocks, the queries and the output."""
    heads, shape = problem.heads, problem.shape
    rows = shape.sequences * shape.selected_tokens(heads) * heads.groups
    return 2 * rows * heads.dim * heads.dtype.itemsize + 2 * work.bytes_of(problem.query)


def _dense(
    problem: Problem,
    name: str,
    package: str,
    prepare: Callable[[], Callable[[], Any]],
    *,
    is_ours: bool = False,
) -> Candidate:
    heads, shape = problem.heads, problem.shape
    candidate = _candidate(
        "decode dense",
        "",
        lambda: Call(prepare(), lambda output: problem.check_output(output, None)),
        flops=work.attention_forward(heads, shape.sequences * shape.tokens),
        size=work.bytes_of(problem.key_cache, problem.value_cache) + 2 * work.bytes_of(problem.query),
    )
    candidate.name, candidate.package, candidate.is_ours = name, package, is_ours
    return candidate


def _candidate(op: str, pattern: str, start: Callable[[], Call], *, flops: int, size: int) -> Candidate:
    return Candidate(op=op, name=NAME, pattern=pattern, start=start, flops=flops, bytes=size, is_ours=True)
