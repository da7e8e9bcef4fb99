"""Draw the curves of a training run: loss, KL, recall and selection over the steps, phases marked.

    python tools/plot_curves.py runs/tiny/metrics.jsonl --output runs/tiny/curves.png --unigram-loss 3.2

All options: --help.
"""

import sys

from megatron_msa.training.curves import main

if __name__ == "__main__":
    sys.exit(main())
