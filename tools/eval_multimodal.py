"""Measure what a trained model makes of images: perplexity with right and wrong images, and a visual needle.

    python tools/eval_multimodal.py --load runs/vision/checkpoints --data data/captions --part val \\
        --objects data/objects --images 2 4 8 --output runs/vision/images.json

Any checkpoint of pretrain_msa.py with a vision encoder, saved under any parallel layout; one process.
Described in docs/multimodal_data.md.
"""

import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron's training package is imported


def main() -> int:
    import logging

    from megatron_msa.errors import ConfigError
    from megatron_msa.evaluation.multimodal_command import build_parser, run

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
