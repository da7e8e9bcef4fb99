"""MiniMax Sparse Attention (arXiv 2606.13392): block selection, sparse attention and the alignment loss.

Needs PyTorch only; Triton is imported when an op runs on it. See the README.md in each op's folder.
"""

from msa_kernels.block_select import block_select
from msa_kernels.common.backend import Backend
from msa_kernels.common.checks import KLTeacher
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.outputs import AttentionOutput, BlockSelection, SelectionQuality
from msa_kernels.common.value_checks import debug_checks
from msa_kernels.decode import decode_attention, decode_select
from msa_kernels.dense_kl import dense_kl
from msa_kernels.selection_quality import selection_quality
from msa_kernels.sparse_attention import sparse_attention

__all__ = [
    "AttentionOutput",
    "Backend",
    "BlockSelection",
    "DocumentLayout",
    "KLTeacher",
    "SelectionQuality",
    "block_select",
    "debug_checks",
    "decode_attention",
    "decode_select",
    "dense_kl",
    "selection_quality",
    "sparse_attention",
]
