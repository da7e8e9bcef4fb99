"""The recipes for clusters: accepted by every check of a real start, and of the sizes that they claim."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_msa.checkpoint.hf.megatron_model import build, single_process
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size
from megatron_msa.training import argument_checks, arguments, megatron_fixes
from megatron_msa.training.parameter_count import count_parameters
from tests.planning.conftest import REPOSITORY, Flags

GPUS = {"msa_109b": 512, "pilot_10b": 64}
STAGES = [("msa_109b", stage) for stage in ("8k", "32k", "192k", "1m")]
STAGES += [("pilot_10b", stage) for stage in ("8k", "32k", "192k")]


def start(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, world_size: int
) -> tuple[argparse.Namespace, MSAModelConfig]:
    """What pretrain_msa.py does before it starts a process group, as the first of so many processes."""
    args = parse(flags, monkeypatch, world_size)
    arguments.tokenizer_from_args(args)
    return args, arguments.model_config_from_args(args)


def parse(flags: list[str], monkeypatch: pytest.MonkeyPatch, world_size: int) -> argparse.Namespace:
    """The arguments, checked by us and by Megatron."""
    megatron_fixes.apply()
    monkeypatch.setattr(sys, "argv", ["pretrain_msa.py", *flags])
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return arguments.parse_arguments(has_gpu=False)


@pytest.mark.parametrize(("recipe", "stage"), STAGES)
def test_a_stage_passes_the_checks_of_a_real_start(
    recipe: str, stage: str, recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, config = start(recipe_flags(f"{recipe}/pretrain.sh", stage), monkeypatch, GPUS[recipe])
    tokens = args.global_batch_size * args.seq_length
    assert tokens == pytest.approx({"msa_109b": 2**24, "pilot_10b": 2**22}[recipe], rel=0.26)
    assert config.transformer.msa_layer_pattern() == [1] * args.num_layers
    assert args.exit_signal_handler
    assert args.moe_token_dispatcher_type == "alltoall"


@pytest.mark.parametrize("recipe", GPUS)
def test_the_conversion_and_its_dense_start_pass_the_checks(
    recipe: str, recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The dense run is the command that the script's head gives.
    head = (REPOSITORY / f"examples/{recipe}/convert.sh").read_text().partition("set -euo")[0]
    command = head.partition("The dense run is this one")[2].partition("#   ")[2].replace("\\\n#", "")
    variables, _, arguments = command.partition(f"examples/{recipe}/pretrain.sh ")
    environment = dict(word.split("=", 1) for word in shlex.split(variables))
    stage, *more = shlex.split(arguments.partition(" --data-path")[0])
    dense = recipe_flags(f"{recipe}/pretrain.sh", stage, *more, MSA_LAYERS=environment["MSA_LAYERS"])
    dense_args, config = start(dense, monkeypatch, GPUS[recipe])
    assert sum(config.transformer.msa_layer_pattern()) == 0
    assert dense_args.dist_ckpt_optim_fully_reshardable

    flags = recipe_flags(f"{recipe}/convert.sh", DENSE=str(tmp_path / "dense"))
    # All checks but that of the dense checkpoint, which only a run can make.
    with pytest.raises(ConfigError, match="--msa-init-index is set, but there is no checkpoint in --load"):
        start(flags, monkeypatch, GPUS[recipe])
    option = flags.index("--msa-init-index")
    args, _ = start(flags[:option] + flags[option + 2 :], monkeypatch, GPUS[recipe])
    first, second = args.msa_schedule.split(",")
    assert (first, second.partition("@")[0]) == ("warmup@0", "sparse")
    assert dense_args.train_iters < int(second.partition("@")[2]) < args.train_iters

    # The learning rate starts anew where the dense checkpoint ends.
    scheduler = OptimizerParamScheduler(
        argparse.Namespace(param_groups=[]),
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=args.lr_warmup_iters,
        lr_decay_steps=args.lr_decay_iters,
        lr_decay_style=args.lr_decay_style,
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=1,
        wd_incr_style="constant",
        wsd_decay_steps=args.lr_wsd_decay_iters,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
    rates = []
    for iteration in (
        dense_args.train_iters,
        (dense_args.train_iters + args.train_iters) // 2,
        args.train_iters,
    ):
        scheduler.num_steps = iteration
        rates.append(scheduler.get_lr({}))
    assert rates == pytest.approx([3e-5, 1.65e-5, 3e-6], rel=1e-3)


def test_the_first_three_layers_can_keep_full_attention(
    recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = recipe_flags("msa_109b/pretrain.sh", "8k", MSA_LAYERS="([0]*3+[1]*38)")
    _, config = start(flags, monkeypatch, GPUS["msa_109b"])
    assert config.transformer.msa_layer_pattern() == [0] * 3 + [1] * 38


@pytest.fixture
def hopper_with_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the checks of a start ask for them; nothing can be computed."""
    from megatron.core.transformer.moe import moe_utils

    monkeypatch.setattr(argument_checks, "transformer_engine_present", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    for name in ("permute", "permute_with_probs", "unpermute", "sort_chunks_by_index"):
        monkeypatch.setattr(moe_utils, f"fused_{name}", print)
    monkeypatch.setattr(moe_utils, "fused_sort_chunks_by_index_with_probs", print)


@pytest.mark.usefixtures("hopper_with_transformer_engine")
@pytest.mark.parametrize(("recipe", "stage"), STAGES)
def test_megatron_accepts_the_kernels_that_recipes_ask_for(
    recipe: str, stage: str, recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(recipe_flags(f"{recipe}/pretrain.sh", stage, TE="1"), monkeypatch, GPUS[recipe])
    assert args.transformer_impl == "transformer_engine"
    assert args.moe_grouped_gemm
    assert args.moe_permute_fusion


@pytest.mark.skipif(argument_checks.transformer_engine_present(), reason="Transformer Engine is installed")
def test_recipes_need_transformer_engine_unless_told_otherwise(
    recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = recipe_flags("msa_109b/pretrain.sh", "8k", TE="1")
    with pytest.raises(ConfigError, match="Transformer Engine is not installed"):
        start(flags, monkeypatch, GPUS["msa_109b"])


def test_an_unknown_stage_and_a_missing_folder_are_refused() -> None:
    script = REPOSITORY / "examples/msa_109b/pretrain.sh"
    result = subprocess.run([script, "64k"], env={"SAVE": "x", "PATH": "/bin:/usr/bin"}, capture_output=True)
    assert result.returncode == 2
    assert b"unknown stage '64k'; choose 8k, 32k, 192k or 1m" in result.stderr
    result = subprocess.run([script, "8k"], env={"PATH": "/bin:/usr/bin"}, capture_output=True)
    assert result.returncode != 0
    assert b"SAVE: folder of the checkpoints" in result.stderr


def parameters(config: MSAModelConfig) -> dict[str, int]:
    """Of Megatron's own model, built without memory for them."""
    config.transformer.perform_initialization = False
    config.transformer.use_cpu_initialization = True
    # One process holds all of it.
    for size in ("pipeline", "tensor", "context", "expert"):
        name = f"{size}_model_parallel_size" if size != "context" else "context_parallel_size"
        setattr(config.transformer, name, 1)
    config.transformer.pipeline_model_parallel_layout = None
    config.transformer.virtual_pipeline_model_parallel_size = None
    with single_process(), torch.device("meta"):
        return {name: parameter.numel() for name, parameter in build(config).named_parameters()}


def test_the_pilot_has_the_sizes_of_the_paper(recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = start(recipe_flags("pilot_10b/pretrain.sh", "8k"), monkeypatch, GPUS["pilot_10b"])
    built = parameters(config)
    count = count_parameters(config.transformer, padded_vocab_size=200_064, untied_embeddings=False)
    assert sum(built.values()) == count.total
    index = sum(size for name, size in built.items() if "index_branch" in name)
    # The paper's 10.53B and 1.47B, which include the 0.41B of the shared vocabulary matrix once, are those of
    # the GQA form.
    assert round((count.total - index) / 1e9, 2) == 10.53
    assert round((count.active - index) / 1e9, 2) == 1.47
    assert round(count.total / 1e9, 2) == 10.55


@pytest.mark.slow  # a model of 15,000 modules
def test_the_large_model_has_109b_parameters(recipe_flags: Flags, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config = start(recipe_flags("msa_109b/pretrain.sh", "8k"), monkeypatch, GPUS["msa_109b"])
    built = parameters(config)
    assert padded_vocab_size(config) == 200_064
    count = count_parameters(config.transformer, padded_vocab_size=200_064, untied_embeddings=True)
    assert sum(built.values()) == count.total == 107_944_752_640
    assert count.total == pytest.approx(109e9, rel=0.01)
    # Active by the convention that gives the pilot's 1.47B. The paper's "6B" is nearer to what is left
    # without the output projection.
    assert count.active == 7_277_131_264
    without_vocabulary = count.active - count.active_by_part["output"]
    assert without_vocabulary == 6_662_534_656
    assert without_vocabulary // 10**9 == 6
