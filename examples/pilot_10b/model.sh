# The 10B pilot of arXiv 2606.13392: 16 mixture-of-experts layers, 10.53B parameters, 1.47B active.
#
# From the paper: layers, hidden size, 32/4 heads, head dimension 128 of which 64 rotate, 64 + 1 experts of 1536 with
# top-4, vocabulary of 200K. The two sizes are those of its GQA form with tied embeddings; the 16 index branches add
# 0.02B to both. What the paper does not give is marked "ours"; see ../msa_109b/model.sh for the reasons.
MODEL=(
    --num-layers 16 --hidden-size 2048
    --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128
    --position-embedding-type rope --rotary-percent 0.5
    --rotary-base 5000000 # ours
    --normalization RMSNorm --disable-bias-linear
    --qk-layernorm --apply-layernorm-1p --norm-epsilon 1e-6 # ours
    # Embeddings are tied (Megatron's default): only then do the sizes above come out.
    --ffn-hidden-size 1536 # no layer is dense; Megatron wants the width of one all the same
    --num-experts 64 --moe-router-topk 4
    --moe-ffn-hidden-size 1536 --moe-shared-expert-intermediate-size 1536
    # ours, from here on
    --moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-load-balancing-type none
    --moe-router-topk-scaling-factor 2.0 --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0
    --hidden-dropout 0 --attention-dropout 0
    --init-method-std 0.02 --make-vocab-size-divisible-by 128
)
MSA=(
    --msa-block-size 128 --msa-num-selected-blocks 16
    --msa-layer-freq "${MSA_LAYERS:-1}"
    --msa-loss-coeff 1.0
)
