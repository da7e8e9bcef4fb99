"""Attention over selected blocks, with the KL loss of the index branch."""

from msa_kernels.sparse_attention.api import sparse_attention

__all__ = ["sparse_attention"]
