"""From a checkpoint on disk to text."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf.megatron_model import seed
from megatron_msa.data.byte_tokenizer import BYTE_EOD, BYTE_VOCAB_SIZE, write_byte_tokenizer
from megatron_msa.data.metadata import tokenizer_fingerprint
from megatron_msa.errors import ConfigError
from megatron_msa.inference.command import build_parser, run
from megatron_msa.inference.engine import InferenceEngine
from megatron_msa.inference.loading import load, tokenizer_for
from megatron_msa.model.from_checkpoint import model_config_from_checkpoint
from megatron_msa.phases import Phase
from tests.attention.tiny import initial_model, tiny_arguments, tiny_config
from tests.inference.checks import full_logits

ITERATION = 7
PADDED = 264
"""The byte tokenizer's 258 ids, padded to a multiple of 8."""
VOCABULARY = {"vocab_size": BYTE_VOCAB_SIZE, "make_vocab_size_divisible_by": 8, "should_pad_vocab": True}


@pytest.fixture(scope="module")
def trained(process_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: one checkpoint, as Megatron saves it, in the sparse phase of its schedule."""
    folder = tmp_path_factory.mktemp("run")
    seed(3)
    model = initial_model(tiny_config(), **VOCABULARY)
    arguments = tiny_arguments(
        seq_length=32,
        max_position_embeddings=64,
        msa_block_size=4,
        msa_num_selected_blocks=3,
        msa_indexer_head_dim=12,
        msa_schedule="warmup@0,sparse@150tok",
        padded_vocab_size=PADDED,
        make_vocab_size_divisible_by=8,
        tensor_model_parallel_size=1,
        consumed_train_samples=5,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(write_byte_tokenizer(folder / "tokenizer")),
    )
    checkpoint = folder / f"iter_{ITERATION:07d}"
    checkpoint.mkdir()
    common = {"args": arguments, "iteration": ITERATION}
    dist_checkpointing.save({"model": model.sharded_state_dict(), **common}, str(checkpoint))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.save({"weights": model.state_dict(), "args": arguments}, folder / "whole.pt")
    return folder


def saved(trained: Path) -> dict:
    return torch.load(trained / "whole.pt", weights_only=False)


def test_the_model_is_the_one_that_was_saved_in_its_phase(trained):
    loaded = load(trained)
    assert (loaded.iteration, loaded.phase) == (ITERATION, Phase.SPARSE)
    assert {layer.phase for layer in msa_layers(loaded.model)} == {Phase.SPARSE}
    weights = saved(trained)["weights"]
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert not loaded.model.training
    # 5 samples of 32 tokens were consumed.
    assert load(trained, msa_schedule="warmup@0,sparse@161tok").phase is Phase.WARMUP
    assert load(trained, msa_schedule="warmup@0,sparse@160tok").phase is Phase.SPARSE
    assert load(trained, dtype=torch.bfloat16).model.embedding.word_embeddings.weight.dtype == torch.bfloat16


def test_the_position_limit_is_that_of_the_checkpoint(trained):
    engine = InferenceEngine(load(trained).model, max_tokens=80)
    with pytest.raises(ConfigError, match="trained for positions up to 64 "):
        engine.generate([[1] * 65], max_new_tokens=1)


def test_the_command_prints_what_the_model_says(trained, capsys):
    run(
        build_parser("").parse_args(
            [
                "--load",
                str(trained),
                "--prompt",
                "def f",
                "--prompt",
                "é",
                "--max-new-tokens",
                "6",
                "--greedy",
            ]
        )
    )
    printed = capsys.readouterr().out
    loaded = load(trained)
    tokenizer = tokenizer_for(loaded.args)
    for prompt in ("def f", "é"):
        ids = list(prompt.encode())
        for _ in range(6):
            ids.append(int(full_logits(loaded.model, ids)[-1, :BYTE_VOCAB_SIZE].argmax()))
            if ids[-1] == BYTE_EOD:
                ids.pop()
                break
        assert f"{tokenizer.detokenize(ids)}\n----" in printed
    assert "iteration 7 (sparse phase) | prefill 7 tokens, " in printed
    assert "decode 10 tokens, " in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "there is no prompt; give --prompt"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt cannot be read"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a", "--temperature", "0"], "temperature is 0.0; it must be above 0"),
        (["--prompt", "a", "--max-new-tokens", "-5"], "--max-new-tokens is -5; it must be 1 or more"),
        (["--prompt", "a", "--prefill-chunk", "0", "--load", "nowhere"], "--prefill-chunk is 0; it must be"),
        (["--prompt", "a", "--max-new-tokens", "64"], "trained for positions up to 64"),
        (["--prompt", "a", "--tensor-model-parallel-size", "2"], "is 2, and there are 1 processes"),
        (["--prompt", "a", "--cache-gib", "1e-9"], "and the given limit is 0.00 GiB"),
        (["--prompt", "a", "--tokenizer-model", "./nowhere"], "tokenizer ./nowhere does not exist"),
        (["--prompt", "a", "--ckpt-step", "9"], "iter_0000009.* does not exist"),
    ],
)
def test_the_command_refuses(trained, options, message):
    with pytest.raises(ConfigError, match=message):
        run(build_parser("").parse_args(["--load", str(trained), *options]))


def test_folders_without_a_usable_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        load(tmp_path)
    (tmp_path / "iter_0000001").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    with pytest.raises(ConfigError, match="is no distributed checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.distcp", r"iter_0000007 is damaged: __0_\d.distcp has 100 bytes of .*another --ckpt-step"),
        ("common.pt", r"the arguments in .*iter_0000007 cannot be read"),
        (".metadata", r"iter_0000007 is damaged: .metadata cannot be read"),
    ],
)
def test_a_checkpoint_that_was_cut_short_is_refused(trained, tmp_path, pattern, message):
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = tmp_path / "run" / f"iter_{ITERATION:07d}"
    if pattern == "common.pt":
        (checkpoint / pattern).touch()  # where older versions of Megatron keep the arguments
    (file, *_) = sorted(checkpoint.glob(pattern))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "run")


def test_a_tokenizer_of_more_ids_than_embeddings_is_refused(trained):
    arguments = argparse.Namespace(**vars(saved(trained)["args"]) | {"padded_vocab_size": 256})
    with pytest.raises(ConfigError, match="has 258 ids, but the checkpoint has 256 embeddings"):
        tokenizer_for(arguments)


def test_an_embedding_that_was_padded_further_is_none_of_the_tokenizers_business(trained):
    """As a conversion from Hugging Face pads it, from the rows that were there."""
    arguments = argparse.Namespace(**vars(saved(trained)["args"]) | {"padded_vocab_size": 384})
    assert tokenizer_for(arguments).vocab_size == BYTE_VOCAB_SIZE


def test_a_tokenizer_of_the_same_size_with_other_ids_is_refused(trained, tmp_path):
    arguments = saved(trained)["args"]
    known = tokenizer_fingerprint(tokenizer_for(arguments))
    arguments = argparse.Namespace(**vars(arguments) | {"tokenizer_fingerprint": known})
    assert tokenizer_for(arguments).vocab_size == BYTE_VOCAB_SIZE
    permuted = write_byte_tokenizer(tmp_path / "permuted")
    described = json.loads((permuted / "tokenizer.json").read_text())
    ids = described["model"]["vocab"]
    ids["a"], ids["e"] = ids["e"], ids["a"]
    (permuted / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"permuted \(258 ids, end of document 256\) is another one"):
        tokenizer_for(arguments, tokenizer_model=str(permuted))


def test_the_rotary_embedding_is_scaled_as_in_training(trained):
    """Megatron's frequencies of a model of these arguments, not those of its default factor 8."""
    arguments = saved(trained)["args"]
    given = {"use_rope_scaling": True, "rope_scaling_factor": 32.0, "rotary_base": 500000}
    scaled = argparse.Namespace(**vars(arguments) | given)
    config = model_config_from_checkpoint(scaled)
    assert (config.rope_scaling, config.rope_scaling_factor) == (True, 32.0)
    found = load(trained, **given).model.rotary_pos_emb.inv_freq
    expected = RotaryEmbedding(8, 0.5, rotary_base=500000, rope_scaling=True, rope_scaling_factor=32.0)
    torch.testing.assert_close(found.cpu(), expected.inv_freq.cpu(), rtol=0, atol=0)


def test_a_dense_run_of_megatrons_own_loads(trained, tmp_path):
    """Without msa settings in its arguments: full attention."""
    arguments = argparse.Namespace(**vars(saved(trained)["args"]))
    for name in [name for name in vars(arguments) if name.startswith("msa_")]:
        delattr(arguments, name)
    dense = initial_model(tiny_config(msa_layer_freq="[0,0]", msa_block_size=128), **VOCABULARY)
    (tmp_path / "iter_0000001").mkdir()
    state = {"model": dense.sharded_state_dict(), "args": arguments, "iteration": 1}
    dist_checkpointing.save(state, str(tmp_path / "iter_0000001"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    loaded = load(tmp_path)
    assert loaded.phase is Phase.DENSE
    ids = list(range(30))
    (found,) = InferenceEngine(loaded.model, max_tokens=64).log_probabilities([ids])
    expected = full_logits(dense, ids)[:-1].log_softmax(-1)[torch.arange(29), torch.tensor(ids[1:])]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
