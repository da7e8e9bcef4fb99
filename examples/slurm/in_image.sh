#!/usr/bin/env bash
# Python inside the job's image, on one node: what a recipe runs before it starts the processes.
set -euo pipefail
flags=(--ntasks=1 --nodes=1 --overlap --container-image="${IMAGE:?}" --no-container-mount-home)
[[ -n "${MOUNTS:-}" ]] && flags+=(--container-mounts="$MOUNTS")
exec srun "${flags[@]}" python "$@"
