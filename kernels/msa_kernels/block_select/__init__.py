"""Index scores to block ids."""

from msa_kernels.block_select.api import block_select

__all__ = ["block_select"]
