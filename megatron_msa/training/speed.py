"""Tokens per second and the two labelled FLOP figures of the steps between two log lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_msa.config import MSATransformerConfig
from megatron_msa.model.vision.config import VisionConfig
from megatron_msa.model.vision.flops import step_flops as step_flops_of_vision
from megatron_msa.model.vision.inputs import VisualInput
from megatron_msa.model.vision.segments import cut_into_segments
from megatron_msa.training.flops import causal_pairs, sparse_pairs, step_flops


class AttendedPairs:
    """(query, key) pairs of a step: in closed form for whole sequences, counted for packed documents."""

    def __init__(self, config: MSATransformerConfig, seq_length: int) -> None:
        self._block = (config.msa_block_size, config.msa_num_selected_blocks)
        self._per_sequence = (causal_pairs([seq_length]), sparse_pairs([seq_length], *self._block))
        self._counted: Tensor | None = None  # [causal, sparse] on this rank since the last log line

    def add_documents(self, offsets: Tensor) -> None:
        """Add a microbatch of packed documents, offsets int32 [documents + 1]; does not wait for a GPU."""
        lengths = (offsets[1:] - offsets[:-1]).long()
        pairs = torch.stack([causal_pairs(lengths), sparse_pairs(lengths, *self._block)])
        self._counted = pairs if self._counted is None else self._counted + pairs

    def saved(self) -> Tensor | None:
        """The count so far, for `restore`."""
        return self._counted

    def restore(self, saved: Tensor | None) -> None:
        """Forget what was counted since."""
        self._counted = saved

    def per_step(
        self, sequences: int, steps: int, group: Any, device: torch.device | int | str
    ) -> tuple[float, float]:
        """Causal and sparse pairs of a step on all data-parallel ranks; collective for packed documents."""
        if self._counted is None:
            return self._per_sequence[0] * sequences, self._per_sequence[1] * sequences
        total = self._counted.to(device=device, dtype=torch.float64)
        torch.distributed.all_reduce(total, group=group)
        self._counted = None
        causal, sparse = (total / steps).tolist()
        return causal, sparse


class EncodedPatches:
    """Patches that the vision encoder took since the last log line, and their (query, key) pairs."""

    def __init__(self, vision: VisionConfig, hidden_size: int) -> None:
        self._vision = vision
        self._hidden_size = hidden_size
        self._counted = [0, 0]

    def add(self, visuals: VisualInput) -> None:
        """Add the visuals of a microbatch; their sizes are on the host."""
        for segment in cut_into_segments(visuals.grid_thw.tolist(), self._vision):
            self._counted[0] += segment.patches
            self._counted[1] += segment.patches**2

    def saved(self) -> list[int]:
        """The count so far, for `restore`."""
        return [*self._counted]

    def restore(self, saved: list[int]) -> None:
        """Forget what was counted since."""
        self._counted = [*saved]

    def flops_per_step(self, steps: int, copies: int, device: torch.device | int | str) -> float:
        """Of a step on all ranks. Collective over all ranks.

        Args:
            steps: since the last log line.
            copies: ranks that were given the same microbatch.
            device: of the sums.
        """
        total = torch.tensor(self._counted, device=device, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        self._counted = [0, 0]
        patches, pairs = (total / (steps * copies)).tolist()
        return step_flops_of_vision(self._vision, self._hidden_size, patches=patches, pairs=pairs)


def speed(
    config: MSATransformerConfig,
    *,
    padded_vocab_size: int,
    tokens: int,
    causal_pairs: float,
    sparse_pairs: float,
    phase: str,
    seconds: float,
    num_devices: int,
    peak_tflops: float | None,
    vision_flops: float = 0.0,
) -> dict[str, float | None]:
    """Speed of a step of ``seconds`` seconds; TFLOP/s and MFU are per device.

    ``mfu`` divides the executed FLOPs by the dense bf16 peak, and is None on hardware whose peak is unknown.
    ``vision_flops`` of a step belong to both FLOP figures.
    """
    flops = step_flops(
        config,
        padded_vocab_size=padded_vocab_size,
        num_tokens=tokens,
        causal_pairs=causal_pairs,
        sparse_pairs=sparse_pairs,
        phase=phase,
    )
    per_device = 1e12 * seconds * num_devices
    executed = (flops.executed + vision_flops) / per_device
    return {
        "tokens_per_second": tokens / seconds,
        "tflops_executed": executed,
        "tflops_dense_equivalent": (flops.dense_equivalent + vision_flops) / per_device,
        "mfu": executed / peak_tflops if peak_tflops else None,
    }


def memory() -> dict[str, float]:
    """GiB of GPU memory: in tensors of this rank now, at most since it started, and reserved for them."""
    if not torch.cuda.is_available():
        return {}
    figures = {
        "memory_gib": torch.cuda.memory_allocated(),
        "peak_memory_gib": torch.cuda.max_memory_allocated(),
        "reserved_memory_gib": torch.cuda.memory_reserved(),
    }
    return {name: round(value / 2**30, 3) for name, value in figures.items()}
