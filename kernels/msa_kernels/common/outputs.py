"""What the ops return.

Letters in shapes: Q queries, Hq query heads, Hkv key/value heads (= groups), d_v value head dim.
"accumulation dtype" is fp64 for fp64 inputs and fp32 for all others.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BlockSelection(NamedTuple):
    """The blocks each query attends to.

    Attributes:
        block_ids: int32 [Q, Hkv, num_selected_blocks], block numbers within the query's document; the block
            that holds the query comes last among the valid entries, -1 padding follows.
        index_lse: accumulation dtype [Q, Hkv], natural log; logsumexp of the scaled index scores over the
            visible tokens of the selected blocks; None if it was not asked for.
    """

    block_ids: Tensor
    index_lse: Tensor | None


class AttentionOutput(NamedTuple):
    """Attention and, beside it, the loss that aligns the index branch with it.

    Attributes:
        out: [Q, Hq, d_v] in the dtype of q.
        lse: accumulation dtype [Q, Hq], natural log of the softmax denominators; carries no gradient.
        kl: accumulation dtype [Q, Hkv], one divergence in nats per query and group, neither summed nor
            divided; None when no index branch was given. Its gradient reaches index_q and index_k only.
    """

    out: Tensor
    lse: Tensor
    kl: Tensor | None


class SelectionQuality(NamedTuple):
    """How well the selected blocks cover what full attention looks at. Nothing here carries a gradient.

    Attributes:
        block_recall: accumulation dtype [Q, Hkv] in 0 .. 1, share of the best blocks that were selected.
        score_recall: accumulation dtype [Q, Hkv] in 0 .. 1, the same share weighted by attention probability.
        selection_entropy: accumulation dtype [Q, Hkv] in nats, of the index branch over the selected blocks.
        local_block_share: accumulation dtype [Q, Hkv] in 0 .. 1, that distribution's probability on the block
            that holds the query.
        first_block_share: accumulation dtype [Q, Hkv] in 0 .. 1, its probability on block 0 of the document.
        drops_blocks: bool [Q], the query sees more blocks than it may select. Only these rows say something
            about recall; it is 1 by construction in the others.
    """

    block_recall: Tensor
    score_recall: Tensor
    selection_entropy: Tensor
    local_block_share: Tensor
    first_block_share: Tensor
    drops_blocks: Tensor
