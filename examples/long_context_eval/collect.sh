#!/usr/bin/env bash
# One report of lengths that length.sh has evaluated: report.md, results.json and pictures in OUTPUT. Lengths whose jobs
# have not ended are in it as far as they are, and named.
#
#   OUTPUT=runs/8k/eval examples/long_context_eval/collect.sh 4096 8192 [FLAG of tools/eval_long_context.py collect ...]
set -euo pipefail
ROOT="$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")"
: "${OUTPUT:?folder of the results}" "${1:?lengths}"
folders=()
while [[ "${1:-}" =~ ^[0-9]+$ ]]; do
    folders+=("$OUTPUT/length_$1")
    shift
done
read -ra launch <<< "${LAUNCH:-${PYTHON:-python}}"
exec "${launch[@]}" "$ROOT/tools/eval_long_context.py" collect --incomplete --output "$OUTPUT" "${folders[@]}" "$@"
