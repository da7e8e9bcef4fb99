"""A job works through its cells, and goes on after an interruption without losing or repeating one."""

import json
import re
from pathlib import Path

import pytest
import torch

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation import command, perplexity, questions, report
from megatron_msa.evaluation.cell_file import FILE_NAME, CellFile, merged, read
from megatron_msa.evaluation.fitting import Fitted
from megatron_msa.evaluation.haystack import from_texts
from megatron_msa.evaluation.plan import Cell, Plan, evenly
from megatron_msa.evaluation.protocol import Tokens
from megatron_msa.evaluation.run import Settings, Subject, evaluate
from megatron_msa.evaluation.samples import Question, Sample
from megatron_msa.evaluation.tasks.question_answering import Item, read_items
from megatron_msa.evaluation.tasks.registry import Material
from tests.evaluation.oracles import ByteTokenizer, Oracle

SETTINGS = Settings(samples=2, seed=1, methods=["generation", "log_probability"])
PLAN = Plan(
    attention=["msa", "dense"],
    tasks=["needle", "serving", "multi_key", "perplexity", "selection"],
    lengths=[500, 300],
    depths=[0.0, 1.0],
)
HEADER = {"settings": {"seed": 1, "samples": 2}, "checkpoint": {}, "versions": {}}


class Stopped(Exception):
    pass


