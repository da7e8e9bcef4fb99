"""Runs the Triton kernels of decode_attention: one or two launches, nothing that waits for the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from msa_kernels.common.backend import Implementation
from msa_kernels.common.hopper import device_refusal
from msa_kernels.decode.triton_attend import decode_attend_kernel, decode_combine_kernel

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
BLOCK_SIZES = (64, 128)
MAX_GROUP = 16
MAX_SLOTS = 64
MAX_TILE_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class AttendLaunch:
    """How the kernels are cut into programs.

    Attributes:
        programs: programs that are wanted over all sequences, groups and queries; the blocks of each are cut
            into as many parts as that takes.
        max_part: most blocks of a part.
        keys: keys per step.
        stages: steps in flight per program, see ``CORRECT_STAGES``.
        warps: of the attention kernel.
        chunk: parts that the sum over the parts reads at a time.
        combine_warps: of that sum.
    """

    programs: int
    max_part: int
    stages: int
    keys: int = 64
    warps: int = 4
    chunk: int = 16
    combine_warps: int = 1


CHOSEN = AttendLaunch(programs=512, max_part=16, stages=2)
EVERYTHING = AttendLaunch(programs=2048, max_part=64, stages=3)

# Stages for which Triton 3.6 makes a right kernel. With one, ptxas 12.8 computes the wgmma descriptors of the
# weights from registers that nothing has written (12.9 does not): illegal memory accesses. With three or more
# over chosen blocks, Triton's pipeliner fails on the two look-ups that follow each other.
CORRECT_STAGES = {"chosen blocks": (2,), "all blocks": (2, 3, 4)}


def refusal(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    block_ids: Tensor | None,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> str | None:
    """Why these inputs, checked by the op, cannot run here; None if they can."""
    _, groups, block_size, dim = key_cache.shape
    if reason := device_refusal(query):
        return reason
    if query.dtype not in DTYPES:
        return f"query has dtype {query.dtype}; supported are torch.bfloat16 and torch.float16"
    if dim not in HEAD_DIMS:
        return f"the head dim is {dim}; supported are {HEAD_DIMS}"
    if value_cache.shape[3] != dim:
        return (
            f"the head dim of values is {value_cache.shape[3]} but that of keys is {dim}; they must be equal"
        )
    if block_size not in BLOCK_SIZES:
        return f"the block size is {block_size}; supported are {BLOCK_SIZES}"
    if query.shape[2] // groups > MAX_GROUP:
        return (
            f"there are {query.shape[2] // groups} query heads per group; at most {MAX_GROUP} are supported"
        )
    if block_ids is not None and block_ids.shape[3] > MAX_SLOTS:
        return f"there are {block_ids.shape[3]} blocks per query; at most {MAX_SLOTS} are supported"
    if key_cache.data_ptr() % 16 or value_cache.data_ptr() % 16:
        return "key_cache or value_cache does not start at a multiple of 16 bytes"
    return None


@torch.no_grad()
def run(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    block_ids: Tensor | None,
    *,
    scale: float,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    launch: AttendLaunch | None = None,
) -> Tensor:
    """See ``msa_kernels.decode_attention``; inputs are checked, scale is given.

    Grids and buffers follow from shapes alone, so that a CUDA graph serves any lengths, pages and blocks. Of
    more than one part, each takes 4 * (d + 1) bytes per query and head.
    """
    if launch is None:
        launch = EVERYTHING if block_ids is None else CHOSEN
    blocks = "all blocks" if block_ids is None else "chosen blocks"
    if launch.stages not in CORRECT_STAGES[blocks]:
        raise ValueError(
            f"launch.stages is {launch.stages}; over {blocks} it must be one of {CORRECT_STAGES[blocks]}"
        )
    sequences, q_len, heads, dim = query.shape
    groups, block_size = key_cache.shape[1:3]
    group = heads // groups
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if sequences == 0:
        return out
    # Queries share a tile where they attend to the same blocks.
    tile_queries = min(q_len, max(1, MAX_TILE_ROWS // group)) if block_ids is None else 1
    tiles = triton.cdiv(q_len, tile_queries)
    max_blocks = page_table.shape[1]
    slots = 0 if block_ids is None else block_ids.shape[3]
    most_blocks = slots or max_blocks
    part_blocks = triton.cdiv(most_blocks, triton.cdiv(launch.programs, sequences * groups * tiles))
    part_blocks = min(part_blocks, launch.max_part)
    parts = triton.cdiv(most_blocks, part_blocks)
    part_out, part_lse = out, None
    if parts > 1:
        part_out = torch.empty(*query.shape[:3], parts, dim, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(*query.shape[:3], parts, dtype=torch.float32, device=query.device)
    lengths = lengths.contiguous()
    block_ids = None if block_ids is None else block_ids.contiguous()
    shapes = {
        "QUERIES": q_len,
        "HEADS": heads,
        "GROUP": group,
        "SLOTS": slots,
        "PADDED_SLOTS": triton.next_power_of_2(slots) if slots else 0,
        "DIM": dim,
        "BLOCK": block_size,
    }
    with torch.cuda.device_of(query):
        decode_attend_kernel[(parts, sequences * groups, tiles)](
            query.contiguous(),
            key_cache,
            value_cache,
            key_scale,
            value_scale,
            page_table.contiguous(),
            lengths,
            block_ids,
            part_out,
            part_lse,
            max_blocks,
            part_blocks,
            parts,
            scale * math.log2(math.e),
            **shapes,
            TILE_QUERIES=tile_queries,
            ROWS=max(16, triton.next_power_of_2(tile_queries * group)),
            KEYS=launch.keys,
            STAGES=launch.stages,
            UPCAST=triton.knobs.runtime.interpret,
            num_warps=launch.warps,
        )
        if part_lse is not None:
            decode_combine_kernel[(sequences * q_len * heads,)](
                part_out,
                part_lse,
                lengths,
                block_ids,
                out,
                part_blocks,
                parts,
                **shapes,
                CHUNK=launch.chunk,
                num_warps=launch.combine_warps,
            )
    return out


IMPLEMENTATION = Implementation(run=run, refusal=refusal)
