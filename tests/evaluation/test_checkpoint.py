"""From a checkpoint on disk to a report, with the real engine; and the selection against brute force."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from megatron.core import dist_checkpointing

from megatron_msa.attention import self_attention
from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.checkpoint.hf.megatron_model import seed
from megatron_msa.data.byte_tokenizer import BYTE_VOCAB_SIZE, write_byte_tokenizer
from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import command, selection
from megatron_msa.evaluation.checkpoint_subject import fingerprint
from megatron_msa.inference.paged_rows import E4M3, PagedRows
from megatron_msa.phases import Phase
from tests.attention.conftest import process_groups
from tests.attention.tiny import BLOCK, initial_model, set_phase, tiny_arguments, tiny_config, tiny_model

__all__ = ["process_groups"]
LENGTHS = ["64", "90"]
PADDED = 264


def write_checkpoint(folder: Path, iteration: int = 7, **changes) -> None:
    seed(iteration)
    shape = {"vocab_size": BYTE_VOCAB_SIZE, "make_vocab_size_divisible_by": 8, "should_pad_vocab": True}
    model = initial_model(tiny_config(**changes), seq_length=96, **shape)
    arguments = tiny_arguments(
        seq_length=96,
        max_position_embeddings=96,
        msa_block_size=BLOCK,
        msa_num_selected_blocks=3,
        msa_indexer_head_dim=12,
        msa_layer_freq=changes.get("msa_layer_freq", 1),
        msa_schedule=changes.get("msa_schedule", "warmup@0"),
        padded_vocab_size=PADDED,
        make_vocab_size_divisible_by=8,
        tensor_model_parallel_size=1,
        consumed_train_samples=5,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(write_byte_tokenizer(folder / "tokenizer")),
    )
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    state = {"model": model.sharded_state_dict(), "args": arguments, "iteration": iteration}
    dist_checkpointing.save(state, str(checkpoint))
    (folder / "latest_checkpointed_iteration.txt").write_text(str(iteration))


@pytest.fixture(scope="module")
def trained(process_groups: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last phase was the warmup: "msa" must select blocks all the same."""
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder)
    return folder


def evaluate(load: Path, output: Path, *flags: str) -> int:
    arguments = ["run", "--load", str(load), "--output", str(output), "--lengths", *LENGTHS, "--samples", "1"]
    arguments += ["--num-depths", "2", "--style", "completion", "--max-sequences", "2", *flags]
    return command.main(None, arguments)


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report")
    flags = ["--tasks", "needle", "perplexity", "selection", "serving", "--attention", "msa,dense"]
    assert evaluate(trained, output, *flags, "--scoring", "generation", "log_probability") == 0
    return output


@pytest.mark.slow
def test_a_checkpoint_gives_cells_tables_and_pictures(report):
    found = json.loads((report / "results.json").read_text())
    assert len(found["cells"]) == 2 * (2 * (2 + 1) + 1 + 1)
    assert found["checkpoint"]["iteration"] == 7
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert {path.name for path in report.glob("*.png")} == {
        "needle_generation.png",
        "needle_log_probability.png",
        "recall_by_length.png",
        "perplexity_by_position.png",
    }
    assert "| needle | dense |" in (report / "report.md").read_text()
    assert all(max(cell["prompt_tokens"]) <= cell["length"] for cell in found["cells"] if "scores" in cell)


def test_the_command_draws_the_heatmap_of_a_checkpoint(trained, tmp_path, capsys):
    """As in the README, with little text to hide the needles in."""
    (tmp_path / "haystack.txt").write_text("A line of text.\nAnother line.\n")
    output = tmp_path / "report"
    flags = ["--tasks", "needle", "common_words", "serving", "--attention", "msa, dense"]
    assert evaluate(trained, output, *flags, "--haystack", str(tmp_path / "haystack.txt")) == 0
    cells = [json.loads(line)["cell"] for line in (output / "cells.jsonl").read_text().splitlines()[1:]]
    needles = {
        (cell["attention"], cell["length"], cell["depth"]) for cell in cells if cell["task"] == "needle"
    }
    assert needles == set(itertools.product(("msa", "dense"), map(int, LENGTHS), (0.0, 1.0)))
    assert imread(output / "needle_generation.png").std() > 0.01
    text = (output / "report.md").read_text()
    assert "| task | attention | 64 | 90 |" in text
    assert all(f"| needle | {mode} | " in text for mode in ("msa", "dense"))
    assert "- common_words at 64: the task common_words takes " in text
    printed = capsys.readouterr()
    assert f"wrote {output}/needle_generation.png" in printed.out
    assert "left out: common_words at 90: " in printed.err


