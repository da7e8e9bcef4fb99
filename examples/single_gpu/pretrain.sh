#!/usr/bin/env bash
# A 313M-parameter MSA MoE at 8K context on one GPU, from scratch: 100 iterations of warmup, then sparse.
#
#   python tools/preprocess_data.py --builtin-corpus --tokenizer-type bytes --output-prefix runs/data/stdlib
#   examples/single_gpu/pretrain.sh --data-path runs/data/stdlib --tokenizer-model runs/data/byte_tokenizer \
#       --save runs/single_gpu
#
# Further flags are passed on and win over the ones here. See docs/results.md for a run of exactly this.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

MODEL=(
    --num-layers 8 --hidden-size 1024 --ffn-hidden-size 2816
    --num-attention-heads 16 --group-query-attention --num-query-groups 4 --kv-channels 64
    --position-embedding-type rope --rotary-percent 0.5 --rotary-base 10000
    --normalization RMSNorm --apply-layernorm-1p --qk-layernorm
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
    --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 768 --moe-shared-expert-intermediate-size 768
    --moe-layer-freq '([0]+[1]*7)'
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02
)
MSA=(
    --msa-block-size 128 --msa-num-selected-blocks 16 --msa-schedule warmup@0,sparse@100
    --msa-quality-interval 10
)
TRAINING=(
    --seq-length 8192 --max-position-embeddings 8192 --micro-batch-size 1 --global-batch-size 1
    --train-iters 300 --lr 6e-4 --min-lr 6e-5 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --bf16 --seed 1234
    --split 95,5,0 --eval-interval 50 --eval-iters 8
    --log-interval 1 --log-throughput
)
exec "${PYTHON:-python}" "$here/../../pretrain_msa.py" "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}" \
    --tokenizer-type HuggingFaceTokenizer "$@"
