"""Settings that cannot work are refused with advice, before a process group exists."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_msa.data.byte_tokenizer import write_byte_tokenizer
from megatron_msa.data.corpus import Document
from megatron_msa.data.metadata import load_tokenizer, tokenizer_config_from_args, tokenizer_fingerprint
from megatron_msa.data.preprocess import write_dataset
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig
from megatron_msa.training import argument_checks, arguments, megatron_fixes

MODEL = """
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --kv-channels 8
    --group-query-attention --num-query-groups 2 --normalization RMSNorm --swiglu --disable-bias-linear
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --seq-length 128 --max-position-embeddings 128 --msa-block-size 16 --msa-num-selected-blocks 3
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --eval-iters 0 --split 90,10,0
"""
EXPERTS = "--num-experts 4 --moe-ffn-hidden-size 16 --moe-router-topk 2"
TRAINING = "--train-iters 10 --msa-schedule warmup@0,sparse@5"

Resolved = tuple[argparse.Namespace, MSAModelConfig]
Resolve = Callable[..., Resolved]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte tokenizer and three copies of a dataset: whole, without its .bin, and with a .bin cut short."""
    from megatron.training.config import TokenizerConfig

    folder = tmp_path_factory.mktemp("data")
    tokenizer = write_byte_tokenizer(folder / "bytes")
    config = TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tokenizer))
    documents = [Document(str(number), "text " * 50, 250) for number in range(20)]
    for name in ("whole", "missing", "truncated"):
        write_dataset(documents, str(folder / name), tokenizer_config=config, show_progress=False)
    (folder / "missing.bin").unlink()
    content = (folder / "truncated.bin").read_bytes()
    (folder / "truncated.bin").write_bytes(content[:-100])
    return folder


@pytest.fixture
def resolve(data: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """What pretrain_msa.py does before it starts a process group."""
    megatron_fixes.apply()

    def resolve(
        flags: str = "", *, training: str = TRAINING, dataset: str = "whole", world_size: int = 1
    ) -> Resolved:
        paths = ["--data-path", str(data / dataset)] if dataset else ["--mock-data"]
        paths += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(data / "bytes")]
        command = [*MODEL.split(), *training.split(), *paths, *flags.format(data=data).split()]
        monkeypatch.setattr(sys, "argv", ["pretrain_msa.py", *command])
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        args = arguments.parse_arguments(has_gpu=False)
        arguments.tokenizer_from_args(args)
        return args, arguments.model_config_from_args(args)

    return resolve


def test_checkpoints_keep_the_fingerprint_of_the_tokenizer(resolve: Resolve) -> None:
    args, _ = resolve()
    tokenizer = load_tokenizer(tokenizer_config_from_args(args))
    assert args.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)


