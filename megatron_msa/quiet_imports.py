"""Silences what the installed libraries say at import about optional parts that are not there.

    from megatron_msa import quiet_imports
    quiet_imports.apply()          # before torch and Megatron are imported

Megatron-core 0.19.2 prints about ten such lines in every process. Only the messages listed here go away.
"""

import logging
import warnings

_WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, r"Transformer Engine and Apex are not installed\. Falling back to "),
    (UserWarning, r"Apex is not installed\. Falling back to Torch Norm"),
    # Without Transformer Engine its version reads 0.0.0.
    (UserWarning, r"Only transformer-engine>=\S+ supports MoE experts, but your version is 0\.0\.0"),
    (UserWarning, r"MimoModelConfig is experimental"),
    # Said by tools that run as a single process without a launcher.
    (UserWarning, r"Could not determine rank from torch\.distributed, RANK, or SLURM_PROCID"),
)
# Compiled anew in every process where Python may not write its cache.
_FILE_WITH_BAD_ESCAPE = r".*megatron/core/inference/contexts/kv_block_allocator"


def apply() -> None:
    """Install the filters."""
    for category, message in _WARNINGS:
        warnings.filterwarnings("ignore", message, category)
    warnings.filterwarnings("ignore", "invalid escape sequence", SyntaxWarning, _FILE_WITH_BAD_ESCAPE)
    # A CUDA build of torch on a machine with a CUDA toolkit and no GPU.
    logging.getLogger("torch.utils.cpp_extension").addFilter(_has_cuda_news)


def _has_cuda_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")
