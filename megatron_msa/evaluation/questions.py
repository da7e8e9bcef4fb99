"""One cell of a task with questions: samples built, asked, scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron_msa.evaluation.fitting import Fitted, check_filler, check_fits, fit
from megatron_msa.evaluation.plan import Cell
from megatron_msa.evaluation.protocol import LanguageModel, Tokens
from megatron_msa.evaluation.samples import Question
from megatron_msa.evaluation.scoring import GENERATION, LOG_PROBABILITY, chance, score_ranking, score_reply
from megatron_msa.evaluation.tasks.base import Task


def fitted_samples(task: Task, tokens: Tokens, cell: Cell, *, samples: int, seed: int) -> list[Fitted]:
    """The samples of a cell; the same for every attention mode, so that both are asked the same."""
    return [fit(task, tokens, **each) for each in _places(cell, samples, seed)]


def check_samples(task: Task, tokens: Tokens, cell: Cell, *, samples: int, seed: int) -> None:
    """Refuse a cell before any work if one of its samples does not fit, or the task has too little filler.

    Raises:
        DoesNotFit: says what the task takes.
    """
    places = _places(cell, samples, seed)
    for each in places:
        check_fits(task, tokens, **each)
    check_filler(task, tokens, **places[0])


def _places(cell: Cell, samples: int, seed: int) -> list[dict[str, Any]]:
    """Length, depth and seed of each sample of a cell."""
    return [
        {
            "length": cell.length,
            "depth": 0.5 if cell.depth is None else cell.depth,
            "seed": f"{seed}/{cell.task}/{cell.length}/{cell.depth}/{number}",
        }
        for number in range(samples)
    ]


def measure(
    model: LanguageModel, tokens: Tokens, fitted: Sequence[Fitted], *, methods: Sequence[str]
) -> dict[str, Any]:
    """Ask all questions of a cell.

    Args:
        model: asked.
        tokens: of the model.
        fitted: the samples.
        methods: of scoring, see `scoring`.

    Returns:
        "scores": per method the score of each sample; "prompt_tokens": of the longest prompt of each sample;
        with generation "replies", for a look; with log-probabilities "answer_log_probability", the mean over
        the right answers of each sample in nats, and "chance", the score of guessing.
    """
    result: dict[str, Any] = {
        "prompt_tokens": [max(map(len, each.prompts)) for each in fitted],
        "scores": {},
    }
    if GENERATION in methods:
        result["scores"][GENERATION], result["replies"] = _by_generation(model, tokens, fitted)
    if LOG_PROBABILITY in methods:
        scores, result["answer_log_probability"] = _by_ranking(model, tokens, fitted)
        result["scores"][LOG_PROBABILITY] = scores
        guesses = [chance(question) for each in fitted for question in each.sample.questions]
        result["chance"] = sum(guesses) / len(guesses)
    return result


def _by_generation(
    model: LanguageModel, tokens: Tokens, fitted: Sequence[Fitted]
) -> tuple[list[float], list[list[str]]]:
    # One call per room, so that the engine can batch: each prompt is as long as its own room lets it be, and
    # with the room of another sample it could exceed the length.
    replies: dict[int, Iterator[list[int]]] = {}
    for room in sorted({each.room for each in fitted}):
        prompts = [prompt for each in fitted if each.room == room for prompt in each.prompts]
        stop = None if tokens.end is None else {tokens.end}
        replies[room] = iter(model.generate(prompts, max_new_tokens=room, stop=stop))
    scores, texts = [], []
    for each in fitted:
        said = [tokens.decode(next(replies[each.room])) for _ in each.prompts]
        texts.append(said)
        scores.append(_mean(map(score_reply, each.sample.questions, said)))
    return scores, texts


def _by_ranking(
    model: LanguageModel, tokens: Tokens, fitted: Sequence[Fitted]
) -> tuple[list[float], list[float]]:
    scores, right = [], []
    for each in fitted:
        of_questions, of_answers = [], []
        for question, prompt in zip(each.sample.questions, each.sample.prompts(), strict=True):
            candidates = [*question.answers, *question.distractors]
            values = _log_probabilities(model, tokens, prompt, question, candidates)
            answers, distractors = values[: len(question.answers)], values[len(question.answers) :]
            of_questions.append(score_ranking(question, answers, distractors))
            of_answers.append(max(answers) if question.any_answer else _mean(answers))
        scores.append(_mean(of_questions))
        right.append(_mean(of_answers))
    return scores, right


def _log_probabilities(
    model: LanguageModel, tokens: Tokens, prompt: str, question: Question, candidates: Sequence[str]
) -> list[float]:
    """Log-probability of each candidate as the continuation of the prompt, in nats."""
    pairs = [tokens.continued(prompt, question.separator + candidate) for candidate in candidates]
    found = model.log_probabilities([ids for ids, _ in pairs], start=[start for _, start in pairs])
    return [float(values.double().sum()) for values in found]


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
