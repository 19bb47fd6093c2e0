"""What happens to an engine, as data: arrivals, aborts, pauses; and the strategies that draw it.

Free of vLLM, which `twins.py` imports.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from lab.scheduler.engine_setup import EngineSetup


@dataclass(frozen=True)
class Arrival:
    """One request; its prompt begins as others with the same `prefix` do."""

    prefix: int = 0
    prefix_tokens: int = 0
    own_tokens: int = 5
    most_tokens: int = 10
    least_tokens: int = 0
    kind: str = "whole"
    extra: str = ""  # "logprobs", "prompt logprobs", "grammar", "stop string", "no repetition"
    stops: tuple[int, ...] = ()
    ignores_eos: bool = False
    priority: int = 0
    client: int = 0


@dataclass(frozen=True)
class Abort:
    which: int
    is_late: bool = False  # while a step runs


@dataclass(frozen=True)
class Pause:
    state: str


@dataclass(frozen=True)
class ResetCache:
    preempts: bool


@dataclass(frozen=True)
class AbortAll:
    pass


@dataclass(frozen=True)
class Steps:
    count: int


Event = Arrival | Abort | Pause | ResetCache | AbortAll | Steps


setups = st.builds(
    EngineSetup,
    is_async=st.sampled_from((True, True, True, False)),
    is_v2_runner=st.booleans(),
    block_size=st.sampled_from((2, 4, 6, 16, 1)),
    blocks=st.sampled_from((120, 60, 30, 20)),
    sequences=st.sampled_from((12, 5, 2)),
    step_tokens=st.sampled_from((200, 40, 12)),
    context=st.sampled_from((200, 48, 24)),
    policy=st.sampled_from(("fcfs", "priority")),
    has_prefix_cache=st.sampled_from((True, True, True, False)),
    chunk_tokens=st.sampled_from((0, 0, 0, 4)),
    has_clients=st.booleans(),
)


def draw_arrivals(extras: tuple[str, ...]) -> st.SearchStrategy[Arrival]:
    return st.builds(
        Arrival,
        prefix=st.integers(0, 2),
        prefix_tokens=st.sampled_from((0, 0, 4, 8, 12)),
        own_tokens=st.integers(1, 10),
        most_tokens=st.one_of(st.integers(15, 60), st.integers(10, 40), st.integers(1, 4)),
        least_tokens=st.sampled_from((0, 0, 5)),
        kind=st.sampled_from(("whole", "whole", "whole", "stream", "so far")),
        extra=st.sampled_from(extras),
        stops=st.sampled_from(((), (), (3,), (5, 6))),
        ignores_eos=st.booleans(),
        priority=st.integers(0, 2),
        client=st.integers(0, 1),
    )


def draw_histories(extras: tuple[str, ...]) -> st.SearchStrategy[list[Event]]:
    """Rounds of a few events and some steps; hardly ever paused for long."""
    some = st.lists(draw_arrivals(extras), min_size=1, max_size=4)
    aborts = st.builds(Abort, st.integers(0, 9), st.booleans()).map(lambda one: [one])
    pauses = st.tuples(
        st.builds(Pause, st.sampled_from(("PAUSED_ALL", "PAUSED_NEW"))),
        st.builds(Steps, st.integers(1, 4)),
        st.just(Pause("UNPAUSED")),
    ).map(list)
    resets = st.builds(ResetCache, st.booleans()).map(lambda one: [one])
    ends = st.just([AbortAll()])
    rounds = st.tuples(
        st.one_of(some, some, some, some, aborts, aborts, pauses, resets, ends),
        st.builds(Steps, st.integers(1, 30)),
    )
    return st.lists(rounds, min_size=2, max_size=14).map(
        lambda drawn: [event for events, steps in drawn for event in (*events, steps)]
    )


histories = st.one_of(
    draw_histories(("", "stop string")),
    draw_histories(("",)),
    draw_histories(("",) * 5 + ("logprobs", "prompt logprobs")),
    draw_histories(("", "", "", "grammar")),
)


def is_served(setup: EngineSetup, event: Event) -> bool:
    """vLLM refuses other requests before its scheduler sees them."""
    if not isinstance(event, Arrival):
        return True
    tokens = event.prefix_tokens + event.own_tokens
    room = (setup.blocks - 1) * setup.block_size
    return tokens < setup.context and min(tokens + event.most_tokens, setup.context) <= room
