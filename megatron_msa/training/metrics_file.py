"""Append-only JSON lines: one object per logged step, validation and phase switch.

Rows have an ``event`` and an ``iteration``, the number of finished steps. NaN and infinity become null.

- ``phase``: a phase begins after this iteration; ``previous`` is null when a process begins with it.
- ``step``: what happened since the row before it, averaged over those steps unless said otherwise.
  ``lm_loss`` in nats per token; ``kl`` in nats per query and GQA group, the sum over layers (without
  --msa-loss-coeff); ``skipped`` steps; ``seconds`` per step; ``tokens_per_second``; ``tflops_executed``,
  ``tflops_dense_equivalent`` and ``mfu`` per device (``mfu`` is null if the device's peak is unknown). On
  GPUs, of the rank that logs: ``memory_gib`` in tensors, ``peak_memory_gib`` of them since it started and
  ``reserved_memory_gib``. Of the last step: ``phase``, ``learning_rate``, ``grad_norm``, ``loss_scale``;
  ``tokens`` since training began. On steps where the selection was measured also ``block_recall``,
  ``score_recall``, ``selection_entropy``, ``local_block_share`` and ``first_block_share``, each the mean over
  layers. ``<name>_per_layer`` maps layer numbers (from 1) to values. With --multimodal-data-path ``data`` has
  the sums since the row before it: ``sequences``, ``documents`` (multimodal samples), ``visuals`` (images and
  videos), ``visual_tokens``, ``padding_tokens`` and ``skipped_samples`` (see --multimodal-on-error). With
  --log-encoder-time ``encoder_seconds`` per step, of the vision encoder with its projector, forward and
  backward, on the rank where they took longest.
- ``validation`` and ``test``: ``lm_loss`` and the ``phase`` in which it was evaluated.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Writes rows to a JSONL file; only the rank that logs opens one.

    Every row is flushed, so a killed run keeps what it logged.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        """Append one row."""
        self._file.write(json.dumps({"event": event, **_json_safe(values)}) + "\n")
        self._file.flush()


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
