#!/usr/bin/env bash
# Train a small model that finds needles: 17M parameters, bytes, 8K context, then 32K, in minutes on one GPU.
#
#   examples/long_context_eval/needle_model.sh data runs/needle
#   examples/long_context_eval/needle_model.sh train runs/needle dense
#   examples/long_context_eval/needle_model.sh train runs/needle msa           (from scratch: warmup, then sparse)
#   examples/long_context_eval/needle_model.sh train runs/needle converted     (continues `dense` as MSA)
#   examples/long_context_eval/needle_model.sh lengthen runs/needle dense      (also msa, converted: 32K documents)
#   examples/long_context_eval/needle_model.sh evaluate runs/needle dense_long
#
# Further flags are passed on and win over the ones here. SIZE=tiny does the same in minutes on a CPU core.
# See docs/long_context_evaluation.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
step="${1:?data, train, lengthen or evaluate}" folder="${2:?folder to write into}" name="${3:-}"
shift "$(( $# < 3 ? $# : 3 ))"
python="${PYTHON:-python}"
tokenizer="$folder/data/byte_tokenizer"

LAYERS=6
MODEL=(
    --num-layers "$LAYERS" --hidden-size 512 --ffn-hidden-size 1408
    --num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 64
    --position-embedding-type rope --rotary-percent 0.5 --rotary-base 500000 --max-position-embeddings 32768
    --normalization RMSNorm --apply-layernorm-1p --qk-layernorm
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02 --make-vocab-size-divisible-by 8
    --msa-block-size 64 --msa-num-selected-blocks 16
)
OPTIMIZER=(
    --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 40
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --seed 1234
)
MICRO_BATCH=4  # short documents per forward pass
SHORT=8192 SHORT_DOCUMENTS=5700 SHORT_BATCH=8 SHORT_ITERS=700 SPARSE_FROM=350
LONG=32768 LONG_DOCUMENTS=260 LONG_BATCH=2 LONG_ITERS=120
CONVERSION_ITERS=200 CONVERSION_SPARSE_FROM=100
DATA=(--retrieval-share 0.4 --occurrences 4)
LENGTHS=(1024 2048 4096 8192 16384 32768) DEPTHS=11 SAMPLES=10

if [[ "${SIZE:-}" == tiny ]]; then
    LAYERS=3
    MODEL+=(
        --num-layers "$LAYERS" --hidden-size 128 --ffn-hidden-size 384 --num-attention-heads 4 --kv-channels 32
        --rotary-base 10000 --max-position-embeddings 512 --msa-block-size 16 --msa-num-selected-blocks 4
    )
    OPTIMIZER=(
        --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 30
        --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --seed 1234
    )
    MICRO_BATCH=1
    SHORT=256 SHORT_DOCUMENTS=16500 SHORT_BATCH=16 SHORT_ITERS=1000 SPARSE_FROM=600
    LONG=512 LONG_DOCUMENTS=850 LONG_BATCH=8 LONG_ITERS=100
    CONVERSION_ITERS=200 CONVERSION_SPARSE_FROM=100
    DATA=(--retrieval-share 0.5 --occurrences 3 --nearest 20)
    LENGTHS=(128 256 512) DEPTHS=5 SAMPLES=10
fi

# A document is a sample: with its end token it has exactly the sequence length, and every sample starts at one.
write_data() {  # NAME LENGTH DOCUMENTS
    "$python" "$here/../../tools/make_retrieval_data.py" --builtin-corpus --output-prefix "$folder/data/$1" --overwrite \
        --document-bytes "$(( $2 - 1 ))" --documents "$3" --workers "${WORKERS:-8}" "${DATA[@]}" "${@:4}"
}

train() {  # NAME DATA LENGTH BATCH ITERATIONS FLAG...
    "$python" "$here/../../pretrain_msa.py" "${MODEL[@]}" "${OPTIMIZER[@]}" \
        --data-path "$folder/data/$2" --split 99,1,0 \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" \
        --seq-length "$3" --micro-batch-size 1 --global-batch-size "$4" --train-iters "$5" --lr-decay-iters "$5" \
        --eval-interval 100 --eval-iters 2 --log-interval 10 --log-line compact --msa-quality-interval 20 \
        --metrics-file "$folder/$1.jsonl" --save "$folder/$1" --save-interval "$5" --no-save-optim "${@:6}"
}

case "$step" in
data)
    write_data short "$SHORT" "$SHORT_DOCUMENTS" ${name:+"$name"} "$@"
    write_data long "$LONG" "$LONG_DOCUMENTS" ${name:+"$name"} "$@"
    ;;
train)
    case "$name" in
    dense) FLAGS=(--msa-layer-freq "([0]*$LAYERS)" --msa-schedule dense@0) ITERS=$SHORT_ITERS ;;
    msa) FLAGS=(--msa-schedule "warmup@0,sparse@$SPARSE_FROM") ITERS=$SHORT_ITERS ;;
    converted)
        FLAGS=(
            --msa-schedule "warmup@0,sparse@$CONVERSION_SPARSE_FROM"
            --load "$folder/dense" --finetune --msa-init-index low_rank
        )
        ITERS=$CONVERSION_ITERS
        ;;
    *) echo "error: train takes dense, msa or converted, not '$name'" >&2; exit 2 ;;
    esac
    train "$name" short "$SHORT" "$SHORT_BATCH" "$ITERS" --micro-batch-size "$MICRO_BATCH" "${FLAGS[@]}" "$@"
    ;;
lengthen)
    case "$name" in
    dense) FLAGS=(--msa-layer-freq "([0]*$LAYERS)" --msa-schedule dense@0) ;;
    msa | converted) FLAGS=(--msa-schedule sparse@0) ;;
    *) echo "error: lengthen takes dense, msa or converted, not '$name'" >&2; exit 2 ;;
    esac
    train "${name}_long" long "$LONG" "$LONG_BATCH" "$LONG_ITERS" "${FLAGS[@]}" \
        --load "$folder/$name" --finetune --lr 5e-4 "$@"
    ;;
evaluate)
    attention=msa,dense tasks=(needle multi_key selection serving)
    if [[ "$name" == dense* ]]; then attention=dense tasks=(needle multi_key serving); fi
    "$python" "$here/../../tools/eval_long_context.py" run --load "$folder/$name" --output "$folder/$name/evaluation" \
        --tokenizer-model "$tokenizer" --lengths "${LENGTHS[@]}" --num-depths "$DEPTHS" --samples "$SAMPLES" \
        --tasks "${tasks[@]}" --attention "$attention" --style completion --max-sequences "$SAMPLES" "$@"
    ;;
*) echo "error: the first argument is data, train, lengthen or evaluate, not '$step'" >&2; exit 2 ;;
esac
