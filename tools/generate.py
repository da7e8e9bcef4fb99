"""Continue prompts with a trained model, and say how fast.

    python tools/generate.py --load runs/demo/checkpoints --prompt "def main(" --max-new-tokens 200

Any checkpoint of pretrain_msa.py, saved under any parallel layout; with torchrun also on several GPUs.
Described in docs/inference.md.
"""

import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron's training package is imported


def main() -> int:
    import logging

    from megatron_msa.errors import ConfigError
    from megatron_msa.inference.command import build_parser, run

    megatron_fixes.apply()
    # Announces at every model built that GPTModel will go.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    try:
        run(build_parser(__doc__).parse_args())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
