#!/usr/bin/env bash
# Continue a dense GQA run as MSA: index warmup, then sparse attention (the second recipe of arXiv 2606.13392).
#
#   DENSE=checkpoints/dense SAVE=checkpoints/msa examples/convert_gqa/pretrain.sh "${MODEL[@]}" --data-path ...
#
# Arguments are the flags of the dense run (model, data, optimizer, parallelism); what is set here wins over them.
# Start it again with the same command after an interruption. LAUNCH is what starts the processes, for example
# "torchrun --nnodes 16 --nproc-per-node 8 ...".
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
: "${DENSE:?folder of the dense checkpoints}" "${SAVE:?folder of the MSA checkpoints}"

# Phases count absolute iterations, and the checkpoint brings its own count along. The paper adds 400B tokens and
# warms up for the first 40B of them: at 4.2M tokens an iteration 95,000 and 9,500 iterations.
START="${START:-500000}"                # iterations of the dense checkpoint
SPARSE="${SPARSE:-$((START + 9500))}"   # the warmup ends here
END="${END:-$((START + 95000))}"

PHASES=(
    --msa-schedule "warmup@0,sparse@$SPARSE"
    --train-iters "$END"
    --msa-block-size 128 --msa-num-selected-blocks 16
)
LOADING=(
    # Index branches that the checkpoint lacks are initialised, and nothing else. This run's own checkpoints have
    # them, and they are loaded as they are: the flag can stay when the run is resumed.
    --msa-init-index low_rank
    # The dense run ended its learning-rate schedule; this one has its own: from --lr at START to --min-lr at END. A plain
    # cosine would count from iteration 0, and be nearly at its end at START.
    --override-opt-param-scheduler --lr-decay-iters "$END" --lr-warmup-iters 0
    --lr-decay-style WSD --lr-wsd-decay-style cosine --lr-wsd-decay-iters "$((END - START))"
    # The distributed optimizer's default format stores flat buffers of exactly these parameters. Dense checkpoints
    # saved without this flag are loaded with --no-load-optim, or saved once more with it: docs/conversion.md.
    --dist-ckpt-optim-fully-reshardable
)
# A checkpoint that was damaged after it was saved is passed over.
newest="$("${PYTHON:-python}" "$here/../../tools/newest_checkpoint.py" "$SAVE")"
if [[ -n "$newest" ]]; then
    LOADING+=(--load "$SAVE" --ckpt-step "$newest")
else
    LOADING+=(--load "$DENSE")
fi

read -ra launch <<< "${LAUNCH:-${PYTHON:-python}}"
exec "${launch[@]}" "$here/../../pretrain_msa.py" "$@" "${PHASES[@]}" "${LOADING[@]}" --save "$SAVE"
