#!/usr/bin/env bash
# The model of this example and how it trains; further flags are passed on and win over the ones here.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
MODEL=(
    --num-layers 3 --hidden-size 64 --ffn-hidden-size 192
    --num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 16
    --position-embedding-type rope --rotary-percent 0.5 --rotary-base 10000
    --normalization RMSNorm --apply-layernorm-1p --qk-layernorm
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --init-method-std 0.02 --make-vocab-size-divisible-by 8
)
MSA=(--msa-block-size 16 --msa-num-selected-blocks 4)
# A photograph has 8 x 8 pixels in 16 grades of grey: 16 patches, 4 tokens.
VISION=(
    --vision-image-token-id 258 --vision-num-channels 1 --vision-temporal-patch-size 1
    --vision-patch-size 2 --vision-merge-size 2
    --vision-num-layers 2 --vision-hidden-size 48 --vision-ffn-hidden-size 128 --vision-num-attention-heads 4
    --multimodal-min-pixels 64 --multimodal-image-mean 0.5 --multimodal-image-std 0.5
)
TRAINING=(
    --seq-length 256 --max-position-embeddings 256 --micro-batch-size 1 --global-batch-size 4
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.05 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --dataloader-inter-document-masking --calculate-per-token-loss --seed 1234
)
exec "${PYTHON:-python}" "$here/../../pretrain_msa.py" "${MODEL[@]}" "${MSA[@]}" "${VISION[@]}" "${TRAINING[@]}" \
    --tokenizer-type HuggingFaceTokenizer --eval-iters 4 --log-interval 10 --log-line compact "$@"
