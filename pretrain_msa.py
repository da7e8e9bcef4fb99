"""Pretrain a GPT model with MiniMax Sparse Attention on Megatron's training loop.

On any machine, without a GPU or a download:

    make demo

With your own flags (all of Megatron's, and the `msa` group; `--dry-run` shows what they resolve to):

    torchrun --nproc-per-node 8 pretrain_msa.py $(cat flags.txt)
"""

import os
from functools import partial

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import no_gpu  # noqa: E402

HAS_GPU = not no_gpu.install_if_no_gpu()  # before Megatron's training package is imported


def main() -> None:
    from megatron_msa.errors import ConfigError
    from megatron_msa.training import arguments, megatron_fixes, slurm_ranks

    os.environ.update(slurm_ranks.adopt(os.environ))
    megatron_fixes.apply()
    rank = int(os.environ.get("RANK", "0"))
    try:
        args = arguments.parse_arguments(has_gpu=HAS_GPU)
        tokenizer = arguments.tokenizer_from_args(args)
        model_config = arguments.model_config_from_args(args)
    except ConfigError as error:
        arguments.exit_with(error, rank)

    if args.dry_run:
        from megatron_msa.training.dry_run import describe

        if rank == 0:
            print(describe(args, model_config))
        return

    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables

    from megatron_msa.data.datasets import make_datasets_provider
    from megatron_msa.training import lost_processes, megatron_hooks
    from megatron_msa.training.forward_step import forward_step
    from megatron_msa.training.run import TrainingRun

    set_global_variables(args, build_tokenizer=False)  # from here on: TensorBoard, W&B, signal handlers
    run = TrainingRun(args, model_config)
    megatron_hooks.install(run)
    with lost_processes.explained(args):
        pretrain(
            pretrain_cfg_container_from_args(args, model_config),
            make_datasets_provider(args, lambda: tokenizer, run.data_counts),
            ModelType.encoder_or_decoder,
            partial(forward_step, on_batch=run.on_batch),
        )


if __name__ == "__main__":  # checkpointing starts processes that import this module again
    main()
