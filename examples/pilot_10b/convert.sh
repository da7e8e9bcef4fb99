#!/usr/bin/env bash
# The 10B model from a dense GQA checkpoint of the same shape, as the paper does with the large one. All sizes are ours:
# 350B tokens dense, 5B of warmup, 45B with sparse attention; the stages 32k and 192k of pretrain.sh follow, with FROM=$SAVE.
#
#   DENSE=checkpoints/dense SAVE=checkpoints/converted examples/pilot_10b/convert.sh --data-path ... --tokenizer-model ...
#
# The dense run is this one:
#
#   SAVE=checkpoints/dense MSA_LAYERS='([0]*16)' examples/pilot_10b/pretrain.sh 8k --msa-schedule dense@0 \
#       --train-iters 83447 --dist-ckpt-optim-fully-reshardable --data-path ...
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/model.sh"
source "$here/stages.sh"
source "$here/../common/long_runs.sh"
# In iterations of 4,194,304 tokens.
START="${START:-83447}" SPARSE="${SPARSE:-$((${START:-83447} + 1192))}" END="${END:-$((${START:-83447} + 11921))}"
convert_dense 8k "$@"
