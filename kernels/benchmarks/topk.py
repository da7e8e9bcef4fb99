"""The top-k of block_select alone, against torch.topk on the same block scores."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.candidate import Call, Candidate, Unavailable
from benchmarks.checks import Verdict
from benchmarks.registry import Heads, Shape


class Scores:
    """Block scores of a single document, fp32, normal; blocks from the query's own on are -inf.

    Attributes:
        by_row: [Q * Hkv, blocks], what torch.topk reads.
        by_block: [blocks, Q * Hkv], what the kernel reads: the layout in which the scores are computed.
    """

    def __init__(self, shape: Shape, heads: Heads, device: torch.device) -> None:
        self.shape = shape
        self.heads = heads
        self.layout = shape.layout(device)
        blocks = -(-shape.num_keys // heads.block_size)
        rows = shape.num_queries * heads.groups
        generator = torch.Generator(device).manual_seed(0)
        self.by_row = torch.randn(rows, blocks, generator=generator, device=device)
        self.local = (self.layout.query_position // heads.block_size).repeat_interleave(heads.groups)
        block = torch.arange(blocks, device=device)
        self.by_row.masked_fill_(block >= self.local[:, None], -torch.inf)
        self.by_block = self.by_row.t().contiguous()

    @property
    def bytes(self) -> int:
        """The scores before each row's local block, and the ids."""
        return int(self.local.sum()) * 4 + self.local.numel() * self.heads.slots * 4

    def check(self, block_ids: Tensor) -> Verdict:
        """The scores of the chosen blocks, sorted, are exactly the largest ones."""
        rows = self.local.numel()
        others = self.heads.slots - 1
        exact = self.by_row.topk(min(others, self.by_row.shape[1]), dim=-1).values
        ids = block_ids.view(rows, -1)
        is_other = (ids >= 0) & (ids != self.local[:, None])
        chosen = self.by_row.gather(1, ids.clamp(min=0).long()).masked_fill(~is_other, -torch.inf)
        chosen = chosen.sort(-1, descending=True).values[:, : exact.shape[1]]
        wrong = (chosen != exact).any(-1)
        return Verdict.of([("share of wrong rows", float(wrong.double().mean()), 0.5 / rows)])


def torch_topk(scores: Scores) -> Candidate:
    """torch.topk of all slots but the local one."""
    others = min(scores.heads.slots - 1, scores.by_row.shape[1])
    return Candidate(
        op="topk",
        name="torch.topk",
        package="torch",
        start=lambda: Call(
            lambda: scores.by_row.topk(others, dim=-1), lambda result: scores.check(result.indices.int())
        ),
        bytes=scores.bytes,
    )


def kernel(scores: Scores) -> Candidate:
    """The Triton kernel, local block included; no logsumexp."""
    heads, device = scores.heads, scores.by_row.device

    def start() -> Call:
        if device.type != "cuda":
            raise Unavailable("the top-k kernel needs a CUDA device")
        import triton
        from msa_kernels.block_select.triton_run import TOPK_ROWS, TOPK_SETTINGS, topk_queue
        from msa_kernels.block_select.triton_topk import topk_kernel

        rows = scores.local.numel()

        def run() -> Tensor:
            block_ids = torch.empty(rows, heads.slots, dtype=torch.int32, device=device)
            topk_kernel[(triton.cdiv(rows, TOPK_ROWS),)](
                scores.by_block,
                None,
                scores.layout.query_position,
                topk_queue(rows, device),
                block_ids,
                None,
                0,
                rows,
                rows,
                GROUPS=heads.groups,
                BLOCK=heads.block_size,
                COUNT=heads.slots,
                SLOTS=triton.next_power_of_2(heads.slots),
                **TOPK_SETTINGS,
            )
            return block_ids

        return Call(run, scores.check)

    return Candidate(op="topk", name="msa_kernels", start=start, bytes=scores.bytes, is_ours=True)
