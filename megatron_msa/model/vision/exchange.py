"""Visual embeddings on their way from the ranks that encoded them to the ranks that hold their tokens.

Under context parallelism a sequence's tokens lie on several ranks, and any of them may encode any segment
(`segments.deal`). Each embedding has one place where it is needed, so one all-to-all carries them there and,
in the backward pass, their gradients back. No rank holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from megatron_msa.attention.context_parallel import TokenLayout
from megatron_msa.errors import ConfigError
from megatron_msa.model.vision.segments import Segment


@dataclass(frozen=True)
class Route:
    """Where this rank's embeddings go, and what it gets.

    Attributes:
        outgoing: int64, this rank's embeddings in the order in which they are sent.
        sent: how many go to each rank.
        received: how many come from each rank.
        arrival: int64, where each of the embeddings for this rank's placeholders lies in what arrives.
        group: of the context-parallel ranks.
    """

    outgoing: Tensor
    sent: list[int]
    received: list[int]
    arrival: Tensor
    group: Any

    def carry(self, embeddings: Tensor) -> Tensor:
        """[embeddings that this rank made, hidden] -> [placeholders on this rank, hidden], in their order."""
        arrived = all_to_all(self.group, embeddings[self.outgoing], self.received, self.sent)
        return arrived[self.arrival]


def plan_route(
    placeholders: Tensor, layout: TokenLayout, segments: Sequence[Segment], owner: Sequence[int], group: Any
) -> Route:
    """Collective over the context-parallel group.

    Args:
        placeholders: bool [tokens of this rank], batch-major: where visual embeddings go.
        layout: which tokens of the microbatch are whose.
        segments: of the microbatch, in the order of their placeholders.
        owner: the rank that encodes each segment.
        group: of the context-parallel ranks.

    Raises:
        ConfigError: another number of placeholders than of embeddings.
    """
    size, rank = get_pg_size(group), get_pg_rank(group)
    everyones = placeholders.new_empty(size * placeholders.numel(), dtype=torch.uint8)
    torch.distributed.all_gather_into_tensor(everyones, placeholders.to(torch.uint8), group=group)
    # Of every placeholder in global order: the rank that holds its token, and the rank that encodes it.
    places = layout.place[everyones[layout.place].bool()]
    holder = places // placeholders.numel()
    counts = torch.tensor([segment.tokens for segment in segments])
    encoder = torch.tensor(owner).repeat_interleave(counts).to(holder.device)
    check_count(holder.numel(), encoder.numel())
    outgoing_to = holder[encoder == rank]
    incoming_from = encoder[holder == rank]
    sent, received = (torch.bincount(ranks, minlength=size) for ranks in (outgoing_to, incoming_from))
    totals = torch.stack([sent, received]).tolist()
    return Route(
        # Both sides sort stably, so that what one rank sends to another keeps its order.
        outgoing=outgoing_to.argsort(stable=True),
        sent=totals[0],
        received=totals[1],
        arrival=incoming_from.argsort(stable=True).argsort(),
        group=group,
    )


def check_count(placeholders: int, embeddings: int) -> None:
    """Every merged patch needs its placeholder.

    Raises:
        ConfigError: the numbers differ.
    """
    if placeholders != embeddings:
        raise ConfigError(
            f"a microbatch has {placeholders} placeholder tokens (--vision-image-token-id, "
            f"--vision-video-token-id) but its images and videos are {embeddings} merged patches, and each "
            "of them needs one placeholder; rebuild the samples with the merge size of the model "
            "(--vision-merge-size)"
        )
