"""Says what has happened when another process of the job is gone, and how to go on.

A process that dies leaves the others inside a collective. gloo notices the closed connection at once; NCCL
notices it when its network does, or else after `--distributed-timeout-minutes`, when its watchdog ends the
process with a message of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def explained(args: argparse.Namespace) -> Iterator[None]:
    """Around training: a failed collective ends this process with status 1 and a last line that helps.

    Args:
        args: Megatron's arguments, whose `curr_iteration` its loop keeps up to date.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        traceback.print_exc()
        iteration = getattr(args, "curr_iteration", args.iteration)
        print(
            f"error: rank {args.rank} lost another process of the job after {iteration} iterations. The rank "
            f"that ended first says why, or was killed (out of memory, node failure). {_how_to_go_on(args)}",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from error


def is_lost_process(error: RuntimeError) -> bool:
    """Whether a collective failed because a peer is gone or silent; gloo raises plain RuntimeErrors."""
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def _how_to_go_on(args: argparse.Namespace) -> str:
    tracker = Path(args.save or "") / "latest_checkpointed_iteration.txt"
    if args.save and tracker.is_file():
        saved = tracker.read_text().strip()
        return f"Restart with --load {args.save}: its last complete checkpoint is that of iteration {saved}."
    return "There is no checkpoint to continue from (--save, --save-interval)."
