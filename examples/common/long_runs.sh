# What the recipes for clusters share; sourced by them, after model.sh and stages.sh.
#
#   LONG_RUN, OPTIMIZER, KERNELS   arrays of flags
#   pretrain_stage STAGE FLAG...   from scratch, or from the weights in FROM
#   convert_dense STAGE FLAG...    from the dense checkpoint in DENSE; START, SPARSE and END count its iterations
#
# SAVE is the folder of the run's checkpoints. LAUNCH is what starts the processes. TE=0 does without Transformer Engine.
ROOT="$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")"
export PYTHON="${PYTHON:-python}"

LONG_RUN=(
    # SIGTERM (time limit, preemption): finish the step, save, end with status 0.
    --exit-signal-handler
    # Every rank writes its share (of 1.5 TB for the 109B model on 512 GPUs: 3 GB), from a copy in the host's memory and
    # while training goes on. megatron-core's own worker: the other way needs a library that its images have only.
    --save-interval 500
    --async-save --use-persistent-ckpt-worker --async-strategy mcore
    # The newest two, should one be damaged, and every 5,000th.
    --save-retain-interval 5000 --keep-newest-checkpoints 2
    # The optimizer's state is saved as it lies on the ranks, so that the number of replicas may change. For another
    # layout (docs/parallelism.md) add --dist-ckpt-optim-fully-reshardable to the run that saves last: every rank then
    # gathers the state of all its replicas, 12 bytes for each of its parameters (55 GB in stage 8k of the 109B model).
    --ckpt-fully-parallel-load
    # Start-up and the first step compile and meet; after that a silent rank is given up after ten minutes.
    --distributed-timeout-minutes 60 --distributed-timeout-seconds-after-init 600
    # Collect garbage in all processes at the same step: one that pauses keeps all others waiting.
    --manual-gc --manual-gc-interval 100
    # A NaN in loss or gradients stops the run, after the step was run again: status 17, another result: a passing fault,
    # resume; 16, the same: the step is saved and, resumed, run once more, which on another GPU tells the data or the
    # model from a faulty GPU (17). A loss ten times the largest of the first hundred is run again and reported.
    # The check of gradients makes the host wait twice for each of their buckets (40M parameters), after the last
    # microbatch only. It stays on: one flag is for loss and gradients, and in bf16 nothing else keeps a NaN of the
    # gradients out of the weights.
    --rerun-mode validate_results --check-for-spiky-loss
    --log-interval 1 --log-throughput --msa-quality-interval 100
)

OPTIMIZER=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # ours; the paper names no optimizer
    --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 0.1 --clip-grad 1.0
)

KERNELS=()
if [[ "${TE:-1}" != 0 ]]; then
    KERNELS=(
        --transformer-impl transformer_engine
        --moe-grouped-gemm --moe-permute-fusion # one call for all experts of a rank instead of one each
    )
fi

# A run that has checkpoints goes on from the newest complete one. One that has none starts with the weights of FROM,
# as iteration 0 with a new optimizer; without FROM, at random. Sets LOADING.
start_or_resume() {
    LOADING=(--save "$SAVE" --load "$SAVE")
    local newest
    newest="$("$PYTHON" "$ROOT/tools/newest_checkpoint.py" "$SAVE")"
    if [[ -n "$newest" ]]; then
        LOADING+=(--ckpt-step "$newest")
    elif [[ -n "${FROM:-}" ]]; then
        LOADING+=(--pretrained-checkpoint "$FROM")
    fi
}

pretrain_stage() {
    : "${SAVE:?folder of the checkpoints of this stage}"
    stage "${1:-}"
    start_or_resume
    local launch
    read -ra launch <<< "${LAUNCH:-$PYTHON}"
    exec "${launch[@]}" "$ROOT/pretrain_msa.py" "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}" "${LAYOUT[@]}" \
        "${OPTIMIZER[@]}" "${KERNELS[@]}" "${LONG_RUN[@]}" "${LOADING[@]}" --tokenizer-type HuggingFaceTokenizer "${@:2}"
}

convert_dense() {
    stage "$1"
    local rate=(--lr 3e-5 --min-lr 3e-6) # ours
    export START SPARSE END
    exec "$ROOT/examples/convert_gqa/pretrain.sh" "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}" "${rate[@]}" \
        "${LAYOUT[@]}" "${OPTIMIZER[@]}" "${KERNELS[@]}" "${LONG_RUN[@]}" --tokenizer-type HuggingFaceTokenizer "${@:2}"
}
