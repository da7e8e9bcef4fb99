"""One small call of every operator with Triton kernels, for compute-sanitizer; training ones with backward.

kernels/benchmarks/sanitize.sh
python3 kernels/benchmarks/sanitize.py --device cpu [training | decode]     tries it in Triton's interpreter
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from msa_kernels import (
    DocumentLayout,
    block_select,
    decode_attention,
    decode_select,
    dense_kl,
    sparse_attention,
)

ROOT = Path(__file__).parents[2]
# Block size, head dim, query heads: groups of 4, and of 16 that the kernels for Hopper take; the one of the
# backward pass takes the last only.
SIZES = ((128, 128, 8), (64, 64, 32), (128, 128, 32))

# Documents that end within a block, one of one token, empty ones; rows that do not fill a tile.
LENGTHS = (300, 0, 1, 64, 135)
GROUPS, SLOTS = 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("operators", nargs="*", help="training, decode. Default: both.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    operators = {"training": training, "decode": decode}
    if unknown := set(options.operators) - set(operators):
        parser.error(f"unknown operators {', '.join(sorted(unknown))}; there are {', '.join(operators)}")
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton, imported by the first call, reads it
        import triton_interpreter  # noqa: F401 (repairs the interpreter)
    for name in options.operators or operators:
        for block_size, dim, heads in SIZES:
            operators[name](block_size, dim, heads, options.device)
            print(f"{name}: block size {block_size}, head dim {dim}, {heads} heads", flush=True)
    if options.device == "cuda":
        torch.cuda.synchronize()
    print("all operators ran")


def training(block_size: int, dim: int, heads: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """block_select, sparse_attention and dense_kl over several documents."""
    offsets = torch.tensor([0, *LENGTHS], device=device).cumsum(0)
    layout = DocumentLayout.from_document_offsets(offsets)
    tokens = sum(LENGTHS)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(tokens, *shape, device=device, dtype=dtype).requires_grad_()

    q, k, v = normal(heads, dim), normal(GROUPS, dim), normal(GROUPS, dim)
    index = {"index_q": normal(GROUPS, dim), "index_k": normal(dim)}
    sizes = {"block_size": block_size, "num_selected_blocks": SLOTS}
    for options in ({"with_lse": True}, {"with_lse": False}, {"with_lse": False, "score_dtype": "e4m3"}):
        selection = block_select(*index.values(), layout, backend="triton", **sizes, **options)
    options = {"block_size": block_size, "backend": "triton"}
    for kl_teacher in ("group_mean", "per_head"):
        result = sparse_attention(
            q, k, v, selection.block_ids, layout, kl_teacher=kl_teacher, **index, **options
        )
        (result.out.float().sum() + result.kl.sum()).backward()
    # Without gradients of the attention, the backward pass runs the teacher's kernel.
    frozen = (each.detach() for each in (q, k, v))
    sparse_attention(*frozen, selection.block_ids, layout, **index, **options).kl.sum().backward()
    try:
        result = dense_kl(q, k, v, layout, backend="triton", **index)
    except RuntimeError as error:
        print(f"left out: {error}", file=sys.stderr)
    else:
        (result.out.float().sum() + result.kl.sum()).backward()


def decode(block_size: int, dim: int, heads: int, device: str) -> None:
    """decode_select and decode_attention: shuffled pages, caches in bf16 and in 8 bits, one and three tokens.

    The first sequence is an unused place, the second has fewer tokens than queries, two end within a block,
    one with it. Entries of the page table behind a sequence are numbers of no page.
    """
    from decode_inputs import decoding, in_8_bits
    from msa_kernels.decode import triton_attention, triton_select

    for q_len in (1, 3):
        inputs = decoding(
            [0, 1, block_size + 1, 4 * block_size, 5 * block_size - 3],
            q_len=q_len,
            heads=heads,
            groups=GROUPS,
            dim=dim,
            index_dim=dim,
            block_size=block_size,
            dtype=torch.bfloat16,
            device=device,
        )
        selection = {"top_k": SLOTS, "index_key_scale": None}
        block_ids = decode_select(*inputs.select, **selection, backend="triton")
        index_keys, index_scale = in_8_bits(inputs.index_key_cache)
        decode_select(
            inputs.index_query,
            index_keys,
            *inputs.select[2:],
            top_k=SLOTS,
            index_key_scale=index_scale,
            backend="triton",
        )
        # With so few sequences a program has one block; with one program wanted, it has all of a sequence.
        triton_select.run(*inputs.select, **selection, launch=replace(triton_select.LAUNCH, programs=1))
        (keys, key_scale), (values, value_scale) = map(in_8_bits, (inputs.key_cache, inputs.value_cache))
        scales = {"key_scale": key_scale, "value_scale": value_scale}
        for chosen, launch in ((block_ids, triton_attention.CHOSEN), (None, triton_attention.EVERYTHING)):
            decode_attention(*inputs.attend, chosen, backend="triton")
            decode_attention(
                inputs.query, keys, values, *inputs.attend[3:], chosen, **scales, backend="triton"
            )
            triton_attention.run(
                *inputs.attend,
                chosen,
                scale=dim**-0.5,
                key_scale=None,
                value_scale=None,
                launch=replace(launch, programs=1),
            )


if __name__ == "__main__":
    main()
