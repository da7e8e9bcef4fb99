"""Training steps of a multimodal model on one GPU: tokens per second with and without images.

    python tools/bench_vision.py --output results

The language model is that of examples/single_gpu (313M parameters, 8 layers, a mixture of experts, MSA with 4
GQA groups), the encoder MiniMax-M3's (32 layers of 1280 channels), all with random weights in bf16. A step is
forward pass, backward pass and fused AdamW on one sequence of 8,192 tokens. Images are random pixels of 448 x
448, which is 1,024 patches and 256 tokens each. Measured for several shares of visual tokens, with the
encoder trained and frozen: seconds of a step, of the encoder's part of it (events around its forward pass and
its part of the backward pass, projector included), and peak memory. At last a stream that mixes sequences of
text and of images is trained on for some steps, to show that the loss falls. Results are printed as they
come and written as vision.json. Without a GPU it runs tiny sizes, to try the program.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]

from megatron_msa import quiet_imports  # noqa: E402

quiet_imports.apply()

from megatron_msa.training import megatron_fixes, no_gpu  # noqa: E402

HAS_GPU = not no_gpu.install_if_no_gpu()
megatron_fixes.apply()

import torch  # noqa: E402
from benchmarks import environment  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_msa.checkpoint.hf.megatron_model import build, seed, single_process  # noqa: E402
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint  # noqa: E402
from megatron_msa.model.multimodal import MultimodalGPT  # noqa: E402
from megatron_msa.model.vision.flops import step_flops  # noqa: E402
from megatron_msa.model.vision.inputs import VisualInput, without_visual_targets  # noqa: E402
from tools.bench_inference import MODEL, TINY, Results  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32
IMAGE = 300
"""The placeholder: a token that the text never has (it is made of bytes)."""
SIDE = 32 if HAS_GPU else 4
"""Patches along a side of an image."""
TINY_VISION = {"vision_num_layers": 2, "vision_hidden_size": 48, "vision_ffn_hidden_size": 64}
TINY_VISION |= {"vision_num_attention_heads": 4}


class Sample(NamedTuple):
    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    visuals: VisualInput | None


def build_model(mode: str, sequence: int) -> MultimodalGPT:
    """With random weights, in training mode."""
    vision = {"vision_mode": mode, "vision_image_token_id": IMAGE} | ({} if HAS_GPU else TINY_VISION)
    settings = MODEL | ({} if HAS_GPU else TINY) | vision | {"max_position_embeddings": sequence}
    config = model_config_from_checkpoint(
        argparse.Namespace(**settings), params_dtype=DTYPE, bf16=HAS_GPU, calculate_per_token_loss=True
    )
    seed()
    model = build(config)
    assert isinstance(model, MultimodalGPT)
    return model.to(DEVICE).train()


def make_sample(sequence: int, images: int, number: int, patch_values: int) -> Sample:
    """Words of one of few sentences, with images spread evenly among them."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(32, 127, (64,), generator=generator).repeat(sequence // 64 + 1)[:sequence]
    length = SIDE * SIDE // 4
    for image in range(images):
        start = image * sequence // images + 1
        tokens[start : start + length] = IMAGE
    tokens = tokens[None].to(DEVICE)
    labels = tokens.roll(-1, dims=1)
    mask = without_visual_targets(torch.ones_like(labels, dtype=torch.float32), labels, (IMAGE,))
    visuals = None
    if images:
        pixels = torch.randn(images * SIDE * SIDE, patch_values, generator=generator)
        visuals = VisualInput(pixels, torch.tensor([[1, SIDE, SIDE]] * images)).to(DEVICE, DTYPE)
    return Sample(tokens, labels, mask, visuals)


