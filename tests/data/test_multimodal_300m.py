"""The example that trains and times a model on a mixed stream."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.multimodal_300m import report
from examples.multimodal_300m.pages import PageWriter, Photograph, paragraphs, photographs
from megatron_msa.data.multimodal.format import Text, Visual, write_dataset
from megatron_msa.data.multimodal.images import ImageError, decoded
from tests.end_to_end.launching import REPOSITORY, Pretraining, Run, read_rows

STEPS, WARMUP = 12, 2
TINY = f"""
    --multimodal-weight 0.5 --multimodal-on-error skip --num-workers 1 --dataloader-inter-document-masking
    --padded-vocab-size 272 --train-iters {STEPS} --msa-schedule warmup@0,sparse@{WARMUP}
    --seq-length 512 --max-position-embeddings 512 --micro-batch-size 1 --global-batch-size 1
    --calculate-per-token-loss --log-encoder-time
    --vision-mode train --vision-image-token-id 257 --vision-num-layers 1 --vision-hidden-size 24
    --vision-ffn-hidden-size 32 --vision-num-attention-heads 2 --vision-patch-size 4
    --multimodal-min-pixels 64 --multimodal-packing-buffer 8
""".split()


@pytest.fixture(scope="module")
def writer() -> PageWriter:
    red = Photograph("a red wall", Image.new("RGB", (90, 60), (70, 5, 5)))
    blue = Photograph("the sky", Image.new("RGB", (40, 80), (120, 160, 250)))
    return PageWriter([red, blue], ["A paragraph.", "Another paragraph."], (16, 40), (1, 3))


def test_captions_say_what_the_pixels_show(writer: PageWriter) -> None:
    looks = {"a red wall": "Dark red", "the sky": "Bright blue"}
    samples = list(writer.captions("caption", 20, random.Random(1)))
    assert len({sample.key for sample in samples}) == 20
    sizes = set()
    for image, text in (sample.pieces for sample in samples):
        assert isinstance(image, Visual)
        assert isinstance(text, Text)
        subject, _, rest = text.text.removeprefix("Photograph of ").partition(", ")
        assert rest.endswith(f". {looks[subject]}.")
        sizes.add(decoded(image.files[0]).size)
    assert sizes == {(28, 16), (28, 40)}  # they can be exchanged


def test_some_pages_have_a_torn_image(writer: PageWriter) -> None:
    torn = []
    for number, sample in enumerate(writer.pages("page", 12, random.Random(1), torn_every=4)):
        for piece in sample.pieces:
            if isinstance(piece, Visual):
                try:
                    width, height = decoded(piece.files[0]).size
                    assert min(width, height) >= 16
                    assert max(width, height) <= 40
                except ImageError:
                    torn.append(number)
    assert torn == [3, 7, 11]


def test_photographs_and_paragraphs_are_found() -> None:
    found = {each.subject for each in photographs()}
    assert {"a pagoda by a lake", "a dahlia", "an officer in uniform"} <= found
    texts = paragraphs(30)
    assert len(texts) == 30
    assert all(80 <= len(text) <= 240 for text in texts)


@pytest.fixture(scope="module")
def run(pretrain: Pretraining, writer: PageWriter, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny model on the pages."""
    folder = tmp_path_factory.mktemp("run")
    pages = {"train": writer.pages("page", 60, random.Random(1), torn_every=10)}
    path = write_dataset(folder / "pages", pages, samples_per_shard=20, suffix="jpg")
    return pretrain(folder, *TINY, "--multimodal-data-path", str(path))


def test_the_report_separates_sequences_with_images_from_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    found = report.result(tmp_path)["mixed"]
    assert found["all_losses_finite"]
    assert found["skipped_samples"] > 0
    timed = STEPS - WARMUP - report.SETTLING
    assert [found[kind]["timed_steps"] for kind in ("mixed", "images", "text")] == [timed, 3, 2]
    assert found["text"]["visual_tokens"] == 0
    rows = [run.steps[step] for step in range(STEPS - timed + 1, STEPS + 1)]
    with_images = [row for row in rows if row["data"]["visuals"]]
    assert found["images"]["visual_tokens"] == sum(row["data"]["visual_tokens"] for row in with_images)
    assert found["images"]["visual_share"] == found["images"]["visual_tokens"] / (3 * 512)
    share = sum(row["encoder_seconds"] for row in rows) / sum(row["seconds"] for row in rows)
    assert found["mixed"]["encoder_share"] == pytest.approx(share)
    report.draw(tmp_path)
    assert (tmp_path / "result.png").stat().st_size > 10_000
    assert f"{found['images']['visual_share']:.1%}" in report.table({"mixed": found})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_runs_all_its_parts(tmp_path: Path) -> None:
    program = str(REPOSITORY / "examples/multimodal_300m/run.py")
    flags = ["--tiny", "--output", str(tmp_path), "--train-iters", "32", "--pages", "60"]
    result = subprocess.run([sys.executable, program, *flags], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    found = json.loads((tmp_path / "results/result.json").read_text())
    assert {name: found[name]["steps"] for name in report.RUNS} == {
        "mixed": 32,
        "text": 16,
        "large": 8,
        "frozen": 8,
    }
    assert found["mixed"]["skipped_samples"] > 0
    assert found["captions"]["own"] > 1
    # The same weights on the same first sequence.
    first = [read_rows(tmp_path / f"results/{name}.jsonl")[1]["lm_loss"] for name in ("mixed", "text")]
    assert first[0] == first[1]
    assert Image.open(tmp_path / "results/result.png").size[0] > 1000
