#!/usr/bin/env bash
# The 313M model of examples/single_gpu with a vision encoder of 85M, for a stream of text and of pages with photographs.
#
#   python examples/multimodal_300m/run.py --output runs/multimodal_300m       # makes the data and calls this
#
# The encoder has the size that is usual for a language model of this size: 12 layers of 768 channels (ViT-B).
# MiniMax-M3's, the default of the flags, is twice as large as this whole language model. Patches, merge and
# rotary axes are MiniMax-M3's. Further flags are passed on and win over the ones here.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
VISION=(
    --vision-mode train --vision-image-token-id 258
    --vision-num-layers 12 --vision-hidden-size 768 --vision-ffn-hidden-size 3072 --vision-num-attention-heads 12
)
# Every other sequence has images. One that cannot be decoded is left out, printed and counted.
DATA=(--multimodal-weight 0.5 --multimodal-on-error skip --num-workers 4)
TRAINING=(
    --dataloader-inter-document-masking --calculate-per-token-loss
    --lr 4e-4 --min-lr 4e-5
)
exec "$here/../single_gpu/pretrain.sh" "${VISION[@]}" "${DATA[@]}" "${TRAINING[@]}" "$@"