def assert_refused(resolve: Resolve, message: str, *flags: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        resolve(*flags, **settings)
    assert "\n" not in str(refusal.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-query-groups 3", "--num-attention-heads 4 is not divisible by --num-query-groups 3"),
        ("--msa-num-selected-blocks 0", "--msa-num-selected-blocks is 0; at least 1"),
        ("--msa-block-size 24", "--seq-length 128 is not a multiple of --msa-block-size 24"),
        ("--msa-block-size 0", "--msa-block-size is 0; it must be positive"),
        ("--msa-layer-freq [1]", r"--msa-layer-freq describes 1 layers, the model has 2"),
        ("--msa-indexer-lr=-1e-3", "--msa-indexer-lr is -0.001"),
        ("--msa-backend fast", "argument --msa-backend: invalid choice: 'fast'"),
        ("--msa-backend triton", "--msa-backend triton needs a GPU and this machine has none"),
        ("--msa-typo 3", "unrecognized arguments: --msa-typo 3"),
        ("--attention-dropout 0.1", "--attention-dropout is 0.1; MSA layers support only 0.0"),
        ("--window-size 64,0", r"--window-size is \(64, 0\); MSA layers support only None"),
        ("--softmax-type learnable", "--softmax-type is learnable; MSA layers support only vanilla"),
        ("--position-embedding-type mrope --mrope-section 1 1 2", "--position-embedding-type is mrope"),
        ("--cuda-graph-impl local", "--cuda-graph-impl is local; MSA layers support only none"),
        ("--freeze-all-layers", "--freeze-all-layers is True; MSA models do not support it"),
        ("--spec some.module spec", r"--spec is \['some.module', 'spec'\]; MSA models do not support it"),
        ("--hybrid-layer-pattern M*", r"--hybrid-layer-pattern is M\*; MSA models do not support it"),
        ("--distributed-backend nccl", "--distributed-backend nccl needs GPUs and this machine has none"),
        ("--yaml-cfg settings.yaml", "--yaml-cfg is set, which replaces all flags"),
        ("--save here", "--save is set without --save-interval"),
        ("--keep-newest-checkpoints 0", "--keep-newest-checkpoints is 0; it must be at least 1"),
        ("--keep-newest-checkpoints 2", "--keep-newest-checkpoints 2 without --save-retain-interval"),
        ("--wandb-project p", "--wandb-project is set, but no folder for its files"),
        (
            "--global-batch-size 3 --micro-batch-size 2",
            "--global-batch-size 3 is not divisible by --micro-batch-size 2",
        ),
        ("--log-encoder-time", "--log-encoder-time without a vision encoder"),
        ("--vision-mode train", "--vision-mode train needs --calculate-per-token-loss"),
        ("--vision-mode train --calculate-per-token-loss", "--vision-image-token-id is missing"),
        ("--vision-mode freeze --calculate-per-token-loss", "an encoder of random weights"),
        (
            "--vision-mode train --calculate-per-token-loss --vision-load ./nowhere",
            "--vision-load ./nowhere has no checkpoint",
        ),
        ("--lr-warmup-iters 10", "warms up for 10 iters .* ends after 10"),
        ("--lr-warmup-fraction 1.0", "warms up for 10 iters .* ends after 10"),
        ("--padded-vocab-size 100", "--padded-vocab-size is 100, but the tokenizer has 258 ids"),
        ("--tokenizer-model ./nowhere", "tokenizer ./nowhere does not exist"),
        ("--tokenizer-type NullTokenizer --vocab-size 100", "vocabulary mismatch: .* has 100 ids"),
        ("--reset-attention-mask", "use --dataloader-inter-document-masking instead"),
        ("--eval-iters 1 --split 100,0,0", "there is no validation data"),
        # Megatron's own checks, which it states as assertions, with and without words.
        ("--eval-micro-batch-size 3", r"Megatron refuses these settings: eval_global_batch_size \(4\) must"),
        ("--min-lr 1", "Megatron refuses these settings: assert args.min_lr <= args.lr"),
        ("--bf16 --fp16", "Megatron refuses these settings: assert not args.bf16"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(resolve: Resolve, flags: str, message: str) -> None:
    assert_refused(resolve, message, flags)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ("--train-iters 10", "--msa-schedule is missing; name the phases"),
        (
            "--train-iters 10 --msa-schedule warm@0",
            "unknown phase 'warm'; allowed: dense, index_only, warmup",
        ),
        (
            "--train-iters 10 --msa-schedule warmup@0,sparse@10",
            "sparse start at 10 iterations, .* ends at 10",
        ),
        # 10 steps of 4 sequences of 128 tokens.
        ("--train-iters 10 --msa-schedule warmup@0,sparse@5120tok", "5,120 tokens, .* ends at 5,120"),
        ("--train-samples 40 --msa-schedule warmup@0,sparse@10", "10 iterations, .* ends at 10"),
        ("--train-samples 40 --msa-schedule warmup@0,sparse@1Mtok", "1,000,000 tokens, .* ends at 5,120"),
        ("--train-samples 40 --msa-schedule warmup@0 --lr-warmup-samples 40", "warms up for 40 samples"),
        ("--msa-schedule warmup@0", "neither --train-iters nor --train-samples is set"),
    ],
)
def test_a_schedule_that_does_not_fit_the_training_is_refused(
    resolve: Resolve, training: str, message: str
) -> None:
    assert_refused(resolve, message, training=training)


@pytest.mark.parametrize(
    "training",
    [
        "--train-iters 10 --msa-schedule warmup@0,sparse@9",
        "--train-iters 10 --msa-schedule warmup@0,sparse@5119tok",
        "--train-samples 40 --msa-schedule warmup@0,sparse@5119tok",
    ],
)
def test_a_schedule_whose_last_phase_is_just_reached_is_accepted(resolve: Resolve, training: str) -> None:
    resolve(training=training)


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--tensor-model-parallel-size 4", 4, "--tensor-model-parallel-size is 4 but there are 2 GQA groups"),
        ("--context-parallel-size 3", 3, "--context-parallel-size 3: its length must be a multiple of 6"),
        ("--context-parallel-size 2", 3, "3 processes cannot be shared out"),
        (
            "--pipeline-model-parallel-size 2 --micro-batch-size 2 --dataloader-inter-document-masking",
            2,
            "Use --micro-batch-size 1",
        ),
        ("--global-batch-size 3", 2, "3 is not divisible by --micro-batch-size 1 times 2 data-parallel"),
        ("--tensor-model-parallel-size 3", 3, "is 3 but there are 2 GQA groups"),
        ("--context-parallel-size 0", 1, "--context-parallel-size is 0; it must be at least 1"),
        (
            "--tensor-model-parallel-size 2 --num-attention-heads 6 --num-query-groups 3",
            2,
            "--num-query-groups 3 is not divisible by --tensor-model-parallel-size 2",
        ),
        (
            "--tensor-model-parallel-size 2 --ffn-hidden-size 65",
            2,
            "--ffn-hidden-size 65 is not divisible by --tensor-model-parallel-size 2",
        ),
        ("--pipeline-model-parallel-size 3", 3, "--num-layers 2 is not divisible by --pipeline-model-par"),
        (
            "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
            2,
            "leaves 1 layers to a rank, which --num-virtual-stages-per-pipeline-rank 2 does not divide",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2 "
            "--global-batch-size 3",
            2,
            "the 3 microbatches of a step .* in groups of 2, .* last group of 1 .* use a multiple of 2",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers 4 --global-batch-size 1 "
            "--pipeline-model-parallel-layout Et|t|t|tL",
            2,
            "the 1 microbatches of a step .* in groups of 2, .* last group of 1 .* use a multiple of 2",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2 "
            "--global-batch-size 2 --microbatch-group-size-per-virtual-pipeline-stage 4",
            2,
            "the 2 microbatches of a step .* in groups of 4, .* use a multiple of 4",
        ),
        (
            "--tensor-model-parallel-size 2 --sequence-parallel --msa-block-size 3 --seq-length 99",
            2,
            r"the 99 tokens of a context-parallel rank \(--seq-length 99 / .* a multiple of 2",
        ),
        ("--expert-model-parallel-size 2", 2, "--expert-model-parallel-size is 2 but the model has no exp"),
        (f"{EXPERTS} --expert-model-parallel-size 3", 3, "--num-experts 4 is not divisible by --expert-mod"),
        (
            f"{EXPERTS} --expert-model-parallel-size 4",
            2,
            "2 processes cannot be shared out: .* --expert-model-parallel-size 4 .* copy of the experts",
        ),
        (
            f"{EXPERTS} --expert-tensor-parallel-size 3",
            3,
            "--moe-ffn-hidden-size 16 is not divisible by --expert-tensor-parallel-size 3",
        ),
        (
            f"{EXPERTS} --tensor-model-parallel-size 2",
            2,
            "--num-experts 4 with --tensor-model-parallel-size 2 needs --sequence-parallel",
        ),
    ],
)
def test_a_parallel_layout_that_cannot_work_is_refused(
    resolve: Resolve, flags: str, world_size: int, message: str
) -> None:
    assert_refused(resolve, message, flags, world_size=world_size)


