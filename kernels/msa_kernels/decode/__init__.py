"""Block selection and attention of a few new tokens per sequence over a paged cache."""

from msa_kernels.decode.api import decode_attention, decode_select

__all__ = ["decode_attention", "decode_select"]
