#!/usr/bin/env bash
# compute-sanitizer over one small call of every kernel: needs one CUDA GPU and the CUDA toolkit.
#   kernels/benchmarks/sanitize.sh [TOOL ...]        default: memcheck racecheck
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# Compiled once without the tool, which slows the host down as well.
PYTHONPATH=. "$PYTHON" benchmarks/sanitize.py
failed=0
for tool in "${@:-memcheck racecheck}"; do
    for each in $tool; do
        echo "== $each"
        # Blocks of the allocator are larger than tensors: without it, reads behind a tensor show.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=. compute-sanitizer --tool "$each" --error-exitcode 1 \
            "$PYTHON" benchmarks/sanitize.py || failed=1
    done
done
exit $failed
