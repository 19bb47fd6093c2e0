"""The batch is cut, put together and halved without losing, doubling or mixing up an answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engines.engine import Engine
from gateway.engines.pool import Pool
from gateway.errors import InvalidRequest
from gateway.observability.metrics import Metrics
from gateway.schemas.wire import Answer, Completion, Prompt, Sampling, default_sampling
from tests.gateway.conftest import make_settings

if TYPE_CHECKING:
    from collections.abc import Sequence


class ListedEngine:
    """An engine that refuses a call with a bad prompt in it, as vLLM does."""

    url, running, is_usable, is_busy = "here", 0, True, False

    def __init__(self, bad: set[str]) -> None:
        self.bad = bad
        self.answered: list[Prompt] = []
        self.calls = 0

    async def complete(self, prompts: Sequence[Prompt], _sampling: Sampling) -> Completion:
        self.calls += 1
        await asyncio.sleep(0)
        if any(prompt in self.bad for prompt in prompts):
            raise InvalidRequest("no")
        self.answered += prompts
        return Completion([Answer(f"to {prompt}", "stop") for prompt in prompts], 1, 1)


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 200),
    bad=st.sets(st.integers(0, 199), max_size=8),
    per_call=st.integers(1, 64),
)
def test_generate_answers_each_prompt_once_in_order(
    count: int, bad: set[int], per_call: int
) -> None:
    prompts = [f"p{number}" for number in range(count)]
    engine = ListedEngine({f"p{number}" for number in bad})
    options = make_settings(max_prompts_per_call=per_call)
    pool = Pool([cast("Engine", engine)], options, Metrics())

    whole = asyncio.run(pool.generate(prompts, default_sampling(options)))

    texts = [answer.text if isinstance(answer, Answer) else None for answer in whole.answers]
    assert texts == [None if prompt in engine.bad else f"to {prompt}" for prompt in prompts]
    assert sorted(engine.answered) == sorted(set(prompts) - engine.bad)
    pieces = -(-count // per_call)
    assert engine.calls <= pieces + 2 * len(bad) * max(1, per_call.bit_length())
