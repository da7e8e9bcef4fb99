"""The run that every parallel layout must repeat, and how far a layout is from it."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.end_to_end.launching import Run
from tests.parallel.checkpoint_tensors import read_parameters
from tests.parallel.selection_record import read as read_selections

# Four layers, so that there are two virtual stages for each of two pipeline ranks; a vocabulary that tensor
# parallelism does not pad to another size. Documents are 20 to 600 tokens long, sequences 128, blocks 16:
# documents end inside blocks, inside the chunks of context parallelism and between ranks.
FLAGS = ["--num-layers", "4", "--moe-layer-freq", "[0,1,1,1]", "--padded-vocab-size", "272"]
FLAGS += ["--train-iters", "10", "--msa-schedule", "dense@0,warmup@3,sparse@6"]
FLAGS += ["--lr-decay-style", "constant"]
# A seed with which no row chooses between two blocks whose scores are equal up to rounding (see `MARGIN`).
FLAGS += ["--seed", "3"]
MARGIN = 1e-5
# With the default of 1e-8 Adam turns the rounding error of a gradient that is almost zero into a step of full
# size, and two steps later a query chooses another block.
FLAGS += ["--adam-eps", "1e-2"]


class TenSteps(NamedTuple):
    """What a run leaves behind."""

    run: Run
    parameters: dict[str, Tensor]  # after the last step
    selections: dict[tuple[int, int], Tensor]
    folder: Path

    @classmethod
    def read(cls, run: Run, folder: Path) -> "TenSteps":
        return cls(
            run, read_parameters(folder / "iter_0000010"), read_selections(folder / "selections"), folder
        )


class Differences(NamedTuple):
    """The largest relative difference of each quantity over all steps, layers and tensors; and the blocks."""

    rows: list[tuple[int, int, int, int]]
    """(layer, sequence, token, group) of the rows that selected other blocks."""
    loss: float
    grad_norm: float
    kl: float
    parameters: float
    """Of a tensor: the largest difference of an entry, beyond one unit in the last place of fp32, over the
    largest change of an entry in the ten steps."""


def differences(actual: TenSteps, expected: TenSteps, initial: dict[str, Tensor]) -> Differences:
    """How far two runs are apart.

    Raises:
        AssertionError: the logged steps and layers are not the same, or the names of the tensors.
    """
    steps, expected_steps = actual.run.steps, expected.run.steps
    assert list(steps) == list(expected_steps) == list(range(1, 11))
    assert [row["phase"] for row in steps.values()] == ["dense"] * 3 + ["warmup"] * 3 + ["sparse"] * 4
    events = [(row["event"], row["iteration"]) for row in actual.run.rows]
    assert len(events) == len(set(events)), "a row was written more than once"
    found: dict[str, list[float]] = {"lm_loss": [], "grad_norm": [], "kl": []}
    for step, row in expected_steps.items():
        for name in ("lm_loss", "grad_norm"):
            found[name].append(abs(steps[step][name] / row[name] - 1))
        assert steps[step].get("kl_per_layer", {}).keys() == row.get("kl_per_layer", {}).keys()
        for layer, kl in row.get("kl_per_layer", {}).items():
            found["kl"].append(abs(steps[step]["kl_per_layer"][layer] / kl - 1))
    assert_same_flops(actual.run, expected.run)
    return Differences(
        rows=different_rows(actual.selections, expected.selections),
        loss=max(found["lm_loss"]),
        grad_norm=max(found["grad_norm"]),
        kl=max(found["kl"]),
        parameters=max(parameter_differences(actual.parameters, expected.parameters, initial).values()),
    )


def assert_same_flops(actual: Run, expected: Run) -> None:
    """All devices together execute the same FLOPs per step: what was attended is counted once."""
    for step, row in expected.steps.items():
        other = actual.steps[step]
        tokens = [each["tokens_per_second"] * each["seconds"] for each in (other, row)]
        assert tokens[0] == pytest.approx(tokens[1])
        flops = [each["tflops_executed"] * each["seconds"] for each in (other, row)]
        assert flops[0] * world_size(actual) == pytest.approx(flops[1] * world_size(expected))


def world_size(run: Run) -> int:
    return int(run.stdout.split("using world size: ")[1].split(",")[0])


def parameter_differences(
    actual: dict[str, Tensor], expected: dict[str, Tensor], initial: dict[str, Tensor]
) -> dict[str, float]:
    """By tensor: the largest difference over the largest change since the initial checkpoint.

    One unit in the last place is no difference: a value between two fp32 numbers is stored as either. Of a
    router's weight of 0.04 that changes by 3e-4 it is already 1e-5 of the change.
    """
    assert actual.keys() == expected.keys()
    result = {}
    for name, tensor in expected.items():
        change = (tensor - initial[name]).abs().max()
        assert change > 0, f"{name} was not trained"
        last_place = torch.nextafter(tensor.abs(), torch.tensor(torch.inf)) - tensor.abs()
        beyond = ((actual[name] - tensor).abs() - last_place).clamp(min=0)
        result[name] = float(beyond.max() / change)
    return result


def different_rows(
    actual: dict[tuple[int, int], Tensor], expected: dict[tuple[int, int], Tensor]
) -> list[tuple[int, int, int, int]]:
    """(layer, sequence, token, group) of every row whose blocks are not the same."""
    assert len(expected) == 4 * 4 * 4  # layers, sparse steps, sequences of a step
    assert actual.keys() == expected.keys()
    rows = []
    for (layer, sequence), block_ids in expected.items():
        assert block_ids.shape == (128, 2, 3)
        assert (block_ids >= 0).any()
        differs = (actual[layer, sequence] != block_ids).any(dim=-1)
        rows += [(layer, sequence, token, group) for token, group in differs.nonzero().tolist()]
    return rows
