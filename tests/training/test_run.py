"""The parts of a training run that need no training loop: learning rates, counts, lines and rows."""

import argparse
import json
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.training import training

from megatron_msa import quiet_imports
from megatron_msa.data.batch import Batch
from megatron_msa.training.console import StepLine
from megatron_msa.training.metrics_file import MetricsFile
from megatron_msa.training.phase_control import is_index_parameter
from megatron_msa.training.run import StepTotals, TrainingRun
from megatron_msa.training.speed import AttendedPairs
from tests.training.tiny_msa import build_model, build_optimizer, tiny_config, tiny_model_config

LEARNING_RATE = 1e-2  # of tiny_msa


def make_run(**config_changes: Any) -> TrainingRun:
    config = tiny_config()
    for name, value in config_changes.items():
        setattr(config, name, value)
    args = argparse.Namespace(lr=LEARNING_RATE, min_lr=1e-3, seq_length=16, msa_init_index=None)
    return TrainingRun(args, tiny_model_config(config))


def param_groups(run: TrainingRun, **kind: bool) -> list[dict[str, Any]]:
    """The groups of an optimizer that was built with the run's overrides, parameters named by origin."""
    model = build_model(**kind)
    optimizer = build_optimizer(model, overrides=run.optimizer_overrides(), **kind)
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    main = {id(getattr(p, "main_param", p)): p for p in model[0].parameters()}
    groups = []
    for group in optimizer.param_groups:
        origins = {is_index_parameter(main[id(p)]) for p in group["params"]}
        assert len(origins) == 1
        groups.append({**group, "is_index": origins.pop()})
    return groups


@pytest.mark.usefixtures("process_groups")
class TestIndexLearningRate:
    @pytest.mark.parametrize("kind", [{}, {"bf16": True}, {"bf16": True, "use_distributed_optimizer": True}])
    def test_it_follows_the_schedule_of_the_others_in_proportion(self, kind: dict[str, bool]) -> None:
        groups = param_groups(make_run(msa_indexer_lr=5 * LEARNING_RATE), **kind)
        assert {group["is_index"] for group in groups} == {True, False}
        scheduler = OptimizerParamScheduler(
            argparse.Namespace(param_groups=groups),  # type: ignore[arg-type]
            init_lr=0.0,
            max_lr=LEARNING_RATE,
            min_lr=0.0,
            lr_warmup_steps=2,
            lr_decay_steps=8,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=8,
            wd_incr_style="constant",
        )
        for group in groups:  # tiny_msa's optimizer has no minimum, a run's arguments have one
            if not group["is_index"]:
                group["min_lr"] = 1e-3
        for _ in range(9):
            scheduler.step(1)
            index = {group["lr"] for group in groups if group["is_index"]}
            others = {group["lr"] for group in groups if not group["is_index"]}
            assert len(index) == len(others) == 1
            assert index.pop() == pytest.approx(5 * others.pop())

    @pytest.mark.parametrize("rate", [None, LEARNING_RATE])
    def test_there_is_no_group_for_it_when_it_is_the_same(self, rate: float | None) -> None:
        assert make_run(msa_indexer_lr=rate).optimizer_overrides() == {}


