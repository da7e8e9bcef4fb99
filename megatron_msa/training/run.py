"""One training run: the phase of every step, and what is logged of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.training import get_tensorboard_writer, get_timers, get_wandb_writer, print_rank_0, training
from megatron.training.utils import is_last_rank
from torch import Tensor

from megatron_msa.attention.layer_metrics import msa_layers
from megatron_msa.data.batch import Batch
from megatron_msa.data.multimodal.counts import DataCounts
from megatron_msa.model.gpt import MSAModelConfig, padded_vocab_size, rotary_dims
from megatron_msa.phases import Phase, PhaseSchedule
from megatron_msa.training.console import StepLine
from megatron_msa.training.encoder_time import EncoderTime
from megatron_msa.training.hardware import peak_bf16_tflops
from megatron_msa.training.index_start import IndexBranchStart
from megatron_msa.training.kept_checkpoints import keep_newest
from megatron_msa.training.layer_reduction import collect
from megatron_msa.training.metrics_file import MetricsFile
from megatron_msa.training.parameter_groups import SavedGroups
from megatron_msa.training.phase_control import PhaseAwareStep, late_start_warning, set_phase
from megatron_msa.training.rerun_state import keep_in_reruns
from megatron_msa.training.speed import AttendedPairs, EncodedPatches, memory, speed
from megatron_msa.training.vision_start import VisionStart


class StepTotals:
    """Sums over the steps since the last row.

    Megatron's own totals and its interval timer do not serve: it does not reset them after the first step
    of a process, so that its second line averages two steps.
    """

    def __init__(self) -> None:
        self.advanced = 0
        self.skipped = 0
        self.loss: Tensor | None = None
        """Sum of the losses of the advanced steps, on the device; None where there is no loss."""

    def add(self, loss: Tensor | None, *, skipped: bool) -> None:
        """Add one step; the loss of a skipped one may be NaN and is left out."""
        self.skipped += skipped
        self.advanced += not skipped
        if loss is not None and not skipped:
            self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()

    @property
    def steps(self) -> int:
        return self.advanced + self.skipped


class TrainingRun:
    """Implements `TrainingHooks`: Megatron's loop calls it before and after each step.

    Args:
        args: Megatron's arguments.
        model_config: the model that is trained.
    """

    def __init__(self, args: argparse.Namespace, model_config: MSAModelConfig) -> None:
        self.args = args
        self.model_config = model_config
        self.config = model_config.transformer
        self.schedule: PhaseSchedule = self.config.phase_schedule()
        self.phase: Phase | None = None
        self.model: list[torch.nn.Module] = []
        self.step: PhaseAwareStep | None = None
        self.index_start: IndexBranchStart | None = None
        if args.msa_init_index is not None:
            self.index_start = IndexBranchStart(args.msa_init_index, self.config, rotary_dims(model_config))
        self.vision_start: VisionStart | None = None
        if model_config.vision is not None:
            self.vision_start = VisionStart(model_config.vision.vision_load)
        self.pairs = AttendedPairs(self.config, args.seq_length)
        self.patches: EncodedPatches | None = None
        if model_config.vision is not None:
            self.patches = EncodedPatches(model_config.vision, self.config.hidden_size)
        self.encoder_time: EncoderTime | None = None
        self.totals = StepTotals()
        self.data_counts = DataCounts() if getattr(args, "multimodal_data_path", None) else None
        """Of multimodal data, filled by its loader."""
        self._line: StepLine | None = None
        self._metrics_file: MetricsFile | None = None
        self._seconds_in_rows = 0.0
        """Of Megatron's interval timer, what rows have accounted for."""
        self._evaluation: dict[str, Any] = {}

    # -- called by Megatron's loop ---------------------------------------------------------------------------

    def optimizer_overrides(self) -> dict[Any, Any]:
        """A parameter group of its own for the index branch when it has its own learning rate."""
        rate = self.config.msa_indexer_lr
        if rate is None or rate == self.args.lr:
            # Megatron tells the groups of a checkpoint apart by their settings: equal ones would collide.
            return {}
        key = ParamKey(attr="is_msa_index_parameter")
        return {key: {"max_lr": rate, "min_lr": (self.args.min_lr or 0.0) * rate / self.args.lr}}

    def load(self, checkpoint: Path, request: dict[str, Any], read: Callable[[], dict[str, Any]]) -> None:
        """Around the reading of a checkpoint: ``request`` is Megatron's sharded state dict."""
        groups = SavedGroups(request)
        if self.vision_start is not None:
            self.vision_start.before_load(checkpoint, request)
        if self.index_start is not None:
            self.index_start.before_load(checkpoint, request)
        loaded = read()
        if self.index_start is not None:
            self.index_start.after_load(loaded)
        groups.restore(loaded)

    def on_setup(self, model: list[torch.nn.Module], optimizer: Any) -> None:
        self.model = model
        if self.index_start is not None:
            self.index_start.finish(model, optimizer)
        if self.vision_start is not None:
            self.vision_start.finish(model, optimizer)
        if optimizer is not None:
            self.step = PhaseAwareStep(model, optimizer)
            if self.args.log_encoder_time and self.patches is not None:
                self.encoder_time = EncoderTime(model)
            counters = [self.pairs, self.patches, self.encoder_time]
            keep_in_reruns(model, [each for each in counters if each is not None])
            if self.args.save_retain_interval:
                keep_newest(self.args.keep_newest_checkpoints, self.args.save_retain_interval)
        for line in self.schedule.describe():
            print_rank_0(f"MSA phase {line}")
        if optimizer is not None and self.args.optimizer == "adam":
            warning = late_start_warning(
                self.schedule, beta1=self.args.adam_beta1, beta2=self.args.adam_beta2
            )
            if warning is not None:
                print_rank_0(f"WARNING: {warning}")
        self._enter_phase(self.args.iteration)

    def evaluates_first(self) -> bool:
        return self.args.eval_at_start and self.args.do_valid and self.args.iteration == 0

    def before_step(self, iteration: int) -> None:
        self._enter_phase(iteration)
        interval = self.config.msa_quality_interval
        if interval and (iteration + 1) % interval == 0 and self.phase is not Phase.DENSE:
            for layer in msa_layers(self.model):
                layer.sample_quality = True

    def on_batch(self, batch: Batch) -> None:
        """Count the document lengths of a training microbatch (packed documents only) and its patches."""
        if self.patches is not None and batch.visual_input is not None:
            self.patches.add(batch.visual_input)
        if batch.packed_seq_params is not None:
            offsets = batch.packed_seq_params.cu_seqlens_q
            self.pairs.add_documents(offsets)
            training.update_seqlen_stats_from_cu_seqlens(offsets)  # for Megatron's own FLOP count

    def log_step(self, megatron_log: Callable[[], Any], values: dict[str, Any]) -> Any:
        """Around Megatron's `training_log`; ``values`` are its arguments."""
        self.totals.add(values["loss_dict"].get("lm loss"), skipped=bool(values["skipped_iter"]))
        row = None if values["iteration"] % self.args.log_interval else self._row(values)
        shown = {n.replace("_", " "): row[n] for n in _IN_MEGATRONS_LINE if n in row} if row else {}
        totals = values["total_loss_dict"]
        # Megatron prints each entry divided by the steps that advanced, this one included.
        advanced = max(1, totals.get("advanced iterations", 0) + (not values["skipped_iter"]))
        totals |= {name: torch.tensor([value * advanced]) for name, value in shown.items()}
        result = self._quietly(megatron_log) if self.args.log_line == "compact" else megatron_log()
        for name in shown:
            del totals[name]
        if row is not None:
            self._write_step(row)
        return result

    def before_evaluation(self, iteration: int, label: str) -> None:
        self._enter_phase(iteration)
        event = "test" if "test set" in label else "validation"
        self._evaluation = {"event": event, "iteration": iteration, "phase": self._phase_name()}

    def after_evaluation(self, losses: dict[str, Any]) -> None:
        row = self._evaluation
        if is_last_rank() and "lm loss" in losses:
            loss = float(losses["lm loss"])
            self._file().write(**row, lm_loss=loss)
            if self.args.log_line == "compact":
                print(f"{row['event']:>10} at step {row['iteration']}: loss {loss:.4f}", flush=True)

    # -- internals -------------------------------------------------------------------------------------------

    def _phase_name(self) -> str:
        return self.phase.value if self.phase is not None else ""

    def _enter_phase(self, iteration: int) -> None:
        tokens = self.args.consumed_train_samples * self.args.seq_length
        phase = self.schedule.phase_at(iteration=iteration, tokens=tokens)
        if phase is self.phase:
            return
        previous, self.phase = self._phase_name(), phase
        set_phase(self.model, phase)
        if self.step is not None:
            self.step.phase = phase
        what = f"switches from {previous} to" if previous else "is"
        print_rank_0(f"MSA phase {what} {phase.value} at iteration {iteration} ({tokens:,} tokens)")
        if is_last_rank() and not self.args.skip_train:
            self._file().write("phase", iteration=iteration, phase=phase.value, previous=previous or None)

    def _row(self, values: dict[str, Any]) -> dict[str, Any]:
        """What is logged of the steps since the last row. Collective over all ranks."""
        args = self.args
        totals, self.totals = self.totals, StepTotals()
        per_layer = collect(
            self.model,
            num_decoder_layers=self.config.num_layers,
            num_mtp_layers=self.config.mtp_num_layers or 0,
            device=torch.cuda.current_device(),
        )
        sequences = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        elapsed = get_timers()("interval-time").elapsed(reset=False, barrier=False)
        seconds = (elapsed - self._seconds_in_rows) / totals.steps
        # Megatron is about to set the timer to zero, except after the first step of a process.
        self._seconds_in_rows = elapsed if values.get("is_first_iteration", False) else 0.0
        row: dict[str, Any] = {
            "iteration": values["iteration"],
            "phase": self._phase_name(),
            "tokens": args.consumed_train_samples * args.seq_length,
            "learning_rate": values["learning_rate"],
            "grad_norm": None if values["grad_norm"] is None else float(values["grad_norm"]),
            "loss_scale": values["loss_scale"],
            "skipped": totals.skipped,
            "seconds": seconds,
        }
        if totals.loss is not None:
            row["lm_loss"] = float(totals.loss) / totals.advanced
        if "kl" in per_layer:
            row["kl"] = sum(per_layer["kl"].values())
            row["kl_per_layer"] = per_layer["kl"]
        for name, layers in per_layer.items():
            if name != "kl":
                row[name] = sum(layers.values()) / len(layers)
                row[f"{name}_per_layer"] = layers
        if self.data_counts is not None:
            row["data"] = self.data_counts.take(torch.cuda.current_device())
        causal, sparse = self.pairs.per_step(
            sequences, totals.steps, parallel_state.get_data_parallel_group(), torch.cuda.current_device()
        )
        vision_flops = 0.0
        if self.patches is not None:
            copies = args.tensor_model_parallel_size * args.context_parallel_size
            vision_flops = self.patches.flops_per_step(totals.steps, copies, torch.cuda.current_device())
        row |= speed(
            self.config,
            padded_vocab_size=padded_vocab_size(self.model_config),
            tokens=sequences * args.seq_length,
            causal_pairs=causal,
            sparse_pairs=sparse,
            phase=self._phase_name(),
            seconds=seconds,
            num_devices=args.world_size,
            peak_tflops=peak_bf16_tflops(torch.cuda.get_device_name()),
            vision_flops=vision_flops,
        )
        if self.encoder_time is not None:
            row["encoder_seconds"] = self.encoder_time.seconds_per_step(
                totals.steps, torch.cuda.current_device()
            )
        return row | memory()

    def _write_step(self, row: dict[str, Any]) -> None:
        if not is_last_rank():
            return
        self._file().write("step", **row)
        if self.args.log_line == "compact":
            self._line = self._line or StepLine(self.args.train_iters)
            print(self._line.format(row), flush=True)
        scalars = {f"msa/{name}": row[name] for name in _SCALARS if row.get(name) is not None}
        scalars |= {f"msa/kl_layer_{layer}": value for layer, value in row.get("kl_per_layer", {}).items()}
        scalars |= {f"msa/data/{name}": value for name, value in row.get("data", {}).items()}
        iteration = row["iteration"]
        if (writer := get_tensorboard_writer()) is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, iteration)
        if (wandb := get_wandb_writer()) is not None:
            wandb.log({**scalars, "msa/phase": row["phase"]}, iteration)

    def _file(self) -> MetricsFile:
        if self._metrics_file is None:
            default = Path(self.args.save or ".") / "metrics.jsonl"
            self._metrics_file = MetricsFile(Path(self.args.metrics_file or default))
        return self._metrics_file

    @staticmethod
    def _quietly(megatron_log: Callable[[], Any]) -> Any:
        """Run Megatron's log without its console line; TensorBoard, W&B and timers stay."""
        printing = training.print_rank_last
        training.print_rank_last = lambda *_: None
        try:
            return megatron_log()
        finally:
            training.print_rank_last = printing


_IN_MEGATRONS_LINE = ("kl", "score_recall", "block_recall")
_SCALARS = (
    "kl",
    "block_recall",
    "score_recall",
    "selection_entropy",
    "local_block_share",
    "first_block_share",
    "tokens_per_second",
    "tflops_executed",
    "tflops_dense_equivalent",
    "mfu",
    "encoder_seconds",
)
