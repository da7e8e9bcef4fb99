#!/usr/bin/env bash
# Submit one job per length and one that collects their results. The values are in site.sh, or in the file given:
#
#   examples/long_context_eval/submit.sh [my_site.sh]
#
# Submit again after a time limit or a lost node: finished cells are kept, and only what is missing is measured.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
site="$(realpath "${1:-$here/site.sh}")"
[[ -f "$site" ]] || { echo "error: there is no file $site with the site's values" >&2; exit 2; }
source "$site"

missing=()
for name in ACCOUNT PARTITION TIME_LIMIT GPUS_PER_JOB SETUP CHECKPOINT OUTPUT TENSOR_PARALLEL CONTEXT_PARALLEL; do
    [[ -n "${!name:-}" ]] || missing+=("$name")
done
(( ${#LENGTHS[@]} )) || missing+=(LENGTHS)
if (( ${#missing[@]} )); then
    echo "error: ${missing[*]} not set in $site; nothing was submitted" >&2
    exit 2
fi
if [[ ! -f "$CHECKPOINT/latest_checkpointed_iteration.txt" ]]; then
    echo "error: CHECKPOINT $CHECKPOINT holds no checkpoint (no latest_checkpointed_iteration.txt)" >&2
    exit 2
fi
if (( GPUS_PER_JOB != TENSOR_PARALLEL * CONTEXT_PARALLEL )); then
    echo "error: GPUS_PER_JOB is $GPUS_PER_JOB, but TENSOR_PARALLEL x CONTEXT_PARALLEL is" \
        "$((TENSOR_PARALLEL * CONTEXT_PARALLEL)); make them equal" >&2
    exit 2
fi

mkdir -p "$OUTPUT/logs"
common=(--account "$ACCOUNT" --partition "$PARTITION" --parsable --export "ALL,SITE=$site,EXAMPLE=$here")
array="$(sbatch "${common[@]}" --array "0-$(( ${#LENGTHS[@]} - 1 ))" --time "$TIME_LIMIT" --gpus-per-node "$GPUS_PER_JOB" \
    --output "$OUTPUT/logs/length_%a.log" "$here/length.sbatch")"
array="${array%%;*}"  # --parsable prints JOB or JOB;CLUSTER
collect="$(sbatch "${common[@]}" --dependency "afterok:$array" --output "$OUTPUT/logs/collect.log" "$here/collect.sbatch")"
echo "submitted ${#LENGTHS[@]} lengths as job $array and their collection as job ${collect%%;*}; results: $OUTPUT"
