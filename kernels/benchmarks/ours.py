"""Calls of msa_kernels as candidates."""

from __future__ import annotations

from typing import Any, Literal

import torch
from msa_kernels import (
    AttentionOutput,
    BlockSelection,
    DocumentLayout,
    block_select,
    dense_kl,
    sparse_attention,
)
from torch import Tensor

from benchmarks import checks, work
from benchmarks.candidate import Call, Candidate
from benchmarks.checks import Verdict
from benchmarks.inputs import Inputs, Upstream
from benchmarks.registry import Heads, Shape
from benchmarks.registry import select as select_pattern

NAME = "msa_kernels"
# Queries whose results are compared with the reference.
CHECKED_QUERIES = 48
CHECKED_QUERIES_OF_LONG = 16
LONG = 2**18


class Problem:
    """The inputs of one shape, and our operators on them.

    Selections and the sample of queries to check are made once and shared by the candidates.
    """

    def __init__(self, shape: Shape, heads: Heads, device: torch.device, *, needs_gradients: bool) -> None:
        self.shape = shape
        self.heads = heads
        self.device = device
        self.layout: DocumentLayout = shape.layout(device)
        self.inputs = Inputs.random(shape, heads, device, requires_grad=needs_gradients)
        self._upstream = Upstream.random(self.inputs) if needs_gradients else None
        count = CHECKED_QUERIES if shape.num_keys < LONG else CHECKED_QUERIES_OF_LONG
        self.rows = checks.sample_queries(self.layout, count)
        # Never "auto": what cannot run must be seen, not replaced by the reference.
        self.backend: Any = "triton" if device.type == "cuda" else "reference"
        self._patterns: dict[str, Tensor] = {}

    def select(
        self, *, with_lse: bool = False, score_dtype: Literal["input", "e4m3"] = "input"
    ) -> BlockSelection:
        """block_select of the index inputs."""
        return block_select(
            self.inputs.index_q.detach(),
            self.inputs.index_k.detach(),
            self.layout,
            block_size=self.heads.block_size,
            num_selected_blocks=self.heads.slots,
            with_lse=with_lse,
            score_dtype=score_dtype,
            backend=self.backend,
        )

    def block_ids(self, pattern: str) -> Tensor:
        """The selection of a pattern; "index" is that of block_select."""
        if pattern not in self._patterns:
            ids = (
                self.select().block_ids
                if pattern == "index"
                else select_pattern(pattern, self.layout, self.heads)
            )
            self._patterns[pattern] = ids
        return self._patterns[pattern]

    def attend(self, block_ids: Tensor, *, with_kl: bool) -> AttentionOutput:
        """sparse_attention; with KL, the way training calls it."""
        inputs = self.inputs
        return sparse_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            block_ids,
            self.layout,
            block_size=self.heads.block_size,
            index_q=inputs.index_q if with_kl else None,
            index_k=inputs.index_k if with_kl else None,
            backend=self.backend,
        )

    def check_forward(self, output: AttentionOutput | Tensor, block_ids: Tensor | None) -> Verdict:
        """Against the reference, on the sampled queries."""
        return checks.check_forward(output, self.inputs, self.layout, self.heads, self.rows, block_ids)

    def check_training(self, run: Any, block_ids: Tensor | None) -> Verdict:
        """Against the reference, outputs and gradients of the sampled queries."""
        return checks.check_training(
            run, self.given_upstream, self.inputs, self.layout, self.heads, self.rows, block_ids
        )

    def check_selection(self, selection: BlockSelection, *, exact: bool = True) -> Verdict:
        """Against the reference, on the sampled queries."""
        return checks.check_selection(selection, self.inputs, self.layout, self.heads, self.rows, exact=exact)

    @property
    def given_upstream(self) -> Upstream:
        """Gradients of the outputs; of problems made with ``needs_gradients``."""
        assert self._upstream is not None
        return self._upstream

    @property
    def attention_bytes(self) -> int:
        """Of q, k, v and the output."""
        q, k, v = self.inputs[:3]
        return work.bytes_of(q, k, v, q)


