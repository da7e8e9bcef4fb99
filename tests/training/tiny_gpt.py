"""Megatron's own pretrain() on a tiny mixture-of-experts GPT, for the tests of this folder.

    python tests/training/tiny_gpt.py --result-file out.json --train-iters 4 [any Megatron flag]
        [--then --result-file another.json ...]      # several runs in one process: the import takes seconds

Two layers (the first one dense), hidden size 64, 4 experts of which 2 are chosen by a sigmoid router with
expert bias, one shared expert, zero-centred RMSNorm (also per head), SwiGLU and RoPE. The last rank writes
the losses and gradient norms of each step and a digest of its final parameters to the result file.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from megatron_msa.training import megatron_fixes, no_gpu

NO_GPU = no_gpu.install_if_no_gpu()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer  # noqa: E402
from megatron.core.utils import get_batch_on_this_tp_rank  # noqa: E402
from megatron.training import get_args, pretrain, training  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402

from megatron_msa.attention.rms_norm import RMSNorm  # noqa: E402

FLAGS = """
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --seq-length 32 --max-position-embeddings 32
    --normalization RMSNorm --apply-layernorm-1p --qk-layernorm
    --swiglu --disable-bias-linear --position-embedding-type rope
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-shared-expert-intermediate-size 64
    --moe-layer-freq [0,1] --moe-router-score-function sigmoid --moe-router-enable-expert-bias
    --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall
    --tokenizer-type NullTokenizer --vocab-size 127 --mock-data --split 99,1,0
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --min-lr 1e-3 --lr-decay-style cosine
    --eval-iters 0 --eval-interval 1000 --log-interval 1
"""


def layer_spec(model_config: Any, vp_stage: int | None = None) -> Any:
    """The local decoder block with our RMSNorm: Megatron's own needs apex or refuses sequence parallelism."""
    block = get_gpt_decoder_block_spec(
        model_config.transformer, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    block.layer_norm = RMSNorm
    for layer in block.layer_specs:
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return block


def datasets(train_valid_test_num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Counting sequences (Megatron's mock data): a model can learn them in a few steps."""
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=None,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(
        MockGPTDataset,
        train_valid_test_num_samples,
        lambda: parallel_state.get_tensor_model_parallel_rank() == 0,
        config,
    )
    return builder.build()


datasets.is_distributed = True  # type: ignore[attr-defined]


def loss_function(loss_mask: torch.Tensor, losses: torch.Tensor) -> Any:
    """Sum over tokens, number of tokens, and the pair that Megatron logs."""
    loss = torch.sum(losses.float().view(-1) * loss_mask.view(-1))
    tokens = loss_mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1).float()])}


def forward_step(data_iterator: Any, model: torch.nn.Module) -> Any:
    args = get_args()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch = next(data_iterator) if data_iterator is not None and tp_rank == 0 else {}
    batch = get_batch_on_this_tp_rank(
        batch={key: value.cuda(non_blocking=True) for key, value in batch.items()},
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=False,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=1,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=False,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, partial(loss_function, batch["loss_mask"])


def extra_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--result-file", type=Path, default=None)
    parser.add_argument("--die-while-saving", type=int, default=None, help="iteration of the fatal save")
    if NO_GPU:
        parser.set_defaults(**no_gpu.argument_defaults())
    else:
        parser.set_defaults(**megatron_fixes.argument_defaults(has_gpu=True))
    return parser


def observe(steps: list[dict[str, Any]], models: list[Any]) -> Any:
    """Keep the exact loss and gradient norm of each step (Megatron's console line is rounded) and the model.

    Returns a function that puts Megatron's own functions back.
    """
    original_log, original_setup = training.training_log, training.setup_model_and_optimizer

    def training_log(*args: Any, **kwargs: Any) -> Any:
        losses, _, _, iteration, _, _, _, grad_norm = args[:8]
        step = {"iteration": iteration, "grad_norm": float(grad_norm)}
        steps.append({**step, **{key: float(value) for key, value in losses.items()}})
        return original_log(*args, **kwargs)

    def setup(*args: Any, **kwargs: Any) -> Any:
        built = original_setup(*args, **kwargs)
        models.extend(built[0])
        return built

    def restore() -> None:
        training.training_log, training.setup_model_and_optimizer = original_log, original_setup

    training.training_log, training.setup_model_and_optimizer = training_log, setup
    return restore


def digest(models: list[Any]) -> str:
    """A hash of all parameters and buffers, bit for bit."""
    result = hashlib.sha256()
    for model in models:
        for name, value in sorted(model.state_dict().items()):
            if isinstance(value, torch.Tensor):
                result.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return result.hexdigest()


def die_while_saving(fatal_iteration: int) -> None:
    """Make the process disappear in the middle of writing the checkpoint of that iteration."""
    original_save, original_write = training.save_checkpoint, filesystem_async._write_item
    written: list[int] = []

    def save_checkpoint(iteration: int, *args: Any, **kwargs: Any) -> Any:
        def write_item(*args: Any, **kwargs: Any) -> Any:
            written.append(iteration)
            if iteration == fatal_iteration and len(written) > 5:
                os._exit(9)
            return original_write(*args, **kwargs)

        written.clear()
        filesystem_async._write_item = write_item
        return original_save(iteration, *args, **kwargs)

    training.save_checkpoint = save_checkpoint


def run(arguments: list[str]) -> None:
    """One call of pretrain()."""
    sys.argv[1:] = [*FLAGS.split(), *arguments]
    args = parse_and_validate_args(extra_args_provider=extra_arguments)
    model_config = gpt_config_from_args(args)
    model_config.transformer_layer_spec = layer_spec
    steps: list[dict[str, Any]] = []
    models: list[Any] = []
    restore = observe(steps, models)
    if args.die_while_saving is not None:
        die_while_saving(args.die_while_saving)
    try:
        config = pretrain_cfg_container_from_args(args, model_config)
        pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
    finally:
        restore()
    if args.result_file is not None and args.rank == args.world_size - 1:
        args.result_file.write_text(json.dumps({"steps": steps, "parameters": digest(models)}, indent=1))
    training.destroy_global_state()


def main() -> None:
    megatron_fixes.apply()
    pending: list[str] = []
    for argument in [*sys.argv[1:], "--then"]:
        if argument != "--then":
            pending.append(argument)
            continue
        run(pending)
        pending = []
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