class Model(Oracle):
    """An oracle that stops the job when it is asked for the given call; every position costs its number."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__("needle")
        self.stop_at = stop_at
        self.asked = 0

    def _count(self) -> None:
        if self.asked == self.stop_at:
            raise Stopped
        self.asked += 1

    def generate(self, prompts, **options):
        self._count()
        return super().generate(prompts, **options)

    def log_probabilities(self, sequences, *, start=None):
        self._count()
        if start is None:
            return [-torch.arange(1.0, len(each)) for each in sequences]
        return super().log_probabilities(sequences, start=start)


def subject_of(model: Model, longest: int = 500, **others) -> Subject:
    return Subject(
        model=lambda attention: model,
        tokens=Tokens(ByteTokenizer()),
        longest=longest,
        serving=lambda length: {"length": length},
        **{"selection": lambda texts: {"texts": [len(text) for text in texts]}} | others,
    )


def plan_of(*tasks_and_lengths: str | int, attention: str = "msa") -> Plan:
    tasks = [each for each in tasks_and_lengths if isinstance(each, str)]
    lengths = [each for each in tasks_and_lengths if isinstance(each, int)]
    return Plan(attention=[attention], tasks=tasks, lengths=lengths, depths=[1.0])


@pytest.fixture
def run(haystack, tmp_path):
    def run(
        model: Model | None = None, *, folder: str = "run", plan: Plan = PLAN, settings=SETTINGS, **changes
    ):
        material = Material(
            haystack=changes.pop("haystack", haystack),
            style="completion",
            distractors=2,
            items=changes.pop("items", None),
        )
        header = HEADER | {"settings": HEADER["settings"] | changes.pop("header", {})}
        subject = subject_of(model or Model(), **changes)
        evaluate(plan, subject, material, settings, tmp_path / folder, header, show_progress=False)
        return read(tmp_path / folder / FILE_NAME)

    return run


def without_times(results):
    return {cell: {k: v for k, v in result.items() if k != "seconds"} for cell, result in results.items()}


def test_the_cells_are_those_of_the_plan_shortest_first(run):
    cells = list(run().results)
    assert cells == PLAN.cells()
    assert len(cells) == len(set(cells)) == 2 * (2 + 1 + 1 + 1 + 1) + 2 * (2 + 1 + 1)
    assert [cell.length for cell in cells if cell.attention == "dense"] == [300] * 4 + [500] * 4
    assert {cell.attention for cell in cells if cell.task in ("selection", "serving")} == {"msa"}
    assert {cell.depth for cell in cells if cell.task != "needle"} == {None}


def test_both_attention_modes_are_asked_the_same(run):
    results = without_times(run().results)
    for cell, result in results.items():
        if cell.attention == "dense":
            assert result == results[Cell("msa", cell.task, cell.length, cell.depth)]


@pytest.mark.parametrize("stop_at", [0, 1, 7, 20])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_an_interrupted_job_goes_on_where_it_was(stop_at, cut, run, tmp_path):
    whole = run(folder="whole")
    with pytest.raises(Stopped):
        run(Model(stop_at))
    path = tmp_path / "run" / FILE_NAME
    finished = len(read(path).results)
    if cut and finished:  # killed while it wrote its last line
        path.write_bytes(path.read_bytes()[:-cut])
        finished -= 1
        assert len(read(path).results) == finished
    model = Model()
    resumed = run(model)
    assert without_times(resumed.results) == without_times(whole.results)
    assert len(path.read_text().splitlines()) == 1 + len(PLAN.cells()), "each cell once, one header"
    fresh = Model()
    run(fresh, folder="other")
    assert model.asked < fresh.asked or finished == 0
    again = Model()
    run(again)
    assert again.asked == 0


def test_a_later_job_may_add_cells_but_not_change_settings(run):
    run(plan=Plan(attention=["msa"], tasks=["needle"], lengths=[300], depths=[0.0]))
    results = run().results
    assert set(results) == set(PLAN.cells())
    with pytest.raises(
        ConfigError, match=r"other settings \(samples: 2 before, 5 now; seed: 1 before, 9 now\)"
    ):
        run(header={"samples": 5, "seed": 9})
    with pytest.raises(ConfigError, match="style: 'not set' before, 'instruct' now"):
        run(header={"style": "instruct"})


def test_two_jobs_do_not_write_to_one_file(run, tmp_path):
    with CellFile(tmp_path / "run", HEADER), pytest.raises(ConfigError, match="another job is writing"):
        run()
    run()


def test_a_cell_is_not_written_twice(tmp_path):
    cell = Cell("msa", "needle", 300, 0.5)
    with CellFile(tmp_path, HEADER) as file:
        file.add(cell, {"x": 1})
        with pytest.raises(ValueError, match="is done already"):
            file.add(cell, {"x": 2})
    path = tmp_path / FILE_NAME
    line = path.read_text().splitlines()[1]
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=r"cells.jsonl:3 holds .* for the second time"):
        read(path)
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match=r"cells.jsonl:1 is not a line of this program"):
        CellFile(tmp_path, HEADER)


def test_folders_of_an_array_are_collected(run, tmp_path):
    for length in (300, 500):
        part = Plan(attention=["msa"], tasks=["needle"], lengths=[length], depths=[0.0])
        run(plan=part, folder=f"length_{length}")
    run(plan=part, folder="other_seed", header={"seed": 2})
    folders = [tmp_path / f"length_{length}" for length in (300, 500)]
    header, results = merged(folders)
    assert header["settings"] == HEADER["settings"]
    assert sorted(cell.length for cell in results) == [300, 500]
    with pytest.raises(ConfigError, match="different settings: seed: 1 before, 2 now"):
        merged([folders[0], tmp_path / "other_seed"])
    with pytest.raises(ConfigError, match="which another folder holds too"):
        merged([folders[0], folders[0]])
    with pytest.raises(ConfigError, match=r"has no cells\.jsonl"):
        merged([*folders, tmp_path])
    with pytest.raises(ConfigError, match="no folder"):
        merged([])


def test_no_prompt_is_asked_for_more_than_its_length_has_room_for():
    """The room of a reply differs between samples: the prompt of one with the room of another is too long."""
    length, rooms = 100, [10, 20, 10]

    class Limited(Model):
        def generate(self, prompts, *, max_new_tokens, stop=None):
            if max(map(len, prompts)) + max_new_tokens > length:
                raise ConfigError("longer than the cache")
            return [[prompt[0]] * max_new_tokens for prompt in prompts]

    fitted = [
        Fitted(Sample("", (Question(cue="", answers=("a",), distractors=("b",)),)), [prompt], room)
        for room, letter in zip(rooms, b"abc", strict=True)
        for prompt in [[letter] * (length - room)]
    ]
    found = questions.measure(Limited(), Tokens(ByteTokenizer()), fitted, methods=["generation"])
    assert found["replies"] == [["a" * 10], ["b" * 20], ["c" * 10]]


def test_a_collection_may_be_incomplete_and_says_so(run, tmp_path, capsys):
    header = HEADER | {
        "checkpoint": {"name": "run", "iteration": 7},
        "settings": {"seed": 1, "samples": 2, "style": "completion", "haystack_name": "lines", "methods": []},
        "versions": {"device": "CPU", "commit": "abc", "torch": "2", "triton": "3"},
    }
    for name in ("ended", "stopped"):
        with CellFile(tmp_path / name, header) as file:
            file.add(Cell("msa", "perplexity", len(name)), {"mean_loss": 1.5, "bin_ends": [5], "loss": [1.5]})
    report.write(tmp_path / "ended", *merged([tmp_path / "ended"]))
    folders = [str(tmp_path / name) for name in ("ended", "stopped", "waiting")]
    collect = ["collect", "--output", str(tmp_path / "all")]
    assert command.main(None, [*collect, *folders]) == 2
    assert "waiting has no cells.jsonl" in capsys.readouterr().err
    assert command.main(None, [*collect, "--incomplete", *folders]) == 0
    note = "stopped: its job has not ended; waiting: nothing is there yet"
    assert f"**Not complete:** {note}." in (tmp_path / "all/report.md").read_text()
    assert json.loads((tmp_path / "all/results.json").read_text())["incomplete"] == note.split("; ")
    assert capsys.readouterr().err.count("not complete: ") == 2
    assert command.main(None, [*collect, "--incomplete", folders[0]]) == 0
    assert "Not complete" not in (tmp_path / "all/report.md").read_text()
    assert command.main(None, [*collect, "--incomplete", folders[2]]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "there are no layers"}, "--tasks has selection, but there are no layers"),
        ({"longest": 499}, r"--lengths has 500, but the model takes 499 tokens.*--position-limit"),
        ({"plan": plan_of("needle", 30)}, "without any filler"),
        ({"plan": plan_of("question_answering", 90)}, "--qa-file"),
        ({"plan": plan_of("perplexity", 1)}, "perplexity takes 2 tokens, .* but the length is 1: use longer"),
        ({"plan": plan_of("selection", 300, attention="dense")}, "leave nothing to measure"),
        (
            {"haystack": from_texts(["little"], "short"), "plan": plan_of("perplexity", 300)},
            r"short has 7 tokens, and perplexity is asked for at 300",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message, run):
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_what_does_not_fit_is_left_out_with_a_note_and_the_rest_is_measured(run, capsys):
    plan = Plan(
        attention=["dense", "msa"],
        tasks=["common_words", "needle", "perplexity", "selection"],
        lengths=[1, 300],
        depths=[0.0, 1.0],
    )
    little = from_texts(["one line", "another line"], "short")
    found = run(plan=plan, haystack=little).results
    assert list(found) == plan.cells()
    reasons = {(cell.task, cell.length): each.get("skipped", "") for cell, each in found.items()}
    assert "common_words takes" in reasons["common_words", 300]
    assert "needle takes" in reasons["needle", 1]
    assert "perplexity takes 2 tokens" in reasons["perplexity", 1]
    for task in ("perplexity", "selection"):
        assert "short has 22 tokens" in reasons[task, 300]
    assert reasons["needle", 300] == reasons["selection", 1] == ""
    assert found[Cell("dense", "needle", 300, 1.0)]["scores"]["generation"] == [1.0, 1.0]
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len([reason for reason in reasons.values() if reason])
    assert all(line.startswith("left out: ") for line in printed)
    resumed = Model()
    assert run(resumed, plan=plan, haystack=little).results == found
    assert resumed.asked == 0


def test_a_length_that_only_some_samples_fit_into_is_left_out_before_any_work(run):
    """The longest question of three decides."""
    question = {"question": "what?", "answers": ("a",)}
    items = tuple(
        Item(context=letter * size, **question) for letter, size in (("x", 10), ("y", 10), ("z", 90))
    )
    model = Model()
    settings = Settings(samples=20, seed=1, methods=["generation"])
    with pytest.raises(ConfigError, match=r"question_answering takes 1\d\d tokens without any filler"):
        run(model, plan=plan_of("question_answering", 100), items=items, settings=settings)
    assert model.asked == 0


def test_prompts_that_would_be_far_shorter_than_their_length_are_left_out(run, qa_file):
    plan = plan_of("question_answering", "needle", 900)
    found = run(plan=plan, longest=900, items=read_items(qa_file)).results
    assert "scores" in found[Cell("msa", "needle", 900, 1.0)]
    reason = found[Cell("msa", "question_answering", 900)]["skipped"]
    assert re.search(r"has filler for \d\d\d tokens, but the length is 900: give it more", reason)


@pytest.mark.parametrize("changes", [{"longest": 499}, {"selection": "there are no layers"}])
def test_refusals_come_before_any_work(changes, run, tmp_path):
    model = Model()
    with pytest.raises(ConfigError):
        run(model, **changes)
    assert model.asked == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": ["needel"]},
            "--tasks has 'needel'; there are needle, multi_key, .*perplexity, selection, serving",
        ),
        ({"tasks": []}, "--tasks is empty"),
        ({"attention": ["msa", "flash"]}, "--attention has 'flash'; there are msa, dense"),
        ({"lengths": []}, "give one or more lengths"),
        ({"lengths": [0, 5]}, r"--lengths is \[0, 5\]"),
        ({"depths": [0.5, 50]}, r"--depths is \[0.5, 50\]; give shares"),
    ],
)
def test_a_plan_of_unknown_things_is_refused(changes, message):
    values = {"attention": ["msa"], "tasks": ["needle"], "lengths": [1], "depths": [0.5]}
    with pytest.raises(ConfigError, match=message):
        Plan(**values | changes)


@pytest.mark.parametrize(
    ("task", "where"),
    [("needle", "needle at 300 tokens, depth 100%"), ("perplexity", "perplexity at 300 tokens, ")],
)
def test_a_model_that_gives_nan_is_named_and_what_is_finished_stays(task, where, run, tmp_path):
    class Broken(Model):
        def log_probabilities(self, sequences, *, start=None):
            found = super().log_probabilities(sequences, start=start)
            return [
                values.fill_(torch.nan) if len(text) > 200 else values
                for text, values in zip(sequences, found, strict=True)
            ]

    with pytest.raises(ConfigError, match=f"the model gives NaN or infinity: {where}.*--attention msa"):
        run(Broken(), plan=plan_of(task, 100, 300))
    assert list(read(tmp_path / "run" / FILE_NAME).results) == plan_of(task, 100).cells()


def test_modes_may_have_spaces_between_them():
    flags = ["run", "--load", "x", "--output", "y", "--lengths", "8", "--attention", "msa, dense"]
    assert command.build_parser(None).parse_args(flags).attention == ["msa", "dense"]


@pytest.mark.parametrize("flag", ["--prefill-chunk", "--max-sequences", "--position-limit"])
def test_numbers_of_the_engine_are_refused_before_anything_is_loaded(flag, capsys):
    flags = ["--load", "nowhere", "--output", "y", "--lengths", "8", flag, "0"]
    assert command.main(None, ["run", *flags]) == 2
    assert f"{flag} is 0; it must be 1 or more" in capsys.readouterr().err


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="--samples is 0"):
        Settings(samples=0, seed=1, methods=["generation"])
    with pytest.raises(ConfigError, match="--scoring has 'bleu'; there are generation, log_probability"):
        Settings(samples=1, seed=1, methods=["bleu"])


def test_depths_are_even():
    assert evenly(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert evenly(1) == [0.5]


@pytest.mark.parametrize("length", [2, 5, 17, 160, 331])
def test_perplexity_is_averaged_within_bins_of_the_position(length):
    def nats(text: list[int]) -> torch.Tensor:
        return torch.arange(1, length) * (1.0 + text[0])

    class Sloped(Model):
        def log_probabilities(self, sequences, *, start=None):
            return [-nats(sequence) for sequence in sequences]

    result = perplexity.measure(Sloped(), [[0] * length, [2] * length])
    ends = result["bin_ends"]
    assert ends[-1] == length
    assert len(ends) == len(set(ends)) == len(result["loss"]) <= perplexity.BINS
    start = 1
    for end, loss in zip(ends, result["loss"], strict=True):
        expected = sum(position * 2.0 for position in range(start, end)) / (end - start)
        assert loss == pytest.approx(expected)
        start = end
    assert result["mean_loss"] == pytest.approx(2.0 * length / 2)


def test_texts_for_perplexity_have_exactly_the_length_and_are_not_repeated(haystack):
    tokens = Tokens(ByteTokenizer())
    total = len("".join(haystack.lines).encode())
    for length in (1, 333, total):
        texts = perplexity.texts(haystack, tokens, length=length, samples=3, seed=4)
        assert [len(text) for text in texts] == [length] * 3
    with pytest.raises(
        ConfigError, match=f"has {total:,} tokens, and perplexity is asked for at {total + 1:,}"
    ):
        perplexity.texts(haystack, tokens, length=total + 1, samples=1, seed=4)


def test_the_file_is_plain_json_lines(run, tmp_path):
    run()
    rows = [json.loads(line) for line in Path(tmp_path, "run", FILE_NAME).read_text().splitlines()]
    assert rows[0]["settings"] == HEADER["settings"]
    assert all(row.keys() == {"cell", "result"} and "seconds" in row["result"] for row in rows[1:])
