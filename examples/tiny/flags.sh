# The tiny MSA MoE of `make demo` and of the end-to-end tests: 4 layers (the first with a dense feed-forward),
# 2 GQA groups, sequences of 16 blocks of which each query attends to 4. Trains on two CPU cores in minutes.
MODEL=(
    --num-layers 4 --hidden-size 128 --ffn-hidden-size 384
    --num-attention-heads 8 --group-query-attention --num-query-groups 2 --kv-channels 16
    --position-embedding-type rope --rotary-percent 0.5 --rotary-base 10000
    --normalization RMSNorm --apply-layernorm-1p --qk-layernorm
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
    --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 96 --moe-shared-expert-intermediate-size 96
    --moe-layer-freq '([0]+[1]*3)'
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
    --hidden-dropout 0 --attention-dropout 0
    --init-method-std 0.02 --make-vocab-size-divisible-by 8
)
MSA=(
    --msa-block-size 32 --msa-num-selected-blocks 4
)
TRAINING=(
    --seq-length 512 --max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 4
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 20
    --weight-decay 0.1 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95
    --dataloader-inter-document-masking
    --seed 1234
)