@pytest.mark.slow
def test_dense_is_another_model_than_msa_on_the_same_prompts(report):
    cells = json.loads((report / "results.json").read_text())["cells"]
    by_mode = {
        mode: [
            cell for cell in cells if cell["attention"] == mode and cell["task"] in ("needle", "perplexity")
        ]
        for mode in ("msa", "dense")
    }
    for msa, dense in zip(by_mode["msa"], by_mode["dense"], strict=True):
        assert msa.get("prompt_tokens") == dense.get("prompt_tokens")
        key = "mean_loss" if msa["task"] == "perplexity" else "answer_log_probability"
        assert msa[key] != dense[key]
        assert msa[key] == pytest.approx(dense[key], rel=0.2), "the same weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "97"], "--lengths has 97, but the model takes 96 tokens"),
        (["--tasks", "niah"], "--tasks has 'niah'; there are needle, multi_key"),
        (["--tasks", "common_words"], "common_words takes .* but the length is 64"),
        (["--ckpt-step", "8"], "iter_0000008, chosen with --ckpt-step, does not exist"),
        (["--haystack", "nothing.txt"], "nothing.txt does not exist"),
        (["--samples", "2"], "other settings (samples: 1 before, 2 now)"),
        (["--num-depths", "0"], "--num-depths is 0"),
    ],
)
def test_bad_input_ends_with_status_2_and_says_why(flags, message, trained, report, capsys):
    common = ["--tasks", "needle", "--scoring", "generation", "log_probability"]
    assert evaluate(trained, report, *common, *flags) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in message.split(" .* ")), error


