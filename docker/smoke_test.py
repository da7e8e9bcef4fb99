"""Whether an image can train: imports, the operators on a small input, and a dry run of the tiny model.

python docker/smoke_test.py                 # on a GPU, if there is one
python docker/smoke_test.py --with-te       # Transformer Engine and apex must be there, too
"""

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

DRY_RUN = """
source examples/tiny/flags.sh
exec "$0" pretrain_msa.py "${MODEL[@]}" "${MSA[@]}" "${TRAINING[@]}" --msa-schedule warmup@0,sparse@2 \\
    --train-iters 4 --lr-warmup-iters 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 96 --dry-run
"""


def check_operators() -> str:
    """Selection and attention with its KL, forward and backward; Triton kernels on a GPU."""
    import torch
    from msa_kernels import DocumentLayout, block_select, sparse_attention

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    tokens, heads, groups, d, block = 300, 8, 2, 64, 64
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return values.to(dtype).requires_grad_()

    q, k, v = draw(tokens, heads, d), draw(tokens, groups, d), draw(tokens, groups, d)
    index_q, index_k = draw(tokens, groups, d), draw(tokens, 1, d)
    layout = DocumentLayout.dense_batch(1, tokens, device=device)
    backend = "triton" if on_gpu else "reference"
    ids = block_select(
        index_q, index_k, layout, block_size=block, num_selected_blocks=3, backend=backend
    ).block_ids
    result = sparse_attention(
        q, k, v, ids, layout, block_size=block, index_q=index_q, index_k=index_k, backend=backend
    )
    (result.out.float().square().mean() + result.kl.mean()).backward()
    # The first block of tokens sees itself only: dense attention there.
    repeated = [x[:block].repeat_interleave(heads // groups, dim=1) for x in (k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1).float() for x in (q[:block], *repeated)), is_causal=True
    )
    error = float((result.out[:block].float() - dense.transpose(0, 1)).abs().max().detach())
    limit = 2e-2 if on_gpu else 1e-5
    assert error < limit, f"attention differs from dense attention by {error:.2g}"
    for name, tensor in {"q": q, "k": k, "v": v, "index_q": index_q, "index_k": index_k}.items():
        assert tensor.grad is not None, f"no gradient of {name}"
        assert tensor.grad.isfinite().all(), f"gradient of {name} is not finite"
    return f"{backend}, error against dense attention {error:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--with-te", action="store_true")
    options = parser.parse_args()
    modules = ["torch", "triton", "megatron.core", "megatron_msa.config", "msa_kernels", "transformers"]
    modules += ["transformer_engine.pytorch", "apex"] if options.with_te else []
    for name in modules:
        module = importlib.import_module(name)
        print(f"{name} {getattr(module, '__version__', '')}", flush=True)
    print(f"operators: {check_operators()}", flush=True)
    result = subprocess.run(
        ["bash", "-c", DRY_RUN, sys.executable], cwd=REPOSITORY, capture_output=True, text=True
    )
    if result.returncode:
        print(result.stderr[-2000:], file=sys.stderr)
        return result.returncode
    print("dry run: ok")
    return 0


if __name__ == "__main__":
    sys.exit(main())
