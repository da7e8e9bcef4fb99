"""`tools/generate.py`: text from a checkpoint and prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from megatron_msa.errors import ConfigError
from megatron_msa.inference.engine import InferenceEngine, Speed
from megatron_msa.inference.limits import check_flags
from megatron_msa.inference.loading import load, tokenizer_for
from megatron_msa.inference.paged_rows import E4M3
from megatron_msa.inference.processes import process_groups
from megatron_msa.inference.sampling import Sampling

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def build_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, help="Folder of a run's checkpoints, saved under any layout.")
    add("--ckpt-step", type=int, help="Iteration to load. Default: the latest.")
    add("--prompt", action="append", default=[], help="May be given several times.")
    add(
        "--prompt-file",
        action="append",
        type=Path,
        default=[],
        help="A prompt in a file; several times, too.",
    )
    add("--tokenizer-type", help="Default: the one that the checkpoint was trained with.")
    add("--tokenizer-model", help="Where the tokenizer lies now.")
    add("--max-new-tokens", type=int, default=128, help="Default: %(default)s.")
    add("--greedy", action="store_true", help="Always the most likely token.")
    add("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    add("--top-k", type=int, default=0, help="Default: %(default)s, all tokens.")
    add("--top-p", type=float, default=1.0, help="Default: %(default)s, all tokens.")
    add("--seed", type=int, default=1234, help="Of the draws. Default: %(default)s.")
    add("--ignore-eod", action="store_true", help="Go on behind the end of a document.")
    add(
        "--attention",
        choices=("as trained", "dense", "sparse"),
        default="as trained",
        help="dense: full attention in every layer, as a control. Default: as the checkpoint's phase says.",
    )
    add("--dtype", choices=_DTYPES, help="To compute in. Default: on a GPU as trained, on a CPU fp32.")
    add("--8bit-kv", dest="kv_8bit", action="store_true", help="Keep keys and values in e4m3.")
    add("--8bit-index-keys", dest="index_8bit", action="store_true", help="Keep index keys in e4m3.")
    add("--max-sequences", type=int, default=8, help="In the cache at a time. Default: %(default)s.")
    add("--prefill-chunk", type=int, default=8192, help="Tokens of a forward pass. Default: %(default)s.")
    add("--cache-gib", type=float, help="Limit of the cache's memory. Default: 90 %% of what is free.")
    add("--position-limit", type=int, help="Default: --max-position-embeddings of the checkpoint.")
    add("--tensor-model-parallel-size", type=int, default=1, help="Under torchrun. Default: %(default)s.")
    add("--context-parallel-size", type=int, default=1, help="Shares the prefill. Default: %(default)s.")
    add("--expert-model-parallel-size", type=int, default=1, help="Default: %(default)s.")
    return parser


def run(options: argparse.Namespace) -> None:
    """Generate and print.

    Raises:
        ConfigError: options that do not fit each other or the checkpoint.
    """
    check_flags(options)
    prompts = [*options.prompt, *(_read(path) for path in options.prompt_file)]
    if not prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompt-file FILE")
    sampling = None
    if not options.greedy:
        sampling = Sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed
        )
    with process_groups(
        tensor_parallel=options.tensor_model_parallel_size,
        context_parallel=options.context_parallel_size,
        expert_parallel=options.expert_model_parallel_size,
    ):
        loaded = load(options.load, step=options.ckpt_step, dtype=_DTYPES.get(options.dtype))
        tokenizer = tokenizer_for(
            loaded.args, tokenizer_type=options.tokenizer_type, tokenizer_model=options.tokenizer_model
        )
        ids = [list(map(int, tokenizer.tokenize(prompt))) for prompt in prompts]
        engine = InferenceEngine(
            loaded.model,
            max_tokens=max(map(len, ids)) + options.max_new_tokens,
            max_sequences=min(options.max_sequences, len(ids)),
            cache_dtype=E4M3 if options.kv_8bit else None,
            index_key_dtype=E4M3 if options.index_8bit else None,
            prefill_chunk=options.prefill_chunk,
            attention=options.attention,
            memory_limit=None if options.cache_gib is None else int(options.cache_gib * 2**30),
            position_limit=options.position_limit,
            vocab_size=tokenizer.vocab_size,
        )
        eod = None if options.ignore_eod else tokenizer.eod
        new = engine.generate(
            ids,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            stop=None if eod is None else {int(eod)},
        )
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            for prompt, tokens in zip(prompts, new, strict=True):
                shown = tokens[:-1] if tokens[-1] == eod else tokens
                print(f"{prompt}{tokenizer.detokenize(shown)}\n{'-' * 40}")
            print(_summary(loaded.iteration, loaded.phase.value, engine))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompt-file {path} cannot be read: {error}") from error


def _summary(iteration: int, phase: str, engine: InferenceEngine) -> str:
    speed = engine.speed
    return (
        f"iteration {iteration} ({phase} phase) | prefill {_rate(speed, 'prefill')} | decode "
        f"{_rate(speed, 'decode')} | cache {engine.cache_bytes / 2**20:.1f} MiB, "
        f"{engine.bytes_per_token:,} bytes a token"
    )


def _rate(speed: Speed, part: str) -> str:
    tokens, seconds = getattr(speed, f"{part}_tokens"), getattr(speed, f"{part}_seconds")
    return f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s" if tokens else "none"
