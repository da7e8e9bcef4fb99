"""Which candidates meet on which inputs: the groups of measurements, and the suites made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch.nn.attention import SDPBackend

from benchmarks import baselines, decode, ours, topk
from benchmarks.candidate import Candidate, Experiment
from benchmarks.ours import Problem
from benchmarks.registry import STANDARD, TINY, Heads, Shape, contexts, decode_shapes, real_shapes

# Dense attention takes seconds from here on: it is timed once, and not backward. In _long_context it has not
# even a warm-up: what was compiled for shorter contexts serves.
ONCE_FROM = "256k"
DENSE_SECONDS_AT_1M = 38
# Sizes at which the bars ask for more than the index scores' own selection.
WITH_PATTERNS = ("32k", "128k")


class Suite:
    """What to measure, and where.

    Attributes:
        name: quick, bars, full or decode.
        device: where it runs; on a CPU the reference operators stand in for the kernels.
        tiny: small sizes that keep the names of the real ones.
        only_shapes: names of the shapes to measure; all if empty.
    """

    def __init__(
        self, name: str, device: torch.device, *, tiny: bool = False, only_shapes: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.device = device
        self.tiny = tiny
        self.only_shapes = tuple(only_shapes)
        self.heads: Heads = TINY if tiny else STANDARD
        self.contexts = contexts(tiny)
        self.real_shapes = real_shapes(tiny)
        self.decode_shapes = decode_shapes(tiny)

    def groups(self) -> list[tuple[str, Callable[[], Iterator[Experiment]]]]:
        """The suite's groups by name, in the order in which they run: what the bars need most comes first."""
        if self.name == "decode":
            return [("decode", self._decode)]
        if self.name == "quick":
            return [
                ("context", partial(self._context, ["4k", "32k"])),
                ("select", partial(self._select, ["32k"], eager=False)),
                ("topk", partial(self._topk, ["32k"])),
                ("real", partial(self._real, self.real_shapes[-1:])),
            ]
        bars: list[tuple[str, Callable[[], Iterator[Experiment]]]] = [
            ("context", partial(self._context, ["32k", "128k"])),
            ("select", partial(self._select, ["128k"], eager=self.name == "full")),
            ("topk", partial(self._topk, ["128k"])),
            ("real", partial(self._real, self.real_shapes)),
            ("memory", self._memory),
            ("context", partial(self._context, ["256k"])),
            ("context", partial(self._long_context, ["1m"])),
            ("context", partial(self._context, ["4k", "8k", "16k", "64k"])),
            ("context", partial(self._long_context, ["512k"])),
            ("warmup", partial(self._warmup, ["32k"])),
            ("context", partial(self._long_patterns, ["1m"])),
            ("context", partial(self._other_dense, ["1m", "512k"])),
        ]
        if self.name == "bars":
            return bars
        return [
            *bars,
            ("topk", partial(self._topk, ["8k", "32k"])),
            ("select", partial(self._select, ["8k", "32k", "512k"], eager=True)),
            ("warmup", partial(self._warmup, ["8k", "128k"])),
            ("patterns", partial(self._patterns, ["16k", "128k"])),
            ("published", self._published),
        ]

    def _shapes(self, names: Sequence[str]) -> list[Shape]:
        return [self.contexts[name] for name in names if self._is_wanted(name)]

    def _is_wanted(self, name: str) -> bool:
        return not self.only_shapes or name in self.only_shapes

    def _problem(self, shape: Shape, *, needs_gradients: bool) -> Problem:
        return Problem(shape, self.heads, self.device, needs_gradients=needs_gradients)

    def _dense(self) -> list[baselines.Baseline]:
        """The one that is expected to be the fastest first."""
        if self.device.type == "cpu":
            return [baselines.SDPA]
        return [baselines.FLASH_4, baselines.CUDNN]

    def _context(self, names: list[str]) -> Iterator[Experiment]:
        """Select + attend, and with all gradients, against dense kernels: one document of each length."""
        for shape in self._shapes(names):
            slow = shape.num_queries >= self.contexts[ONCE_FROM].num_queries
            problem = self._problem(shape, needs_gradients=not slow)
            dense = self._dense()
            if self.name == "full" and self.device.type == "cuda" and not slow:
                dense.append(baselines.FLASH_2)
            yield Experiment(
                group="context",
                shape=shape,
                candidates=[
                    *(ours.prefill(problem, pattern) for pattern in _patterns_at(shape)),
                    *(baselines.forward(each, problem, op="prefill", once=slow) for each in dense),
                ],
                expected_s=10 if slow else 5,
            )
            if not slow:
                yield Experiment(
                    group="context",
                    shape=shape,
                    candidates=[
                        *(ours.train(problem, pattern) for pattern in _patterns_at(shape)),
                        *(baselines.train(each, problem) for each in dense),
                    ],
                    expected_s=20 if shape.name == "128k" else 5,
                )

    def _long_context(self, names: list[str]) -> Iterator[Experiment]:
        """Where a dense forward takes many seconds: forward only, and the first dense kernel alone."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=False)
            yield Experiment(
                group="context", shape=shape, candidates=[ours.prefill(problem, "index")], expected_s=12
            )
            yield self._cold_dense(problem, self._dense()[0])

    def _other_dense(self, names: list[str]) -> Iterator[Experiment]:
        """The other dense kernels at those lengths."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=False)
            for each in self._dense()[1:]:
                yield self._cold_dense(problem, each)

    def _long_patterns(self, names: list[str]) -> Iterator[Experiment]:
        """The other patterns at those lengths."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=False)
            candidates = [ours.prefill(problem, pattern) for pattern in ("local", "random")]
            yield Experiment(group="context", shape=shape, candidates=candidates, expected_s=18)

    def _cold_dense(self, problem: Problem, baseline: baselines.Baseline) -> Experiment:
        seconds = DENSE_SECONDS_AT_1M * (problem.shape.num_queries / 2**20) ** 2
        dense = baselines.forward(baseline, problem, op="prefill", once=True, warm=False)
        return Experiment("context", problem.shape, [dense], expected_s=seconds + 3)

    def _select(self, names: list[str], *, eager: bool) -> Iterator[Experiment]:
        """block_select alone."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=False)
            candidates = [
                ours.selection(problem, "exact"),
                ours.selection(problem, "with LSE"),
                ours.selection(problem, "e4m3"),
            ]
            yield Experiment(
                group="select",
                shape=shape,
                candidates=candidates + ([baselines.eager_selection(problem)] if eager else []),
            )

    def _topk(self, names: list[str]) -> Iterator[Experiment]:
        """Top-k alone."""
        for shape in self._shapes(names):
            scores = topk.Scores(shape, self.heads, self.device)
            yield Experiment(
                group="topk",
                shape=shape,
                candidates=[topk.kernel(scores), topk.torch_topk(scores)],
            )

    def _real(self, shapes: list[Shape]) -> Iterator[Experiment]:
        """Attention on the queries and keys of one rank of a real run, selection not included."""
        for shape in shapes:
            if not self._is_wanted(shape.name):
                continue
            problem = self._problem(shape, needs_gradients=True)
            yield Experiment(
                group="real",
                shape=shape,
                candidates=[
                    *_attention(problem, "index"),
                    *(ours.forward(problem, each, with_kl=False) for each in ("local", "random")),
                    *(ours.backward(problem, each) for each in ("local", "random")),
                ],
                expected_s=3,
            )

    def _memory(self) -> Iterator[Experiment]:
        """A training step of 262,144 tokens on one GPU."""
        for shape in self._shapes(["256k"]):
            problem = self._problem(shape, needs_gradients=True)
            yield Experiment(group="memory", shape=shape, candidates=[ours.train(problem, "index")])

    def _warmup(self, names: list[str]) -> Iterator[Experiment]:
        """Full attention with KL and all gradients against dense attention, which has no KL."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=True)
            yield Experiment(
                group="warmup",
                shape=shape,
                candidates=[
                    ours.warmup(problem),
                    *(baselines.train(each, problem, op="warmup") for each in self._dense()),
                ],
            )

    def _patterns(self, names: list[str]) -> Iterator[Experiment]:
        """Attention with every selection pattern."""
        for shape in self._shapes(names):
            problem = self._problem(shape, needs_gradients=True)
            yield Experiment(
                group="patterns",
                shape=shape,
                candidates=_attention(problem, "index", "local", "random", "recent", "hot"),
            )

    def _decode(self) -> Iterator[Experiment]:
        """One new token per sequence against dense kernels over the same cache."""
        for shape in self.decode_shapes.values():
            if not self._is_wanted(shape.name):
                continue
            problem = decode.Problem(shape, self.heads, self.device)
            others = [decode.sdpa(problem, "SDPA", None)]
            if self.device.type == "cuda":
                others = [
                    decode.sdpa(problem, "cuDNN SDPA", SDPBackend.CUDNN_ATTENTION),
                    decode.sdpa(problem, "flash-2 SDPA", SDPBackend.FLASH_ATTENTION),
                    decode.flash_attn_4(problem),
                ]
            yield Experiment(
                group="decode",
                shape=shape,
                candidates=[
                    decode.step(problem, eight_bit=False),
                    decode.step(problem, eight_bit=True),
                    decode.dense(problem),
                    *others,
                    decode.selection(problem, eight_bit=False),
                    decode.selection(problem, eight_bit=True),
                    decode.attention(problem),
                ],
                expected_s=12,
            )

    def _published(self) -> Iterator[Experiment]:
        """Published sparse kernels with the same selection, where their packages are installed."""
        with_the_same_blocks = (
            ("16k", "local", [baselines.NSA, baselines.FLEX]),
            ("16k", "random", [baselines.NSA]),
            ("128k", "local", [baselines.NSA]),
        )
        for name, pattern, sparse in with_the_same_blocks:
            for shape in self._shapes([name]):
                problem = self._problem(shape, needs_gradients=True)
                forwards = [baselines.forward(each, problem, pattern, op="forward") for each in sparse]
                backwards = [baselines.backward(each, problem, pattern) for each in sparse]
                yield Experiment(
                    group="published",
                    shape=shape,
                    candidates=[
                        ours.forward(problem, pattern, with_kl=False),
                        ours.backward(problem, pattern),
                        *forwards,
                        *backwards,
                    ],
                )
        for shape in self._shapes(["16k", "64k"]):
            problem = self._problem(shape, needs_gradients=True)
            yield Experiment(
                group="published",
                shape=shape,
                candidates=[ours.train(problem, "index"), baselines.flash_msa(problem)],
            )


def _patterns_at(shape: Shape) -> list[str]:
    return ["index", *(["local", "random"] if shape.name in WITH_PATTERNS else [])]


def _attention(problem: Problem, *patterns: str) -> list[Candidate]:
    """sparse_attention forward, forward with KL and backward, for each pattern."""
    return [
        each
        for pattern in patterns
        for each in (
            ours.forward(problem, pattern, with_kl=False),
            ours.forward(problem, pattern, with_kl=True),
            ours.backward(problem, pattern),
        )
    ]
