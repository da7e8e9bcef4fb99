"""RMSNorm in plain torch, for the `local` transformer implementation (no Transformer Engine)."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension.

        y = x / sqrt(mean(x^2) + eps) * gain
        gain = weight, or 1 + weight with layernorm_zero_centered_gamma

    Computed in fp32 (fp64 for fp64 inputs) and cast back to the input's dtype. The signature is the one
    Megatron builds norms with; arguments of other norms are accepted and ignored.

    Args:
        config: reads `layernorm_zero_centered_gamma` and `sequence_parallel`.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        # Under sequence parallelism every TP rank sees other tokens: Megatron sums the gradients of marked
        # parameters.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the plain norm: gain 1."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size], same dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        gain = self.weight.to(dtype) + 1.0 if self.zero_centered else self.weight.to(dtype)
        return nn.functional.rms_norm(x.to(dtype), (x.shape[-1],), gain, self.eps).to(x.dtype)
