"""Tokenize text into Megatron's .bin/.idx format.

    python tools/preprocess_data.py --builtin-corpus --tokenizer-type bytes --output-prefix runs/data/stdlib

    python tools/preprocess_data.py --input corpus/*.jsonl --json-key text --output-prefix runs/data/corpus \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/tokenizer --workers 16

It prints the flags with which training reads the dataset. All options: --help.
"""

import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.data.preprocess import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
