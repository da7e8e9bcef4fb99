"""Print the iteration of the newest complete checkpoint of a run, or nothing if it has none yet.

    python tools/newest_checkpoint.py checkpoints/8k        # for --ckpt-step

Damaged ones that it passes over are named on stderr. Status 2 if all are damaged.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from megatron_msa.checkpoint.newest import newest_complete  # noqa: E402
from megatron_msa.errors import ConfigError  # noqa: E402


def main() -> int:
    if len(sys.argv) != 2:
        print("error: pass the folder of the run's checkpoints (--save)", file=sys.stderr)
        return 2
    try:
        iteration, skipped = newest_complete(Path(sys.argv[1]))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in skipped:
        print(f"warning: {line}", file=sys.stderr)
    if iteration is not None:
        print(iteration)
    return 0


if __name__ == "__main__":
    sys.exit(main())
