"""Runs the Triton kernels of block_select: two launches per chunk of queries."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.block_select import e4m3
from msa_kernels.block_select.triton_scores import block_scores_kernel
from msa_kernels.block_select.triton_topk import topk_kernel
from msa_kernels.common.backend import Implementation
from msa_kernels.common.hopper import device_refusal
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import BlockSelection

# Budget of the buffers that hold one number per row and block; a larger call runs in chunks of queries.
MAX_BUFFER_BYTES = 2**30

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16)
SUPPORTED_DIMS = (64, 128)
SUPPORTED_BLOCK_SIZES = (64, 128)
MAX_SELECTED_BLOCKS = 64

# Three programs of the score kernel share a multiprocessor, so that some multiply while others reduce: that
# gains more than key blocks loaded ahead, for which three programs leave no shared memory unless keys have 8
# bits. Each may then take a third of the 64 K registers.
TILE_ROWS = 128
SCORE_SETTINGS = {"TILE": TILE_ROWS, "num_warps": 4, "maxnreg": 168}
STAGES = {"input": 1, "e4m3": 2}
# A program works through up to 32 blocks. Enough programs for a short document; and programs that run at the
# same time read the same few keys.
MIN_SEGMENT_BLOCKS = 8
MAX_SEGMENT_BLOCKS = 32
PROGRAMS_WANTED = 4096

# One warp with one row per thread: reductions over a row's blocks then stay inside a thread.
TOPK_ROWS = 32
TOPK_SETTINGS = {"ROWS": TOPK_ROWS, "CHUNK": 8, "FULL": 16, "num_warps": 1}


def refusal(
    index_q: Tensor,
    index_k: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    num_selected_blocks: int,
    softmax_scale: float,
    with_lse: bool,
    score_dtype: str,
) -> str | None:
    """Why these inputs, checked by the op, cannot run here; None if they can."""
    if index_q.dtype not in SUPPORTED_DTYPES:
        return f"index_q has dtype {index_q.dtype}; it takes torch.bfloat16 and torch.float16"
    if index_q.shape[2] not in SUPPORTED_DIMS:
        return f"the index head dim is {index_q.shape[2]}; it takes 64 and 128"
    if block_size not in SUPPORTED_BLOCK_SIZES:
        return f"block_size is {block_size}; it takes 64 and 128"
    if num_selected_blocks > MAX_SELECTED_BLOCKS:
        return f"num_selected_blocks is {num_selected_blocks}; it takes at most {MAX_SELECTED_BLOCKS}"
    return device_refusal(index_q)


@torch.no_grad()
def run(
    index_q: Tensor,
    index_k: Tensor,
    layout: DocumentLayout,
    *,
    block_size: int,
    num_selected_blocks: int,
    softmax_scale: float,
    with_lse: bool,
    score_dtype: str,
) -> BlockSelection:
    """See ``msa_kernels.block_select``; inputs are checked, index_k is [K, d_i], softmax_scale is given.

    Nothing here waits for the device: grids and buffers follow from shapes and max_document_length.
    """
    num_queries, groups, dim = index_q.shape
    device = index_q.device
    block_ids = torch.empty(num_queries, groups, num_selected_blocks, dtype=torch.int32, device=device)
    index_lse = torch.empty(num_queries, groups, dtype=torch.float32, device=device) if with_lse else None
    if num_queries == 0:
        return BlockSelection(block_ids, index_lse)

    index_q, index_k = _contiguous_and_aligned(index_q), _contiguous_and_aligned(index_k)
    key_scale = None
    if score_dtype == "e4m3":
        # The scale of a query is left out: it is the same for all scores of a row.
        index_q, _ = e4m3.quantise(index_q)
        index_k, key_scale = e4m3.quantise(index_k)
    query_document, query_position = layout.query_document.contiguous(), layout.query_position.contiguous()
    document_offsets = layout.document_offsets.contiguous()

    keys = TensorDescriptor.from_tensor(index_k, [block_size, dim])
    num_rows = num_queries * groups
    num_blocks = max(1, layout.max_blocks(block_size))
    buffer_rows = _rows_per_chunk(num_rows, num_blocks, numbers=2 if with_lse else 1)
    block_max = torch.empty(num_blocks, buffer_rows, dtype=torch.float32, device=device)
    block_lse = torch.empty_like(block_max) if with_lse else None
    queue = topk_queue(buffer_rows, device)
    tiles = triton.cdiv(buffer_rows, TILE_ROWS)
    segment_blocks = _segment_blocks(tiles, num_blocks)

    with torch.cuda.device_of(index_q):
        for first_row in range(0, num_rows, buffer_rows):
            end_row = min(first_row + buffer_rows, num_rows)
            chunk_rows = end_row - first_row
            block_scores_kernel[triton.cdiv(chunk_rows, TILE_ROWS), triton.cdiv(num_blocks, segment_blocks)](
                index_q,
                keys,
                key_scale,
                document_offsets,
                query_document,
                query_position,
                block_max,
                block_lse,
                first_row,
                end_row,
                buffer_rows,
                segment_blocks,
                softmax_scale * math.log2(math.e),
                GROUPS=groups,
                DIM=dim,
                BLOCK=block_size,
                UPCAST=triton.knobs.runtime.interpret,
                STAGES=STAGES[score_dtype],
                **SCORE_SETTINGS,
            )
            topk_kernel[(triton.cdiv(chunk_rows, TOPK_ROWS),)](
                block_max,
                block_lse,
                query_position,
                queue,
                block_ids,
                index_lse,
                first_row,
                end_row,
                buffer_rows,
                GROUPS=groups,
                BLOCK=block_size,
                COUNT=num_selected_blocks,
                SLOTS=triton.next_power_of_2(num_selected_blocks),
                **TOPK_SETTINGS,
            )
    return BlockSelection(block_ids, index_lse)


def topk_queue(num_rows: int, device: torch.device) -> Tensor:
    """Scratch of ``topk_kernel`` for so many rows: 192 bytes a row."""
    length = TOPK_SETTINGS["CHUNK"] + TOPK_SETTINGS["FULL"]
    programs = triton.cdiv(num_rows, TOPK_ROWS)
    return torch.empty(programs, length, TOPK_ROWS, dtype=torch.int64, device=device)


def _rows_per_chunk(num_rows: int, num_blocks: int, *, numbers: int) -> int:
    """Rows whose fp32 numbers per block stay within the budget, in whole tiles and equal chunks."""
    tile_bytes = numbers * 4 * num_blocks * TILE_ROWS
    most_tiles = max(1, MAX_BUFFER_BYTES // tile_bytes)
    tiles = triton.cdiv(num_rows, TILE_ROWS)
    chunks = triton.cdiv(tiles, most_tiles)
    return triton.cdiv(tiles, chunks) * TILE_ROWS


def _segment_blocks(tiles: int, num_blocks: int) -> int:
    wanted = triton.cdiv(tiles * num_blocks, PROGRAMS_WANTED)
    return min(max(wanted, MIN_SEGMENT_BLOCKS), MAX_SEGMENT_BLOCKS)


def _contiguous_and_aligned(tensor: Tensor) -> Tensor:
    """The same values in one piece that starts at a multiple of 16 bytes, as wide loads need it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


IMPLEMENTATION = Implementation(run=run, refusal=refusal)
