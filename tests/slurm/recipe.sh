#!/usr/bin/env bash
# A recipe like those of examples/msa_109b at a size that two processes train on two cores.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/../../examples/tiny/flags.sh"
tiny=("${TRAINING[@]}")
stage() {
    TRAINING=(
        "${tiny[@]}" --num-layers 2 --moe-layer-freq '([0]+[1]*1)' --hidden-size 32 --ffn-hidden-size 64
        --seq-length 128 --max-position-embeddings 128 --train-iters "$1" --msa-schedule warmup@0,sparse@3
        --msa-block-size 16 --eval-iters 0 --lr-warmup-iters 0 --lr-decay-style constant
    )
    LAYOUT=()
}
export TE=0
source "$here/../../examples/common/long_runs.sh"
pretrain_stage "$@" --mock-data --tokenizer-type NullTokenizer --vocab-size 100
