"""Which implementation of an op runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

logger = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]

_said: set[tuple[str, str]] = set()


@dataclass(frozen=True, kw_only=True)
class Implementation[**P, R]:
    """A fast implementation of an op.

    Attributes:
        run: takes the arguments of the op's reference and returns what it returns.
        refusal: takes the same arguments; None if ``run`` can take them, else the reason why not.
    """

    run: Callable[P, R]
    refusal: Callable[P, str | None]


@dataclass(frozen=True, kw_only=True)
class Op[**P, R]:
    """An op and its implementations.

    Attributes:
        name: the public name, for messages.
        reference: plain PyTorch; takes every input that passed the checks of the op's api.
        triton: imports and returns the Triton implementation, None if there is none. It is called on first
            use, so that importing msa_kernels does not import Triton.
    """

    name: str
    reference: Callable[P, R]
    triton: Callable[[], Implementation[P, R]] | None = None

    def run(self, backend: str, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs the op on the backend asked for.

        "auto" takes Triton where it can run these inputs and the reference elsewhere, and logs each reason
        for falling back once.

        Raises:
            ValueError: ``backend`` is unknown.
            RuntimeError: ``backend`` is "triton" and Triton cannot run these inputs.
        """
        if backend not in get_args(Backend):
            raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
        if backend == "reference":
            return self.reference(*args, **kwargs)
        implementation, reason = self._load_triton()
        if implementation is not None:
            reason = implementation.refusal(*args, **kwargs)
            if reason is None:
                return implementation.run(*args, **kwargs)
        if backend == "triton":
            raise RuntimeError(
                f"{self.name} cannot run with backend='triton': {reason}. Use backend='auto' or 'reference'"
            )
        if (self.name, str(reason)) not in _said:
            _said.add((self.name, str(reason)))
            logger.warning("%s runs its PyTorch reference, not Triton: %s", self.name, reason)
        return self.reference(*args, **kwargs)

    def _load_triton(self) -> tuple[Implementation[P, R] | None, str | None]:
        if self.triton is None:
            return None, "this op has no Triton implementation"
        try:
            return self.triton(), None
        except ImportError as error:
            return None, f"its Triton implementation could not be imported ({error})"
