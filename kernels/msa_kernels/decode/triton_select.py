"""Runs the Triton kernels of decode_select: two launches, nothing that waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from msa_kernels.common.backend import Implementation
from msa_kernels.common.hopper import device_refusal
from msa_kernels.decode.checks import EIGHT_BIT
from msa_kernels.decode.triton_scores import decode_scores_kernel
from msa_kernels.decode.triton_topk import decode_topk_kernel

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
MAX_SLOTS = 64
MAX_TILE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class SelectLaunch:
    """How the kernels are cut into programs.

    Attributes:
        programs: programs of the score kernel that are wanted over all sequences; more of them even out
            different lengths, fewer spend less time on starting.
        max_segment: most blocks that one of them works through.
        stages: index key blocks in flight per program.
        warps: of the score kernel.
        hands: hands that the top-k ranks in a round; at least four times the slots.
        loads: block maxima that it reads at a time.
        topk_warps: of the top-k kernel.
    """

    programs: int = 2048
    max_segment: int = 32
    stages: int = 3
    warps: int = 4
    hands: int = 128
    loads: int = 4096
    topk_warps: int = 8


LAUNCH = SelectLaunch()
LAUNCH_8_BIT = SelectLaunch(stages=4)


def refusal(
    index_query: Tensor,
    index_key_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    index_key_scale: Tensor | None,
) -> str | None:
    """Why these inputs, checked by the op, cannot run here; None if they can."""
    _, block_size, dim = index_key_cache.shape
    if reason := device_refusal(index_query):
        return reason
    if index_query.dtype not in DTYPES:
        return f"index_query has dtype {index_query.dtype}; supported are torch.bfloat16 and torch.float16"
    if dim not in HEAD_DIMS:
        return f"the index head dim is {dim}; supported are {HEAD_DIMS}"
    if block_size not in BLOCK_SIZES:
        return f"the block size is {block_size}; supported are {BLOCK_SIZES}"
    if top_k > MAX_SLOTS:
        return f"top_k is {top_k}; at most {MAX_SLOTS} are supported"
    if index_key_cache.data_ptr() % 16:
        return "index_key_cache does not start at a multiple of 16 bytes"
    return None


@torch.no_grad()
def run(
    index_query: Tensor,
    index_key_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    top_k: int,
    index_key_scale: Tensor | None,
    launch: SelectLaunch | None = None,
) -> Tensor:
    """See ``msa_kernels.decode_select``; inputs are checked.

    Grids and buffers follow from shapes alone, so that a CUDA graph serves any lengths and pages. The buffer
    of block maxima takes 4 * q_len * groups bytes for every entry of the page table.
    """
    if launch is None:
        launch = LAUNCH_8_BIT if index_key_cache.dtype == EIGHT_BIT else LAUNCH
    sequences, q_len, groups, dim = index_query.shape
    block_size = index_key_cache.shape[1]
    max_blocks = page_table.shape[1]
    rows = q_len * groups
    block_ids = torch.empty(sequences, q_len, groups, top_k, dtype=torch.int32, device=index_query.device)
    if sequences == 0:
        return block_ids
    lengths = lengths.contiguous()
    block_max = torch.empty(sequences, rows, max_blocks, dtype=torch.float32, device=index_query.device)
    tile_rows = min(MAX_TILE_ROWS, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, tile_rows)
    wanted = triton.cdiv(sequences * tiles * max_blocks, launch.programs)
    segment_blocks = min(wanted, launch.max_segment)
    slots = triton.next_power_of_2(top_k)
    parts = max(4, launch.hands // slots)
    keys = TensorDescriptor.from_tensor(index_key_cache.flatten(0, 1), [block_size, dim])
    with torch.cuda.device_of(index_query):
        decode_scores_kernel[(triton.cdiv(max_blocks, segment_blocks), sequences, tiles)](
            index_query.contiguous(),
            keys,
            index_key_scale,
            page_table.contiguous(),
            lengths,
            block_max,
            max_blocks,
            segment_blocks,
            SEQUENCE_ROWS=rows,
            DIM=dim,
            BLOCK=block_size,
            ROWS=tile_rows,
            STAGES=launch.stages,
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=launch.warps,
        )
        decode_topk_kernel[(sequences * rows,)](
            block_max,
            lengths,
            block_ids,
            max_blocks,
            QUERIES=q_len,
            GROUPS=groups,
            BLOCK=block_size,
            COUNT=top_k,
            SLOTS=slots,
            PARTS=parts,
            CHUNK=launch.loads // (slots * parts),
            num_warps=launch.topk_warps,
        )
    return block_ids


IMPLEMENTATION = Implementation(run=run, refusal=refusal)
