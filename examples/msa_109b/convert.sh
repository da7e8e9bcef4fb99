#!/usr/bin/env bash
# The 109B model from a dense GQA checkpoint of the same shape: the second recipe of the paper. 40B tokens of warmup,
# then 360B with sparse attention; the stages 32k to 1m of pretrain.sh follow, with FROM=$SAVE.
#
#   DENSE=checkpoints/dense SAVE=checkpoints/converted examples/msa_109b/convert.sh --data-path ... --tokenizer-model ...
#
# The dense run is this one; the paper's ended after 2.6T tokens:
#
#   SAVE=checkpoints/dense MSA_LAYERS='([0]*41)' examples/msa_109b/pretrain.sh 8k --msa-schedule dense@0 \
#       --train-iters 154972 --dist-ckpt-optim-fully-reshardable --data-path ...
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/model.sh"
source "$here/stages.sh"
source "$here/../common/long_runs.sh"
# In iterations of 16,777,216 tokens: 2.6T of them dense, 40B of warmup, 400B in all.
START="${START:-154972}" SPARSE="${SPARSE:-$((${START:-154972} + 2385))}" END="${END:-$((${START:-154972} + 23842))}"
convert_dense 8k "$@"
