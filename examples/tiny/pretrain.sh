#!/usr/bin/env bash
# Train the tiny MSA MoE on any machine; further flags are passed on and win over the ones here.
#
#   python tools/preprocess_data.py --builtin-corpus --tokenizer-type bytes --output-prefix runs/data/stdlib
#   examples/tiny/pretrain.sh --data-path runs/data/stdlib --tokenizer-model runs/data/byte_tokenizer \
#       --split 95,5,0 --train-iters 300 --msa-schedule warmup@0,sparse@120 --eval-interval 50 --save runs/tiny
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/flags.sh"
exec "${PYTHON:-python}" "$here/../../pretrain_msa.py" "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}" \
    --tokenizer-type HuggingFaceTokenizer --eval-iters 8 "$@"
