#!/usr/bin/env bash
# What to run on a GPU after a change of a kernel, the cheapest first; it stops at the first part that fails.
#   kernels/benchmarks/verify.sh [SECONDS]     of the bars' benchmarks, default 240; all parts take about 9 minutes
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

part() { # NAME COMMAND...
    local start=$SECONDS status=0
    "${@:2}" || status=$?
    echo "== $1: status $status after $((SECONDS - start)) s"
    return $status
}

# What does not compile shows here, in a minute and without a GPU.
part "every kernel compiles" "$PYTHON" tests/kernels/hopper_compiler.py
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no CUDA device: the other parts need one" >&2
    exit 2
fi
part "tests on the GPU" "$PYTHON" -m pytest -q -m gpu tests/kernels
part "compute-sanitizer" kernels/benchmarks/sanitize.sh
part "bars" "$PYTHON" kernels/benchmarks/run.py --suite bars --merge --seconds "${1:-240}"
