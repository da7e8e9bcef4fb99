"""What is put back before Megatron's rerun machine runs a step again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.training import training

from megatron_msa.training import rerun_state


class Wrapper(torch.nn.Module):
    """Like Megatron's: `buffers` is something else there."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(2))
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.buffers: Any = ["gradients"]


class Count:
    def __init__(self) -> None:
        self.value = 3

    def saved(self) -> int:
        return self.value

    def restore(self, saved: int) -> None:
        self.value = saved


def test_buffers_and_counts_are_those_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    restored: list[str] = []
    machine = SimpleNamespace(state_save_func=lambda: "generators", state_restore_func=restored.append)
    monkeypatch.setattr(rerun_state, "get_rerun_state_machine", lambda: machine)
    model, count = Wrapper(), Count()
    rerun_state.keep_in_reruns([model], [count])

    state = machine.state_save_func()
    model.expert_bias += 1.0
    model.weight.data += 1.0
    count.value += 4
    monkeypatch.setattr(training, "_seqlen_stats_in_iteration", torch.ones(2))
    for _ in range(2):  # before the second pass, and once more before a checkpoint is saved for a third
        machine.state_restore_func(state)
        assert model.expert_bias.tolist() == [0.0, 0.0]
        model.expert_bias += 1.0
    assert model.weight.tolist() == [1.0, 1.0]  # the optimizer has not run yet: parameters are not touched
    assert count.value == 3
    assert restored == ["generators", "generators"]
    assert training._seqlen_stats_in_iteration.tolist() == [0.0, 0.0]
