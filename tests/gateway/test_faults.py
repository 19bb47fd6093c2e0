"""What an engine can do wrong on its sockets, at each route: an honest answer, once, and soon.

The stand-in of the other tests speaks HTTP, so it cannot do these things; what it can do is in
test_failover.py (an engine of several) and test_streams.py (streams).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from gateway.admission.served_models import MODELS
from gateway.engines.pool import POOL
from lab.fuzz.raw_http import RawAnswer, build_request, connect, read_answer
from tests.gateway.conftest import Served, serve_gateway, until
from tests.gateway.scripted_engine import (
    Call,
    Fault,
    ScriptedEngine,
    answer_well,
    chunk,
    stream_events,
    stream_head,
    whole_answer,
)

_LONGEST_ANSWER_S = 60.0
# Where a fault hangs. Elsewhere the usual time-outs hold: a busy machine is no fault.
_SOON: dict[str, Any] = {"engine_timeout_s": 2.0, "stream_idle_timeout_s": 1.0}


# What an engine may do to a call.


async def resets(call: Call) -> None:
    call.reset()


async def closes(call: Call) -> None:
    """As one that closes an idle connection just when the next call is on its way."""
    call.writer.close()


async def hangs(call: Call) -> None:
    await call.wait_closed()


async def hangs_after_half(call: Call) -> None:
    await call.send(_half(call))
    await call.wait_closed()


async def resets_after_half(call: Call) -> None:
    await call.send(_half(call))
    await asyncio.sleep(0.02)
    call.reset()


async def closes_after_half(call: Call) -> None:
    await call.send(_half(call))
    call.writer.close()


async def breaks_off_its_head(call: Call) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\nContent-Le")
    call.writer.close()


async def speaks_no_http(call: Call) -> None:
    await call.send(b"\x16\x03\x01\x02\x00 what is this\r\n\r\n")
    call.writer.close()


async def drips(call: Call) -> None:
    answer = call.good_answer()
    for place in range(len(answer)):
        await call.send(answer[place : place + 1])
        await asyncio.sleep(0.001)


async def answers_twice(call: Call) -> None:
    """The second one must not become the answer to somebody else's call."""
    await call.send(call.good_answer() + whole_answer(b'{"choices": "a stray answer"}'))


async def answers_again_later(call: Call) -> None:
    await call.send(call.good_answer())
    await asyncio.sleep(0.02)
    await call.send(whole_answer(b'{"choices": "a stray answer"}'))


async def breaks_its_json(call: Call) -> None:
    await call.send(whole_answer(b'{"choices": [{"index": 0, "te'))


async def answers_html(call: Call) -> None:
    await call.send(whole_answer(b"<html>502 Bad Gateway</html>"))


async def closes_behind(call: Call) -> None:
    await call.send(call.good_answer())
    call.writer.close()


async def closes_soon_behind(call: Call) -> None:
    await call.send(call.good_answer())
    await asyncio.sleep(random.random() * 0.004)
    call.writer.close()


def _half(call: Call) -> bytes:
    """The head and some of the body; of a stream, its first event."""
    if call.fields.get("stream"):
        return stream_head() + chunk(stream_events(f"answer:{call.prompts[0]}")[0])
    answer = call.good_answer()
    return answer[: answer.index(b"\r\n\r\n") + 10]


def _with_indices(*indices: int) -> Fault:
    async def answer(call: Call) -> None:
        choices = [
            {"index": index, "text": f"answer:{index}", "finish_reason": "stop"}
            for index in indices
        ]
        await call.send(whole_answer(orjson.dumps({"choices": choices})))

    return answer


# The routes through which a caller comes.


