#!/usr/bin/env bash
# Train a small model that finds needles: 17M parameters, bytes, documents of 512 bytes that grow to 32K.
#
#   examples/long_context_eval/needle_model.sh data runs/needle
#   examples/long_context_eval/needle_model.sh dense runs/needle        (every stage with full attention)
#   examples/long_context_eval/needle_model.sh converted runs/needle    (becomes MSA where `dense` was at 2K)
#   examples/long_context_eval/needle_model.sh msa runs/needle          (MSA from the first step)
#   examples/long_context_eval/needle_model.sh evaluate runs/needle dense       (also converted, msa)
#
# A stage that is saved is not trained again. Further flags are passed on and win over the ones here. SIZE=tiny
# goes the same way on CPU cores, half an hour on two; it is too small to find needles. See docs/long_context_evaluation.md.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
step="${1:?data, dense, converted, msa or evaluate}" folder="${2:?folder to write into}"
shift 2
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
OPTIMIZER=(--weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --seed 1234)
# Looking up is learned in steps, not in tokens, and soonest where there is little to confuse: most steps are
# taken on short documents. Each line: bytes, documents written, documents a step and a forward pass, steps,
# learning rate.
STAGES=(
    "512 26000 64 64 1000 1e-3"
    "2048 4600 16 16 280 7e-4"
    "8192 1300 8 4 130 5e-4"
    "32768 220 2 1 80 3e-4"
)
DATA=(--retrieval-share 0.5 --occurrences 4)
CONVERTED_FROM=2048
CONVERSION=(--msa-schedule warmup@0,sparse@60 --msa-init-index low_rank)
LENGTHS=(1024 2048 4096 8192 16384 32768) DEPTHS=11 SAMPLES=10

if [[ "${SIZE:-}" == tiny ]]; then
    LAYERS=4
    MODEL+=(
        --num-layers "$LAYERS" --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 --kv-channels 32
        --rotary-base 10000 --max-position-embeddings 512 --msa-block-size 16 --msa-num-selected-blocks 4
    )
    OPTIMIZER=(--weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --seed 1234)
    # One document a pass: the reference operators compare every pair of tokens in it, across documents too.
    STAGES=("256 12000 16 1 1500 2e-3" "512 900 8 1 100 1e-3")
    DATA=(--retrieval-share 0.6 --occurrences 2 --nearest 16)
    CONVERTED_FROM=256
    CONVERSION=(--msa-schedule warmup@0,sparse@40 --msa-init-index low_rank)
    LENGTHS=(128 192 256 384 512) DEPTHS=5 SAMPLES=10
fi

# A document is a sample: with its end token it has exactly the sequence length, and every sample starts at one.
# Longer documents are written while the model trains on shorter ones, if `data` runs in the background.
write_data() {
    local stage length documents
    for stage in "${STAGES[@]}"; do
        read -r length documents _ <<< "$stage"
        [[ -f "$folder/data/$length.meta.json" ]] && continue
        "$python" "$here/../../tools/make_retrieval_data.py" --builtin-corpus --output-prefix "$folder/data/$length" \
            --document-bytes "$((length - 1))" --documents "$documents" --workers "${WORKERS:-8}" "${DATA[@]}" "$@"
    done
}

wait_for_data() { # LENGTH: written by a `data` that runs beside
    until [[ -f "$folder/data/$1.meta.json" ]]; do sleep 1; done
}

train() { # NAME LENGTH DOCUMENTS_PER_STEP DOCUMENTS_PER_PASS STEPS LEARNING_RATE FLAG...
    local name="$1-$2" length="$2" iterations="$5"
    if [[ -f "$folder/$name/latest_checkpointed_iteration.txt" ]]; then
        echo "$folder/$name is there already"
        return
    fi
    wait_for_data "$length"
    "$python" "$here/../../pretrain_msa.py" "${MODEL[@]}" "${OPTIMIZER[@]}" \
        --data-path "$folder/data/$length" --split 98,2,0 \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer" \
        --seq-length "$length" --global-batch-size "$3" --micro-batch-size "$4" --train-iters "$iterations" \
        --lr "$6" --min-lr "$6" --lr-decay-style constant --lr-warmup-iters 30 \
        --eval-interval 100 --eval-iters 2 --log-interval 10 --log-line compact --msa-quality-interval 20 \
        --metrics-file "$folder/$name.jsonl" --save "$folder/$name" --save-interval "$iterations" --no-save-optim \
        "${@:7}"
}

# Every stage continues the one before; the flags say what attention does in it.
train_stages() { # NAME FLAG...
    local name="$1" previous="" stage length from
    shift
    for stage in "${STAGES[@]}"; do
        read -r length _ <<< "$stage"
        from=()
        case "$name" in
        dense) attention=(--msa-layer-freq "([0]*$LAYERS)" --msa-schedule dense@0) ;;
        # On the shortest documents all blocks are selected: the index branch learns from full attention there.
        msa) attention=(--msa-schedule "$([[ -z $previous ]] && echo warmup@0 || echo sparse@0)") ;;
        converted)
            if ((length <= CONVERTED_FROM)); then
                previous="dense-$length"
                continue
            fi
            attention=(--msa-schedule sparse@0)
            if [[ $previous == dense-* ]]; then attention=("${CONVERSION[@]}"); fi
            ;;
        esac
        if [[ -n $previous ]]; then from=(--load "$folder/$previous" --finetune); fi
        # shellcheck disable=SC2086  # the numbers of a stage are words
        train "$name" $(cut -d' ' -f1,3- <<< "$stage") "${attention[@]}" ${from[@]+"${from[@]}"} "$@"
        previous="$name-$length"
    done
}

longest_stage() { read -r length _ <<< "${STAGES[-1]}" && echo "$length"; }

case "$step" in
data) write_data "$@" ;;
dense | converted | msa) train_stages "$step" "$@" ;;
evaluate)
    name="${1:?dense, converted or msa}"
    shift
    attention=msa,dense tasks=(needle multi_key selection serving)
    if [[ "$name" == dense ]]; then attention=dense tasks=(needle multi_key serving); fi
    "$python" "$here/../../tools/eval_long_context.py" run --load "$folder/$name-$(longest_stage)" \
        --output "$folder/evaluation/$name" --tokenizer-model "$tokenizer" \
        --lengths "${LENGTHS[@]}" --num-depths "$DEPTHS" --samples "$SAMPLES" \
        --tasks "${tasks[@]}" --attention "$attention" --style completion --max-sequences "$SAMPLES" "$@"
    ;;
*)
    echo "error: the first argument is data, dense, converted, msa or evaluate, not '$step'" >&2
    exit 2
    ;;
esac