@pytest.mark.parametrize(
    ("flags", "world_size"),
    [
        ("--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2", 4),
        (
            "--pipeline-model-parallel-size 2 --num-layers 4 --num-virtual-stages-per-pipeline-rank 2",
            2,
        ),
        (
            f"{EXPERTS} --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 "
            "--expert-tensor-parallel-size 1",
            4,
        ),
        # One stage a rank: any number of microbatches will do.
        (
            "--pipeline-model-parallel-size 2 --num-layers 4 --global-batch-size 1 "
            "--pipeline-model-parallel-layout Et*2|t*2L",
            2,
        ),
        # The first stage holds one layer of three.
        (
            "--pipeline-model-parallel-size 2 --num-layers 3 --decoder-first-pipeline-num-layers 1",
            2,
        ),
    ],
)
def test_a_parallel_layout_that_works_is_accepted(resolve: Resolve, flags: str, world_size: int) -> None:
    resolve(flags, world_size=world_size)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("nowhere", r"nowhere\.bin does not exist: check the path given with --data-path"),
        ("missing", r"missing\.bin does not exist"),
        ("truncated", r"truncated\.bin has \d+ bytes where the index describes \d+"),
    ],
)
def test_missing_and_damaged_data_are_found(resolve: Resolve, dataset: str, message: str) -> None:
    assert_refused(resolve, message, dataset=dataset)


