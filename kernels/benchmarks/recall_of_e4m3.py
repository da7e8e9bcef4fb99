"""How many of the right blocks are found when they are ranked by 8-bit scores: tables of two READMEs.

    PYTHONPATH=kernels python kernels/benchmarks/recall_of_e4m3.py

block_select rounds queries and keys; decode_select has a cache of rounded keys and exact queries. Runs the
references, on a CPU within four minutes: rounding and products are the same everywhere. Block recall
is the share of the blocks chosen from exact scores that are chosen from rounded ones, the query's own block
left out. 64 queries from the second half of a document, 4 groups, d_i 128, 16 blocks of 128.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from msa_kernels import DocumentLayout, block_select, decode_select
from torch import Tensor

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.decode import in_8_bits

QUERIES, GROUPS, DIM, BLOCK_SIZE, SLOTS = 64, 4, 128, 128, 16
LENGTHS = (16_384, 131_072)
ROTARY_DIMS, ROTARY_BASE = 64, 5e6


def gaussian(position: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Independent normal entries."""
    return torch.randn(len(position), GROUPS, DIM).double(), torch.randn(num_keys, DIM).double()


def large_channels(position: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The same with an RMS norm whose gains are 8 in four channels and 1 in the others, and RoPE."""
    gain = torch.ones(DIM).double()
    gain[[5, 40, 70, 111]] = 8
    index_q, index_k = gaussian(position, num_keys)
    return normed_and_rotated(index_q, gain, position), normed_and_rotated(
        index_k, gain, torch.arange(num_keys)
    )


def drifting_topics(position: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """The same with keys of a few dimensions that drift along the document, and queries like their keys."""
    gain = torch.ones(DIM).double()
    gain[[5, 40, 70, 111]] = 8
    mixing = torch.randn(16, DIM).double()
    topic = torch.randn(-(-num_keys // 256), 16).double().repeat_interleave(256, 0)[:num_keys]
    index_k = (topic + 0.7 * torch.randn(num_keys, 16)) @ mixing + 0.5 * torch.randn(num_keys, DIM)
    turn = torch.eye(DIM).double() + 0.5 * torch.randn(GROUPS, DIM, DIM) / DIM**0.5
    index_q = torch.einsum("qd,rde->qre", index_k[position], turn)
    index_q += 0.5 * torch.randn(index_q.shape)
    return normed_and_rotated(index_q, gain, position), normed_and_rotated(
        index_k, gain, torch.arange(num_keys)
    )


def normed_and_rotated(vectors: Tensor, gain: Tensor, position: Tensor) -> Tensor:
    """RMS norm, then RoPE on the first dims."""
    vectors = gain * vectors / vectors.square().mean(-1, keepdim=True).sqrt()
    frequency = ROTARY_BASE ** (-torch.arange(0, ROTARY_DIMS, 2).double() / ROTARY_DIMS)
    angle = position.double()[:, None] * frequency
    angle = angle[:, None] if vectors.dim() == 3 else angle
    first, second, rest = vectors.split([ROTARY_DIMS // 2, ROTARY_DIMS // 2, DIM - ROTARY_DIMS], dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def selections(make: Callable[[Tensor, int], tuple[Tensor, Tensor]], num_keys: int) -> dict[str, Tensor]:
    """Block ids without the own block, int32 [QUERIES, GROUPS, SLOTS - 1], by how they were ranked."""
    torch.manual_seed(0)
    position = torch.randint(num_keys // 2, num_keys, (QUERIES,))
    index_q, index_k = make(position, num_keys)
    layout = DocumentLayout.dense_batch(1, num_keys).select_queries(position)
    sizes = {"block_size": BLOCK_SIZE, "num_selected_blocks": SLOTS}

    def select(dtype: torch.dtype, score_dtype: str = "input") -> Tensor:
        inputs = index_q.to(dtype), index_k.to(dtype)
        found = block_select(
            *inputs, layout, with_lse=False, score_dtype=score_dtype, backend="reference", **sizes
        )
        return found.block_ids[..., :-1]

    def decode() -> Tensor:
        """Every query as the last token of a sequence; all sequences share their pages."""
        cache = index_k.to(torch.bfloat16).unflatten(0, (-1, BLOCK_SIZE))
        values, scale = in_8_bits(cache)
        table = torch.arange(len(cache), dtype=torch.int32).expand(QUERIES, -1)
        found = decode_select(
            index_q.to(torch.bfloat16)[:, None],
            values,
            table,
            position.int() + 1,
            top_k=SLOTS,
            index_key_scale=scale,
            backend="reference",
        )
        return found[:, 0, :, :-1]

    return {
        "e4m3 cache": decode(),
        "fp64": select(torch.float64),
        "bf16": select(torch.bfloat16),
        "e4m3": select(torch.bfloat16, "e4m3"),
    }


def recall(found: Tensor, wanted: Tensor) -> float:
    return float((wanted[..., None] == found[..., None, :]).any(-1).double().mean())


def main() -> None:
    columns = (
        "index vectors | keys | e4m3 of bf16 | e4m3 of fp64 | bf16 of fp64 | e4m3 cache of bf16 | of fp64"
    )
    print(f"| {columns} |\n|---|---|---|---|---|---|---|")
    for make in (gaussian, large_channels, drifting_topics):
        for num_keys in LENGTHS:
            by = selections(make, num_keys)
            values = (
                recall(by["e4m3"], by["bf16"]),
                recall(by["e4m3"], by["fp64"]),
                recall(by["bf16"], by["fp64"]),
                recall(by["e4m3 cache"], by["bf16"]),
                recall(by["e4m3 cache"], by["fp64"]),
            )
            name = make.__name__.replace("_", " ")
            print(
                f"| {name} | {num_keys:,} | " + " | ".join(f"{value:.3f}" for value in values) + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
