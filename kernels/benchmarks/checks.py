"""Results are compared with the reference operators before anything is timed.

Full results are out of the reference's reach at most sizes, so it computes some queries of the same call,
over all keys, in fp32. Gradients of keys add up over queries: they are compared in a second backward pass,
for every key, whose upstream gradient is zero but at those queries. Errors are judged per row (a query and
head, or a key and group), not over the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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

from benchmarks.inputs import Inputs, Upstream
from benchmarks.registry import Heads

# Relative error norm of a row. Probabilities and results rounded to bf16 (2^-9 each) give 2e-3 to 4e-3.
OUTPUT_LIMIT = 1e-2
# Gradients round the scores' gradient, too, and differ in size from row to row: a twentieth of the median row
# norm is added to the denominator.
GRADIENT_LIMIT = 2e-2
GRADIENT_FLOOR = 0.05
# A query that sees one key has dq = 0, as a difference of large numbers; with some more they still cancel so
# far that the rounding of out shows. The training check leaves such queries to the tests of the operators.
FEW_KEYS = 16
# Natural-log units; logsumexps and divergences are computed in fp32 from exact products of bf16 numbers.
LSE_LIMIT = 1e-3
KL_LIMIT = 1e-2
# Rows and groups with the exact selection. fp32 may order two blocks differently whose scores agree to 1e-6.
SELECTION_SHARE = 0.99
# Of the exact selection's blocks, on average, for scores rounded to 8 bits.
ROUNDED_RECALL = 0.8


class Verdict(NamedTuple):
    """Outcome of a check: ``errors`` is empty if it passed, ``worst`` the largest error over its limit."""

    errors: tuple[str, ...]
    worst: float

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong."""
        return not self.errors

    @classmethod
    def of(cls, comparisons: Sequence[tuple[str, float, float]]) -> Verdict:
        """From (name, error, limit) of each comparison; a NaN error fails."""
        errors = tuple(
            f"{name}: error {error:.1e} > {limit:.0e}"
            for name, error, limit in comparisons
            if not error <= limit
        )
        return cls(errors, max((error / limit for _, error, limit in comparisons), default=0.0))


