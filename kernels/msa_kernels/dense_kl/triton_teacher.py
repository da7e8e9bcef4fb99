"""The teacher of a tile: attention probabilities computed again from the LSE, averaged over the heads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_mean_probabilities(
    tile, q, lse, first_place, key_tile, group, num_queries, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    WITH_ENTROPY: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """tile, fp32 [ROWS, KEYS], with the mean over the heads of P_h added. Hidden keys get arbitrary values.

    q is a tensor descriptor of [Q, Hq * d], lse [Q, Hq]. The heads are a loop around one tile of keys, so
    that their mean is a sum in registers, and the index scores of the same positions and keys are a full tile
    as well. WITH_ENTROPY (of a tile of zeros) also returns the mean over the heads of P_h log2 P_h, else the
    first result again.
    """
    place = first_place + tl.arange(0, ROWS)
    pointers = lse + place.to(tl.int64) * HEADS + group * GROUP
    keys_by_columns = tl.trans(key_tile)
    log2_group = tl.log2(tl.full([], GROUP, dtype=tl.float32))
    entropy = tile
    for head in tl.range(0, GROUP, num_stages=STAGES):
        q_tile = q.load([first_place, (group * GROUP + head) * DIM])
        # P_h / G: the division happens in the exponent.
        row_lse = tl.load(pointers + head, mask=place < num_queries, other=0.0)
        lse_log2 = row_lse * 1.4426950408889634 + log2_group
        log_p = tl.dot(q_tile, keys_by_columns) * scale_log2 - lse_log2[:, None]
        p = tl.exp2(log_p)
        tile += p
        if WITH_ENTROPY:
            entropy += p * log_p
    if WITH_ENTROPY:
        return tile, entropy + log2_group * tile
    return tile, tile
