"""What the tests of the attention kernels share: inputs, the same in plain PyTorch, and how errors compare.

The interpreter (see `triton_interpreter`) multiplies bf16 matrices wrongly; it gets fp16.
"""

import dataclasses
import math

import torch
from kernel_oracles import Inputs, random_inputs
from msa_kernels import DocumentLayout, sparse_attention
from triton_interpreter import DEVICE

DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
NAMES = ("out", "lse", "kl", "dq", "dk", "dv", "dindex_q", "dindex_k")


def make_inputs(layout, num_keys, *, groups, group, dim, index_dim, dtype, seed=0):
    """Random inputs; the queries are those of the layout, not necessarily one per key."""
    inputs = random_inputs(
        max(num_keys, layout.num_queries), heads=groups * group, groups=groups, dim=dim, value_dim=dim,
        index_dim=index_dim, dtype=dtype, seed=seed,
    )  # fmt: skip
    queries, keys = layout.num_queries, num_keys
    counts = (queries, keys, keys, queries, keys)
    return Inputs(*(tensor[:count].to(DEVICE) for tensor, count in zip(inputs, counts, strict=True)))


def on_device(layout):
    moved = {
        field.name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for field in dataclasses.fields(layout)
        for value in [getattr(layout, field.name)]
    }
    return DocumentLayout(**moved)


