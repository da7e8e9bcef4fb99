"""Write long documents of real text with needles to look up, as a Megatron dataset.

    python tools/make_retrieval_data.py --builtin-corpus --output-prefix runs/needle/data/train \\
        --documents 4096 --document-bytes 8191 --retrieval-share 0.4

What a document looks like: megatron_msa/data/retrieval.py. All options: --help.
"""

import sys

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.data.retrieval import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
