# What the job files share: checks, submission, the life of a job. Needs ROOT.
#
# A job file is run, not submitted: outside of a job it checks the site's values and submits itself, in a job it starts
# the processes. `--dry-run` as the first argument prints every command instead.
#
# One policy for all ends:
#   status 0                       done, unless SIGTERM or a preemption came first: then the job is put back into the queue
#   status 143 after SIGTERM       the same: ended by it, with nothing to save
#   status 2                       a setting was refused: it would be again
#   status 17 after status 16      Megatron's rerun machine: a NaN came again (16), and what a third attempt on another
#                                  GPU told is in its log (17): the data, the model, or the first GPU
#   any other                      back into the queue, at most MAX_RETRIES times without a new checkpoint in between;
#                                  then the job ends with that status. Among them 17 alone: a NaN that did not come
#                                  again, and 16: a NaN that did, saved before its step for an attempt elsewhere
source "$ROOT/examples/slurm/site.sh"

DRY_RUN=no
if [[ "${1:-}" == --dry-run ]]; then
    DRY_RUN=yes
    shift
fi

show() { printf '%q ' "$@"; echo; }

check_site() {
    local name missing=()
    for name in ACCOUNT PARTITION NODES LOGS "$@"; do
        [[ -n "${!name:-}" ]] || missing+=("$name")
    done
    [[ -n "$IMAGE$VENV" ]] || missing+=("IMAGE or VENV")
    if ((${#missing[@]})); then
        printf 'error: %s is not set; fill it in in examples/slurm/site.sh or in the environment\n' "${missing[@]}" >&2
        return 2
    fi
    if [[ -n "$VENV" && -z "$IMAGE" && ! -x "$VENV/bin/python" ]]; then
        echo "error: VENV is $VENV, but $VENV/bin/python does not exist; pass the folder of a Python environment" >&2
        return 2
    fi
    for name in NODES SAVE_SECONDS CPUS_PER_TASK; do
        if [[ ! "${!name}" =~ ^[1-9][0-9]*$ ]]; then
            echo "error: $name is '${!name}'; it must be a positive number" >&2
            return 2
        fi
    done
    for name in GPUS_PER_NODE MAX_RETRIES; do
        if [[ ! "${!name}" =~ ^[0-9]+$ ]]; then
            echo "error: $name is '${!name}'; it must be a number" >&2
            return 2
        fi
    done
    for name in ROOT LOGS VENV IMAGE MOUNTS; do # words of a command that recipes split
        if [[ "${!name}" =~ [[:space:]] ]]; then
            echo "error: $name is '${!name}'; use one without spaces" >&2
            return 2
        fi
    done
}

# submit NAME FILE ARGUMENT...: prints the number of the job, or, in a dry run, the command
submit() {
    local name="$1" file="$2"
    shift 2
    local tasks=$((GPUS_PER_NODE > 0 ? GPUS_PER_NODE : 1)) command extra
    read -ra extra <<< "$SBATCH_FLAGS"
    command=(
        sbatch --parsable --job-name="$name" --account="$ACCOUNT" --partition="$PARTITION"
        --nodes="$NODES" --ntasks-per-node="$tasks" --time="$TIME"
        --requeue --open-mode=append --output="$LOGS/$name-%j.log"
        # To the batch shell alone, which passes it on: only it knows whether the job is to be put back.
        --signal="B:TERM@$SAVE_SECONDS"
        --cpus-per-task="$CPUS_PER_TASK" --export=ALL
    )
    ((GPUS_PER_NODE > 0)) && command+=(--gpus-per-node="$GPUS_PER_NODE")
    # All memory of its nodes: SLURM's default is a share for the cores that were asked for.
    ((GPUS_PER_NODE > 0)) && [[ "${WHOLE_NODES:-yes}" == yes ]] && command+=(--mem=0)
    [[ -n "${ARRAY:-}" ]] && command+=(--array="$ARRAY")
    command+=("${extra[@]}" "$file" "$@")
    export MSA_ROOT="$ROOT"
    if [[ "$DRY_RUN" == yes ]]; then
        show "${command[@]}"
        return
    fi
    mkdir -p "$LOGS"
    "${command[@]}"
}

# Sets LAUNCH, which starts the processes of a job on its nodes, and PYTHON, for what a recipe asks before that.
launcher() {
    local logs="$1" command extra
    read -ra extra <<< "$SRUN_FLAGS"
    # One process per GPU, without torchrun, which would end its processes 30 seconds after SIGTERM. Processes that end
    # together do not do so in the same second: the last one gets two minutes, for its status and for what it writes.
    command=(
        srun --label --kill-on-bad-exit=0 --wait=120 --cpus-per-task="$CPUS_PER_TASK" --output="$logs/rank-%t.log"
        "${extra[@]}"
    )
    if [[ -n "$IMAGE" ]]; then
        command+=(--container-image="$IMAGE" --no-container-mount-home)
        [[ -n "$MOUNTS" ]] && command+=(--container-mounts="$MOUNTS")
        command+=(python)
        PYTHON="$ROOT/examples/slurm/in_image.sh"
        [[ "$DRY_RUN" == no ]] || PYTHON=true # the image is on the cluster: a dry run takes it that nothing is saved yet
    else
        command+=("$VENV/bin/python")
        PYTHON="$VENV/bin/python"
    fi
    LAUNCH="${command[*]}"
    export LAUNCH PYTHON IMAGE MOUNTS
}

network() {
    local logs="$1"
    # Kernels start in the order of their launch, which the overlap of tensor-parallel communication needs.
    export CUDA_DEVICE_MAX_CONNECTIONS=1
    # NVLink multicast takes memory for each of the many communicators, and context parallelism does not use it.
    export NCCL_NVLS_ENABLE=0
    # A node's memory of its last collectives, written when the watchdog ends a run that hangs: who did not come.
    export TORCH_FR_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1
    export TORCH_FR_DUMP_TEMP_FILE="$logs/collectives-rank-"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$CPUS_PER_TASK}"
    [[ -n "${NCCL_IB_HCA:-}" ]] || unset NCCL_IB_HCA
    [[ -n "${NCCL_SOCKET_IFNAME:-}" ]] || unset NCCL_SOCKET_IFNAME
}

# run_job COMMAND...: the life of a job. COMMAND starts the processes with LAUNCH. SAVE tells progress.
run_job() {
    local logs="$LOGS/${SLURM_JOB_ID:-JOB}/attempt-${SLURM_RESTART_COUNT:-0}" status=0
    # One element of an array: its own number, or that of the array, is taken for all elements.
    JOB="${SLURM_JOB_ID:-}"
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || JOB="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    launcher "$logs"
    network "$logs"
    if [[ "$DRY_RUN" == yes ]]; then
        local name set=() words
        for name in CUDA_DEVICE_MAX_CONNECTIONS NCCL_NVLS_ENABLE NCCL_IB_HCA NCCL_SOCKET_IFNAME TORCH_FR_BUFFER_SIZE \
            TORCH_NCCL_DUMP_ON_TIMEOUT TORCH_FR_DUMP_TEMP_FILE OMP_NUM_THREADS; do
            [[ -z "${!name:-}" ]] || set+=("$name=${!name}")
        done
        show env "${set[@]}" LAUNCH="$LAUNCH" "$@"
        # What a recipe makes of it.
        words="$(LAUNCH="$ROOT/examples/common/print_arguments.sh $LAUNCH" "$@")"
        mapfile -t words <<< "$words"
        show "${words[@]}"
        return
    fi
    mkdir -p "$logs"
    STOPPING=no
    trap stop TERM
    "$@" 2> "$logs/launch.log" &
    local child=$!
    # The trap interrupts `wait`, which is then called again for the status of the child itself.
    while true; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2> /dev/null || break
    done
    trap - TERM
    cat "$logs/launch.log" >&2
    ((status == 0)) || status="$(first_status "$logs/launch.log" "$status")"
    echo "$(date -Is) attempt ${SLURM_RESTART_COUNT:-0}: status $status, stopping: $STOPPING, iteration: $(iteration)"
    finish "$status"
}

# first_status FILE STATUS: that of the process that ended first, if srun reported one; srun's own is the highest, which
# is that of the processes it had to end.
first_status() {
    local first
    first="$(sed -n 's/^srun: error: .*: Exited with exit code \([0-9]*\)$/\1/p' "$1" | head -n 1)"
    echo "${first:-$2}"
}

# SIGTERM: before the time limit, at preemption, or by hand. The processes save and end by themselves.
stop() {
    STOPPING=yes
    echo "$(date -Is) SIGTERM: the processes save and end"
    scancel --signal=TERM "$JOB" || true
}

iteration() {
    local file="${SAVE:-}/latest_checkpointed_iteration.txt"
    if [[ -f "$file" ]]; then cat "$file"; else echo none; fi
}

finish() {
    local status="$1" record="$LOGS/$SLURM_JOB_ID/failures" last=none count=0 before=none now
    if [[ "$STOPPING" == no ]] && is_preempted; then
        STOPPING=yes
    fi
    if [[ "$STOPPING" == yes && ("$status" == 0 || "$status" == 143) ]]; then
        requeue "stopped"
        exit 0
    fi
    [[ "$status" == 0 ]] && exit 0
    [[ -f "$record" ]] && read -r last count before < "$record"
    if [[ "$status" == 2 || "$before $status" == "16 17" ]]; then
        echo "error: status $status is not tried again; the logs of the processes say why" >&2
        exit "$status"
    fi
    now="$(iteration)"
    [[ "$now" == "$last" ]] || count=0
    count=$((count + 1))
    echo "$now $count $status" > "$record"
    if ((count > MAX_RETRIES)); then
        echo "error: $count failures at iteration $now; the last one with status $status" >&2
        exit "$status"
    fi
    requeue "failure $count at iteration $now, status $status"
    exit "$status"
}

# During a partition's GraceTime SLURM sends SIGTERM to the processes alone, unless PreemptParameters=send_user_signal.
is_preempted() {
    local job
    job="$(scontrol show job "$JOB" 2> /dev/null)" || return 1
    [[ "$job" =~ PreemptTime=[0-9] ]]
}

requeue() {
    # A job that was cancelled is on its way out and must stay there; a preempted one SLURM puts back itself.
    local state
    state="$(squeue --noheader --jobs="$JOB" --format=%T)"
    if [[ "$state" != RUNNING ]]; then
        echo "$(date -Is) not put back ($1): the job is $state"
        return
    fi
    echo "$(date -Is) back into the queue: $1"
    scontrol requeue "$JOB"
    sleep 60 # SLURM ends this shell
}

# main NAME FILE RECIPE ARGUMENT...
main() {
    check_site
    if ! command -v -- "$3" > /dev/null; then
        echo "error: '$3' is no program; pass a recipe, for example $ROOT/examples/msa_109b/pretrain.sh" >&2
        return 2
    fi
    if [[ -n "${SLURM_JOB_ID:-}" ]]; then
        run_job "${@:3}"
        return
    fi
    submit "$@"
    if [[ "$DRY_RUN" == yes ]]; then
        run_job "${@:3}"
    fi
}