def sample_queries(layout: DocumentLayout, count: int, *, seed: int = 0) -> Tensor:
    """At most ``count`` distinct queries, int64: the first, the last, two in the middle, random others."""
    total = layout.num_queries
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.tensor([0, 1, total // 2 - 1, total // 2, total - 2, total - 1]).clamp(0, total - 1)
    others = torch.randint(total, (max(0, count - len(fixed)),), generator=generator)
    return torch.cat([fixed, others]).unique().to(layout.device)


def check_selection(
    found: BlockSelection,
    inputs: Inputs,
    layout: DocumentLayout,
    heads: Heads,
    rows: Tensor,
    *,
    exact: bool = True,
) -> Verdict:
    """The same sets of blocks, the local one last, and (where it was asked for) the same logsumexp.

    Not ``exact``: most of the same blocks, as rounded scores rank them.
    """
    of_rows = inputs.of_queries(rows, torch.float64)
    expected = block_select(
        of_rows.index_q,
        of_rows.index_k,
        layout.select_queries(rows),
        block_size=heads.block_size,
        num_selected_blocks=heads.slots,
        backend="reference",
    )
    found_ids = found.block_ids[rows]
    agrees = (found_ids.sort(-1).values == expected.block_ids.sort(-1).values).all(-1)
    valid = (found_ids >= 0).sum(-1, keepdim=True)
    last = found_ids.gather(-1, (valid - 1).clamp(min=0).long())[..., 0]
    is_local = last == (layout.query_position[rows] // heads.block_size)[:, None]
    is_found = (found_ids[..., None, :] == expected.block_ids[..., None]).any(-1)
    missing = 1 - _mean(is_found[expected.block_ids >= 0])
    comparisons = [
        ("share of wrong selections", 1 - _mean(agrees), 1 - SELECTION_SHARE)
        if exact
        else ("share of missing blocks", missing, 1 - ROUNDED_RECALL),
        ("share of rows without the local block last", 1 - _mean(is_local), 0.5 / agrees.numel()),
    ]
    if found.index_lse is not None:
        difference = (found.index_lse[rows].double() - expected.index_lse)[agrees].abs()
        comparisons.append(("index_lse", _largest(difference), LSE_LIMIT))
    return Verdict.of(comparisons)


def check_forward(
    found: AttentionOutput | Tensor,
    inputs: Inputs,
    layout: DocumentLayout,
    heads: Heads,
    rows: Tensor,
    block_ids: Tensor | None,
) -> Verdict:
    """Outputs of the chosen queries. ``block_ids`` None: full attention; ``found`` a tensor: out alone."""
    found = _as_output(found)
    with torch.no_grad():
        expected = _reference(inputs, layout, heads, rows, block_ids, with_kl=found.kl is not None)[0]
    return Verdict.of(_compare_outputs(found, expected, rows))


def check_training(
    run: Callable[[Upstream], tuple[AttentionOutput | Tensor, Sequence[Tensor]]],
    upstream: Upstream,
    inputs: Inputs,
    layout: DocumentLayout,
    heads: Heads,
    rows: Tensor,
    block_ids: Tensor | None,
) -> Verdict:
    """Outputs of the chosen queries and all gradients that they cause.

    Args:
        run: maps upstream gradients to the outputs and the gradients of q, k, v (and index_q, index_k).
        upstream: values for the chosen queries are taken from here.
        inputs: of the call.
        layout: of the call.
        heads: of the call.
        rows: the chosen queries.
        block_ids: the selection of the call; None for full attention.
    """
    sees_enough = layout.query_position[rows] >= FEW_KEYS
    rows = rows[sees_enough] if sees_enough.any() else rows
    found, gradients = run(upstream.only(rows))
    found = _as_output(found)
    with_kl = found.kl is not None
    expected, leaves = _reference(inputs, layout, heads, rows, block_ids, with_kl=with_kl)
    outputs, ups = [expected.out], [upstream.dout[rows].float()]
    if expected.kl is not None:
        outputs.append(expected.kl)
        ups.append(torch.ones_like(expected.kl))
    wanted = torch.autograd.grad(outputs, leaves if with_kl else leaves[:3], ups)
    comparisons = _compare_outputs(found, expected, rows)
    names = ("dq", "dk", "dv", "dindex_q", "dindex_k")
    for name, gradient, exact in zip(names, gradients, wanted, strict=False):
        if name in ("dq", "dindex_q"):
            others = torch.ones(len(gradient), dtype=torch.bool, device=gradient.device)
            others[rows] = False
            comparisons.append((f"{name} of other queries", _largest(gradient[others].abs()), 0.5e-30))
            gradient = gradient[rows]
        comparisons.append((name, gradient_error(gradient, exact), GRADIENT_LIMIT))
    return Verdict.of(comparisons)


def row_error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error norm over the last dimension."""
    found, expected = found.detach().double(), expected.detach().double()
    return _largest((found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30))


def gradient_error(found: Tensor, expected: Tensor) -> float:
    """As ``row_error``; the denominator is at least a share of the median norm of the nonzero rows."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = expected.norm(dim=-1)
    nonzero = norm[norm > 0]
    floor = GRADIENT_FLOOR * float(nonzero.median()) if nonzero.numel() else 1.0
    return _largest((found - expected).norm(dim=-1) / (norm + floor))


def _reference(
    inputs: Inputs,
    layout: DocumentLayout,
    heads: Heads,
    rows: Tensor,
    block_ids: Tensor | None,
    *,
    with_kl: bool,
) -> tuple[AttentionOutput, Inputs]:
    leaves = inputs.of_queries(rows, torch.float32)
    queries = layout.select_queries(rows)
    index = {"index_q": leaves.index_q, "index_k": leaves.index_k} if with_kl else {}
    if block_ids is None:
        output = dense_kl(*leaves[:3], queries, backend="reference", **index)
    else:
        output = sparse_attention(
            *leaves[:3],
            block_ids[rows],
            queries,
            block_size=heads.block_size,
            backend="reference",
            **index,
        )
    return output, leaves


def _as_output(found: AttentionOutput | Tensor) -> AttentionOutput:
    """Dense and sparse baselines return out alone."""
    return AttentionOutput(found, None, None) if isinstance(found, Tensor) else found


def _compare_outputs(
    found: AttentionOutput, expected: AttentionOutput, rows: Tensor
) -> list[tuple[str, float, float]]:
    comparisons = [("out", row_error(found.out[rows], expected.out), OUTPUT_LIMIT)]
    if found.lse is not None:
        comparisons.append(("lse", _largest((found.lse[rows] - expected.lse).abs()), LSE_LIMIT))
    if found.kl is not None and expected.kl is not None:
        difference = (found.kl[rows] - expected.kl).abs() / (expected.kl.abs() + 0.1)
        comparisons.append(("kl", _largest(difference.detach()), KL_LIMIT))
    return comparisons


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _largest(values: Tensor) -> float:
    """0 of nothing; NaN if there is one."""
    return float(values.max()) if values.numel() else 0.0
