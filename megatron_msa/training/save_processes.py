"""Corrections to megatron-core 0.19.2: the processes that it starts to save checkpoints.

Every save needs a process that serves a queue; `--async-save` adds a worker that lives as long as the run,
copies the state and writes it while training goes on. Without these corrections both outlive a training
process that is killed, both are ended by the SIGTERM that a scheduler sends to all processes of a job (the
save that follows then fails), a worker that died is waited for without end, and one that lives writes tensors
of the CPU as later steps leave them.
"""

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import multiprocessing.managers
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

_POLL_SECONDS = 0.1
_SIGNALS_TO_THE_JOB = (signal.SIGTERM, signal.SIGINT)


class SaveProcessEnded(RuntimeError):
    """The worker of `--async-save` is gone, and with it the checkpoint that it was writing."""


def apply() -> None:
    """Apply the corrections. May be called more than once."""
    _keep_queue()
    _keep_worker()


def _keep_queue() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async.get_write_results_queue
    if getattr(original, "_ends_with_owner", False):
        return
    # Without a GPU the queue is forked, not spawned (see `no_gpu`).
    default_mode = getattr(original, "keywords", {}).get("mp_mode", "spawn")

    def get_write_results_queue(mp_mode: str = default_mode) -> Any:
        if filesystem_async._results_queue is None:
            context = multiprocessing.get_context(mp_mode)
            manager = multiprocessing.managers.SyncManager(ctx=context)
            with _signals_for_this_process_only():
                manager.start(_end_with_parent_only, (os.getpid(),))
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    get_write_results_queue._ends_with_owner = True  # type: ignore[attr-defined]
    filesystem_async.get_write_results_queue = get_write_results_queue


def _keep_worker() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller as Caller

    if Caller.async_loop is _work:
        return
    original_get_process = Caller._get_process.__func__
    original_is_done = Caller.is_current_async_call_done

    @functools.wraps(original_get_process)
    def get_process(
        cls: Any, rank: int, mp_mode: str = "", cpu_priority: int = 10, io_priority: int | None = None
    ) -> Any:
        started = cls._persistent_process is None
        # Not "forkserver": SIGTERM ends that server, which would be the worker's parent.
        with _signals_for_this_process_only():
            process = original_get_process(cls, rank, "spawn", cpu_priority, io_priority)
        if started:
            # Ends it when this process fails: what `multiprocessing` would send is SIGTERM.
            atexit.register(process.kill)
            # Where Megatron waits until the state is copied.
            staged = cls._persistent_preload_q
            staged.join = functools.partial(_join, staged.join, cls)
        return process

    @functools.wraps(original_is_done)
    def is_current_async_call_done(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        # The answer is the same on all ranks, so that all ask equally often.
        while not original_is_done(self, False, no_dist):
            if self.process and self.cur_item is None:
                _check_alive(type(self))
            if not blocking:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    Caller.async_loop = staticmethod(_work)
    Caller._get_process = classmethod(get_process)
    Caller.is_current_async_call_done = is_current_async_call_done


def _work(*args: Any) -> None:
    """The worker process."""
    from megatron_msa.training import no_gpu

    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    _end_with_parent_only(parent.pid)
    no_gpu.install_if_no_gpu()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    # Under its name it is what the training process asks for.
    staged = functools.partial(_staged, FileSystemWriterAsync.preload_tensors)
    FileSystemWriterAsync.preload_tensors = staticmethod(staged)
    PersistentAsyncCaller.async_loop(*args)


def _staged(preload_tensors: Any, write_buckets: list[Any], non_blocking: bool = True) -> list[Any]:
    """The state that is to be written, copied while training waits.

    `preload_tensors` copies from a GPU. Tensors of the CPU lie in memory that is shared with the training
    process: without a copy they would be written as later steps leave them. Such are torch's own count of
    Adam's steps and, without a GPU, all.
    """
    copied = [
        (name, key, (data, [(item, t.clone() if t.device.type == "cpu" else t) for item, t in tensors]))
        for name, key, (data, tensors) in write_buckets
    ]
    return preload_tensors(copied, non_blocking)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _signals_for_this_process_only() -> Iterator[None]:
    """A child that is started here is not ended by signals to the job, from its first moment on.

    Until it can ignore them it has to import PyTorch, which takes seconds. Blocked signals stay blocked in a
    child; here they are delivered afterwards.
    """
    # Started first: otherwise the child's start would start it, and with that unblock them.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_TO_THE_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent_only(parent: int) -> None:
    """Run in a child process: Linux kills it when its parent ends; signals to the job are for the parent."""
    for number in _SIGNALS_TO_THE_JOB:
        signal.signal(number, signal.SIG_IGN)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _join(join: Any, caller: Any) -> None:
    """`JoinableQueue.join`, as long as the other side lives."""
    waiting = threading.Thread(target=join, daemon=True)
    waiting.start()
    while waiting.is_alive():
        waiting.join(_POLL_SECONDS)
        if waiting.is_alive():
            _check_alive(caller)


def _check_alive(caller: Any) -> None:
    process = caller._persistent_process
    if process is None or process.is_alive():
        return
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    # At the end nobody shall wait for what it has not read, or for its answer to "done".
    for queue in (caller._persistent_queue, caller._persistent_preload_q):
        queue.cancel_join_thread()
    caller._persistent_process = None
    if AsyncCallsQueue._persistent_caller is not None:
        AsyncCallsQueue._persistent_caller.process = None
    raise SaveProcessEnded(
        f"the process that saves in the background ended with exit code {process.exitcode} (-9: killed, for "
        "example because the host has no memory for a copy of this rank's state); the checkpoint that it was "
        "writing is incomplete, the one before stays in charge"
    )
