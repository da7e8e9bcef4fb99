"""Convert checkpoints: Hugging Face <-> Megatron, and dense (GQA) -> MSA.

    python tools/convert_checkpoint.py hf-to-megatron --load models/Qwen3-8B --save checkpoints/qwen3

    python tools/convert_checkpoint.py megatron-to-hf --load checkpoints/run --save models/run --verify

All options: COMMAND --help. Described in docs/conversion.md.
"""

import argparse
import importlib
import logging
import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()  # before Megatron's training package is imported

# Each has add_subcommand(subparsers), which sets the default `run` to a function of the parsed arguments.
COMMANDS = (
    "megatron_msa.checkpoint.gqa_to_msa",
    "megatron_msa.checkpoint.hf.to_hf",
    "megatron_msa.checkpoint.hf.to_megatron",
)


def main() -> int:
    from megatron_msa.errors import ConfigError

    megatron_fixes.apply()
    # Announces at every model built that GPTModel will go.
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        importlib.import_module(module).add_subcommand(subparsers)
    try:
        args = parser.parse_args()
        args.run(args)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
