"""Plans against Megatron's own model and schedule, our FLOP count, and what was measured."""

import itertools
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_msa.checkpoint.hf.megatron_model import build
from megatron_msa.config import MSATransformerConfig
from megatron_msa.errors import ConfigError
from megatron_msa.model.gpt import MSAModelConfig
from megatron_msa.phases import Phase
from megatron_msa.planning import cluster as clusters
from megatron_msa.planning import comparison, plan, report
from megatron_msa.planning.layout import Layout, equal_layers, split_layers, stages_text
from megatron_msa.planning.memory import OptimizerSettings, microbatches_in_flight
from megatron_msa.planning.rates import Assumptions, Curve, load_rates
from megatron_msa.planning.request import Request, read_command
from megatron_msa.planning.step_time import StepEstimate
from megatron_msa.planning.weights import Model, rank_weights
from megatron_msa.training.flops import causal_pairs, sparse_pairs, step_flops
from megatron_msa.training.parameter_count import count_parameters
from tests.planning.conftest import MOCK, REPOSITORY, Flags
from tools import plan as plan_tool

FILES = plan_tool.MEASUREMENTS
VOCABULARY = 96
TWO_STAGES = ("--micro-batch-size", "1", "--pipeline-model-parallel-size", "2")


def cluster(nodes: int = 2, gpu: str = "H100", gpus_per_node: int = 8) -> clusters.Cluster:
    return clusters.Cluster(
        gpu=clusters.GPUS[gpu],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        node_gb_per_s=200.0,
        network_gb_per_s=30.0,
        reserved_gib=5.0,
    )


def config(**changes) -> MSATransformerConfig:
    """Five layers whose sizes all differ; one is dense, one has full attention."""
    values = {
        "num_layers": 5,
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 12,
        "ffn_hidden_size": 40,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "transformer_impl": "local",
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 24,
        "moe_shared_expert_intermediate_size": 28,
        "moe_layer_freq": [0, 1, 1, 1, 1],
        "msa_layer_freq": "[1,1,0,1,1]",
        "msa_block_size": 16,
        "msa_num_selected_blocks": 3,
        "msa_indexer_head_dim": 16,
        "msa_schedule": "sparse@0",
        "perform_initialization": False,
        "use_cpu_initialization": True,
    }
    return MSATransformerConfig(**values | changes)


def layout(**changes) -> Layout:
    values = {"world": 1, "chunks": ((0, 1, 2, 3, 4),)}
    return Layout(**values | changes)


