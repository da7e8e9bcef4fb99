"""Two processes: converted checkpoints at TP2, EP2 and PP2.

    torchrun --nproc-per-node 2 tests/checkpoint/hf_layouts_program.py RESULT.json FOLDER

FOLDER has, for each model, NAME/megatron (a converted checkpoint) and NAME/logits.pt (tokens and what
transformers computes). Rank 0 writes the largest error of each model and layout.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # started as a program, not by pytest

from megatron_msa.training import no_gpu

no_gpu.install_if_no_gpu()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch import Tensor, distributed  # noqa: E402

from megatron_msa.checkpoint.hf import verify  # noqa: E402

# Three layers: the stages are uneven. Expert parallelism is for the models with experts.
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "EP2": {"expert_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
}


@torch.no_grad()
def logits(checkpoint: Path, tokens: Tensor, layout: dict[str, Any]) -> Tensor | None:
    """Logits of the whole vocabulary on the ranks that have them."""
    parallel_state.destroy_model_parallel()
    sizes = {name: size for name, size in layout.items() if name.endswith("_model_parallel_size")}
    parallel_state.initialize_model_parallel(**sizes)
    model = verify.load_megatron_model(checkpoint, **layout)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], model.config.hidden_size)
        distributed.recv(hidden, src=0)
        model.set_input_tensor(hidden)
    output = model(tokens, positions, None)
    if not parallel_state.is_pipeline_last_stage():
        distributed.send(output, dst=1)
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(output) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(shards, output.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def main() -> None:
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {}
    for folder in sorted(path for path in Path(sys.argv[2]).iterdir() if path.is_dir()):
        tokens, expected = torch.load(folder / "logits.pt")
        for name, layout in LAYOUTS.items():
            if name == "EP2" and folder.name in ("llama", "qwen3"):
                continue
            actual = logits(folder / "megatron/release", tokens, layout)
            error = torch.zeros(())
            if actual is not None:
                error = (actual[..., : expected.shape[-1]] - expected).abs().max()
            distributed.all_reduce(error, op=distributed.ReduceOp.MAX)
            results.setdefault(folder.name, {})[name] = float(error)
    if distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