def gradients(
    output: AttentionOutput, inputs: Inputs, upstream: Upstream, *, keep_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of all five inputs."""
    return torch.autograd.grad([output.out, output.kl], inputs, list(upstream), retain_graph=keep_graph)


def detached(output: AttentionOutput) -> AttentionOutput:
    """Without the graph, which holds more memory than the values."""
    return AttentionOutput(*(None if each is None else each.detach() for each in output))


def prefill(problem: Problem, pattern: str) -> Candidate:
    """Selection and attention without KL or gradients.

    The selection always runs; with another pattern than "index" attention then takes that pattern's blocks.
    """

    def start() -> Call:
        given = None if pattern == "index" else problem.block_ids(pattern)

        @torch.no_grad()
        def run() -> tuple[AttentionOutput, BlockSelection]:
            selection = problem.select()
            block_ids = selection.block_ids if given is None else given
            return problem.attend(block_ids, with_kl=False), selection

        def check(result: tuple[AttentionOutput, BlockSelection]) -> Verdict:
            output, selection = result
            block_ids = selection.block_ids if given is None else given
            of_selection = problem.check_selection(selection)
            of_output = problem.check_forward(output, block_ids)
            return Verdict(of_selection.errors + of_output.errors, max(of_selection.worst, of_output.worst))

        return Call(run, check)

    heads, shape = problem.heads, problem.shape
    return Candidate(
        op="prefill",
        name=NAME,
        pattern=pattern,
        start=start,
        flops=work.attention_forward(heads, shape.sparse_pairs(heads))
        + work.index_scores(heads, shape.causal_pairs()),
        bytes=problem.attention_bytes + work.bytes_of(*problem.inputs[3:]),
        is_ours=True,
    )


def train(problem: Problem, pattern: str) -> Candidate:
    """Selection, attention with KL, and all gradients."""

    def start() -> Call:
        given = None if pattern == "index" else problem.block_ids(pattern)

        def run_with(upstream: Upstream) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
            selection = problem.select()
            output = problem.attend(selection.block_ids if given is None else given, with_kl=True)
            return detached(output), gradients(output, problem.inputs, upstream)

        def check(_: Any) -> Verdict:
            return problem.check_training(run_with, problem.block_ids(pattern))

        return Call(lambda: run_with(problem.given_upstream), check, needs_result=False)

    heads, shape = problem.heads, problem.shape
    pairs = shape.sparse_pairs(heads)
    return Candidate(
        op="train",
        name=NAME,
        pattern=pattern,
        start=start,
        flops=work.attention_forward(heads, pairs)
        + work.attention_backward(heads, pairs)
        + work.index_scores(heads, shape.causal_pairs())
        + work.kl_gradient(heads, pairs),
        is_ours=True,
    )


def forward(problem: Problem, pattern: str, *, with_kl: bool) -> Candidate:
    """Attention over given blocks, with or without the KL of every row."""

    def start() -> Call:
        block_ids = problem.block_ids(pattern)

        @torch.no_grad()
        def run() -> AttentionOutput:
            return problem.attend(block_ids, with_kl=with_kl)

        return Call(run, lambda output: problem.check_forward(output, block_ids))

    return Candidate(
        op="forward with KL" if with_kl else "forward",
        name=NAME,
        pattern=pattern,
        start=start,
        flops=work.attention_forward(problem.heads, problem.shape.sparse_pairs(problem.heads)),
        bytes=problem.attention_bytes,
        is_ours=True,
    )


def backward(problem: Problem, pattern: str) -> Candidate:
    """All gradients, KL's included, of a forward pass made before."""

    def start() -> Call:
        block_ids = problem.block_ids(pattern)
        output = problem.attend(block_ids, with_kl=True)

        def run_with(upstream: Upstream) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
            return detached(output), gradients(output, problem.inputs, upstream, keep_graph=True)

        return Call(
            lambda: run_with(problem.given_upstream)[1],
            lambda _: problem.check_training(run_with, block_ids),
            needs_result=False,
        )

    heads = problem.heads
    pairs = problem.shape.sparse_pairs(heads)
    return Candidate(
        op="backward with KL",
        name=NAME,
        pattern=pattern,
        start=start,
        flops=work.attention_backward(heads, pairs) + work.kl_gradient(heads, pairs),
        bytes=2 * (problem.attention_bytes + work.bytes_of(*problem.inputs[3:])),
        is_ours=True,
    )


def selection(problem: Problem, variant: Literal["exact", "with LSE", "e4m3"]) -> Candidate:
    """block_select alone: ids; ids and index_lse; ids ranked by scores of inputs rounded to 8 bits."""
    with_lse, rounded = variant == "with LSE", variant == "e4m3"

    def run() -> BlockSelection:
        return problem.select(with_lse=with_lse, score_dtype="e4m3" if rounded else "input")

    return Candidate(
        op="select" if variant == "exact" else f"select {variant}",
        name=NAME,
        pattern="index",
        start=lambda: Call(run, lambda found: problem.check_selection(found, exact=not rounded)),
        flops=work.index_scores(problem.heads, problem.shape.causal_pairs()),
        bytes=work.bytes_of(*problem.inputs[3:]),
        is_ours=True,
    )


def warmup(problem: Problem) -> Candidate:
    """Full attention with the KL over all visible tokens, and all gradients: the indexer's warmup phase."""
    inputs = problem.inputs

    def run_with(upstream: Upstream) -> tuple[AttentionOutput, tuple[Tensor, ...]]:
        output = dense_kl(
            inputs.q,
            inputs.k,
            inputs.v,
            problem.layout,
            index_q=inputs.index_q,
            index_k=inputs.index_k,
            backend=problem.backend,
        )
        return detached(output), gradients(output, inputs, upstream)

    heads = problem.heads
    pairs = problem.shape.causal_pairs()
    return Candidate(
        op="warmup",
        name=NAME,
        start=lambda: Call(
            lambda: run_with(problem.given_upstream),
            lambda _: problem.check_training(run_with, None),
            needs_result=False,
        ),
        flops=work.attention_forward(heads, pairs)
        + work.attention_backward(heads, pairs)
        + work.index_scores(heads, pairs)
        + work.kl_gradient(heads, pairs),
        is_ours=True,
    )
