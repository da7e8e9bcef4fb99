#!/usr/bin/env bash
# Evaluate a checkpoint at one length, into OUTPUT/length_LENGTH; started again, it goes on where it was.
#
#   CHECKPOINT=runs/8k/checkpoints OUTPUT=runs/8k/eval examples/long_context_eval/length.sh 8192 [FLAG...]
#
# LAUNCH starts the processes (default: one); FLAGs of tools/eval_long_context.py run win over the ones here.
set -euo pipefail
ROOT="$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")"
length="${1:?tokens}"
tasks=(
    needle multi_key multi_value multi_query variable_tracking common_words frequent_words
    perplexity serving
)
# It is measured where every rank has all tokens of a text.
[[ "${CONTEXT_PARALLEL:-1}" != 1 ]] || tasks+=(selection)
EVALUATION=(--tasks "${tasks[@]}" --attention msa,dense --num-depths 11 --samples 10)
read -ra launch <<< "${LAUNCH:-${PYTHON:-python}}"
exec "${launch[@]}" "$ROOT/tools/eval_long_context.py" run \
    --load "${CHECKPOINT:?folder of the checkpoints}" --output "${OUTPUT:?folder for the results}/length_$length" \
    --lengths "$length" --tensor-model-parallel-size "${TENSOR_PARALLEL:-1}" \
    --context-parallel-size "${CONTEXT_PARALLEL:-1}" --expert-model-parallel-size "${EXPERT_PARALLEL:-1}" "${EVALUATION[@]}" "${@:2}"
