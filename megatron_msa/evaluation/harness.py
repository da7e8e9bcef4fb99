"""EleutherAI's lm-evaluation-harness on our models: its tasks, its scoring, our engine.

    python tools/eval_long_context.py harness --load CHECKPOINTS --tasks lambada_openai --output runs/harness

Needs the optional package lm-eval (0.4.13 was tried); importing this module imports it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_msa.errors import ConfigError
from megatron_msa.evaluation.protocol import LanguageModel, Tokens

_NEW_TOKENS = 256
"""The harness's own default for tasks that do not say how much they want."""


class HarnessModel(TemplateLM):
    """A `LanguageModel` in the form that the harness asks.

    Args:
        model: asked.
        tokens: of the model; its start token, or else its end token, stands before texts that nothing else
            precedes.
        longest: tokens that the model takes. Longer contexts lose their beginning, as with the harness's own
            models.

    Raises:
        ConfigError: the tokenizer has no end token.
    """

    def __init__(self, model: LanguageModel, tokens: Tokens, longest: int) -> None:
        super().__init__()
        if tokens.end is None:
            raise ConfigError(
                "the tokenizer has no end-of-document token, which the harness puts before texts"
            )
        self._model = model
        self._tokens = tokens
        self._longest = longest

    @property
    def eot_token_id(self) -> int:
        assert self._tokens.end is not None
        return self._tokens.end

    @property
    def prefix_token_id(self) -> int:
        """What texts begin with in training: the start token, or behind the end of another text."""
        return self._tokens.start[0] if self._tokens.start else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; see `TemplateLM.tok_encode`."""
        return (
            self._tokens.encode_bare(string) if add_special_tokens is False else self._tokens.encode(string)
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy decoding gives it) of each continuation."""
        sequences, starts = [], []
        for _, context, continuation in requests:
            if len(continuation) >= self._longest:
                raise ConfigError(
                    f"a task's continuation has {len(continuation):,} tokens, and the model takes "
                    f"{self._longest:,} with at least one before it; leave the task out"
                )
            kept = (context + continuation)[-self._longest :]
            sequences.append(kept)
            starts.append(len(kept) - len(continuation))
        found = self._model.log_probabilities(sequences, start=starts)
        # More than half of the probability is the maximum. Where that does not decide, it decodes.
        greedy = [bool((values > math.log(0.5)).all()) for values in found]
        for number, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
            if not greedy[number]:
                continuation = sequence[start:]
                (said,) = self._model.generate([sequence[:start]], max_new_tokens=len(continuation))
                greedy[number] = said == continuation
        return [
            (float(values.double().sum()), is_greedy) for values, is_greedy in zip(found, greedy, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, in windows that do not overlap where a text is too long."""
        results = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self._tokens.encode_bare(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            sequences = [context + predicted for context, predicted in pairs]
            found = self._model.log_probabilities(sequences, start=[len(context) for context, _ in pairs])
            results.append(math.fsum(float(values.double().sum()) for values in found))
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of a request's stop texts.

        Raises:
            ConfigError: a task asks for sampling.
        """
        replies = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 0) > 0:
                raise ConfigError(
                    f"a task samples at temperature {options['temperature']}; decoding is greedy here, "
                    "choose another task"
                )
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            new_tokens = min(int(options.get("max_gen_toks", _NEW_TOKENS)), self._longest - 1)
            # An empty prompt has nothing to go on from.
            prompt = (self._tokens.encode(context) or [self.eot_token_id])[-(self._longest - new_tokens) :]
            (new,) = self._model.generate([prompt], max_new_tokens=new_tokens, stop={self.eot_token_id})
            reply = self._tokens.decode(new)
            ends = [place for stop in until if stop and (place := reply.find(stop)) >= 0]
            replies.append(reply[: min(ends, default=len(reply))])
        return replies
