"""A dense model and its conversion on the same tokens: their logits must be equal while attention is full."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf.megatron_model import build, seed, single_process
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint
from megatron_msa.phases import Phase


def verify(dense: Path, converted: Path, *, num_tokens: int = 256) -> str:
    """Run both models in fp32 on random tokens and describe how far apart they are.

    Args:
        dense, converted: folders of one torch_dist checkpoint each.
        num_tokens: length of the one sequence.
    """
    args = dist_checkpointing.load_common_state_dict(str(converted))["args"]
    patterns = (f"([0]*{args.num_layers})", args.msa_layer_freq)
    expected, actual = (
        logits(folder, pattern, num_tokens)
        for folder, pattern in zip((dense, converted), patterns, strict=True)
    )
    difference = float((actual - expected).abs().max())
    return (
        f"verified on {num_tokens} random tokens in fp32 with full attention: largest difference of a logit "
        f"{difference:.2e} (largest logit {float(expected.abs().max()):.2e})"
    )


@torch.no_grad()
def logits(checkpoint: Path, layer_freq: str, num_tokens: int) -> Tensor:
    """Logits of a checkpoint's model with full attention, [1, s, padded vocabulary], fp32, on the CPU."""
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model_config_from_checkpoint(
        common["args"],
        msa_layer_freq=layer_freq,
        msa_schedule="warmup@0",
        msa_backend="reference",
        params_dtype=torch.float32,
        bf16=False,
        fp16=False,
        perform_initialization=False,
    )
    with single_process():
        seed()
        model = build(config)
        state = {"model": model.sharded_state_dict(metadata=common.get("content_metadata"))}
        model.load_state_dict(dist_checkpointing.load(state, str(checkpoint))["model"])
        model = model.to(device).eval()
        for layer in msa_layers([model]):
            layer.phase = Phase.WARMUP
        vocabulary = common["args"].padded_vocab_size
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(vocabulary, (1, num_tokens), generator=generator).to(device)
        positions = torch.arange(num_tokens, device=device)[None]
        return model(tokens, positions, None).float().cpu()
