# The stages of the 10B pilot: one per context length, each a run of its own with its own folder and data.
#
# The paper does not say how long it trained or on what; all of this is ours. The reasons are those of
# ../msa_109b/stages.sh. Layouts are those that tools/plan.py finds best for 64 H100, 8k with two sequences in a
# microbatch, or the GPUs would wait for the host; they divide for 16 to 128.
# Sets TRAINING and LAYOUT.
stage() {
    local sequence batch micro=1 iterations schedule=sparse@0 rate
    case "$1" in
    8k)
        sequence=8192 batch=512 micro=2 iterations=95368 # 400B tokens
        schedule=warmup@0,sparse@5.2Btok         # 1.3 %, the paper's share for the large model
        rate=(--lr 4e-4 --min-lr 4e-5 --lr-decay-style cosine --lr-warmup-iters 1000)
        LAYOUT=(--expert-model-parallel-size 8 --expert-tensor-parallel-size 1)
        ;;
    32k)
        sequence=32768 batch=128 iterations=4769 # 20B tokens
        rate=(--lr 4e-5 --min-lr 4e-5 --lr-decay-style constant --lr-warmup-iters 100)
        LAYOUT=(--context-parallel-size 2 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1)
        ;;
    192k)
        sequence=196608 batch=16 iterations=2544 # 8B tokens
        rate=(--lr 4e-5 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 100)
        # Expert layers are computed again in the backward pass.
        LAYOUT=(
            --context-parallel-size 8 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1
            --recompute-granularity selective --recompute-modules moe
        )
        ;;
    *)
        echo "error: unknown stage '$1'; choose 8k, 32k or 192k" >&2
        return 2
        ;;
    esac
    TRAINING=(
        --seq-length "$sequence" --max-position-embeddings "$sequence"
        --micro-batch-size "$micro" --global-batch-size "$batch" --train-iters "$iterations"
        --msa-schedule "$schedule" --dataloader-inter-document-masking
        "${rate[@]}" --seed 1234
        --eval-interval 1000 --eval-iters 8 --split 999,1,0
    )
}