class Clock:
    """Times on the device's own clock, or on the host's without a GPU."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        if HAS_GPU:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self, first: int, last: int) -> float:
        """Between two marks, counted from 0."""
        start, end = self.marks[first], self.marks[last]
        return start.elapsed_time(end) / 1000 if HAS_GPU else end - start


class Trainer:
    """A model with its optimizer, and marks around what the encoder does."""

    def __init__(self, mode: str, sequence: int) -> None:
        self.model = build_model(mode, sequence)
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=HAS_GPU)
        self.encoder_clock = Clock()
        vision = self.model.vision_model
        assert vision is not None
        vision.register_forward_pre_hook(lambda *_: self.encoder_clock.mark())
        vision.register_forward_hook(self._after_encoder)
        # Of the parameters of the vision part that train, the first one gets its gradient last.
        first = next(each for each in vision.parameters() if each.requires_grad)
        first.register_post_accumulate_grad_hook(lambda _: self.encoder_clock.mark())

    def _after_encoder(self, *arguments: Any) -> None:
        self.encoder_clock.mark()
        arguments[-1].register_hook(lambda _: self.encoder_clock.mark())

    def step(self, sample: Sample) -> tuple[float, float, float]:
        """Loss per token, seconds, and those of the encoder. Waits for the device."""
        clock, self.encoder_clock.marks = Clock(), []
        clock.mark()
        positions = torch.arange(sample.tokens.shape[1], device=DEVICE)[None]
        losses = self.model(sample.tokens, positions, None, labels=sample.labels, visual_input=sample.visuals)
        loss = (losses.float() * sample.loss_mask).sum() / sample.loss_mask.sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()
        value = float(loss.detach())
        encoder = 0.0
        if sample.visuals is not None:
            encoder = self.encoder_clock.seconds(0, 1) + self.encoder_clock.seconds(2, 3)
        return value, clock.seconds(0, 1), encoder


def measure(trainer: Trainer, options: argparse.Namespace, images: int) -> dict[str, Any]:
    """Medians over some steps, after two that compile kernels."""
    vision = trainer.model.vision
    sample = make_sample(options.tokens, images, 0, vision.patch_values)
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    steps = [trainer.step(sample) for _ in range(options.repeats + 2)][2:]
    seconds, encoder = (statistics.median(step[column] for step in steps) for column in (1, 2))
    patches = images * SIDE * SIDE
    flops = step_flops(
        vision, trainer.model.config.hidden_size, patches=patches, pairs=images * (SIDE * SIDE) ** 2
    )
    return {
        "loss": steps[-1][0],
        "seconds": seconds,
        "tokens_per_second": options.tokens / seconds,
        "encoder_seconds": encoder,
        "encoder_share": encoder / seconds,
        "encoder_tflops": flops / encoder / 1e12 if encoder else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if HAS_GPU else None,
    }


def mixed_stream(trainer: Trainer, options: argparse.Namespace, images: int) -> dict[str, Any]:
    """Sequences without images and with some, by turns; the losses of the first and of the last round."""
    counts = (0, images, 0, images // 2)
    values = trainer.model.vision.patch_values
    samples = [make_sample(options.tokens, count, number, values) for number, count in enumerate(counts)]
    losses: list[float] = []
    start = time.perf_counter()
    for sample in itertools.islice(itertools.cycle(samples), options.steps):
        losses.append(trainer.step(sample)[0])
    elapsed = time.perf_counter() - start
    return {
        "steps": len(losses),
        "first_losses": losses[: len(counts)],
        "last_losses": losses[-len(counts) :],
        "tokens_per_second": options.tokens * len(losses) / elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="Folder of vision.json.")
    parser.add_argument("--tokens", type=int, default=8192 if HAS_GPU else 64)
    parser.add_argument("--repeats", type=int, default=3 if HAS_GPU else 1, help="Steps that are timed.")
    parser.add_argument("--steps", type=int, default=24 if HAS_GPU else 8, help="Of the mixed stream.")
    parser.add_argument("--commit", help="Of copies of the repository without its history.")
    options = parser.parse_args()
    results = Results()
    most = options.tokens // 2 // (SIDE * SIDE // 4)  # half of the tokens are visual
    with single_process():
        for mode in ("train", "freeze"):
            trainer = Trainer(mode, options.tokens)
            sizes = [each.numel() for each in trainer.model.parameters()]
            print(f"{mode}: {sum(sizes) / 1e6:.0f}M parameters", flush=True)
            for images in (0, most // 2, most):
                what = {"encoder": mode, "images": images, "visual_share": images / most / 2}
                results.measure(what, partial(measure, trainer, options, images))
            if mode == "train":
                results.measure({"stream": "mixed"}, partial(mixed_stream, trainer, options, most))
            del trainer
            gc.collect()  # its hooks refer to it: the next peak would hold this model, too
    described = environment.describe(DEVICE, options.commit)
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(
        {"environment": described, "tokens": options.tokens, "results": results.entries}, indent=1
    )
    (options.output / "vision.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
