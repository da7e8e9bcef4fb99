"""RMSNorm over all heads of q, or of k, together (MiniMax-M2, OLMo 2); Megatron's norm is one per head."""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class FullWidthRMSNorm(nn.Module):
    """Root mean square norm over heads and head dimensions, [s, b, heads / TP, d] -> the same.

        y = x / sqrt(mean(x^2 over all heads) + eps) * gain       gain [heads * d]

    Each rank has some of the heads, so the mean is summed over TP. The weight is held whole by every rank,
    which uses its heads' part: Megatron sums the gradients of parameters named q_layernorm and k_layernorm
    over TP, and that makes them complete.

    Args:
        config: reads `layernorm_zero_centered_gamma` and `params_dtype`.
        hidden_size: of one head (the builder's signature is that of a norm per head).
        eps: added to the mean square.
        num_heads: of the whole model.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, num_heads: int, **kwargs: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.weight = nn.Parameter(torch.empty(num_heads * hidden_size, dtype=config.params_dtype))
        nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        squares = wide.square().sum(dim=(-2, -1), keepdim=True)
        gain = self.weight.to(dtype) + 1.0 if self.zero_centered else self.weight.to(dtype)
        gain = gain.view(-1, x.shape[-1])
        ranks = get_pg_size(self.tp_group)
        if ranks > 1:
            # Every rank's output depends on the sum: the backward pass sums its gradient over TP, too.
            squares = all_reduce(squares, group=self.tp_group)
            gain = gain.chunk(ranks)[get_pg_rank(self.tp_group)]
        scale = torch.rsqrt(squares / self.weight.numel() + self.eps)
        return (wide * scale * gain).to(x.dtype)


def full_width_norms(config: TransformerConfig) -> tuple[Any, Any]:
    """Builders of the norms of q and of k."""
    return (
        partial(FullWidthRMSNorm, num_heads=config.num_attention_heads),
        partial(FullWidthRMSNorm, num_heads=config.num_query_groups),
    )
