"""As for the attention layers: Megatron in one process, the same seed for every test."""

from tests.attention.conftest import global_state, process_groups

__all__ = ["global_state", "process_groups"]
