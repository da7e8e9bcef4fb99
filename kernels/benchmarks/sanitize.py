"""One small call of every operator with Triton kernels, forward and backward, for compute-sanitizer.

kernels/benchmarks/sanitize.sh
"""

from __future__ import annotations

import sys

import torch
from msa_kernels import DocumentLayout, block_select, dense_kl, sparse_attention

# Documents that end within a block, one of one token, empty ones; rows that do not fill a tile.
LENGTHS = (300, 0, 1, 64, 135)
HEADS, GROUPS, SLOTS = 8, 2, 3


def main() -> None:
    for block_size, dim in ((128, 128), (64, 64)):
        run(block_size, dim)
    torch.cuda.synchronize()
    print("all operators ran")


def run(block_size: int, dim: int) -> None:
    offsets = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0)
    layout = DocumentLayout.from_document_offsets(offsets)
    tokens = sum(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, device="cuda", dtype=torch.bfloat16).requires_grad_()

    q, k, v = normal(HEADS, dim), normal(GROUPS, dim), normal(GROUPS, dim)
    index = {"index_q": normal(GROUPS, dim), "index_k": normal(dim)}
    sizes = {"block_size": block_size, "num_selected_blocks": SLOTS}
    for options in ({"with_lse": True}, {"with_lse": False}, {"with_lse": False, "score_dtype": "e4m3"}):
        selection = block_select(*index.values(), layout, backend="triton", **sizes, **options)
    options = {"block_size": block_size, "backend": "triton"}
    for kl_teacher in ("group_mean", "per_head"):
        result = sparse_attention(
            q, k, v, selection.block_ids, layout, kl_teacher=kl_teacher, **index, **options
        )
        (result.out.float().sum() + result.kl.sum()).backward()
    try:
        result = dense_kl(q, k, v, layout, backend="triton", **index)
    except RuntimeError as error:
        print(f"left out: {error}", file=sys.stderr)
    else:
        (result.out.float().sum() + result.kl.sum()).backward()


if __name__ == "__main__":
    main()
