"""Two processes: an engine on tensor-, context- and expert-parallel ranks says what a single rank says.

    torchrun --nproc-per-node 2 tests/inference/parallel_program.py RESULT.json FOLDER

Rank 0 writes, for each case, the largest difference of a log-probability, and whether the tokens are equal.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a program, not by pytest

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()

import torch  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_msa.checkpoint.hf.megatron_model import seed  # noqa: E402
from megatron_msa.inference.engine import InferenceEngine  # noqa: E402
from megatron_msa.inference.paged_rows import E4M3  # noqa: E402
from megatron_msa.inference.sampling import Sampling  # noqa: E402
from tests.attention.tiny import tiny_config, tiny_model  # noqa: E402
from tests.inference.checks import LENGTHS, MIXTURE, NEW, model_of, random_sequences  # noqa: E402

TENSOR = {"tensor_model_parallel_size": 2}
CONTEXT = {"context_parallel_size": 2}
EXPERT = {"expert_model_parallel_size": 2}
MIXED = {"num_layers": 3, "msa_layer_freq": "[1,0,1]"}
EIGHT_BIT = {"cache_dtype": E4M3, "index_key_dtype": E4M3}


@dataclass(frozen=True)
class Case:
    """How the ranks share the model, the model, and options of the engine."""

    parallel: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)


CASES = {
    "TP2": Case(TENSOR, MIXED),
    "TP2, sequence parallel": Case(TENSOR | {"sequence_parallel": True}, MIXED),
    "TP2, sequence parallel, experts": Case(TENSOR | {"sequence_parallel": True}, MIXTURE),
    "CP2": Case(CONTEXT, MIXED),
    "CP2, 8 bit": Case(CONTEXT, MIXED, EIGHT_BIT),
    "CP2, dense control": Case(CONTEXT, MIXED, {"attention": "dense"}),
    "CP2, experts on both": Case(CONTEXT | EXPERT, MIXTURE),
    "EP2": Case(EXPERT, MIXTURE),
}


def build_groups(**parallel: Any) -> None:
    parallel_state.destroy_model_parallel()
    sizes = {name: size for name, size in parallel.items() if name.endswith("_size")}
    parallel_state.initialize_model_parallel(**sizes)
    seed(7)


def answers(model: GPTModel, options: dict[str, Any]) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Log-probabilities, greedy tokens and drawn tokens; chunks of no even number, batches that shrink."""
    engine = InferenceEngine(model, max_tokens=64, max_sequences=3, prefill_chunk=13, **options)
    torch.manual_seed(11)
    sequences = random_sequences(LENGTHS)
    stop = {1, 2, 3}
    return (
        torch.cat(engine.log_probabilities(sequences, start=[20, *[0] * (len(LENGTHS) - 1)])),
        engine.generate(sequences, max_new_tokens=NEW, stop=stop),
        engine.generate(sequences, max_new_tokens=NEW, sampling=Sampling(top_k=20)),
    )


def compare(case: Case, folder: Path) -> dict[str, Any]:
    build_groups()
    whole = model_of(**case.model)
    expected = answers(whole, case.engine)
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(whole.sharded_state_dict(), str(folder))
    build_groups(**case.parallel)
    model = tiny_model(tiny_config(**case.model, **case.parallel))
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))
    found = answers(model, case.engine)
    return {
        "log-probabilities": float((found[0] - expected[0]).abs().max()),
        "greedy": found[1] == expected[1],
        "drawn": found[2] == expected[2],
    }


def main() -> None:
    torch.distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    results = {name: compare(case, folder / str(number)) for number, (name, case) in enumerate(CASES.items())}
    every = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, results)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(every, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":  # saving a checkpoint starts processes that import this module again
    main()
