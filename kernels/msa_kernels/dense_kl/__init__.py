"""Full causal attention with the KL loss of the indexer warmup."""

from msa_kernels.dense_kl.api import dense_kl

__all__ = ["dense_kl"]