@pytest.mark.slow
def test_another_tokenizer_than_the_checkpoints_is_refused(trained, tmp_path, capsys):
    folder = write_byte_tokenizer(tmp_path / "tokenizer")
    described = json.loads((folder / "tokenizer.json").read_text())
    more = [
        {"id": 258 + n, "content": f"<|{n}|>", "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for n in range(20)
    ]
    described["added_tokens"] += more
    (folder / "tokenizer.json").write_text(json.dumps(described))
    assert evaluate(trained, tmp_path / "out", "--tokenizer-model", str(folder)) == 2
    assert (
        "the checkpoint has 264 embeddings; use the tokenizer it was trained with" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_checkpoint_without_msa_layers_is_evaluated_with_dense_attention_only(
    tmp_path, capsys, process_groups
):
    write_checkpoint(tmp_path / "run", msa_layer_freq="([0]*2)", msa_schedule="dense@0")
    assert evaluate(tmp_path / "run", tmp_path / "out") == 2
    assert "has no MSA layer: use --attention dense" in capsys.readouterr().err
    assert evaluate(tmp_path / "run", tmp_path / "out", "--attention", "dense") == 0
    flags = ["--attention", "dense", "--tasks", "selection"]
    assert evaluate(tmp_path / "run", tmp_path / "out", *flags) == 2


@pytest.mark.slow
def test_other_weights_of_the_same_shape_have_another_fingerprint(trained, tmp_path, process_groups):
    write_checkpoint(tmp_path / "run", iteration=8)
    other = tmp_path / "run" / "iter_0000008"
    assert fingerprint(trained / "iter_0000007") == fingerprint(trained / "iter_0000007")
    assert fingerprint(trained / "iter_0000007") != fingerprint(other)


def test_the_selections_recall_is_that_of_brute_force(process_groups, monkeypatch):
    """All rows of two layers, block by block, from the tensors that the layers work on."""
    torch.manual_seed(1)
    seed(1)
    model = tiny_model()
    set_phase(model, Phase.WARMUP)
    length = 30
    texts = torch.randint(64, (2, length)).tolist()
    expected: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for layer in msa_layers(model):
        run = layer._run_core_attention

        def measured(query, key, *args, run=run, number=layer.layer_number, block_ids, **kwargs):
            scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(2, dim=1)) / 8**0.5
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            mass = scores.masked_fill(~mask, -torch.inf).softmax(-1).unflatten(0, (2, 2)).mean(1)
            for row in range(3 * BLOCK, length):
                for group in range(2):
                    blocks = [float(mass[group, row, b * BLOCK : (b + 1) * BLOCK].sum()) for b in range(8)]
                    best = sorted(range(8), key=lambda b, blocks=blocks: -blocks[b])[:3]
                    found = set(best) & set(block_ids[row, group].tolist())
                    share = sum(blocks[b] for b in found) / sum(blocks[b] for b in best)
                    expected[number].append((len(found) / 3, share))
            return run(query, key, *args, block_ids=block_ids, **kwargs)

        monkeypatch.setattr(layer, "_run_core_attention", measured)
    result = selection.measure(model, texts, rows=1000)
    for number, pairs in expected.items():
        assert len(pairs) == 2 * (length - 3 * BLOCK) * 2
        for name, values in zip(("block_recall", "score_recall"), zip(*pairs, strict=True), strict=True):
            assert result["per_layer"][name][str(number)] == pytest.approx(
                sum(values) / len(values), rel=1e-9
            )
    assert 0 < result["block_recall"] < 1
    assert all(layer.phase is Phase.WARMUP and not layer.sample_quality for layer in msa_layers(model))
    assert model.training
    assert model.post_process


def test_the_selection_is_measured_with_the_index_keys_of_the_cache(process_groups, monkeypatch):
    """Against the cache itself: what is written to its pages and read from them again."""
    torch.manual_seed(1)
    seed(1)
    model = tiny_model()
    texts = torch.randint(64, (4, 60)).tolist()
    exact = selection.measure(model, texts, rows=1000)
    found = selection.measure(model, texts, rows=1000, index_key_dtype=E4M3)
    assert found != exact
    assert selection.measure(model, texts, rows=1000) == exact, "the layers are as they were"

    select = self_attention.block_select

    def through_the_cache(index_query, index_key, *args, **options):
        tokens, heads, dim = index_key.shape
        pages = PagedRows(1, heads, tokens, dim, E4M3, index_key.device)
        place = torch.arange(tokens, device=index_key.device)
        pages.write(torch.zeros_like(place), place, index_key)
        rounded = pages.read(torch.zeros(1, dtype=torch.int64), tokens, index_key.dtype)
        return select(index_query, rounded, *args, **options)

    monkeypatch.setattr(self_attention, "block_select", through_the_cache)
    assert selection.measure(model, texts, rows=1000) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"msa_layer_freq": "[0,0]"}, "the checkpoint has no MSA layer; leave it out"),
        ({"context_parallel_size": 2}, "--context-parallel-size is 2, and the selection is measured with 1"),
    ],
)
def test_a_model_whose_selection_cannot_be_measured_says_why(changes, message, process_groups, monkeypatch):
    seed(1)
    model = tiny_model(tiny_config(msa_layer_freq=changes.get("msa_layer_freq", 1)))
    monkeypatch.setattr(model.config, "context_parallel_size", changes.get("context_parallel_size", 1))
    assert selection.obstacle(tiny_model()) is None
    assert message in selection.obstacle(model)
    with pytest.raises(ConfigError, match=message):
        selection.measure(model, [[1, 2]], rows=5)


def test_a_text_of_no_more_blocks_than_are_chosen_says_nothing(process_groups):
    seed(1)
    result = selection.measure(tiny_model(), [[1] * (3 * BLOCK)], rows=5)
    assert result["block_recall"] is None
    assert result["per_layer"]["score_recall"] == {}
