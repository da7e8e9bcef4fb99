"""A whole model on one GPU: prefill with MSA against full attention, and decode tokens per second.

    python tools/bench_inference.py --output results

The model is that of examples/single_gpu (313M parameters, 8 layers, a mixture of experts) with random weights
in bf16. Its dense twin is the same model with full attention in every layer and without the index branches,
which is what `attention="dense"` computes. MSA's prefill is timed whole and in four chunks and counts with
the faster; the twin's is timed whole, where full attention has its fastest kernel here (cuDNN). Decoding is
greedy, and its time is that of the whole loop. Results are printed as they come and written as
inference.json. Without a GPU it runs tiny sizes, to try the program.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu  # noqa: E402

HAS_GPU = not no_gpu.install_if_no_gpu()
megatron_fixes.apply()

import torch  # noqa: E402
from benchmarks import environment, summary  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402

from megatron_msa.checkpoint.hf.megatron_model import build, seed  # noqa: E402
from megatron_msa.inference.engine import InferenceEngine  # noqa: E402
from megatron_msa.inference.paged_rows import E4M3  # noqa: E402
from megatron_msa.inference.processes import process_groups  # noqa: E402
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint  # noqa: E402
from megatron_msa.phases import Phase, PhaseSchedule  # noqa: E402

# The flags of examples/single_gpu/pretrain.sh, as Megatron names its arguments.
MODEL: dict[str, Any] = {
    "num_layers": 8,
    "hidden_size": 1024,
    "ffn_hidden_size": 2816,
    "num_attention_heads": 16,
    "group_query_attention": True,
    "num_query_groups": 4,
    "kv_channels": 64,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": True,
    "qk_layernorm": True,
    "quick_geglu": True,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "num_experts": 16,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 768,
    "moe_shared_expert_intermediate_size": 768,
    "moe_layer_freq": [0, *[1] * 7],
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
    "moe_router_dtype": "fp32",
    "moe_token_dispatcher_type": "alltoall",
    "msa_block_size": 128,
    "msa_num_selected_blocks": 16,
    "msa_schedule": "sparse@0",
    "padded_vocab_size": 384,
}
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "moe_layer_freq": [0, 1],
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "msa_block_size": 16,
    "msa_num_selected_blocks": 4,
}
TRANSFORMER_ENGINE = {
    "transformer_impl": "transformer_engine",
    "moe_grouped_gemm": True,
    "moe_permute_fusion": True,
    "apply_rope_fusion": True,
}


class Results:
    """Entries printed as they come; those that fail keep their error."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def measure(self, what: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        """Add what ``run`` finds to what it was asked."""
        try:
            entry = what | run()
        except Exception as error:
            traceback.print_exc()
            entry = what | {"error": f"{type(error).__name__}: {error}"}
        self.entries.append(entry)
        print(json.dumps(entry), flush=True)

    def best(self, **what: Any) -> float | None:
        """The smallest time among the entries of this description."""
        found = [
            entry["seconds"] for entry in self.entries if "seconds" in entry and what.items() <= entry.items()
        ]
        return min(found, default=None)


def build_model(options: argparse.Namespace) -> GPTModel:
    """With random weights, in evaluation mode."""
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    settings = MODEL | ({} if HAS_GPU else TINY) | {"max_position_embeddings": max(options.tokens)}
    if options.head_dim:
        heads = settings["num_attention_heads"] * settings["kv_channels"] // options.head_dim
        settings |= {"kv_channels": options.head_dim, "num_attention_heads": heads}
    config = model_config_from_checkpoint(
        argparse.Namespace(**settings),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **(TRANSFORMER_ENGINE if options.transformer_impl == "transformer_engine" else {}),
    )
    assert PhaseSchedule.parse(config.transformer.msa_schedule).phases == (Phase.SPARSE,)
    seed()
    model = build(config)
    return model.to("cuda" if HAS_GPU else "cpu").eval()


def prefill(model: GPTModel, tokens: int, chunk: int, attention: str, repeats: int) -> dict[str, Any]:
    """Seconds from a prompt to its first new token."""
    engine = InferenceEngine(
        model,
        max_tokens=tokens + 1,
        prefill_chunk=chunk,
        attention=attention,
        position_limit=tokens + 1,
        cuda_graphs=False,
    )
    prompts = random_prompts(1, tokens)
    engine.generate(prompts, max_new_tokens=1)  # compiles the kernels
    reset_peak_memory()
    seconds = []
    for _ in range(repeats):
        engine.generate(prompts, max_new_tokens=1)
        seconds.append(engine.speed.prefill_seconds)
    return {
        "seconds": round(statistics.median(seconds), 5),
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "peak_gib": peak_memory(),
        "cache_gib": round(engine.cache_bytes / 2**30, 3),
    }


def profile(model: GPTModel, tokens: int, attention: str, output: Path) -> None:
    """Where the time of a whole prefill goes: profile_ATTENTION.txt, kernels by their time on the device."""
    engine = InferenceEngine(
        model,
        max_tokens=tokens + 1,
        prefill_chunk=tokens,
        attention=attention,
        position_limit=tokens + 1,
        cuda_graphs=False,
    )
    prompts = random_prompts(1, tokens)
    engine.generate(prompts, max_new_tokens=1)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if HAS_GPU:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as found:
        engine.generate(prompts, max_new_tokens=1)
    order = "self_cuda_time_total" if HAS_GPU else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=45, max_name_column_width=90)
    (output / f"profile_{attention.replace(' ', '_')}.txt").write_text(table)


def decode(model: GPTModel, tokens: int, batch: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a greedy decode step of ``batch`` sequences behind prompts of ``tokens``, loop included."""
    engine = InferenceEngine(
        model,
        max_tokens=tokens + steps + 1,
        max_sequences=batch,
        position_limit=tokens + steps + 1,
        prefill_chunk=32768,
        **options,
    )
    engine.generate(random_prompts(batch, 40), max_new_tokens=4)  # compiles the kernels, captures the graph
    engine.generate(random_prompts(batch, tokens), max_new_tokens=steps + 1)
    seconds = engine.speed.decode_seconds / steps
    return {
        "seconds": round(seconds, 7),
        "tokens_per_second": round(batch / seconds, 1),
        "cache_gib": round(engine.cache_bytes / 2**30, 3),
        "bytes_per_token": engine.bytes_per_token,
    }


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, tokens), generator=generator).tolist()


