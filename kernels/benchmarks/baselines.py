"""What others would run: dense kernels, sparse kernels with the same selection, torch.topk.

A dense or sparse baseline is a function of q [Q, Hq, d], k and v [K, Hkv, d] that returns out [Q, Hq, d] and
has gradients. Those that need a package import it when they start, and raise ``Unavailable`` without it. What
a user would do once per selection (a mask, a cast of the ids) is not timed, unless the package's own call
does it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import work
from benchmarks.candidate import Call, Candidate, Unavailable
from benchmarks.checks import Verdict
from benchmarks.inputs import Upstream
from benchmarks.ours import Problem

type Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Baseline(NamedTuple):
    """Its name, the package that it needs, and what makes its function for one selection (None: dense)."""

    name: str
    package: str
    make: Callable[[Problem, Tensor | None], Attend]


def require(module: str) -> Any:
    """The module; raises ``Unavailable`` where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        raise Unavailable(f"{module} cannot be imported: {error}") from error


def _sdpa(backend: SDPBackend | None) -> Callable[[Problem, Tensor | None], Attend]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        with nullcontext() if backend is None else sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return lambda problem, block_ids: attend


def _flash_attn_4(problem: Problem, block_ids: Tensor | None) -> Attend:
    flash_attn_func = require("flash_attn.cute").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = flash_attn_func(q[None], k[None], v[None], causal=True)
        return (output[0] if isinstance(output, tuple) else output)[0]

    return attend