@dataclass(frozen=True)
class CallerRoute:
    """One kind of request; `ask` carries a number that has to come back."""

    name: str
    is_repeatable: bool
    is_stream: bool = False

    def ask(self, number: int) -> bytes:
        temperature = 0 if self.is_repeatable else 0.7
        text = f"#{number}#"
        path, body = "/predict", self._predict_body(text)
        if self.name == "chat":
            path, body = "/v1/chat/completions", self._chat_body(text)
        return build_request("POST", path, orjson.dumps(body | {"temperature": temperature}))

    def _predict_body(self, text: str) -> dict[str, Any]:
        return {"prompt": [text, f"{text} too"]}

    def _chat_body(self, text: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        return {"model": "fake", "stream": self.is_stream, "messages": messages}

    def read(self, answer: RawAnswer) -> list[str]:
        """The texts in a good answer."""
        if self.is_stream:
            lines = answer.body.decode().strip().split("\n\n")
            assert lines[-1] == "data: [DONE]"
            deltas = [orjson.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
            return ["".join(delta["content"] for delta in deltas)]
        data = orjson.loads(answer.body)
        if self.name == "predict":
            assert "errors" not in data
            return list(data["response"])
        return [data["choices"][0]["message"]["content"]]

    def expected(self, number: int) -> list[str]:
        texts = [f"answer:#{number}#"]
        return [*texts, f"answer:#{number}# too"] if self.name == "predict" else texts


PREDICT, SAMPLED_PREDICT = CallerRoute("predict", True), CallerRoute("predict", False)
CHAT, SAMPLED_CHAT = CallerRoute("chat", True), CallerRoute("chat", False)
STREAM, SAMPLED_STREAM = CallerRoute("chat", True, True), CallerRoute("chat", False, True)
GREEDY = (PREDICT, CHAT, STREAM)
SAMPLED = (SAMPLED_PREDICT, SAMPLED_CHAT, SAMPLED_STREAM)
ROUTES = (*GREEDY, *SAMPLED)


def _label(value: object) -> str:
    if isinstance(value, CallerRoute):
        kind = "stream" if value.is_stream else value.name
        return f"{kind}-{'greedy' if value.is_repeatable else 'sampled'}"
    return getattr(value, "__name__", str(value))


@contextlib.asynccontextmanager
async def _serve(
    tmp_path: Path, *engines: ScriptedEngine, urls: Sequence[str] = (), **settings: Any
) -> AsyncIterator[Served]:
    questions = tmp_path / "warm.jsonl"
    questions.write_text('{"question": "warm"}\n')
    options: dict[str, Any] = {
        "tokenizer": None,
        "prompt_style": "raw",
        "warmup_file": questions,
        "breaker_failures": 1000,
        "keepalive_comment_s": 0.1,
        "restart_hold_s": 3,
    } | settings
    async with contextlib.AsyncExitStack() as stack:
        own = [await stack.enter_async_context(engine.serve()) for engine in engines]
        served = await stack.enter_async_context(
            serve_gateway(engines=(*urls, *own), wait_ready=False, **options)
        )
        await until(lambda: all(one.is_usable for one in served.app[POOL].engines))
        yield served


async def _ask(served: Served, route: CallerRoute, number: int) -> RawAnswer:
    """The answer; then the same connection must serve the next request, so there was only one."""
    async with connect(served.url) as (reader, writer), asyncio.timeout(_LONGEST_ANSWER_S):
        writer.write(route.ask(number))
        answer = await read_answer(reader)
        writer.write(build_request("GET", "/healthz"))
        healthz = await read_answer(reader, "GET")
    assert answer is not None
    assert healthz is not None
    assert healthz.body == b'{"status":"ok"}'
    return answer


def _error(answer: RawAnswer) -> tuple[int, str]:
    return answer.status, orjson.loads(answer.body)["error"]["code"]


def _read_events(answer: RawAnswer) -> tuple[str, dict[str, Any]]:
    """Of a stream that failed: the text that had come, and the error."""
    *pieces, failure, end = answer.body.decode().strip().split("\n\n")
    data = [orjson.loads(one[6:]) for one in pieces if not one.startswith(":")]
    assert (answer.status, end) == (200, "data: [DONE]")
    text = "".join(one["choices"][0]["delta"]["content"] for one in data)
    return text, orjson.loads(failure[6:])["error"]


ALL_FAULTS = (
    *(resets, closes, hangs, hangs_after_half, resets_after_half, closes_after_half, drips),
    *(breaks_off_its_head, speaks_no_http, answers_twice, closes_soon_behind),
)
LOST_BEFORE = (resets, closes, breaks_off_its_head, speaks_no_http)
LOST_AMID = (resets_after_half, closes_after_half)
WHOLE_GREEDY, WHOLE_SAMPLED = (PREDICT, CHAT), (SAMPLED_PREDICT, SAMPLED_CHAT)


@pytest.mark.parametrize(
    ("fault", "route"),
    [
        *itertools.product(LOST_BEFORE, GREEDY),
        *itertools.product(LOST_AMID, WHOLE_GREEDY),
    ],
    ids=_label,
)
async def test_lost_call_that_may_run_again_is_answered_once(
    tmp_path: Path, fault: Fault, route: CallerRoute
) -> None:
    engine = ScriptedEngine(faults=[fault])
    async with _serve(tmp_path, engine) as served:
        answer = await _ask(served, route, 1)

    assert answer.status == 200, answer.body
    assert route.read(answer) == route.expected(1)
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    ("fault", "route"),
    [
        *itertools.product(LOST_BEFORE, SAMPLED),
        *itertools.product(LOST_AMID, WHOLE_SAMPLED),
    ],
    ids=_label,
)
async def test_lost_call_that_may_have_run_is_an_error_and_not_run_again(
    tmp_path: Path, fault: Fault, route: CallerRoute
) -> None:
    engine = ScriptedEngine(faults=[fault])
    async with _serve(tmp_path, engine) as served:
        answer = await _ask(served, route, 1)
        again = await _ask(served, route, 2)

    assert _error(answer) == (502, "engine_failed")
    assert route.read(again) == route.expected(2)
    assert len(engine.calls) == 2


@pytest.mark.parametrize("fault", [*LOST_AMID, hangs_after_half], ids=_label)
async def test_stream_lost_amid_says_so_in_its_last_event(tmp_path: Path, fault: Fault) -> None:
    engine = ScriptedEngine(faults=[fault])
    async with _serve(tmp_path, engine, **_SOON if fault is hangs_after_half else {}) as served:
        answer = await _ask(served, STREAM, 1)
        again = await _ask(served, STREAM, 2)

    text, error = _read_events(answer)
    assert text == "answer:"
    assert error["code"] == ("engine_timeout" if fault is hangs_after_half else "engine_failed")
    assert STREAM.read(again) == STREAM.expected(2)
    assert len(engine.calls) == 2


@pytest.mark.parametrize(
    ("fault", "route"),
    [*itertools.product([hangs], ROUTES), *itertools.product([hangs_after_half], WHOLE_GREEDY)],
    ids=_label,
)
async def test_hanging_call_is_given_up_and_not_run_again(
    tmp_path: Path, fault: Fault, route: CallerRoute
) -> None:
    """A second one would double the wait, and would hang as well."""
    engine = ScriptedEngine(usual=fault)
    async with _serve(tmp_path, engine, **_SOON) as served:
        answer = await _ask(served, route, 1)
        await until(lambda: served.app[POOL].engines[0].running == 0)

    assert _error(answer) == (504, "engine_timeout")
    assert len(engine.calls) == 1


@pytest.mark.parametrize("route", ROUTES, ids=_label)
async def test_answer_that_drips_arrives_whole(tmp_path: Path, route: CallerRoute) -> None:
    async with _serve(tmp_path, ScriptedEngine(usual=drips)) as served:
        answers = await asyncio.gather(*(_ask(served, route, number) for number in range(8)))

    assert [route.read(one) for one in answers] == [route.expected(number) for number in range(8)]


@pytest.mark.parametrize("route", ROUTES, ids=_label)
async def test_connection_to_an_engine_that_is_well_is_kept(
    tmp_path: Path, route: CallerRoute
) -> None:
    engine = ScriptedEngine()
    async with _serve(tmp_path, engine) as served:
        for number in range(5):
            await _ask(served, route, number)

    assert len({call.writer for call in engine.calls}) == 1


@pytest.mark.parametrize("route", ROUTES, ids=_label)
@pytest.mark.parametrize("fault", [answers_twice, answers_again_later], ids=_label)
async def test_stray_answer_is_nobodys(tmp_path: Path, fault: Fault, route: CallerRoute) -> None:
    """An engine that says more than it was asked is hung up on before the next call."""
    engine = ScriptedEngine(usual=fault)
    async with _serve(tmp_path, engine) as served:
        for number in range(4):
            answer = await _ask(served, route, number)
            assert route.read(answer) == route.expected(number)
            await until(engine.calls[-1].writer.is_closing)


@pytest.mark.parametrize("route", ROUTES, ids=_label)
@pytest.mark.parametrize("fault", [closes_behind, closes_soon_behind], ids=_label)
async def test_connection_closed_behind_each_answer_doubles_nothing(
    tmp_path: Path, fault: Fault, route: CallerRoute
) -> None:
    """The next call may be on its way; only one that was sampled may be lost, and says so."""
    engine = ScriptedEngine(usual=fault)
    async with _serve(tmp_path, engine) as served:

        async def ask_in_turn(first: int) -> list[tuple[int, RawAnswer]]:
            return [(one, await _ask(served, route, one)) for one in range(first, first + 20)]

        lanes = await asyncio.gather(*map(ask_in_turn, range(0, 80, 20)))

    for number, answer in itertools.chain(*lanes):
        if route.is_repeatable or fault is closes_behind or answer.status == 200:
            assert route.read(answer) == route.expected(number)
        else:
            assert _error(answer) == (502, "engine_failed")
    asked = Counter(call.prompts[0] for call in engine.calls)
    assert set(asked.values()) == {1}


@pytest.mark.parametrize(
    "fault",
    [
        breaks_its_json,
        answers_html,
        *(_with_indices(*one) for one in [(), (0,), (0, 0), (0, 1, 2), (1, 2), (0, -1)]),
    ],
    ids=_label,
)
async def test_predict_garbled_answer_is_an_error_not_an_answer(
    tmp_path: Path, fault: Fault
) -> None:
    async with _serve(tmp_path, ScriptedEngine(usual=fault)) as served:
        answer = await _ask(served, PREDICT, 1)

    assert _error(answer) == (502, "engine_garbled")


async def test_predict_choices_out_of_order_are_put_in_order(tmp_path: Path) -> None:
    async with _serve(tmp_path, ScriptedEngine(usual=_with_indices(1, 0))) as served:
        answer = await _ask(served, PREDICT, 1)

    assert PREDICT.read(answer) == ["answer:0", "answer:1"]


@pytest.mark.parametrize("route", ROUTES, ids=_label)
async def test_engine_that_refuses_connections_is_503(tmp_path: Path, route: CallerRoute) -> None:
    async with contextlib.AsyncExitStack() as life:
        engine = ScriptedEngine()
        url = await life.enter_async_context(engine.serve())
        async with _serve(tmp_path, urls=[url], restart_hold_s=0.2) as served:
            await life.aclose()
            answer = await _ask(served, route, 1)

    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert engine.calls == []


@pytest.mark.slow
async def test_faults_of_all_kinds_leave_nothing_behind(tmp_path: Path) -> None:
    """Two engines that fail at random: each caller gets one answer, then all is as before."""
    engines = ScriptedEngine(), ScriptedEngine()
    chance = random.Random(3)

    async def fails_at_random(call: Call) -> None:
        await chance.choice((*ALL_FAULTS, *[answer_well] * 6))(call)

    async with _serve(tmp_path, *engines, **_SOON) as served:
        await served.client.aclose()
        before = _count_leftovers(served, engines)
        for engine in engines:
            engine.usual = fails_at_random
        outcomes: Counter[str] = Counter()

        async def call(number: int) -> None:
            outcomes[
                _judge(await _ask(served, route := ROUTES[number % 6], number), route, number)
            ] += 1

        for start in range(0, 300, 60):
            await asyncio.gather(*(call(number) for number in range(start, start + 60)))
        for engine in engines:
            engine.usual = answer_well
        await until(lambda: _count_leftovers(served, engines) == before)

    assert outcomes.total() == 300
    assert outcomes["answered"] >= 150, outcomes
    assert outcomes["refused"] >= 15, outcomes


def _judge(answer: RawAnswer, route: CallerRoute, number: int) -> str:
    """Its own answer, or an error that says so: nothing else."""
    if answer.status != 200:
        assert answer.status in {502, 503, 504}
        return "refused" if _error(answer)[1].startswith("engine") else "not ready"
    if not route.is_stream or b'"error"' not in answer.body:
        assert route.read(answer) == route.expected(number)
        return "answered"
    assert _read_events(answer)[0] in {"", "answer:"}
    return "broken off"


def _count_leftovers(served: Served, engines: Sequence[ScriptedEngine]) -> dict[str, int]:
    """What a call holds while it is there; none of it may outlive the call."""
    queue, pool = served.app[MODELS], served.app[POOL]
    gc.collect()
    kept = (web.Request, web.StreamResponse, aiohttp.ClientResponse)
    connections = sum(
        engine.open_connections for engine in engines
    )  # a task each, kept for a while
    return {
        "running": sum(engine.running for engine in pool.engines),
        "in the queue": sum(queue.count("batch") + queue.count("interactive")),
        "tasks": len(asyncio.all_tasks()) - connections,
        **Counter(type(one).__name__ for one in gc.get_objects() if issubclass(type(one), kept)),
    }
