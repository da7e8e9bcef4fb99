"""Recall, entropy and shares of a block selection."""

from msa_kernels.selection_quality.api import selection_quality

__all__ = ["selection_quality"]
