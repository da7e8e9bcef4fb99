"""Multimodal samples: their format, their images, their tokens, and sequences of several of them."""

import io
import json
import tarfile
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from megatron.training.config import TokenizerConfig
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_msa.data.corpus import Document as TextDocument
from megatron_msa.data.encode import Encoder as TextEncoder
from megatron_msa.data.metadata import load_tokenizer
from megatron_msa.data.multimodal.config import CLIP_MEAN, CLIP_STD
from megatron_msa.data.multimodal.encode import SampleEncoder
from megatron_msa.data.multimodal.format import (
    Sample,
    SampleError,
    Text,
    Visual,
    members_of,
    parse,
    write_dataset,
)
from megatron_msa.data.multimodal.images import ImageError, ImageSettings, decoded, size_of
from megatron_msa.data.multimodal.packing import choose, join
from megatron_msa.errors import ConfigError
from tests.data.multimodal_samples import (
    EOD,
    IMAGE,
    VIDEO,
    data_config,
    encoder,
    picture,
    sample,
    samples,
    vision_config,
)

INTERLEAVED = Sample(
    "page",
    (
        Text("a "),
        Visual((picture(4, 8),)),
        Text("naïve\n"),
        Visual((picture(4, 4, 1), picture(4, 4, 2), picture(4, 4, 3)), is_video=True),
        Visual((picture(8, 8, 4),)),
    ),
)


# -- format --------------------------------------------------------------------------------------------------


def test_a_sample_survives_the_round_trip_through_its_files():
    assert parse("page", members_of(INTERLEAVED)) == INTERLEAVED


def test_shards_hold_the_documented_files_and_the_same_samples_make_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_dataset(tmp_path / name, {"train": [INTERLEAVED, *samples(3)]}, samples_per_shard=2)
    shard = tmp_path / "one/train-000000.tar"
    with tarfile.open(shard) as tar:
        names = tar.getnames()
    assert names[:6] == ["page.json", *(f"page.{number}.png" for number in range(5))]
    assert shard.read_bytes() == (tmp_path / "two" / shard.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image", "file": "1.png"}], "names the file '1.png' which the shard does not have"),
        ([{"type": "image", "file": "0.png"}] * 2, "names the file '0.png' twice"),
        ([{"type": "text", "text": "a"}], "no piece names the files 0.png"),
        ([{"type": "sound", "file": "0.png"}], "piece 0 is not text, image or video"),
        ([{"type": "video", "files": []}], "piece 0 is not text, image or video"),
        ([{"type": "video", "files": [["0.png"]]}], "piece 0 is not text, image or video"),
        ({"type": "text"}, 'no object with a list "content"'),
        (None, 'no object with a list "content"'),
    ],
)
def test_a_sample_in_another_format_is_refused_with_its_key(content, message):
    members = {"json": json.dumps({"content": content}).encode(), "0.png": picture(4, 4)}
    with pytest.raises(SampleError, match=f"^sample k7: .*{message}"):
        parse("k7", members)


def test_a_sample_without_its_json_file_is_refused():
    with pytest.raises(SampleError, match=r"sample k7: has no \.json file, only 0\.png"):
        parse("k7", {"0.png": picture(4, 4)})


@pytest.mark.parametrize("key", ["a.b", "a/b", ""])
def test_keys_that_a_shard_cannot_hold_are_refused(key, tmp_path):
    with pytest.raises(ConfigError, match="is no key"):
        write_dataset(tmp_path, {"train": [Sample(key, (Text("a"),))]})


