"""The benchmark's verdicts, in a time of the tests' own: no machine is too busy for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiohttp import web

from lab.bench import vllm_bench as outside
from lab.bench.answer_book import MixedUp
from lab.bench.report.bench_console import describe_result
from lab.bench.report.bench_result import BenchResult, describe_quiet
from lab.bench.rounds import RoundBudget, take_rounds
from lab.bench.targets import CallFailed
from lab.scale.virtual_time import in_virtual_time
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.lab.bench.fake_gateway import FakeGateway, build_bench, serve_fake


@contextlib.asynccontextmanager
async def serve_direct(
    fake: FakeGateway, slow: Iterator[float] | None = None
) -> AsyncIterator[str]:
    """The fake engine with this one's places and delay, or with delays that come one by one.

    Without places it would serve any rate: in this time of the tests' own, work takes none.
    """
    at_work = asyncio.Semaphore(fake.places or 1)

    @web.middleware
    async def limited(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.method == "POST":
            async with at_work:
                await asyncio.sleep(next(slow) if slow else fake.delay_s)
        return await handler(request)  # type: ignore[no-any-return]

    app = build_fake_engine(Behaviour())
    app.middlewares.append(limited)
    async with serve_app(app) as url:
        yield url


async def measure(fake: FakeGateway, parts: str, *options: str, **scale: Any) -> BenchResult:
    """A run of some parts; engine and gateway take 5 ms for a call unless told otherwise."""
    return await compare(FakeGateway(places=8), fake, "--only", parts, *options, **scale)


async def compare(
    direct: FakeGateway, gateway: FakeGateway, *options: str, **scale: Any
) -> BenchResult:
    async with serve_direct(direct) as engine, serve_fake(gateway) as url:
        return await build_bench(url, engine, *options, **scale).measure()


def find_row(result: BenchResult, name: str) -> Any:
    return next(row for row in result.rows() if row.name == name)


# --- real and not real


@in_virtual_time
async def test_gateway_that_is_slow_is_really_slower() -> None:
    result = await measure(FakeGateway(delay_s=0.035), "one")

    added = find_row(result, "one prompt, 8 tokens: time, added")
    assert added.difference == "really more"
    assert added.span.value == pytest.approx(30, abs=0.1)
    assert added.bound_verdict == "OVER"
    assert not result.is_good


@in_virtual_time
async def test_gateway_that_is_no_slower_is_not_called_so() -> None:
    result = await measure(FakeGateway(), "one")

    added = find_row(result, "one prompt, 8 tokens: time, added")
    assert added.difference != "really more"
    assert added.bound_verdict == "within"


@in_virtual_time
async def test_control_that_moves_is_said_loudly() -> None:
    """What other programs do to a machine, done to one arm: every second direct call is slow."""
    slow = itertools.cycle([0.005, 0.045])
    direct, gateway = FakeGateway(), FakeGateway(delay_s=0.025)
    async with serve_direct(direct, slow) as url, serve_fake(gateway) as fake:
        bench = build_bench(fake, url, "--only", "one")
        # A fixed order of turns: the slow call is always the control's.
        bench._chance = _InOrder(0)
        result = await bench.measure()

    ratio = find_row(result, "one prompt, 8 tokens: time")
    assert not ratio.is_quiet
    assert ratio.difference == "cannot be told: the control moved as much"
    said = describe_quiet(result)
    assert said.startswith("THIS MACHINE WAS NOT QUIET")
    assert "one prompt, 8 tokens: time" in said
    assert said in "\n".join(describe_result(result, coloured=False))


class _InOrder(random.Random):
    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return list(population)


# --- answers that are not theirs


@pytest.mark.parametrize("part", ["batch", "calls", "streams"])
@in_virtual_time
async def test_gateway_that_mixes_answers_up_gets_no_figures(part: str) -> None:
    with pytest.raises(MixedUp, match=r"gateway answered question .* answer to question"):
        await measure(FakeGateway(mixes=True), part)


@pytest.mark.parametrize(
    ("fake", "part", "said"),
    [
        (FakeGateway(status=500), "one", "answered 500"),
        (FakeGateway(cuts_streams=True), "streams", r"without \[DONE\]"),
        (FakeGateway(status=401), "calls", "answered 401"),
    ],
)
@in_virtual_time
async def test_gateway_that_fails_ends_the_run_and_is_named(
    fake: FakeGateway, part: str, said: str
) -> None:
    with pytest.raises(CallFailed, match=said):
        await measure(fake, part)


# --- rounds


@in_virtual_time
async def test_rounds_drop_the_warm_ups_and_shuffle_the_arms() -> None:
    turns: list[str] = []

    async def measure_arm(arm: str) -> dict[str, float]:
        turns.append(arm)
        return {"time": float(len(turns))}

    taken = await take_rounds(
        ["a", "b", "c"],
        measure_arm,
        RoundBudget(9, 20, warmups=2),
        random.Random(3),
        lambda _: None,
    )

    assert all(len(values) == 20 for values in taken["time"].values())
    assert min(min(values) for values in taken["time"].values()) == 7
    rounds = [tuple(turns[at : at + 3]) for at in range(0, len(turns), 3)]
    assert all(set(one) == {"a", "b", "c"} for one in rounds)
    assert len(set(rounds)) > 3


@in_virtual_time
async def test_rounds_end_with_their_time_but_not_before_enough_were_made() -> None:
    async def measure_arm(_arm: str) -> dict[str, float]:
        await asyncio.sleep(0.01)
        return {"time": 1.0}

    async def count(budget: RoundBudget) -> int:
        taken = await take_rounds(["a", "b"], measure_arm, budget, random.Random(1), lambda _: None)
        return len(taken["time"]["a"])

    assert 2 <= await count(RoundBudget(0.2, 100, fewest=2)) <= 10
    assert await count(RoundBudget(0.1, 100, fewest=6)) >= 3  # 60 % over time
    assert await count(RoundBudget(0.0, 100, fewest=6)) == 2


# --- vllm bench serve


@in_virtual_time
async def test_outside_opinion_without_vllm_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> None:
        raise outside.NoVllm("vLLM is not installed")

    monkeypatch.setattr(outside, "find_environment", find_none)

    result = await measure(FakeGateway(), "outside")

    assert result.outside is None
    assert "no outside opinion: vLLM is not installed" in result.notes
