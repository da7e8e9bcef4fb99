"""Input checks shared by the ops.

Every message says what was given, what is allowed and what to change. Nothing here reads a value from a GPU,
but in debug mode (``value_checks``).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from msa_kernels.common import value_checks
from msa_kernels.common.layout import DocumentLayout
from msa_kernels.common.numerics import SUPPORTED_DTYPES, accumulation_dtype

KLTeacher = Literal["group_mean", "per_head"]
ScoreDtype = Literal["input", "e4m3"]


def check_tensors(required: dict[str, Tensor], optional: dict[str, Tensor | None] | None = None) -> None:
    """Raises TypeError or ValueError unless all are tensors of one supported dtype on one device.

    In debug mode they must be finite, too.

    Args:
        required: tensors by name.
        optional: more of them by name; None is skipped.
    """
    given = required | {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in SUPPORTED_DTYPES:
            allowed = ", ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
            raise TypeError(f"{name} has dtype {tensor.dtype}; supported are {allowed}; cast it first")
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} has dtype {tensor.dtype} but {first_name} has {first.dtype}; cast them to one dtype"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}; move them to one device"
            )
    value_checks.check_finite(given)


def check_attention_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q is [Q, Hq, d], k [K, Hkv, d] and v [K, Hkv, d_v], Hq a multiple of Hkv."""
    check_query_key_shapes(q, k)
    _check_dimensions("v", v, "[keys, key/value heads, value head dim]")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must have as many keys and heads as k, got v {list(v.shape)} and k {list(k.shape)}"
        )