def random_block_ids(layout, groups, block_size, slots, *, seed=0, favourite=None):
    """Distinct visible blocks in any order, the local one among them, -1 behind, and some rows of -1 only.

    With ``favourite``, every query that can see that block has it.
    """
    generator = torch.Generator().manual_seed(seed)
    local = (layout.query_position // block_size).tolist()
    rows = []
    for block in local:
        for _ in range(groups):
            chosen = torch.randperm(block, generator=generator).tolist()[: slots - 1]
            if favourite is not None and favourite < block and favourite not in chosen:
                chosen[:1] = [favourite]
            entries = [block, *chosen][:slots]
            if torch.rand((), generator=generator) < 0.05:
                entries = []
            order = torch.randperm(len(entries), generator=generator).tolist()
            rows.append([entries[i] for i in order] + [-1] * (slots - len(entries)))
    return torch.tensor(rows, dtype=torch.int32).view(len(local), groups, slots).to(DEVICE)


def straightforward(inputs, block_ids, layout, block_size, kl_teacher, dtype):
    """out, lse and kl from one masked matrix of scores, every step in ``dtype``."""
    q, k, v, index_q, index_k = inputs
    groups = k.shape[1]
    key_document = torch.searchsorted(
        layout.document_offsets[1:], torch.arange(k.shape[0], device=DEVICE), right=True
    )
    key_position = torch.arange(k.shape[0], device=DEVICE) - layout.document_offsets[key_document]
    sees = (layout.query_document[:, None] == key_document) & (key_position <= layout.query_position[:, None])
    chosen = (block_ids[..., None] == key_position // block_size).any(2)  # [Q, groups, K]
    visible = (chosen & sees[:, None]).transpose(0, 1)  # [groups, Q, K]
    some = visible.any(-1, keepdim=True)
    hidden = ~visible
    scores = torch.einsum("qrgd,krd->rgqk", q.unflatten(1, (groups, -1)), k) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(hidden[:, None], torch.finfo(dtype).min)
    p = scores.softmax(-1)
    out = torch.einsum("rgqk,krd->qrgd", p, v).flatten(1, 2)
    out = out.masked_fill(~some.transpose(0, 1).repeat_interleave(q.shape[1] // groups, 1), 0)
    lse = scores.logsumexp(-1).masked_fill(~some[:, None, :, 0], -math.inf).permute(2, 0, 1).flatten(1)
    if index_q is None:
        return out, lse, None
    z = torch.einsum("qrd,kd->rqk", index_q, index_k) / math.sqrt(index_q.shape[2])
    log_student = z.masked_fill(hidden, torch.finfo(dtype).min).log_softmax(-1)
    teacher = p.detach()
    if kl_teacher == "group_mean":
        teacher = teacher.mean(1, keepdim=True)
    kl = (torch.xlogy(teacher, teacher) - teacher * log_student[:, None]).sum(-1).mean(1)
    return out, lse.detach(), kl.masked_fill(~some[..., 0], 0).t()


def outputs_and_gradients(attend, inputs, weights, kl_weights):
    """out, lse, kl and the five gradients; those of the index branch for upstream gradients of order one."""
    leaves = Inputs(*(tensor.detach().clone().requires_grad_() for tensor in inputs))
    out, lse, kl = attend(leaves)
    gradients = torch.autograd.grad([out, kl], leaves, [weights.to(out.dtype), kl_weights.to(kl.dtype)])
    return [tensor.detach().double() for tensor in (out, lse, kl, *gradients)]


def assert_error_at_most_twice(found, plain, exact, unit):
    """Per row (outputs, gradients of queries) or block of rows (gradients of keys).

    The same-dtype code's error in a single row may happen to be small: its typical error, absolute or
    relative to the row, is allowed as well.
    """
    for name, ours, same_dtype, right in zip(NAMES, found, plain, exact, strict=True):
        rows = unit if name in ("dk", "dv", "dindex_k") else 1

        def size(tensor, rows=rows):
            per_row = tensor.flatten(1).square().sum(1)
            return torch.stack([part.sum().sqrt() for part in per_row.split(rows)])

        def error(tensor, right=right):
            return size(torch.where(right == tensor, 0.0, tensor - right))  # equal infinities differ by 0

        assert not ours.isnan().any(), name
        typical, length = error(same_dtype), size(right.nan_to_num(neginf=0.0))
        relative = (typical / length.clamp(min=1e-30))[length > 0].median()
        allowed = 2 * torch.stack([typical, typical.median().expand_as(typical), relative * length]).amax(0)
        bad = (error(ours) > allowed).nonzero().flatten().tolist()
        assert not bad, (name, bad[:8], error(ours)[bad[:8]], allowed[bad[:8]])


def assert_close(found, plain, exact, unit):
    """Where probabilities are 0 and 1, exact gradients are 0 and a ratio of errors says nothing."""
    del plain, unit
    for name, ours, right in zip(NAMES, found, exact, strict=True):
        error = torch.where(right == ours, 0.0, ours - right)  # equal infinities differ by 0
        assert error.norm() <= 0.01 * right[right.isfinite()].norm() + 1e-4 * math.sqrt(right.numel()), name


def check(
    layout, num_keys, *, groups, group, dim, index_dim, block_size, slots, kl_teacher, dtype,
    change=lambda inputs: inputs, compare=assert_error_at_most_twice, **ids
):  # fmt: skip
    layout = on_device(layout)
    inputs = make_inputs(
        layout, num_keys, groups=groups, group=group, dim=dim, index_dim=index_dim, dtype=dtype
    )
    inputs = change(inputs)
    block_ids = random_block_ids(layout, groups, block_size, slots, **ids)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(inputs.q.shape, generator=generator).to(DEVICE, dtype)
    kl_weights = torch.randn(inputs.q.shape[0], groups, generator=generator).to(DEVICE)

    def plain(leaves, cast):
        leaves = Inputs(*(tensor.to(cast) for tensor in leaves))
        return straightforward(leaves, block_ids, layout, block_size, kl_teacher, cast)

    def triton(leaves):
        return sparse_attention(
            *leaves[:3], block_ids, layout, block_size=block_size, index_q=leaves.index_q,
            index_k=leaves.index_k, kl_teacher=kl_teacher, backend="triton",
        )  # fmt: skip

    exact_inputs = Inputs(*(tensor.double() for tensor in inputs))
    exact = outputs_and_gradients(lambda x: plain(x, torch.float64), exact_inputs, weights, kl_weights)
    same_dtype = outputs_and_gradients(lambda x: plain(x, dtype), inputs, weights, kl_weights)
    found = outputs_and_gradients(triton, inputs, weights, kl_weights)
    compare(found, same_dtype, exact, block_size)


UNSUPPORTED = [
    ({"dtype": torch.float32}, "the dtype is torch.float32"),
    ({"dim": 32}, "the head dim is 32"),
    ({"value_dim": 128}, "the head dim of v is 128"),
    ({"index_dim": 32}, "the index head dim is 32"),
    ({"heads": 17}, "there are 17 query heads per group; supported are 1 to 16"),
]
"""Changes of `five_tokens` that no attention kernel runs, and the reason that its refusal gives."""


def five_tokens(**changes):
    """Inputs of one document and group that the kernels run, but for what is changed."""
    size = {"heads": 4, "groups": 1, "dim": 64, "value_dim": 64, "index_dim": 64, "dtype": torch.float16}
    return Inputs(*(tensor.to(DEVICE) for tensor in random_inputs(5, **(size | changes))))


def assert_out_and_kl_reach_inputs_of_their_own(found, leaves):
    """out has gradients for q, k and v only, kl for the index inputs only, and lse none."""
    assert not found.lse.requires_grad
    of_out = torch.autograd.grad(found.out.sum(), leaves, retain_graph=True, allow_unused=True)
    of_kl = torch.autograd.grad(found.kl.sum(), leaves, allow_unused=True)
    assert [gradient is None for gradient in of_out] == [False] * 3 + [True] * 2
    assert [gradient is None for gradient in of_kl] == [True] * 3 + [False] * 2
