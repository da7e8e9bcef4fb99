"""What the Triton kernels of sparse_attention cannot run is refused, with the reason.

Where they run: see `triton_interpreter`.
"""

import pytest
import torch
from attention_checks import UNSUPPORTED, five_tokens, on_device
from kernel_oracles import packed_layout
from msa_kernels import DocumentLayout, sparse_attention
from triton_interpreter import DEVICE, needs_triton

pytestmark = pytest.mark.usefixtures("poisoned_buffers")


@needs_triton
def test_more_blocks_than_can_be_sorted_are_refused_before_any_work():
    from msa_kernels.sparse_attention.triton_op import refusal

    layout = DocumentLayout(
        document_offsets=torch.arange(600_001, dtype=torch.int32),
        query_document=torch.zeros(1, dtype=torch.int32),
        query_position=torch.zeros(1, dtype=torch.int32),
        max_document_length=1,
    )
    q, k = torch.zeros(1, 4, 64, dtype=torch.float16), torch.zeros(600_000, 1, 64, dtype=torch.float16)
    options = {
        "block_size": 64, "index_q": None, "index_k": None, "index_lse": None, "softmax_scale": 1.0,
        "index_softmax_scale": 1.0, "kl_teacher": "group_mean",
    }  # fmt: skip
    ids = torch.zeros(1, 1, 64, dtype=torch.int32)
    reason = refusal(q, k, k, ids, layout, **options)
    assert "there may be 609,375 blocks" in reason
    assert "at most 524,287 are supported" in reason
    assert refusal(q, k, k, ids[..., :16], layout, **options) is None


@needs_triton
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *UNSUPPORTED,
        ({"block_size": 32}, "the block size is 32"),
        ({"slots": 65}, "there are 65 blocks per query"),
    ],
    ids=str,
)
def test_what_the_kernels_cannot_run_is_refused_with_the_reason(change, reason):
    of_call = ("block_size", "slots")
    inputs = five_tokens(**{name: value for name, value in change.items() if name not in of_call})
    block_ids = torch.full((5, 1, change.get("slots", 2)), -1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"cannot run with backend='triton': {reason}"):
        sparse_attention(
            *inputs[:3], block_ids, on_device(packed_layout([5])), block_size=change.get("block_size", 64),
            index_q=inputs.index_q, index_k=inputs.index_k, backend="triton",
        )  # fmt: skip