# -- images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(50, 70), (9, 300), (56, 56), (210, 33), (28, 28)])
def test_patches_are_those_of_the_processor_of_qwen2_vl(size):
    """Which rounds, limits, resizes, normalises and orders as MiniMax-M3's does."""
    settings = ImageSettings.build(
        data_config(
            multimodal_min_pixels=3136,
            multimodal_max_pixels=9000,
        ),
        vision_config(vision_patch_size=14, vision_temporal_patch_size=2),
    )
    file = picture(*size)
    theirs = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 3136, "longest_edge": 9000}, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    expected = theirs(decoded(file), return_tensors="pt")
    patches, grid = settings.patches([file])
    assert [list(grid)] == expected["image_grid_thw"].tolist()
    assert grid == settings.grid([file])
    # Both compute in fp32, in another order: a few units in the last place of values up to 3.
    torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=2e-6)


def test_frames_of_a_video_fill_temporal_patches_in_order():
    settings = ImageSettings.build(data_config(), vision_config(vision_temporal_patch_size=2))
    frames = [picture(4, 4, seed) for seed in range(3)]
    video, grid = settings.patches(frames)
    assert grid == settings.grid(frames) == (2, 2, 2)
    values = video.view(2, 4, 3, 2, 2, 2)  # time, patch, channel, frame, row, column
    for number, frame in enumerate((0, 1, 2, 2)):
        single, _ = settings.patches([frames[frame]])
        expected = single.view(4, 3, 2, 2, 2)[:, :, 0]
        assert torch.equal(values[number // 2, :, :, number % 2], expected)


def test_grey_images_have_one_channel():
    settings = ImageSettings.build(
        data_config(multimodal_image_mean=[0.0], multimodal_image_std=[1.0]),
        vision_config(vision_num_channels=1),
    )
    file = picture(4, 4, mode="L")
    patches, _ = settings.patches([file])
    assert patches.shape == (4, 4)
    assert sorted((patches * 255).round().flatten().tolist()) == sorted(
        numpy.array(decoded(file, "L"), dtype=float).flatten().tolist()
    )


def saved_as(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright_as_their_exif_data_say(kind, orientation):
    stored = Image.fromarray(numpy.arange(8 * 4 * 3, dtype=numpy.uint8).reshape(8, 4, 3))
    exif = stored.getexif()
    exif[0x0112] = orientation
    file = saved_as(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file)))
    assert numpy.array_equal(decoded(file), upright)
    assert size_of(file) == (upright.height, upright.width) == ((8, 4) if orientation < 5 else (4, 8))
    settings = ImageSettings.build(data_config(), vision_config())
    assert settings.grid([file]) == settings.patches([file])[1]


def test_the_size_of_a_png_file_is_read_without_decoding_it():
    file = saved_as(Image.fromarray(numpy.zeros((64, 32, 3), dtype=numpy.uint8)), "PNG")
    assert size_of(file[:60]) == (64, 32)


def test_exif_data_that_cannot_be_read_do_not_matter():
    file = saved_as(Image.new("RGB", (4, 8)), "JPEG", exif=b"Exif\0\0broken")
    assert size_of(file) == (8, 4)
    assert decoded(file).size == (4, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_of_16_bits_becomes_grey_of_8(kind, mode):
    values = numpy.array([[0, 128, 129, 257], [300, 32768, 40000, 65535]], dtype=numpy.uint16)
    pixels = numpy.array(decoded(saved_as(Image.fromarray(values), kind), mode))
    expected = numpy.array([[0, 0, 1, 1], [1, 128, 156, 255]])
    assert numpy.array_equal(pixels if mode == "L" else pixels[..., 1], expected)


def test_errors_of_any_kind_in_a_decoder_are_those_of_the_image(monkeypatch):
    """Libraries under Pillow raise what they like: libavif a RuntimeError, for one."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to decode frame 0")

    settings = ImageSettings.build(data_config(), vision_config())
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", fail)
        with pytest.raises(ImageError, match="an image is corrupt: Failed to decode"):
            settings.patches([picture(4, 4)])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(ImageError, match="is no image that can be read: Failed to decode"):
            settings.grid([picture(4, 4)])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([b"no image"], "8 bytes is no image"),
        ([picture(4, 4), picture(4, 8)], "differ in size .*: 4 x 4, 4 x 8"),
        ([picture(1, 201)], "at most 200 times"),
    ],
)
def test_files_that_are_no_images_are_refused_before_they_are_decoded(files, message):
    settings = ImageSettings.build(data_config(), vision_config())
    with pytest.raises(ImageError, match=message):
        settings.grid(files)


@pytest.mark.parametrize(
    ("data", "vision", "message"),
    [
        ({}, {"vision_num_channels": 2}, "--vision-num-channels is 2"),
        ({"multimodal_image_mean": [0.5]}, {}, "--multimodal-image-mean has 1 values"),
        ({"multimodal_max_pixels": 16}, {"vision_patch_size": 4}, "--multimodal-max-pixels is 16"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(data, vision, message):
    with pytest.raises(ConfigError, match=message):
        ImageSettings.build(data_config(**data), vision_config(**vision))


# -- tokens --------------------------------------------------------------------------------------------------


def test_placeholders_stand_where_the_images_are_one_for_each_token():
    measured = encoder().measure(INTERLEAVED)
    text = list("naïve\n".encode())
    expected = [*b"a ", IMAGE, IMAGE, *text, VIDEO, VIDEO, VIDEO, IMAGE, IMAGE, IMAGE, IMAGE, EOD]
    assert measured.tokens.tolist() == expected
    assert measured.grids == ((1, 2, 4), (3, 2, 2), (1, 4, 4))
    document = encoder().decode(measured)
    assert document.grid_thw.tolist() == [list(grid) for grid in measured.grids]
    assert document.patches is not None
    assert document.patches.shape == (8 + 12 + 16, 12)
    assert encoder().without_pixels(measured).patches is None


@pytest.mark.parametrize(
    ("template", "include", "begin", "end"),
    [
        ("<s> $A", True, [0], [1]),
        ("<s> $A </s>", True, [0], [1]),
        ("<s> $A <s>", True, [0], [0, 1]),
        ("<s> $A", False, [], [1]),
    ],
)
def test_a_sample_begins_and_ends_as_a_document_of_text_does(template, include, begin, end, tmp_path):
    """The tokenizer of a Hugging Face model marks the beginning of every text that it is given."""
    letters = {chr(ord("a") + number): 3 + number for number in range(26)}
    bpe = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1, "<image>": 2} | letters, merges=[]))
    bpe.add_special_tokens(["<s>", "</s>", "<image>"])
    ids = [("<s>", 0), ("</s>", 1)]
    bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(
        TokenizerConfig(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tmp_path),
            tokenizer_hf_no_include_special_tokens=not include,
        )
    )
    vision = vision_config(vision_image_token_id=2, vision_video_token_id=None)
    images = ImageSettings.build(data_config(), vision)
    samples = SampleEncoder(tokenizer, images, vision, seq_length=20)

    def tokens(*pieces: Text | Visual) -> list[int]:
        return samples.measure(Sample("k", pieces)).tokens.tolist()

    image = Visual((picture(4, 4),))
    assert tokens(Text("ab"), image, Text("c"), Text("d")) == [*begin, 3, 4, 2, 5, 6, *end]
    assert tokens(image) == [*begin, 2, *end]
    assert tokens(Text("abc")) == TextEncoder(tokenizer).encode(TextDocument("k", "abc", 3)).tolist()
    with pytest.raises(SampleError, match="neither text nor images"):
        tokens(Text(""))


def test_a_corrupt_image_is_found_when_it_is_decoded():
    whole = picture(16, 16)
    measured = encoder().measure(Sample("torn", (Visual((whole[: len(whole) // 2],)),)))
    with pytest.raises(SampleError, match="sample torn: visual 1: an image is corrupt"):
        encoder().decode(measured)


def test_an_image_of_another_size_than_its_header_says_is_refused():
    measured = replace(encoder().measure(Sample("k7", (Visual((picture(8, 8),)),))), grids=((1, 2, 4),))
    with pytest.raises(SampleError, match=r"sample k7: visual 1 .*: \(1, 2, 4\) and \(1, 4, 4\) patches"):
        encoder().decode(measured)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((Text("a<image>b<image>"),), r"holds 2 placeholder tokens \(\(258, 259\)\)"),
        ((Visual((b"x",)),), "image 1: a file of 1 bytes is no image"),
        ((Visual((picture(4, 4),)), Visual((b"x",), is_video=True)), "video 2: a file of 1 bytes"),
        ((Visual((picture(32, 32),)), Text("a")), "has 65 tokens, but a sequence has 64"),
        (
            (Visual((picture(4, 4), *[picture(4, 4)] * 64), is_video=True),),
            "65 tokens, but a sequence has 64",
        ),
        ((Text(""),), "neither text nor images"),
        ((Text("a\ud800"),), "its text is no Unicode"),
    ],
)
def test_samples_that_cannot_be_used_are_refused_with_their_key(pieces, message):
    with pytest.raises(SampleError, match=f"^sample k7: .*{message}"):
        encoder().measure(Sample("k7", pieces))


def test_an_image_larger_than_the_context_is_refused_by_its_grid():
    with pytest.raises(SampleError, match=r"sample k7: image 1: .*1 x 16 x 16 patches is 64 tokens.* has 32"):
        encoder(seq_length=32).measure(Sample("k7", (Visual((picture(32, 32),)),)))


# -- packing -------------------------------------------------------------------------------------------------


def test_every_sample_is_packed_once_and_fits():
    measured = [encoder().measure(each) for each in samples(40)]
    packs = choose(measured, 24)
    assert sorted(each.key for pack in packs for each in pack) == [each.key for each in measured]
    lengths = [sum(each.length for each in pack) for pack in packs]
    assert max(lengths) <= 24
    total = sum(each.length for each in measured)
    assert len(packs) <= -(-total // 24) + 1  # close to the best possible
    assert packs == choose(measured, 24)


def test_a_sequence_is_its_documents_end_to_end():
    documents = [encoder().decode(encoder().measure(sample(number))) for number in (3, 4)]
    sequence = join(documents, seq_length=20, filler=EOD, placeholder_ids=(IMAGE, VIDEO))
    values = sequence.values
    # Number 3: "abcd" and 4 tokens of image; number 4: "abcde" and 1 token.
    first, second = [*b"abcd", *[IMAGE] * 4], [*b"abcde", IMAGE]
    assert values["tokens"].tolist() == [*first, *second, *[EOD] * 6]
    assert values["labels"].tolist() == [*first[1:], EOD, *second[1:], EOD, *[EOD] * 6]
    assert values["position_ids"].tolist() == [*range(8), *range(6), *range(6)]
    assert values["cu_seqlens"].tolist() == [0, 8, 14, *[20] * 18]
    assert values["max_seqlen"] == 8
    # No loss where an image is to be predicted, and none on what fills the sequence up. What follows an image
    # is predicted from its last token.
    assert values["loss_mask"].tolist() == [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, *[0] * 6]
    assert sequence.grid_thw.tolist() == [[1, 4, 4], [1, 2, 2]]
    assert torch.equal(sequence.patches, torch.cat([document.patches for document in documents]))
    counts = vars(sequence.counts)
    expected = {"sequences": 1, "documents": 2, "visuals": 2, "visual_tokens": 5, "padding_tokens": 6}
    assert counts == {**expected, "skipped_samples": 0}


def test_a_full_sequence_has_no_document_of_filling():
    document = encoder().decode(encoder().measure(sample(3)))
    sequence = join([document], seq_length=8, filler=EOD, placeholder_ids=(IMAGE,))
    assert sequence.values["cu_seqlens"].tolist() == [0, *[8] * 8]
    assert sequence.counts.padding_tokens == 0