class TestDocuments:
    def test_a_batch_of_documents_is_counted_for_both_flop_figures(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(training, "_seqlen_stats_in_iteration", None)
        monkeypatch.setattr(training, "_seqlen_stats_active", False)
        run = make_run()
        for lengths in ([3, 9, 4], [16]):
            offsets = torch.tensor([0, *lengths]).cumsum(0).int()
            documents = PackedSeqParams(qkv_format="thd", cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
            run.on_batch(Batch(None, None, None, None, None, documents))
        run.on_batch(Batch(None, None, None, None, None, None))  # whole sequences
        assert training._seqlen_stats_in_iteration.tolist() == [32, 9 + 81 + 16 + 256]
        assert run.pairs._counted is not None
        causal, _ = run.pairs._counted.tolist()
        assert causal == sum(n * (n + 1) // 2 for n in (3, 9, 4, 16))

    @pytest.mark.usefixtures("process_groups")
    def test_pairs_are_those_of_a_step_and_start_again_after_they_were_read(self) -> None:
        pairs = AttendedPairs(tiny_config(), seq_length=16)  # blocks of 4 keys, 2 per query
        group = torch.distributed.group.WORLD
        whole = pairs.per_step(3, 1, group, "cpu")
        seen = [min(p + 1, 4 + p % 4 + 1) for p in range(16)]
        assert whole == (3 * 136, 3 * sum(seen))
        pairs.add_documents(torch.tensor([0, 5, 16], dtype=torch.int32))
        pairs.add_documents(torch.tensor([0, 16], dtype=torch.int32))
        assert pairs.per_step(1, 2, group, "cpu") == (
            (15 + 66 + 136) / 2,
            (15 + sum(seen[:11]) + sum(seen)) / 2,
        )
        assert pairs.per_step(3, 1, group, "cpu") == whole


def test_a_skipped_step_counts_but_its_loss_does_not() -> None:
    totals = StepTotals()
    for loss, skipped in ((4.0, False), (math.nan, True), (2.0, False)):
        totals.add(torch.tensor([loss]), skipped=skipped)
    totals.add(None, skipped=True)  # a pipeline stage without a loss
    assert (totals.steps, totals.advanced, totals.skipped) == (4, 2, 2)
    assert totals.loss is not None
    assert float(totals.loss) == 6.0


class TestStepLine:
    ROW = {  # noqa: RUF012
        **{"iteration": 7, "phase": "sparse", "lm_loss": 1.25, "kl": 0.5, "score_recall": 0.75},
        **{"tokens_per_second": 12345.6, "tflops_executed": 0.0123, "mfu": None},
    }

    def test_it_shows_the_values_of_the_row(self) -> None:
        parts = [part.strip() for part in StepLine(100).format(self.ROW).split("|")]
        loss, kl, recall = "loss 1.2500", "kl 0.5000", "recall 0.7500"
        expected = ["step   7/100 sparse", loss, kl, recall, "12,346 tok/s", "0.0123 TFLOP/s", "left --:--"]
        assert [" ".join(part.split()) for part in parts] == [" ".join(part.split()) for part in expected]

    def test_it_keeps_the_last_recall_and_knows_when_there_is_none(self) -> None:
        line = StepLine(100)
        without = {name: value for name, value in self.ROW.items() if name not in ("score_recall", "kl")}
        assert "recall    -" in line.format(without)
        assert "kl    -" in line.format(self.ROW | {"kl": None})
        assert "recall 0.7500" in line.format(without)

    def test_it_shows_the_mfu_of_known_hardware(self) -> None:
        assert "| MFU 41.2% |" in StepLine(100).format(self.ROW | {"mfu": 0.412})

    def test_the_time_left_follows_the_pace_since_the_first_line(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = iter([1000.0, 1030.0, 1600.0])
        monkeypatch.setattr("time.monotonic", lambda: next(now))
        line = StepLine(100)
        assert line.format(self.ROW | {"iteration": 10}).endswith("left --:--")
        assert line.format(self.ROW | {"iteration": 20}).endswith("left 04:00")
        assert line.format(self.ROW | {"iteration": 30}).endswith("left 35:00")

    def test_hours_are_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = iter([0.0, 60.0])
        monkeypatch.setattr("time.monotonic", lambda: next(now))
        line = StepLine(100)
        line.format(self.ROW | {"iteration": 1})
        assert line.format(self.ROW | {"iteration": 2}).endswith("left 1:38:00")


class TestMetricsFile:
    def test_rows_are_appended_and_numbers_json_lacks_become_null(self, tmp_path: Path) -> None:
        path = tmp_path / "new/folder/metrics.jsonl"
        values = {"lm_loss": math.nan, "kl": math.inf, "kl_per_layer": {1: 0.5, 2: -math.inf}}
        MetricsFile(path).write("step", iteration=1, **values)
        MetricsFile(path).write("step", iteration=2)
        rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
        expected = {"lm_loss": None, "kl": None, "kl_per_layer": {"1": 0.5, "2": None}}
        assert rows == [{"event": "step", "iteration": 1, **expected}, {"event": "step", "iteration": 2}]

    def test_a_row_is_on_disk_when_it_has_been_written(self, tmp_path: Path) -> None:
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write("step", iteration=1)
        assert (tmp_path / "metrics.jsonl").read_text().endswith("\n")


class TestQuietImports:
    @pytest.mark.parametrize(
        ("message", "is_shown"),
        [
            ("Apex is not installed. Falling back to Torch Norm", False),
            ("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", False),
            ("Only transformer-engine>=1.7.0 supports MoE experts, but your version is 0.0.0. Use", False),
            ("Only transformer-engine>=1.7.0 supports MoE experts, but your version is 1.6.0. Use", True),
            ("Apex is installed but broken", True),
            ("invalid escape sequence '\\-'", True),  # only that of one file is known
        ],
    )
    def test_only_known_messages_are_silenced(self, message: str, is_shown: bool) -> None:
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            quiet_imports.apply()
            warnings.warn(message, UserWarning, stacklevel=1)
        assert [str(warning.message) for warning in shown] == ([message] if is_shown else [])

    def test_other_messages_of_the_logger_stay(self, caplog: pytest.LogCaptureFixture) -> None:
        quiet_imports.apply()
        logger = logging.getLogger("torch.utils.cpp_extension")
        with caplog.at_level(logging.WARNING, logger.name):
            logger.propagate = True
            logger.addHandler(caplog.handler)
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
            logger.warning("The compiler is too old")
            logger.removeHandler(caplog.handler)
        assert {record.getMessage() for record in caplog.records} == {"The compiler is too old"}
