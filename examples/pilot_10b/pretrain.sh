#!/usr/bin/env bash
# A stage of the 10B model (8k, 32k or 192k). Start it again with the same command after an interruption.
#
#   SAVE=checkpoints/8k                        examples/pilot_10b/pretrain.sh 8k  --data-path ... --tokenizer-model ...
#   SAVE=checkpoints/32k FROM=checkpoints/8k   examples/pilot_10b/pretrain.sh 32k --data-path ... --tokenizer-model ...
#
# Further flags win over the ones here; --dry-run shows what they resolve to. LAUNCH is what starts the processes:
# "torchrun --nnodes ...", or srun as in ../slurm. TE=0 does without Transformer Engine.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/model.sh"
source "$here/stages.sh"
source "$here/../common/long_runs.sh"
pretrain_stage "$@"
