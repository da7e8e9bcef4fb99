#!/usr/bin/env bash
# A long run with accidents: trains, is asked to stop (SIGTERM), is killed (SIGKILL) in mid-step, perhaps while its last
# checkpoint is still being written in the background, and goes on from its checkpoints each time. Then
# tools/soak_report.py says whether anything was lost.
#
#   examples/soak/soak.sh FOLDER --data-path runs/data/stdlib --tokenizer-model runs/data/byte_tokenizer
#
# Further flags are passed on and win over the ones here. STEPS, SAVE_EVERY, TERM_AT and KILL_AT move the accidents.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
folder="${1:?folder to write into}"
shift
STEPS="${STEPS:-500}" SAVE_EVERY="${SAVE_EVERY:-250}" TERM_AT="${TERM_AT:-180}" KILL_AT="${KILL_AT:-280}"
export TE="${TE:-0}"
source "$here/../pilot_10b/model.sh"
source "$here/../common/long_runs.sh"

# Two layers of the 10B pilot with 48 of their 64 experts: 0.9B parameters. What bounds it is not the GPU's memory
# but the time that three checkpoints of 14 bytes per parameter take within the minutes of a test.
SLICE=(
    --num-layers 2 --num-experts 48
    --seq-length 32768 --max-position-embeddings 32768 --micro-batch-size 1 --global-batch-size 1
    --lr 2e-4 --min-lr 2e-4 --lr-decay-style constant --lr-warmup-iters 20
    --train-iters "$STEPS" --save-interval "$SAVE_EVERY" --save-retain-interval "$((1000 * SAVE_EVERY))" --split 100,0,0 --eval-iters 0
    --msa-schedule sparse@0 --msa-quality-interval 50 --log-line compact
)
SAVE="$folder/checkpoints"
mkdir -p "$folder"

start_leg() { # NAME FLAG...: sets leg, the process
    start_or_resume
    echo "leg $1 ${LOADING[*]}"
    "$PYTHON" "$ROOT/pretrain_msa.py" "${MODEL[@]}" "${MSA[@]}" "${OPTIMIZER[@]}" "${KERNELS[@]}" "${LONG_RUN[@]}" "${SLICE[@]}" \
        "${LOADING[@]}" --tokenizer-type HuggingFaceTokenizer --metrics-file "$folder/leg$1.jsonl" "${@:2}" \
        > "$folder/leg$1.log" 2>&1 &
    leg=$!
}

wait_for_step() { # NAME STEP: the leg has finished the step, or ended
    until grep -qs "\"event\": \"step\", \"iteration\": $2," "$folder/leg$1.jsonl"; do
        kill -0 "$leg" 2> /dev/null || break
        sleep 0.1
    done
}

end_leg() { # NAME EXPECTED_STATUS
    local status=0
    wait "$leg" || status=$?
    echo "leg $1 ended with status $status"
    if ((status != $2)); then
        echo "error: expected status $2; the last lines of $folder/leg$1.log:" >&2
        tail -n 20 "$folder/leg$1.log" >&2
        exit 1
    fi
}

rm -f "$folder"/leg*.jsonl
start_leg 1 "$@"
wait_for_step 1 "$TERM_AT"
kill -TERM "$leg" || true # ended already: end_leg says how
end_leg 1 0
start_leg 2 "$@"
wait_for_step 2 "$KILL_AT"
kill -KILL "$leg" || true
end_leg 2 137
start_leg 3 "$@"
end_leg 3 0
"$PYTHON" "$ROOT/tools/soak_report.py" "$folder"/leg?.jsonl --steps "$STEPS" --output "$folder"
