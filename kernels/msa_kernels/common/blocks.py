"""Keys cut into blocks that are aligned to the start of their document.

Letters in shapes: Q queries, K keys, D documents, N blocks of all documents, B block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msa_kernels.common.layout import DocumentLayout


@dataclass(frozen=True, kw_only=True, eq=False)
class KeyBlocks:
    """All documents' keys as a list of blocks, the last block of each document filled up with empty slots.

    N is the upper bound K // B + D, known on the host; the blocks behind the last document are empty.

    Attributes:
        key: int64 [N, B], the packed key in each slot; 0 in empty slots.
        document: int64 [N, B], the document of each slot; -1 in empty slots.
        position: int64 [N, B], the position of each slot within its document.
        first_block: int64 [D], the place of each document's block 0 in the list.
    """

    key: Tensor
    document: Tensor
    position: Tensor
    first_block: Tensor

    @classmethod
    def build(cls, layout: DocumentLayout, num_keys: int, block_size: int) -> KeyBlocks:
        """Cuts ``num_keys`` keys into blocks of ``block_size`` tokens."""
        offsets = layout.document_offsets.long()
        lengths = offsets.diff()
        blocks_of_document = (lengths + block_size - 1) // block_size
        end_block = blocks_of_document.cumsum(0)
        first_block = end_block - blocks_of_document

        block = torch.arange(num_keys // block_size + layout.num_documents, device=layout.device)
        document = torch.searchsorted(end_block, block, right=True)
        behind_the_last = document == layout.num_documents
        document = document.clamp(max=layout.num_documents - 1)
        slot = torch.arange(block_size, device=layout.device)
        position = (block - first_block[document])[:, None] * block_size + slot
        filled = ~behind_the_last[:, None] & (position < lengths[document, None])
        return cls(
            key=torch.where(filled, offsets[document, None] + position, 0),
            document=torch.where(filled, document[:, None], -1),
            position=position,
            first_block=first_block,
        )

    def visible(self, queries: DocumentLayout) -> Tensor:
        """Whether a query sees the key in a slot: bool [Q, N, B]."""
        same_document = queries.query_document[:, None, None] == self.document
        return same_document & (self.position <= queries.query_position[:, None, None])

    def of_own_document(self, per_block: Tensor, queries: DocumentLayout, block_size: int) -> Tensor:
        """Takes, for each query, the values of its document's blocks.

        Args:
            per_block: [Q, groups, N], a value for every block in the list.
            queries: the Q queries.
            block_size: B.

        Returns:
            [Q, groups, max_blocks], indexed by block number within the query's document. Entries past the end
            of a document are arbitrary.
        """
        number = torch.arange(queries.max_blocks(block_size), device=queries.device)
        place = self.first_block[queries.query_document.long(), None] + number
        place = place.clamp(max=per_block.shape[-1] - 1)
        return per_block.gather(-1, place[:, None, :].expand(-1, per_block.shape[1], -1))
