#!/usr/bin/env bash
# From a dense GQA model to MSA at a size that two CPU cores train: makes docs/results/convert_gqa (about 12 minutes).
#
#   examples/convert_gqa/run_tiny.sh runs/convert_gqa
#
# Trains a dense model, converts it with each index initialisation, continues each through the warmup into the
# sparse phase, and the dense model for as many steps. Leaves curves.png, summary.json and a JSONL per run.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="$(realpath -m "${1:?folder to write into}")"
python="${PYTHON:-python}"
export PYTHON="$python"

DENSE=200   # iterations of the dense model
SWITCH=250  # warmup until here, in absolute iterations: the checkpoint brings its own count
END=300     # sparse until here

mkdir -p "$out"
"$python" "$here/../../tools/preprocess_data.py" --builtin-corpus --tokenizer-type bytes --output-prefix "$out/data/stdlib"

train() {  # NAME FLAG...: metrics in NAME.jsonl
    rm -f "$out/$1.jsonl"
    "$here/../tiny/pretrain.sh" --data-path "$out/data/stdlib" --tokenizer-model "$out/data/byte_tokenizer" \
        --split 95,5,0 --train-iters "$END" --lr 2e-3 --lr-decay-style constant --eval-interval 25 \
        --log-interval 1 --log-line compact --msa-quality-interval 5 --metrics-file "$out/$1.jsonl" "${@:2}" \
        > "$out/$1.log" 2>&1 || { tail -20 "$out/$1.log" >&2; exit 1; }
    grep -E '^ *validation at' "$out/$1.log" | tail -1 | sed "s/^ */$1: /"
}
# No layer is MSA: plain GQA, as any Megatron run saves it.
NO_INDEX=(--msa-layer-freq '([0]*4)' --msa-schedule dense@0)

rm -rf "$out/dense"
train dense "${NO_INDEX[@]}" --save "$out/dense" --save-interval "$DENSE" --exit-interval "$DENSE"
train dense_continued "${NO_INDEX[@]}" --load "$out/dense"
for method in random mean low_rank; do
    rm -rf "$out/$method"
    "$python" "$here/../../tools/convert_checkpoint.py" gqa-to-msa --load "$out/dense" --save "$out/$method" \
        --index-init "$method" --verify > "$out/$method.convert.log" 2>&1 \
        || { tail -20 "$out/$method.convert.log" >&2; exit 1; }
    grep '^verified' "$out/$method.convert.log"
    train "$method" --load "$out/$method" --msa-schedule "warmup@0,sparse@$SWITCH"
done
"$python" "$here/compare.py" "$out"
