#!/usr/bin/env bash
# Install what the image lacks, and fail if that would replace what the image is built around.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"

built_together() {
    "$python" -m pip list --format=freeze \
        | grep -iE '^(torch|pytorch-triton|triton|numpy|transformer[-_]engine[a-z_-]*|apex|flash[-_]attn)=='
}
built_together > /tmp/built_together.txt
# The image's own constraints name some packages that are pinned here in other versions.
PIP_CONSTRAINT=/tmp/built_together.txt "$python" -m pip install --no-cache-dir "$@" --requirement "$here/requirements.txt"
built_together | diff /tmp/built_together.txt -
