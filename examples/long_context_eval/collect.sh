#!/usr/bin/env bash
# One report of lengths that length.sh has evaluated: report.md, results.json and pictures in OUTPUT.
#
#   OUTPUT=runs/8k/eval examples/long_context_eval/collect.sh 4096 8192
set -euo pipefail
ROOT="$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")"
: "${OUTPUT:?folder of the results}" "${1:?lengths}"
read -ra launch <<< "${LAUNCH:-${PYTHON:-python}}"
exec "${launch[@]}" "$ROOT/tools/eval_long_context.py" collect --output "$OUTPUT" "${@/#/$OUTPUT/length_}"