def _flex(problem: Problem, block_ids: Tensor | None) -> Attend:
    flex = require("torch.nn.attention.flex_attention")
    assert block_ids is not None
    heads, tokens, block = problem.heads, problem.shape.num_keys, problem.heads.block_size
    blocks = tokens // block
    if tokens % block:
        raise Unavailable(f"{tokens} tokens are not whole blocks of {block}")
    ids = block_ids.long()
    table = torch.zeros(tokens, heads.groups, blocks + 1, dtype=torch.bool, device=ids.device)
    selected = table.scatter_(2, ids.where(ids >= 0, blocks), True)[..., :blocks].transpose(0, 1).contiguous()
    # A tile of 128 queries needs a block if any of its queries selected it; the mask decides within the tile.
    per_head = heads.query // heads.groups
    tiles = selected.unflatten(1, (blocks, block)).any(2).repeat_interleave(per_head, 0)[None]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & selected[head // per_head, query, key // block]

    mask = flex.BlockMask.from_kv_blocks(
        tiles.sum(-1).int(),
        tiles.int().argsort(dim=-1, descending=True, stable=True).int(),
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(tokens, tokens),
    )
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        inputs = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
        return compiled(*inputs, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def _nsa(problem: Problem, block_ids: Tensor | None) -> Attend:
    parallel_nsa = require("fla.ops.nsa").parallel_nsa
    assert block_ids is not None
    indices = block_ids.long()[None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return parallel_nsa(
            q[None],
            k[None],
            v[None],
            block_indices=indices,
            block_counts=problem.heads.slots,
            block_size=problem.heads.block_size,
        )[0]

    return attend


SDPA = Baseline("SDPA", "torch", _sdpa(None))
CUDNN = Baseline("cuDNN SDPA", "torch", _sdpa(SDPBackend.CUDNN_ATTENTION))
FLASH_2 = Baseline("flash-2 SDPA", "torch", _sdpa(SDPBackend.FLASH_ATTENTION))
FLASH_4 = Baseline("flash-attn-4", "flash-attn-4", _flash_attn_4)
FLEX = Baseline("FlexAttention", "torch", _flex)
NSA = Baseline("flash-linear-attention NSA", "fla-core", _nsa)


def forward(
    baseline: Baseline,
    problem: Problem,
    pattern: str = "",
    *,
    op: str,
    once: bool = False,
    warm: bool = True,
) -> Candidate:
    """Forward pass of a dense baseline (no pattern) or a sparse one."""

    def start() -> Call:
        block_ids = problem.block_ids(pattern) if pattern else None
        attend = baseline.make(problem, block_ids)
        # flash-attn-4 writes a logsumexp where an input requires gradients, even under no_grad.
        q, k, v = (tensor.detach() for tensor in problem.inputs[:3])

        @torch.no_grad()
        def run() -> Tensor:
            return attend(q, k, v)

        return Call(run, lambda out: problem.check_forward(out, block_ids))

    return Candidate(
        op=op,
        name=baseline.name,
        package=baseline.package,
        pattern=pattern,
        start=start,
        flops=work.attention_forward(problem.heads, _pairs(problem, pattern)),
        bytes=problem.attention_bytes,
        once=once,
        warm=warm,
    )


def train(baseline: Baseline, problem: Problem, *, op: str = "train") -> Candidate:
    """Forward and backward pass of a dense baseline, which has no KL."""
    leaves = problem.inputs[:3]

    def start() -> Call:
        attend = baseline.make(problem, None)

        def run_with(upstream: Upstream) -> tuple[Tensor, tuple[Tensor, ...]]:
            out = attend(*leaves)
            return out.detach(), torch.autograd.grad(out, leaves, upstream.dout)

        return Call(
            lambda: run_with(problem.given_upstream),
            lambda _: problem.check_training(run_with, None),
            needs_result=False,
        )

    pairs = problem.shape.causal_pairs()
    return Candidate(
        op=op,
        name=baseline.name,
        package=baseline.package,
        start=start,
        flops=work.attention_forward(problem.heads, pairs) + work.attention_backward(problem.heads, pairs),
    )


def backward(baseline: Baseline, problem: Problem, pattern: str) -> Candidate:
    """Backward pass alone of a sparse baseline."""
    leaves = problem.inputs[:3]

    def start() -> Call:
        block_ids = problem.block_ids(pattern)
        out = baseline.make(problem, block_ids)(*leaves)

        def run_with(upstream: Upstream) -> tuple[Tensor, tuple[Tensor, ...]]:
            return out.detach(), torch.autograd.grad(out, leaves, upstream.dout, retain_graph=True)

        return Call(
            lambda: run_with(problem.given_upstream)[1],
            lambda _: problem.check_training(run_with, block_ids),
            needs_result=False,
        )

    return Candidate(
        op="backward",
        name=baseline.name,
        package=baseline.package,
        pattern=pattern,
        start=start,
        flops=work.attention_backward(problem.heads, _pairs(problem, pattern)),
    )


def flash_msa(problem: Problem) -> Candidate:
    """flash-msa: its own selection, attention, and the gradients with that of the KL; it returns no KL."""
    heads, shape, inputs = problem.heads, problem.shape, problem.inputs

    def start() -> Call:
        flash_msa_func = require("flash_msa").flash_msa_func

        def run_with(upstream: Upstream) -> tuple[Tensor, tuple[Tensor, ...]]:
            leaves = (inputs.index_q, inputs.index_k[:, None], *inputs[:3])
            own = [leaf.detach().transpose(0, 1)[None].contiguous().requires_grad_() for leaf in leaves]
            out, loss = flash_msa_func(*own, heads.slots * heads.block_size, heads.dim**-0.5)
            upstreams = [upstream.dout.flatten(1)[None], torch.ones_like(loss)]
            of_attention = torch.autograd.grad([out, loss], own, upstreams)[2:]
            out = out.detach()[0].unflatten(-1, (heads.query, heads.dim))
            return out, tuple(gradient[0].transpose(0, 1) for gradient in of_attention)

        return Call(
            lambda: run_with(problem.given_upstream),
            lambda _: problem.check_training(run_with, problem.block_ids("index")),
            needs_result=False,
        )

    pairs = shape.sparse_pairs(heads)
    return Candidate(
        op="train",
        name="flash-msa",
        package="flash-msa",
        pattern="index",
        start=start,
        flops=work.attention_forward(heads, pairs)
        + work.attention_backward(heads, pairs)
        + work.index_scores(heads, shape.causal_pairs())
        + work.kl_gradient(heads, pairs),
    )


EAGER_CHUNK_BYTES = 2**30


def eager_selection(problem: Problem) -> Candidate:
    """What a PyTorch user would write: chunks of scores, largest per block, torch.topk; no logsumexp."""
    heads = problem.heads
    index_q, index_k = problem.inputs.index_q.detach(), problem.inputs.index_k.detach()

    def run() -> Tensor:
        slots = min(heads.slots, -(-len(index_k) // heads.block_size))
        chunks = eager_block_scores(index_q, index_k, heads.block_size)
        return torch.cat([scores.topk(slots, dim=-1).indices.int() for scores in chunks])

    def check(block_ids: Tensor) -> Verdict:
        """Scores rounded to bf16 tie, so the blocks may differ; most must agree."""
        expected = problem.block_ids("index")[problem.rows]
        found = block_ids[problem.rows]
        is_found = (expected[..., None] == found[..., None, :]).any(-1)[expected >= 0]
        return Verdict.of([("share of missing blocks", 1 - float(is_found.double().mean()), 0.05)])

    return Candidate(
        op="select",
        name="PyTorch eager",
        package="torch",
        pattern="index",
        start=lambda: Call(run, check),
        flops=work.index_scores(heads, problem.shape.causal_pairs()),
    )


def eager_block_scores(index_q: Tensor, index_k: Tensor, block_size: int) -> Iterator[Tensor]:
    """Yields [chunk, Hkv, blocks]: the largest visible score of each block, the local block as +inf."""
    tokens, device = index_k.shape[0], index_k.device
    chunk = max(1, EAGER_CHUNK_BYTES // (index_q.shape[1] * tokens * 4))
    key = torch.arange(tokens, device=device)
    block = torch.arange(-(-tokens // block_size), device=device)
    for start in range(0, tokens, chunk):
        query = torch.arange(start, min(start + chunk, tokens), device=device)
        scores = torch.einsum("qrd,kd->qrk", index_q[start : start + chunk], index_k)
        scores = scores.masked_fill((key > query[:, None])[:, None], -torch.inf)
        padding = len(block) * block_size - tokens
        scores = F.pad(scores, (0, padding), value=-torch.inf)
        pooled = scores.unflatten(-1, (len(block), block_size)).amax(-1)
        yield pooled.masked_fill((block == (query // block_size)[:, None])[:, None], torch.inf)


def _pairs(problem: Problem, pattern: str) -> int:
    shape = problem.shape
    return shape.sparse_pairs(problem.heads) if pattern else shape.causal_pairs()
