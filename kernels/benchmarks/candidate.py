"""One thing to time: a call, what it should return, and what it is worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.checks import Verdict
from benchmarks.registry import DecodeShape, Shape


class Unavailable(Exception):
    """A candidate that cannot run here; the message says why."""


class Call(NamedTuple):
    """``run`` is timed; what it returns counts as output, not as extra memory. ``check`` judges it.

    A check that does not need the result (it gets None) calls the implementation itself.
    """

    run: Callable[[], Any]
    check: Callable[[Any], Verdict]
    needs_result: bool = True


@dataclass(kw_only=True)
class Candidate:
    """A call of one implementation.

    Attributes:
        op: what it computes: prefill, train, forward, backward, select, topk, ...
        name: the implementation.
        start: imports and prepares what is not timed; raises ``Unavailable`` where a baseline cannot run.
        pattern: how the queries selected their blocks; empty if they did not.
        flops: useful work, see work.py.
        bytes: compulsory traffic; 0 where it says nothing.
        is_ours: a failed check of ours fails the whole run, one of a baseline drops the baseline.
        once: timed in a single call, because it is slow.
        warm: called, and checked, before it is timed; if not, the timed call is the first and is checked.
        package: distribution whose version belongs to the result.
    """

    op: str
    name: str
    start: Callable[[], Call]
    pattern: str = ""
    flops: int = 0
    bytes: int = 0
    is_ours: bool = False
    once: bool = False
    warm: bool = True
    package: str = ""


class Experiment(NamedTuple):
    """Candidates that are timed in turn on the same inputs.

    Attributes:
        group: name for --only.
        shape: size of the inputs.
        candidates: what to time.
        expected_s: about how long it takes on a GPU, for --seconds.
    """

    group: str
    shape: Shape | DecodeShape
    candidates: list[Candidate]
    expected_s: float = 5.0
