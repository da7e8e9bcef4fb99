"""Triton's interpreter runs the kernels' Python source on a CPU, with NumPy in the place of the GPU."""

from __future__ import annotations

from typing import Any


def repair_loop_bounds() -> None:
    """Lets Triton 3.6's interpreter take tensors as loop bounds with NumPy 2.5.

    It holds scalars as arrays of one element and converts them by int(), which NumPy 2.5 refuses for arrays
    that have a dimension.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
