"""Megatron in one process, as in the tests of attention."""

from tests.attention.conftest import global_state, process_groups

__all__ = ["global_state", "process_groups"]
