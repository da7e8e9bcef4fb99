# The 109B model of arXiv 2606.13392: 41 layers (3 dense, 38 mixture-of-experts), MSA in every layer.
#
# From the paper: layers, hidden size, 64/4 heads, head dimension 128 of which 64 rotate, 128 + 1 experts with top-4,
# vocabulary of 200K, blocks of 128 of which 16 are selected. What the paper does not give is marked "ours"; most of
# it is taken from the released MiniMax-M3, a larger model of the same family.
#
# MSA_LAYERS='([0]*3+[1]*38)' keeps full attention in the first three layers, as M3 does.
MODEL=(
    --num-layers 41 --hidden-size 3072
    --num-attention-heads 64 --group-query-attention --num-query-groups 4 --kv-channels 128
    --position-embedding-type rope --rotary-percent 0.5
    --rotary-base 5000000 # ours, M3's: from the first token on, so that no stage has to relearn positions
    --normalization RMSNorm --disable-bias-linear
    --qk-layernorm --apply-layernorm-1p # ours, M3's: a norm per head, gains stored around one
    --norm-epsilon 1e-6                 # ours, M3's
    --untie-embeddings-and-output-weights # ours, M3's
    --moe-layer-freq '([0]*3+[1]*38)'
    --ffn-hidden-size 12288 # ours: the width of M3's three dense layers
    --num-experts 128 --moe-router-topk 4
    # ours: the multiple of 256 that comes closest to 109B. This text model has 107.97B parameters; a vision encoder
    # of M3's size (0.6B) would make 108.6B of them.
    --moe-ffn-hidden-size 2304 --moe-shared-expert-intermediate-size 2304
    # ours, M3's router: sigmoid scores, balanced by a bias per expert instead of a loss, weights scaled by 2.
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-router-topk-scaling-factor 2.0 --moe-router-dtype fp32
    # Megatron's default would gather the rows of all expert-parallel ranks on each: twice what top-4 of 8 ranks needs.
    --moe-token-dispatcher-type alltoall
    # ours, M3's SwiGLU-OAI: alpha 1.702, clamped at 7.
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
    --hidden-dropout 0 --attention-dropout 0
    --init-method-std 0.02               # ours
    --make-vocab-size-divisible-by 128   # 200,000 ids become M3's 200,064 rows
)
MSA=(
    --msa-block-size 128 --msa-num-selected-blocks 16
    --msa-layer-freq "${MSA_LAYERS:-1}"
    --msa-loss-coeff 1.0 # ours: with Adam it hardly matters (docs/training.md)
)
