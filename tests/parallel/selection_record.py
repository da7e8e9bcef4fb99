"""Records which blocks a run selects, in a form that does not depend on the parallel layout."""

import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Selected(NamedTuple):
    """The selection of one layer for one microbatch, on one rank."""

    layer: int  # from 0, of the whole model
    microbatch: int  # of this rank, counted over the steps that select
    data_parallel: tuple[int, int]  # rank, size
    tensor_parallel: tuple[int, int]
    rows: Tensor  # [queries], places in the microbatch as a single rank would hold it
    block_ids: Tensor  # [queries, groups of this rank, k], sorted: the order of a row is free
    margin: float
    """The smallest step, in any row, from the score of a selected block to that of one left out, over the
    largest score of the row; infinite if nothing is left out, NaN if the keys of other ranks are missing."""


class SelectionRecord:
    """Watches the MSA layers of this process. Microbatches must hold one sequence each."""

    def __init__(self) -> None:
        from megatron.core import parallel_state

        from megatron_msa.attention.self_attention import MSASelfAttention

        self._entries: list[Selected] = []
        microbatches: Counter[int] = Counter()
        select = MSASelfAttention._select

        def recorded(layer: Any, index_query: Tensor, index_key: Tensor, layout: Any, *rest: Any) -> Any:
            selection = select(layer, index_query, index_key, layout, *rest)
            if torch.is_grad_enabled():  # once per microbatch, with and without recomputation
                number = layer.layer_number - 1
                offsets = layout.document_offsets.long()
                self._entries.append(
                    Selected(
                        layer=number,
                        microbatch=microbatches[number],
                        data_parallel=(
                            parallel_state.get_data_parallel_rank(),
                            parallel_state.get_data_parallel_world_size(),
                        ),
                        tensor_parallel=(
                            parallel_state.get_tensor_model_parallel_rank(),
                            parallel_state.get_tensor_model_parallel_world_size(),
                        ),
                        rows=offsets[layout.query_document.long()] + layout.query_position,
                        block_ids=selection["block_ids"].sort(dim=-1).values,
                        margin=_margin(index_query, index_key, layout, layer.config),
                    )
                )
                microbatches[number] += 1
            return selection

        MSASelfAttention._select = recorded  # type: ignore[method-assign]

    def save(self, folder: Path) -> None:
        torch.save([tuple(entry) for entry in self._entries], folder / f"{os.environ.get('RANK', '0')}.pt")


@torch.no_grad()
def _margin(index_query: Tensor, index_key: Tensor, layout: Any, config: Any) -> float:
    keys = index_key.flatten(1)
    if layout.num_queries != keys.shape[0]:
        return math.nan
    visible = layout.visible_keys(keys.shape[0])
    scores = torch.einsum("qgd,kd->qgk", index_query, keys).masked_fill(~visible[:, None], -math.inf)
    position = layout.key_position(keys.shape[0]).long()
    size, free = config.msa_block_size, config.msa_num_selected_blocks - 1
    blocks = torch.full((*scores.shape[:2], layout.max_blocks(size)), -math.inf)
    blocks.scatter_reduce_(2, (position // size).expand_as(scores), scores, "amax")
    local = (layout.query_position.long() // size)[:, None, None].expand(*blocks.shape[:2], 1)
    largest = scores.masked_fill(~visible[:, None], 0).abs().amax(-1)
    best = blocks.scatter(2, local, -math.inf).sort(dim=-1, descending=True).values
    if best.shape[-1] <= free:
        return math.inf
    step = (best[..., free - 1] - best[..., free]) / largest
    dropping = step[best[..., free] > -math.inf]
    return float(dropping.min()) if dropping.numel() else math.inf


def read(folder: Path) -> dict[tuple[int, int], Tensor]:
    """(layer, sequence counted over the steps that select) -> block ids [tokens, groups, k] of all ranks.

    Raises:
        AssertionError: a row is missing, or was selected on two ranks.
    """
    entries = read_entries(folder)
    return {key: _assemble(parts) for key, parts in _by_sequence(entries).items()}


def read_entries(folder: Path) -> list[Selected]:
    files = sorted(folder.glob("*.pt"))
    return [Selected(*fields) for file in files for fields in torch.load(file, weights_only=False)]


def _by_sequence(entries: Iterable[Selected]) -> dict[tuple[int, int], list[Selected]]:
    result: dict[tuple[int, int], list[Selected]] = {}
    for entry in entries:
        rank, size = entry.data_parallel
        result.setdefault((entry.layer, entry.microbatch * size + rank), []).append(entry)
    return result


def _assemble(parts: list[Selected]) -> Tensor:
    tensor_parallel = parts[0].tensor_parallel[1]
    tokens = sum(part.rows.numel() for part in parts) // tensor_parallel
    _, groups, slots = parts[0].block_ids.shape
    result = torch.empty(tokens, groups * tensor_parallel, slots, dtype=torch.int32)
    filled = torch.zeros(tokens, groups * tensor_parallel, dtype=torch.int32)
    for part in parts:
        first = part.tensor_parallel[0] * groups
        result[part.rows, first : first + groups] = part.block_ids
        filled[part.rows, first : first + groups] += 1
    assert bool((filled == 1).all()), "a row was selected by no rank, or by two"
    return result
