"""Which checkpoint would be loaded, and whether the model can continue from it."""

import argparse
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save

from megatron_msa.checkpoint.inspection import check_checkpoint, find_checkpoint, tensor_shapes
from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError

VOCABULARY = 16


def write_checkpoint(root: Path, *tensors: str, step: int = 3, latest: str | None = None) -> Path:
    """A torch_dist checkpoint of small tensors; the embedding is always there."""
    folder = root / f"iter_{step:07d}"
    state = {name: torch.zeros(2, 2) for name in tensors}
    state["embedding.word_embeddings.weight"] = torch.zeros(VOCABULARY, 4)
    save(state, checkpoint_id=folder, no_dist=True)
    (root / "latest_checkpointed_iteration.txt").write_text(str(step) if latest is None else latest)
    return folder


def index_key(layer: int) -> str:
    return f"decoder.layers.{layer}.self_attention.index_branch.linear_index_k.weight"


def check(
    load: Path | None,
    *,
    layers: str = "1",
    vocabulary: int = VOCABULARY,
    pretrained: Path | None = None,
    init_index: str | None = None,
    with_optimizer: bool = False,
) -> None:
    config = MSATransformerConfig(
        num_layers=2,
        hidden_size=8,
        num_attention_heads=2,
        attention_dropout=0.0,
        normalization="RMSNorm",
        transformer_impl="local",
        msa_schedule="sparse@0",
        msa_layer_freq=layers,
    )
    args = argparse.Namespace(
        load=load and str(load),
        ckpt_step=None,
        pretrained_checkpoint=pretrained and str(pretrained),
        msa_init_index=init_index,
        finetune=False,
        no_load_optim=not with_optimizer,
        skip_train=False,
    )
    check_checkpoint(args, config, vocabulary)


class TestFinding:
    def test_the_tracker_names_the_checkpoint(self, tmp_path: Path) -> None:
        assert find_checkpoint(str(tmp_path / "nowhere")) is None
        assert find_checkpoint(None) is None
        folder = write_checkpoint(tmp_path, step=12)
        assert find_checkpoint(str(tmp_path)) == folder

    def test_a_chosen_step_wins_over_the_tracker(self, tmp_path: Path) -> None:
        early = write_checkpoint(tmp_path, step=1)
        write_checkpoint(tmp_path, step=2)
        assert find_checkpoint(str(tmp_path), 1) == early

    def test_a_release_has_a_folder_of_its_own(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, latest="release").rename(tmp_path / "release")
        assert find_checkpoint(str(tmp_path)) == tmp_path / "release"

    @pytest.mark.parametrize("text", ["", "soon", "-3"])
    def test_a_tracker_that_names_no_iteration_is_refused(self, tmp_path: Path, text: str) -> None:
        write_checkpoint(tmp_path, latest=text)
        with pytest.raises(ConfigError, match=r"holds '.*' where an iteration is expected"):
            find_checkpoint(str(tmp_path))

    @pytest.mark.parametrize(("step", "advice"), [(None, "named by"), (9, "chosen with --ckpt-step")])
    def test_a_missing_folder_is_refused(self, tmp_path: Path, step: int | None, advice: str) -> None:
        write_checkpoint(tmp_path, latest="8")
        with pytest.raises(ConfigError, match=f"iter_000000{step or 8}, {advice}.* does not exist"):
            find_checkpoint(str(tmp_path), step)


class TestFitting:
    def test_a_checkpoint_with_all_index_branches_fits(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, index_key(0), index_key(1))
        check(tmp_path)
        check(tmp_path, layers="[0,1]")  # what is there in addition does no harm
        check(None)

    def test_one_tensor_may_hold_all_layers(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, "decoder.layers.self_attention.index_branch.linear_index_k.weight")
        check(tmp_path)

    def test_the_optimizer_state_of_an_index_branch_is_not_an_index_branch(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, f"optimizer.state.exp_avg.{index_key(0)}")
        with pytest.raises(ConfigError, match="has no index branch"):
            check(tmp_path)

    def test_a_dense_checkpoint_is_refused_with_both_ways_on(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path)
        with pytest.raises(
            ConfigError, match=r"Add --msa-init-index .* gqa-to-msa, .* --msa-layer-freq '\(\[0\]\*2\)'"
        ):
            check(tmp_path)
        check(tmp_path, layers="([0]*2)")

    def test_a_dense_checkpoint_is_accepted_if_its_index_branches_may_be_initialised(
        self, tmp_path: Path
    ) -> None:
        write_checkpoint(tmp_path)
        check(tmp_path, init_index="low_rank")
        with pytest.raises(ConfigError, match=r"no checkpoint in --load .*nowhere"):
            check(tmp_path / "nowhere", init_index="low_rank")

    def test_a_checkpoint_without_optimizer_state_needs_a_new_optimizer(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, index_key(0), index_key(1))
        with pytest.raises(ConfigError, match="has no optimizer state; add --no-load-optim"):
            check(tmp_path, with_optimizer=True)
        write_checkpoint(tmp_path, index_key(0), index_key(1), f"optimizer.state.exp_avg.{index_key(0)}")
        check(tmp_path, with_optimizer=True)

    def test_the_layer_without_an_index_branch_is_named(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, index_key(1))
        with pytest.raises(ConfigError, match=r"no index branch in layer 1 \(counted from 1\)"):
            check(tmp_path)

    def test_another_vocabulary_is_refused(self, tmp_path: Path) -> None:
        write_checkpoint(tmp_path, index_key(0), index_key(1))
        with pytest.raises(ConfigError, match="has 16 embeddings, the model 24"):
            check(tmp_path, vocabulary=24)

    def test_a_checkpoint_whose_save_was_interrupted_is_refused(self, tmp_path: Path) -> None:
        (write_checkpoint(tmp_path, index_key(0)) / ".metadata").unlink()
        with pytest.raises(ConfigError, match="is not a complete torch_dist checkpoint"):
            check(tmp_path)

    def test_damaged_metadata_is_refused(self, tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path, index_key(0))
        (folder / ".metadata").write_bytes(b"nothing")
        with pytest.raises(ConfigError, match="is not a complete torch_dist checkpoint"):
            tensor_shapes(folder)

    def test_megatrons_older_format_is_left_to_megatron(self, tmp_path: Path) -> None:
        (tmp_path / "iter_0000003/mp_rank_00").mkdir(parents=True)
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
        check(tmp_path)

    def test_the_pretrained_checkpoint_counts_until_the_run_has_its_own(self, tmp_path: Path) -> None:
        own, pretrained = tmp_path / "own", tmp_path / "pretrained"
        write_checkpoint(pretrained)
        with pytest.raises(ConfigError, match="pretrained/iter_0000003 has no index branch"):
            check(own, pretrained=pretrained)
        write_checkpoint(own, index_key(0), index_key(1))
        check(own, pretrained=pretrained)
