"""Measure how well a trained model uses long contexts: needles, RULER-style tasks, perplexity, selection.

    python tools/eval_long_context.py run --load runs/demo/checkpoints --output runs/demo/eval \\
        --lengths 256 384 512 --num-depths 5 --attention msa,dense --style completion \\
        --tasks needle perplexity selection --scoring generation log_probability

    python tools/eval_long_context.py collect --output runs/eval runs/eval/length_*

Any checkpoint of pretrain_msa.py, saved under any parallel layout; with torchrun also on several GPUs. A job
that was interrupted goes on where it was when it is started again. Described in
docs/long_context_evaluation.md; as an array of batch jobs: examples/slurm/evaluate.sbatch.
"""

import os
import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu, slurm_ranks  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron's training package is imported


def run() -> int:
    import logging

    from megatron_msa.evaluation.command import main

    os.environ.update(slurm_ranks.adopt(os.environ))
    megatron_fixes.apply()
    # Announces at every model built that GPTModel will go.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    return main(__doc__)


if __name__ == "__main__":
    sys.exit(run())