# -- weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1, 6, 15])
def test_a_rank_stores_what_megatron_builds_there(rank: int) -> None:
    """16 processes that only one of exists: TP2, PP2 with three layers in front, EP4 with whole experts."""
    chosen = layout(world=16, tensor=2, pipeline=2, expert=4, expert_tensor=1, chunks=((0, 1, 2), (3, 4)))
    transformer = config(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
        num_layers_in_first_pipeline_stage=3,
        pipeline_dtype=torch.float32,
    )
    torch.distributed.init_process_group(
        "fake", rank=rank, world_size=16, store=torch.distributed.HashStore()
    )
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=2,
            pipeline_model_parallel_size=2,
            expert_model_parallel_size=4,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        model_config = MSAModelConfig(
            transformer=transformer,
            vocab_size=VOCABULARY,
            should_pad_vocab=False,
            seq_length=64,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        with torch.device("meta"):
            built = build(model_config)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        parameters = list(built.named_parameters())
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    weights = rank_weights(Model(transformer, VOCABULARY, untied=True), chosen, stage)
    expert = sum(p.numel() for name, p in parameters if "local_experts" in name)
    assert weights.expert == expert > 0
    assert weights.dense == sum(p.numel() for _, p in parameters) - expert


@pytest.mark.parametrize("untied", [True, False])
def test_the_stages_together_store_the_whole_model(untied: bool) -> None:
    model = Model(config(), VOCABULARY, untied)
    whole = count_parameters(model.config, padded_vocab_size=VOCABULARY, untied_embeddings=untied).total
    assert rank_weights(model, layout(), 0).total == whole
    split = layout(world=3, pipeline=3, chunks=((0,), (1, 2, 3), (4,)))
    copies = 0 if untied else VOCABULARY * 32  # the last stage has a table of its own
    assert sum(rank_weights(model, split, rank).total for rank in range(3)) == whole + copies


# -- the pipeline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pipeline", "virtual"), [(4, 1), (4, 2), (2, 3)])
def test_microbatches_in_flight_follow_megatrons_schedule(
    pipeline: int, virtual: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = layout(world=pipeline, pipeline=pipeline, chunks=((0,),) * (pipeline * virtual))
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pipeline)
    name = "get_virtual_pipeline_model_parallel_world_size"
    monkeypatch.setattr(parallel_state, name, lambda: virtual if virtual > 1 else None)
    for rank in range(pipeline):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        _, _, warmup, _ = schedules.get_pp_rank_microbatches(8, virtual, pipeline)
        assert microbatches_in_flight(chosen, rank, 8) == pytest.approx((warmup + 1) / virtual)
    assert microbatches_in_flight(chosen, 0, 1) == 1


def test_layers_are_split_so_that_the_dearest_stage_is_as_cheap_as_can_be() -> None:
    draw = random.Random(1)
    for layers, stages in itertools.product((4, 7, 9), (1, 2, 3, 4)):
        costs = [draw.uniform(1, 3) for _ in range(layers)]
        output = draw.uniform(0, 6)
        chunks = split_layers(costs, output, stages)
        assert [layer for chunk in chunks for layer in chunk] == list(range(layers))
        assert len(chunks) == stages

        def dearest(cuts: tuple[int, ...], costs=costs, output=output) -> float:
            bounds = [0, *cuts, len(costs)]
            sums = [sum(costs[a:b]) for a, b in itertools.pairwise(bounds)]
            return max([*sums[:-1], sums[-1] + output])

        best = min(
            dearest(cuts) for cuts in itertools.combinations_with_replacement(range(layers + 1), stages - 1)
        )
        found = dearest(tuple(itertools.accumulate(len(chunk) for chunk in chunks))[:-1])
        assert found == pytest.approx(best)
    assert stages_text(((0, 1), (2,), (3,))) == "Et*2|t*1|t*1L"
    assert stages_text(equal_layers(41, 8)) == "Et*6|t*5|t*5|t*5|t*5|t*5|t*5|t*5L"
    assert equal_layers(4, 2) == ((0, 1), (2, 3))


# -- time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.DENSE, Phase.WARMUP, Phase.SPARSE])
def test_at_one_rate_for_everything_the_time_is_that_of_the_executed_flops(phase: Phase) -> None:
    rate, tokens = 100.0, 200
    flat = Curve([1, 10**9], [rate, rate])
    rates = load_rates(FILES, clusters.GPUS["H100"])
    rates = replace(
        rates,
        matmul_tflops=rate,
        training_tflops=flat,
        warmup_tflops=rate,
        dense_tflops=flat,
        assumptions=replace(rates.assumptions, expert_efficiency=1.0, output_efficiency=1.0),
    )
    model = Model(config(), VOCABULARY, untied=True)
    estimate = StepEstimate(
        model,
        layout(),
        cluster(),
        rates,
        seq_length=tokens,
        phase=phase,
        local_layers=False,
        optimizer=OptimizerSettings(is_distributed=False),
    )
    step = estimate.step(3)
    flops = step_flops(
        model.config,
        padded_vocab_size=VOCABULARY,
        num_tokens=3 * tokens,
        causal_pairs=3 * causal_pairs([tokens]),
        sparse_pairs=3 * sparse_pairs([tokens], 16, 3),
        phase=phase,
    )
    seconds = 3 * (step.stage.attention + step.stage.products + step.output)
    assert seconds == pytest.approx(flops.executed / (rate * 1e12), rel=1e-9)


def test_beyond_the_measured_lengths_only_the_index_scores_grow_faster_than_the_tokens() -> None:
    rates = load_rates(FILES, clusters.GPUS["H200"])
    longest = int(rates.training_tflops.tokens[-1])

    def seconds(tokens: int) -> tuple[float, float]:
        select = 2 * 128 * 4 * causal_pairs([tokens])
        rest = (7 * 2 * 128 * 64 + 3 * 2 * 128 * 4) * sparse_pairs([tokens], 128, 16)
        return rates.sparse_seconds(tokens, select + rest, select), select / (rates.select_tflops * 1e12)

    (short, short_scores), (long, long_scores) = seconds(longest), seconds(4 * longest)
    assert short == pytest.approx(0.302, rel=0.01)  # the row of the benchmark
    assert long_scores / short_scores == pytest.approx(16, rel=1e-3)
    assert long - long_scores == pytest.approx(4 * (short - short_scores), rel=0.02)


# -- measurements -------------------------------------------------------------------------------------


def test_faster_kernels_change_nothing_but_their_own_part_of_a_layer() -> None:
    now, then = (load_rates(files, FILES.gpu) for files in (FILES, FILES.with_earlier_kernels()))
    assert now.attention_other_us == then.attention_other_us
    assert now.training_tflops.at(131_072) > 1.1 * then.training_tflops.at(131_072)


def test_predictions_agree_with_what_was_measured_on_one_and_two_gpus() -> None:
    two = cluster(nodes=1, gpu="H200", gpus_per_node=2)
    rates = load_rates(FILES.with_earlier_kernels(), two.gpu)
    found = comparison.attention_layer(FILES.layer, two, rates)
    script = REPOSITORY / "examples/single_gpu/pretrain.sh"
    printing = {**os.environ, "PYTHON": str(REPOSITORY / "examples/common/print_arguments.sh")}
    command = subprocess.run([script, *MOCK], env=printing, capture_output=True, text=True, check=True).stdout
    small = read_command([*command.splitlines()[1:], "--vocab-size", "258"], 1)
    found += comparison.small_model(small, FILES.small_model, 10.1, two, rates)
    found += comparison.slices(REPOSITORY / "docs/results/plan_h200", two, rates)
    errors = {each.what: each.error for each in found if not each.calibrated}
    assert len(errors) == 18
    # docs/planning.md: 32 experts without grouped products take twice as long as predicted.
    missed = errors.pop("3 layers of the pilot, 32 experts, 32,768 tokens, 1 GPU: step")
    assert -0.6 < missed < -0.25
    for what, error in errors.items():
        assert abs(error) < (0.10 if "memory" in what else 0.25), what
    (calibrated,) = (each for each in found if each.calibrated and each.what.startswith("with Transformer"))
    assert calibrated.error == pytest.approx(0, abs=0.02)  # the parts of the host's time add up


def test_only_the_time_of_the_host_explains_the_steps_with_transformer_engine() -> None:
    two = cluster(nodes=1, gpu="H200", gpus_per_node=2)
    rates = load_rates(FILES, two.gpu, Assumptions(host_speed=1e6))
    found = comparison.slices(REPOSITORY / "docs/results/plan_h200", two, rates)
    errors = {each.what: each.error for each in found}
    for what in (
        "4 layers of 109B, 16 experts, 8,192 tokens",
        "3 layers of the pilot, 32 experts, 32,768 tokens",
    ):
        assert errors[f"with Transformer Engine: {what}, 1 GPU: step"] < -0.25


def test_the_host_launches_forward_passes_again_that_are_recomputed() -> None:
    host = load_rates(FILES, clusters.GPUS["H100"]).host
    none, moe, full = (host.layer(16, recompute) for recompute in ("none", "moe", "full"))
    assert full - none == pytest.approx(host.moe_forward + 16 * host.expert_forward)
    assert none < moe < full
    assert host.layer(0, "moe") == host.layer(0, "none") < none
    # Experts are launched one by one, fused or not.
    assert host.layer(32, "none") - none == pytest.approx(16 * (host.expert_forward + host.expert_backward))


def test_a_faster_host_waits_less_and_a_plan_says_when_it_is_the_limit(pilot: Request) -> None:
    narrow = replace(pilot.layout(), micro_batch=1)

    def planned(speed: float) -> plan.Plan:
        rates = load_rates(FILES, clusters.GPUS["H100"], Assumptions(host_speed=speed))
        return plan.make_plan(pilot, narrow, cluster(), rates)

    slow, faster, fastest = (planned(speed) for speed in (1.0, 2.0, 1e6))
    assert fastest.step.waiting_for_host == 0
    assert slow.step.waiting_for_host > 2 * faster.step.waiting_for_host > 0
    # Of the same work on the GPU; of its gradients' exchange less hides behind a shorter microbatch.
    steps = [each.step for each in (slow, faster, fastest)]
    work = [step.total - step.waiting_for_host - step.data_comm for step in steps]
    assert work == pytest.approx([work[0]] * 3)
    assert steps[0].data_comm <= steps[1].data_comm <= steps[2].data_comm
    assert "The host is the limit: 8,192 tokens of a rank" in report.describe(slow)
    assert "The host is the limit" not in report.describe(fastest)


# -- whole plans --------------------------------------------------------------------------------------


@pytest.fixture
def pilot(recipe_flags: Flags) -> Request:
    return read_command(recipe_flags("pilot_10b/pretrain.sh", "8k", TE="1"), 16)


def test_a_plan_adds_up_and_the_search_finds_nothing_slower(pilot: Request) -> None:
    rates = load_rates(FILES, clusters.GPUS["H100"])
    ours = plan.make_plan(pilot, pilot.layout(), cluster(), rates)
    plan.check_memory(ours)
    assert ours.microbatches == 512 // (2 * 16)
    assert ours.tokens_per_second * 16 * ours.step.total == pytest.approx(2**22)
    tokens = pilot.phase_tokens()
    assert tokens == {Phase.WARMUP: 5_200_000_000, Phase.SPARSE: 95368 * 2**22 - 5_200_000_000}
    sparse_days = tokens[Phase.SPARSE] / 2**22 * ours.step.total / 86400
    assert sparse_days < ours.days < 1.1 * sparse_days

    found = plan.search(pilot, cluster(), rates)
    assert all(each.fits for each in found)
    times = [each.step.total for each in found]
    assert times == sorted(times)
    assert times[0] <= ours.step.total * 1.0001
    assert {each.layout.micro_batch for each in found if each.layout.pipeline == 1} == {1, 2, 4}
    # Packed samples cannot cross stages side by side.
    assert {each.layout.micro_batch for each in found if each.layout.pipeline > 1} == {1}


@pytest.mark.parametrize(
    ("recipe", "nodes", "stages"),
    [("msa_109b", 64, ("8k", "32k", "192k", "1m")), ("pilot_10b", 8, ("8k", "32k", "192k"))],
)
def test_every_stage_of_a_recipe_fits_the_gpus_that_it_is_made_for(
    recipe: str, nodes: int, stages: tuple[str, ...], recipe_flags: Flags
) -> None:
    rates = load_rates(FILES, clusters.GPUS["H100"])
    for stage in stages:
        request = read_command(recipe_flags(f"{recipe}/pretrain.sh", stage, TE="1"), nodes * 8)
        plan.check_memory(plan.make_plan(request, request.layout(), cluster(nodes), rates))


def test_a_layout_that_does_not_fit_is_refused_with_its_parts(pilot: Request) -> None:
    small = replace(cluster(), gpu=replace(clusters.GPUS["H100"], memory_gib=30.0))
    rates = load_rates(FILES, small.gpu)
    too_large = plan.make_plan(pilot, pilot.layout(), small, rates)
    with pytest.raises(
        ConfigError, match=r"needs \d+\.\d GiB .*weights .*optimizer .*but the GPU has 30 GiB"
    ):
        plan.check_memory(too_large)
    with pytest.raises(ConfigError, match="recompute more"):
        plan.search(pilot, replace(small, gpu=replace(small.gpu, memory_gib=8.0)), rates)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tensor-model-parallel-size", "8"], "is 8 but there are 4 GQA groups"),
        (["--expert-model-parallel-size", "3"], "--num-experts 64 is not divisible"),
        (["--global-batch-size", "24"], "24 is not divisible by --micro-batch-size 2 times 16"),
        (
            [*TWO_STAGES, "--pipeline-model-parallel-layout", "Et*8|t*9L"],
            "holds 17 layers, but --num-layers is 16",
        ),
        (
            ["--recompute-granularity", "selective", "--recompute-modules", "core_attn"],
            "--recompute-modules is core_attn; a plan knows",
        ),
        (
            ["--use-precision-aware-optimizer"],
            "--use-precision-aware-optimizer is True; a plan does not know",
        ),
        (["--pipeline-model-parallel-size", "2"], "and a micro batch of 2 is not supported"),
        (["--mtp-num-layers", "1"], "--mtp-num-layers is 1; a plan does not count it"),
        (["--moe-token-dispatcher-type", "allgather"], "a plan knows what alltoall sends"),
        (["--optimizer", "sgd"], "--optimizer is sgd; a plan knows the memory of adam only"),
        (
            [
                "--micro-batch-size",
                "1",
                "--pipeline-model-parallel-size",
                "2",
                "--num-layers-per-virtual-pipeline-stage",
                "2",
            ],
            "--num-layers-per-virtual-pipeline-stage is 2; a plan takes the layers",
        ),
        (
            [
                "--micro-batch-size",
                "1",
                "--pipeline-model-parallel-size",
                "2",
                "--decoder-first-pipeline-num-layers",
                "6",
            ],
            "--decoder-first-pipeline-num-layers is 6; a plan takes the layers",
        ),
        (
            ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "1"],
            "--recompute-method is block and --recompute-num-layers 1; a plan knows",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(recipe_flags: Flags, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_command(recipe_flags("pilot_10b/pretrain.sh", "8k", *flags), 16)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="--gpu is V100; allowed: H100, H200"):
        clusters.gpu("V100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "0"], "--nodes is 0; it must be at least 1"),
        (["--nodes", "1", "--search", "-1"], "--search is -1; it must be at least 1"),
        (
            ["--nodes", "1", "--network-gb-per-s", "0"],
            "--network-gb-per-s is 0.0; it must be above 0",
        ),
        (["--nodes", "1", "--host-speed", "-1"], "--host-speed is -1.0; it must be above 0"),
        (["--nodes", "1", "--host-speed", "nan"], "--host-speed is nan; it must be above 0"),
        (["--nodes", "1", "--host-speed", "inf"], "--host-speed is inf; it must be above 0"),
    ],
)
def test_the_tool_refuses_clusters_that_cannot_be(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan.py", *options, "--", "--num-layers", "1"])
    assert plan_tool.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
