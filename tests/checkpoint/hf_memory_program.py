"""One conversion in a process of its own, which reports the memory it took.

python tests/checkpoint/hf_memory_program.py to_megatron|to_hf SOURCE TARGET RESULT.json
"""

import json
import resource
import sys
import time
from pathlib import Path

from megatron_msa import quiet_imports

quiet_imports.apply()

from megatron_msa.training import no_gpu  # noqa: E402

no_gpu.install_if_no_gpu()

import torch  # noqa: E402

from megatron_msa.checkpoint.hf import sidecar, to_hf, to_megatron  # noqa: E402


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    direction, source, target, result = sys.argv[1], *map(Path, sys.argv[2:])
    torch.set_num_threads(1)
    # What transformers imports for a configuration is part of the base, not of the conversion.
    if (source / "hf/config.json").is_file() or (source / "config.json").is_file():
        sidecar.load_config(source if (source / "config.json").is_file() else source / "hf")
    before, start = peak_bytes(), time.perf_counter()
    {"to_megatron": to_megatron.convert, "to_hf": to_hf.convert}[direction](source, target)
    figures = {"before": before, "peak": peak_bytes(), "seconds": time.perf_counter() - start}
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