def test_generated_data_is_checked_for_the_flags_it_cannot_have(resolve: Resolve) -> None:
    resolve(dataset="")
    assert_refused(resolve, "--reset-attention-mask needs a dense", "--reset-attention-mask", dataset="")


@pytest.mark.parametrize("phase", ["dense", "index_only"])
@pytest.mark.parametrize("flags", ["--optimizer-cuda-graph", "--optimizer muon"])
def test_optimizers_that_cannot_freeze_are_refused_when_a_phase_freezes(
    resolve: Resolve, flags: str, phase: str
) -> None:
    frozen = f"--train-iters 10 --msa-schedule {phase}@0,sparse@5"
    assert_refused(resolve, f"{flags.split()[0]} is .* freezes parameters", flags, training=frozen)
    resolve(flags)


def test_transformer_engine_is_asked_for_where_it_is_missing(
    resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(argument_checks, "transformer_engine_present", lambda: False)
    message = "Transformer Engine is not installed; .* use --transformer-impl local"
    assert_refused(resolve, message, "--transformer-impl transformer_engine")


def test_transformer_engine_without_apex_leaves_the_kernels_of_apex_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = {"transformer_engine"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    defaults = megatron_fixes.argument_defaults(has_gpu=True)
    assert defaults["gradient_accumulation_fusion"] is False
    assert defaults["masked_softmax_fusion"] is False
    assert not {"transformer_impl", "apply_rope_fusion"} & defaults.keys()
    installed |= {"apex", "fused_weight_gradient_mlp_cuda", "scaled_masked_softmax_cuda"}
    assert megatron_fixes.argument_defaults(has_gpu=True) == {"async_strategy": "mcore"}
    assert megatron_fixes.argument_defaults(has_gpu=False)["transformer_impl"] == "local"


def test_multi_latent_attention_is_refused(resolve: Resolve) -> None:
    assert_refused(resolve, "--multi-latent-attention is True; .* use grouped", "--multi-latent-attention")


def test_a_checkpoint_that_does_not_fit_is_refused(resolve: Resolve, tmp_path: Path) -> None:
    checkpoint = tmp_path / "iter_0000007"
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    embedding = {"embedding.word_embeddings.weight": torch.zeros(384, 32)}
    torch.distributed.checkpoint.save(embedding, checkpoint_id=checkpoint, no_dist=True)
    missing_branch = "has no index branch: it is a dense model. Add --msa-init-index"
    assert_refused(resolve, missing_branch, f"--load {tmp_path}")
    dense = f"--load {tmp_path} --msa-layer-freq [0,0]"
    assert_refused(resolve, "has no optimizer state; add --no-load-optim", dense)
    # As a dense model it fits.
    dense += " --no-load-optim"
    resolve(dense)
    message = "vocabulary mismatch: the checkpoint .* has 384 embeddings, the model 264"
    assert_refused(resolve, message, f"{dense} --make-vocab-size-divisible-by 8")


def test_what_is_not_given_gets_values_that_work_here(resolve: Resolve) -> None:
    args, config = resolve()
    assert args.distributed_backend == "gloo"
    assert args.create_attention_mask_in_dataloader is False
    assert args.padded_vocab_size == config.vocab_size == 384  # 258 ids, a multiple of 128
    assert config.transformer.msa_indexer_head_dim == 8
    # Megatron divides by the evaluation interval even if there is no evaluation during training.
    assert args.train_iters // args.eval_interval == 0


def test_the_tokenizer_is_built_once(resolve: Resolve, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_msa.data import metadata

    built = []
    build = metadata.build_tokenizer
    monkeypatch.setattr(metadata, "build_tokenizer", lambda config: built.append(config) or build(config))
    resolve()
    assert len(built) == 1


def test_the_help_lists_all_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pretrain_msa.py", "--help"])
    with pytest.raises(SystemExit) as end:
        arguments.parse_arguments(has_gpu=torch.cuda.is_available())
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--num-layers", "--moe-paged-stash-buffer", "--msa-block-size"))
