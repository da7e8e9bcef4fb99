"""MiniMax Sparse Attention (arXiv 2606.13392) for Megatron-core."""

__version__ = "0.1.0"