def check_query_key_shapes(q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless q and k are [Q, Hq, d] and [K, Hkv, d] with Hq a multiple of Hkv."""
    _check_dimensions("q", q, "[queries, query heads, head dim]")
    _check_dimensions("k", k, "[keys, key/value heads, head dim]")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have the same head dim, got {q.shape[2]} and {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the number of key/value heads, "
            f"got {q.shape[1]} and {k.shape[1]}"
        )


def check_index_shapes(index_q: Tensor, index_k: Tensor) -> Tensor:
    """Raises ValueError unless index_q is [Q, groups, d_i] and index_k [K, d_i] or [K, 1, d_i].

    Returns:
        index_k as [K, d_i].
    """
    _check_dimensions("index_q", index_q, "[queries, groups, index head dim]")
    if index_k.dim() == 3 and index_k.shape[1] == 1:
        index_k = index_k.squeeze(1)
    if index_k.dim() != 2 or 0 in index_k.shape[1:]:
        raise ValueError(
            "index_k must be [keys, index head dim] or [keys, 1, index head dim], "
            f"got {list(index_k.shape)}; all groups share one index key head"
        )
    if index_q.shape[2] != index_k.shape[1]:
        raise ValueError(
            "index_q and index_k must have the same index head dim, "
            f"got {index_q.shape[2]} and {index_k.shape[1]}"
        )
    return index_k


def check_index_branch(
    q: Tensor, k: Tensor, index_q: Tensor | None, index_k: Tensor | None
) -> tuple[Tensor | None, int]:
    """Raises ValueError unless the index branch is absent, or has the queries, keys and groups of q and k.

    Returns:
        index_k as [K, d_i], or None, and the index head dim d_i (1 without an index branch).
    """
    if index_q is None and index_k is None:
        return None, 1
    if index_q is None or index_k is None:
        missing = "index_q" if index_q is None else "index_k"
        raise ValueError(
            f"index_q and index_k come together, but {missing} is None; give both, or neither for attention "
            "without KL"
        )
    index_k = check_index_shapes(index_q, index_k)
    if index_q.shape[:2] != (q.shape[0], k.shape[1]):
        raise ValueError(
            f"index_q must be [queries, key/value heads, index head dim] = [{q.shape[0]}, {k.shape[1]}, "
            f"1 or more], got {list(index_q.shape)}; give one index query head per key/value head"
        )
    if index_k.shape[0] != k.shape[0]:
        raise ValueError(f"index_k must have as many keys as k, got {index_k.shape[0]} and {k.shape[0]}")
    return index_k, index_k.shape[1]


def check_index_lse(index_lse: Tensor, index_q: Tensor | None) -> None:
    """Raises TypeError or ValueError unless index_lse is [Q, groups] in the accumulation dtype of index_q."""
    if index_q is None:
        raise ValueError("index_lse was given without index_q and index_k; give all three, or none of them")
    dtype = accumulation_dtype(index_q.dtype)
    if not isinstance(index_lse, Tensor) or index_lse.dtype != dtype:
        got = index_lse.dtype if isinstance(index_lse, Tensor) else type(index_lse).__name__
        raise TypeError(f"index_lse must be a {dtype} tensor for {index_q.dtype} inputs, got {got}")
    if index_lse.shape != index_q.shape[:2]:
        raise ValueError(
            f"index_lse must be [queries, groups] = {list(index_q.shape[:2])}, got {list(index_lse.shape)}"
        )
    if index_lse.device != index_q.device:
        raise ValueError(
            f"index_lse is on {index_lse.device} but index_q is on {index_q.device}; move them to one device"
        )


def check_block_ids(block_ids: Tensor, num_queries: int, groups: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless block_ids is int32 [Q, groups, 1 or more] on the device of q."""
    if not isinstance(block_ids, Tensor) or block_ids.dtype != torch.int32:
        got = block_ids.dtype if isinstance(block_ids, Tensor) else type(block_ids).__name__
        raise TypeError(f"block_ids must be an int32 tensor as block_select returns it, got {got}")
    if block_ids.dim() != 3 or block_ids.shape[:2] != (num_queries, groups) or block_ids.shape[2] < 1:
        raise ValueError(
            f"block_ids must be [queries, groups, blocks] = [{num_queries}, {groups}, 1 or more], "
            f"got {list(block_ids.shape)}"
        )
    if block_ids.device != device:
        raise ValueError(f"block_ids is on {block_ids.device} but q is on {device}; move them to one device")


def check_layout(layout: DocumentLayout, num_queries: int, num_keys: int, device: torch.device) -> None:
    """Raises TypeError or ValueError unless the layout describes these queries and keys."""
    if not isinstance(layout, DocumentLayout):
        raise TypeError(f"layout must be a DocumentLayout, got {type(layout).__name__}")
    if layout.num_queries != num_queries:
        raise ValueError(
            f"layout describes {layout.num_queries} queries but there are {num_queries}; "
            "use layout.select_queries for a part of the queries"
        )
    if layout.device != device:
        raise ValueError(f"layout is on {layout.device} but the inputs are on {device}; build it on {device}")
    if num_keys == 0:
        raise ValueError("there are no keys; skip the call when there is nothing to attend to")
    value_checks.check_layout_values(layout, num_keys)


def check_count(name: str, value: int) -> None:
    """Raises TypeError or ValueError unless ``value`` is an int of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def check_score_dtype(score_dtype: str, with_lse: bool) -> None:
    """Raises ValueError unless ``score_dtype`` is known and can give what is asked for."""
    if score_dtype not in get_args(ScoreDtype):
        raise ValueError(f"score_dtype must be one of {', '.join(get_args(ScoreDtype))}; got {score_dtype!r}")
    if score_dtype == "e4m3" and with_lse:
        raise ValueError("score_dtype 'e4m3' ranks blocks only and gives no index_lse; pass with_lse=False")


def check_kl_teacher(kl_teacher: str) -> None:
    """Raises ValueError unless ``kl_teacher`` is known."""
    if kl_teacher not in get_args(KLTeacher):
        raise ValueError(f"kl_teacher must be one of {', '.join(get_args(KLTeacher))}; got {kl_teacher!r}")


def resolve_scale(name: str, scale: float | None, head_dim: int) -> float:
    """The scale of the scores, 1 / sqrt(head_dim) if None.

    Raises:
        TypeError: it is not a Python number (a tensor would have to be read from the device).
        ValueError: it is not positive and finite; a scale may not change the order of the scores.
    """
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, int | float):
        raise TypeError(f"{name} must be a Python number, got {type(scale).__name__}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"{name} must be positive and finite, got {scale}")
    return float(scale)


def _check_dimensions(name: str, tensor: Tensor, meaning: str) -> None:
    if tensor.dim() != 3 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name} must be {meaning}, the last two 1 or more; got shape {list(tensor.shape)}")
