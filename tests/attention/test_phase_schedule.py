"""The phase is a function of the iteration or the tokens, and a schedule that cannot work is refused."""

import re

import pytest

from megatron_msa.errors import ConfigError
from megatron_msa.phases import Phase, PhaseSchedule

MESSAGES = [
    (None, "--msa-schedule is missing; name the phases and where they start"),
    ("", "Phases: dense, index_only, warmup, sparse"),
    ("warmup@0,spars@10", "unknown phase 'spars'; allowed: dense, index_only, warmup, sparse"),
    ("warmup@0,", "unknown phase ''"),
    ("warmup", "'warmup' starts at ''; write warmup@ITERATION or warmup@TOKENS with a unit"),
    ("warmup@0,sparse@2K", "'sparse' starts at '2K'"),
    ("warmup@0,sparse@-5", "'sparse' starts at '-5'"),
    ("warmup@0,sparse@40B", "for example sparse@2000 or sparse@40Btok"),
    ("warmup@0,sparse@1.5", "'1.5' is not a whole number"),
    ("warmup@0,sparse@1.0005Ktok", "'1.0005Ktok' is not a whole number"),
    ("dense@0,warmup@10,sparse@40Ktok", "mixes iterations and tokens; use one unit throughout"),
    ("warmup@5,sparse@10", "the first phase must start at 0, not 5"),
    ("dense@0,warmup@20,sparse@10", "each phase must start later than the one before it"),
    ("warmup@0,sparse@0", "each phase must start later than the one before it"),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES)
def test_an_unusable_schedule_is_refused_with_what_to_write(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PhaseSchedule.parse(text)


@pytest.mark.parametrize(
    ("text", "starts", "unit"),
    [
        ("sparse@0", (0,), "iterations"),
        ("warmup@0, sparse@2_000", (0, 2000), "iterations"),
        ("warmup@0tok,sparse@100tok", (0, 100), "tokens"),
        ("dense@0,warmup@2.6Ttok,sparse@2.64Ttok", (0, 2_600_000_000_000, 2_640_000_000_000), "tokens"),
        # In floating point 8.2 * 10**9 is 8199999999.999999.
        ("warmup@0,sparse@8.2Btok", (0, 8_200_000_000), "tokens"),
        ("warmup@0,sparse@4.35Ttok", (0, 4_350_000_000_000), "tokens"),
    ],
)
def test_starts_are_read_exactly(text, starts, unit):
    schedule = PhaseSchedule.parse(text)
    assert (schedule.starts, schedule.unit) == (starts, unit)


def test_a_phase_begins_with_the_step_that_follows_its_start():
    schedule = PhaseSchedule.parse("dense@0,warmup@3,sparse@5")
    phases = [schedule.phase_at(iteration=finished, tokens=0) for finished in range(7)]
    assert phases == [Phase.DENSE] * 3 + [Phase.WARMUP] * 2 + [Phase.SPARSE] * 2


def test_a_schedule_in_tokens_does_not_look_at_the_iteration():
    schedule = PhaseSchedule.parse("warmup@0,sparse@1Ktok")
    assert schedule.phase_at(iteration=10**6, tokens=999) is Phase.WARMUP
    assert schedule.phase_at(iteration=0, tokens=1000) is Phase.SPARSE


@pytest.mark.parametrize("unit", ["iterations", "tokens"])
def test_a_phase_that_training_never_reaches_is_refused(unit):
    suffix = "tok" if unit == "tokens" else ""
    schedule = PhaseSchedule.parse(f"warmup@0,sparse@1000{suffix}")
    length = {"train_iters": 10**9, "train_tokens": 10**9}
    name = {"iterations": "train_iters", "tokens": "train_tokens"}[unit]
    schedule.check_length(**length | {name: 1001})
    message = f"--msa-schedule lets sparse start at 1,000 {unit}, but training ends at 1,000"
    with pytest.raises(ConfigError, match=message):
        schedule.check_length(**length | {name: 1000})


def test_a_run_of_unknown_length_and_a_single_phase_are_accepted():
    PhaseSchedule.parse("warmup@0,sparse@1000").check_length(train_iters=0, train_tokens=0)
    PhaseSchedule.parse("sparse@0").check_length(train_iters=1, train_tokens=1)


def test_what_each_phase_trains():
    trained = {phase: (phase.trains_backbone, phase.trains_index_branch, phase.has_kl) for phase in Phase}
    assert trained == {
        Phase.DENSE: (True, False, False),
        Phase.INDEX_ONLY: (False, True, True),
        Phase.WARMUP: (True, True, True),
        Phase.SPARSE: (True, True, True),
    }


def test_the_description_has_a_line_per_phase():
    lines = PhaseSchedule.parse("warmup@0,sparse@2000").describe()
    assert [line.split() for line in lines] == [
        ["warmup", "from", "0", "to", "2,000", "iterations"],
        ["sparse", "from", "2,000", "to", "end", "of", "training", "iterations"],
    ]