def reset_peak_memory() -> None:
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> float | None:
    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if HAS_GPU else None


def plan(options: argparse.Namespace, model: GPTModel, results: Results) -> Iterator[Callable[[], None]]:
    """What is measured, the most important first."""
    longest = max(options.tokens)
    for tokens in sorted(options.tokens, reverse=True):
        # Of a whole prompt cuDNN computes full attention; in chunks it would be a slower kernel of Triton.
        for attention, chunk in (("as trained", tokens), ("dense", tokens), ("as trained", tokens // 4)):
            what = {"what": "prefill", "tokens": tokens, "chunk": chunk, "attention": attention}
            yield lambda w=what: results.measure(
                w, lambda: prefill(model, w["tokens"], w["chunk"], w["attention"], options.repeats)
            )
        if tokens == longest:
            yield from plan_decode(options, model, results, longest)


def plan_decode(
    options: argparse.Namespace, model: GPTModel, results: Results, tokens: int
) -> Iterator[Callable[[], None]]:
    eight_bit = {"cache_dtype": E4M3, "index_key_dtype": E4M3}
    for batch in options.batches:
        for name, given in (
            ("graph", {"cuda_graphs": HAS_GPU}),
            ("dense, graph", {"cuda_graphs": HAS_GPU, "attention": "dense"}),
            ("eager", {"cuda_graphs": False}),
            ("8-bit index keys, graph", {"cuda_graphs": HAS_GPU, "index_key_dtype": E4M3}),
            ("8-bit cache, graph", {"cuda_graphs": HAS_GPU, **eight_bit}),
        ):
            what = {"what": "decode", "tokens": tokens, "batch": batch, "variant": name}
            yield lambda w=what, g=given: results.measure(
                w, lambda: decode(model, w["tokens"], w["batch"], options.steps, g)
            )


def summarise(options: argparse.Namespace, model: GPTModel, results: Results) -> dict[str, Any]:
    """The figures for the tables, and what they depend on."""
    speedups = {}
    for tokens in options.tokens:
        msa, dense = (
            results.best(what="prefill", tokens=tokens, attention=attention)
            for attention in ("as trained", "dense")
        )
        speedups[str(tokens)] = None if msa is None or dense is None else round(dense / msa, 3)
    device = next(model.parameters()).device
    return {
        "model_prefill_speedup": speedups,
        "model_prefill_128k_speedup": speedups.get(str(131072)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "head_dim": model.config.kv_channels,
        "transformer_impl": options.transformer_impl,
        "entries": results.entries,
        **environment.describe(device, options.commit),
    }


PREFILL_BAR = 3.0


def add_to_summary(path: Path, found: dict[str, Any]) -> None:
    """Write the entry model_prefill_128k_speedup of an inference.json beside those of the kernels."""
    value = found["model_prefill_128k_speedup"]
    entry = {
        "value": value,
        "unit": "x",
        "bar": PREFILL_BAR,
        "reached": None if value is None else value >= PREFILL_BAR,
        "what": "prefill of a 313M model, 131,072 tokens, against its dense twin",
        "seconds": {
            attention: min(
                entry["seconds"]
                for entry in found["entries"]
                if (entry["what"], entry["tokens"], entry["attention"]) == ("prefill", 131072, attention)
                and "seconds" in entry
            )
            for attention in ("as trained", "dense")
        }
        if value is not None
        else None,
        **{name: found[name] for name in ("transformer_impl", "gpu", "torch", "triton", "commit", "date")},
    }
    summary.write(path, {"model_prefill_128k_speedup": entry})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for inference.json.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[131072, 32768] if HAS_GPU else [512, 128])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8] if HAS_GPU else [2])
    parser.add_argument("--head-dim", type=int, help="Of as many heads as give the same width. Default: 64.")
    parser.add_argument("--transformer-impl", choices=("local", "transformer_engine"), default="local")
    parser.add_argument(
        "--profile", action="store_true", help="Also profile a prefill of the longest prompt."
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=64, help="Decode steps that are timed.")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="Start nothing new after this.")
    parser.add_argument("--commit", help="Default: that of the repository.")
    parser.add_argument("--summary", type=Path, help="summary.json of the kernels, to add the speedup to.")
    options = parser.parse_args()
    started = time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    results = Results()
    with process_groups():
        model = build_model(options)
        for run in plan(options, model, results):
            if time.monotonic() - started > options.seconds:
                print("out of time; what is missing was not measured", flush=True)
                break
            run()
            text = json.dumps(summarise(options, model, results), indent=1)
            (options.output / "inference.json").write_text(text + "\n")
        if options.profile:
            for attention in ("as trained", "dense"):
                profile(model, max(options.tokens), attention, options.output)
    if options.summary:
        add_to_summary(options.summary, summarise(options, model, results))
    print(json.dumps({k: v for k, v in summarise(options, model, results).items() if k != "entries"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
