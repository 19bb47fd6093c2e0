"""What is measured, how much of it and for how long."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lab.bench.bench_figures import FEWEST_ROUNDS
from lab.bench.rate_sweep import Plan
from lab.bench.relay.relay_comparison import Load
from lab.bench.rounds import Budget
from lab.bench.vllm_bench import Asked
from lab.bench.workloads import ManyCalls, OneCall, Streams, Workload

PARTS = ("one", "batch", "calls", "streams", "sweep", "outside", "relay")
QUICK_PARTS = ("one", "batch", "calls", "streams", "relay")
# Short answers where what is added to a call is sought: it does not depend on their length.
_SINGLE_TOKENS, _STREAM_TOKENS, _SWEEP_TOKENS = 8, 64, 32
SINGLE_TITLE = f"one prompt, {_SINGLE_TOKENS} tokens"


@dataclass(frozen=True)
class Scale:
    """Seconds a part, rounds, and how much is asked."""

    seconds: dict[str, float]
    fewest: int
    prompts: int
    most: int = 150
    streams: tuple[int, ...] = (1, 16, 64)
    sweep_rounds: int = 8
    sweep_window_s: float = 2.0
    sweep_arrivals: int = 60
    outside: Asked = field(default_factory=Asked)
    relay: Load = field(default_factory=Load)

    def budget(self, part: str, most: int, share: float = 1.0) -> Budget:
        most = min(most, self.most)
        return Budget(self.seconds[part] * share, most, min(self.fewest, most))


# On two cores with the demo model: seventeen minutes, and one.
FULL = Scale(
    {
        "one": 15,
        "batch": 80,
        "calls": 180,
        "streams": 120,
        "sweep": 420,
        "outside": 45,
        "relay": 85,
    },
    FEWEST_ROUNDS,
    358,
)
QUICK = Scale(
    {"one": 4, "batch": 6, "calls": 8, "streams": 12, "sweep": 30, "outside": 24, "relay": 10},
    3,
    64,
    sweep_rounds=1,
    sweep_window_s=1.0,
    outside=Asked(prompts=32),
    relay=Load(calls=200, seconds=0.3),
)


@dataclass(frozen=True)
class Questions:
    """The file's questions, as often as they are needed, and how long an answer may be."""

    known: tuple[str, ...]
    max_tokens: int

    def take(self, count: int) -> tuple[str, ...]:
        return tuple(itertools.islice(itertools.cycle(self.known), count))


def batch_title(prompts: int) -> str:
    return f"{prompts} prompts in one call"


def list_workloads(
    parts: Sequence[str], scale: Scale, asked: Questions
) -> Iterator[tuple[Workload, Budget]]:
    """In the order of the parts."""
    all_questions, longest = asked.take(scale.prompts), asked.max_tokens
    if "one" in parts:
        single = OneCall(SINGLE_TITLE, asked.take(1), min(_SINGLE_TOKENS, longest))
        yield single, scale.budget("one", 150)
    if "batch" in parts:
        batch = OneCall(batch_title(scale.prompts), all_questions, longest)
        yield batch, scale.budget("batch", 150)
    if "calls" in parts:
        calls = ManyCalls(f"{scale.prompts} calls at once", all_questions, longest)
        yield calls, scale.budget("calls", 150)
    if "streams" in parts:
        # A few streams vary more from round to round and take less time: they get more rounds.
        total = sum(count**0.25 for count in scale.streams)
        for count in scale.streams:
            title = f"{count} chat stream{'s at once' if count > 1 else ''}"
            streams = Streams(title, asked.take(count), min(_STREAM_TOKENS, longest))
            yield streams, scale.budget("streams", 150, count**0.25 / total)


def plan_sweep(scale: Scale, asked: Questions, bound_s: float) -> Plan:
    return Plan(
        asked.known,
        min(_SWEEP_TOKENS, asked.max_tokens),
        bound_s,
        scale.sweep_window_s,
        scale.sweep_arrivals,
        scale.seconds["sweep"],
        scale.sweep_rounds,
    )
