"""How the ops behave under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch


def outside_graphs[**P, R](op: Callable[P, R]) -> Callable[P, R]:
    """Makes torch.compile end its graph before ``op`` and start another one behind it.

    The kernels are compiled already, and their launches depend on host values (grids, chunks of queries) that
    tracing would turn into reasons to compile again. What stands between the ops is compiled as usual.
    """
    # What torch.compiler.disable does, and torch.utils.checkpoint uses. The public name would import
    # torch._dynamo, and with it Triton, as soon as msa_kernels is imported; this one waits for a call.
    return torch._disable_dynamo(op)
