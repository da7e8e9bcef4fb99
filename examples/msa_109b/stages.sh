# The stages of the 109B model: one per context length, each a run of its own with its own folder and data.
#
# From the paper: 3T tokens, of which the first 40B warm the index branch up. Everything else here is ours.
#
# - A stage starts with the weights of the one before it and a new optimizer. Megatron finds its place in the data by
#   counting sequences, so a run cannot change their length; and weights, unlike Adam's moments, load in any layout.
# - 16.8M tokens a step (192k: 12.6M, which divides).
# - Layouts are chosen with tools/plan.py for 512 H100 whose hosts launch kernels as slowly as the one that was measured
#   (docs/planning.md, which has the best layouts for 128 to 2,048). The host then takes 48 ms for an expert layer, so
#   8k and 32k put as many tokens as they can on a rank and into a microbatch, 8,192 and 16,384: no tensor and little
#   context parallelism, a micro batch of 1, because packed samples of a larger one cannot cross pipeline stages. Whole
#   layers are recomputed to have the memory; 40 to 50 of 80 GiB are used. Where hosts are more than twice as fast, PP4
#   CP2 (8k) and PP4 CP8 (32k) without recomputation are faster. 192k and 1m: within 2 % of the best. The best of 8k,
#   22 % faster, sends tokens to experts of other nodes (EP64), at a rate that is assumed; that of 32k, 9 % faster,
#   leaves no memory to spare (TP1 PP2x2 CP2).
# - 8k divides and fits for 128 to 2,048 GPUs, the others for 128 and 512: a step has too few sequences for more.
# - Tensor parallelism also divides the logits, which are the largest buffer of the long stages: 200,000 of them per
#   token, in bf16 and in fp32.
# - Documents in a sequence do not see each other: what a document attends to does not depend on its neighbours.
# Sets TRAINING and LAYOUT.
stage() {
    local sequence batch iterations schedule=sparse@0 rate
    case "$1" in
    8k)
        sequence=8192 batch=2048 iterations=178814 # 3T tokens
        schedule=warmup@0,sparse@40Btok
        rate=(--lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000)
        LAYOUT=(
            --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout 'Et*6|t*5|t*5|t*5|t*5|t*5|t*5|t*5L'
            --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
            --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        )
        ;;
    32k)
        sequence=32768 batch=512 iterations=5961 # 100B tokens
        rate=(--lr 3e-5 --min-lr 3e-5 --lr-decay-style constant --lr-warmup-iters 100)
        LAYOUT=(
            --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout 'Et*6|t*5|t*5|t*5|t*5|t*5|t*5|t*5L'
            --context-parallel-size 2 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
            --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        )
        ;;
    192k)
        sequence=196608 batch=64 iterations=3179 # 40B tokens
        rate=(--lr 3e-5 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 100)
        # Two stages of two parts each; only the inputs of the layers are kept.
        LAYOUT=(
            --tensor-model-parallel-size 4 --sequence-parallel
            --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'Et*11|t*10|t*10|t*10L'
            --context-parallel-size 4 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
            --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        )
        ;;
    1m)
        sequence=1048576 batch=16 iterations=597 # 10B tokens
        rate=(--lr 1e-5 --min-lr 1e-5 --lr-decay-style constant --lr-warmup-iters 50)
        # Tensor parallelism divides the gathered keys and values, which context parallelism does not. Four stages of two
        # parts each: the last one has the memory for its logits.
        LAYOUT=(
            --tensor-model-parallel-size 4 --sequence-parallel
            --pipeline-model-parallel-size 4 --pipeline-model-parallel-layout 'Et*6|t*5|t*5|t*5|t*5|t*5|t*5|t*5L'
            --context-parallel-size 8 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
            --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
        )
        ;;
    *)
        echo "error: unknown stage '$1'; choose 8k, 32k, 192k or 1m" >&2
        return 2
        ;;
    esac
    TRAINING=(
        --seq-length "$sequence" --max-position-embeddings "$sequence"
        --micro-batch-size 1 --global-batch-size "$batch" --train-iters "$iterations"
        --msa-schedule "$schedule" --dataloader-inter-document-masking
        "${rate[@]}" --seed 1234
        --eval-interval 1000 --eval-iters 8 --split 999,1,0
    )
}
