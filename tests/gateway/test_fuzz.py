"""Ten thousand requests, most of them spoilt, at a gateway in a process of its own.

Never a 500, never a traceback, never an answer without OpenAI's envelope, never one caller's text
in another's answer, never a blocked event loop, nothing left behind. `FUZZ_SEED=7
FUZZ_CASES=100000` tries others by hand.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from lab.fuzz.raw_http import NotHTTP, RawAnswer, connect, read_answer
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.gateway.fuzz_cases import KEY, Case, make_cases, mark
from tests.gateway.process import check_blocks, serve_process

SEED = int(os.environ.get("FUZZ_SEED", "1"))
COUNT = int(os.environ.get("FUZZ_CASES", "10000"))
CALLERS = 32
_LONGEST_ANSWER_S = 20
_LONGEST_SILENCE_S = 0.15  # one whose request is not whole gets no answer, rightly
_MOST_REPORTED = 10
_MARK = re.compile(r"#\d{6}#")
_ENVELOPE = {"message", "type", "code", "param", "source"}
_ALLOWED = frozenset((200, 308, 400, 401, 403, 404, 405, 408, 413, 415, 417, 429, 431, 503, 504))


@dataclass
class Record:
    """What came of the cases."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def blame(self, case: Case, fault: str, answer: RawAnswer | None = None) -> None:
        got = f"{answer.status} {answer.headers} {answer.body[:400]!r}" if answer else "nothing"
        self.faults.append(
            f"seed {SEED} case {case.number} ({case.kind}): {fault}\n"
            f"  sent {case.sent[:700]!r}\n  got  {got}"
        )

    def report(self) -> str:
        return "\n".join([f"{len(self.faults)} faults", *self.faults[:_MOST_REPORTED]])


@pytest.mark.timeout(300)
@pytest.mark.slow
async def test_fuzz_spoilt_requests_get_an_envelope_and_nothing_leaks(tmp_path: Path) -> None:
    engine = Behaviour(delay_s=0.001)
    record = Record()
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(
            *(tmp_path, engine_url, "--api-keys", KEY, "--max-body-bytes", "1000000"),
            blocks=tmp_path / "blocks.jsonl",
        ) as gateway,
    ):
        cases = make_cases(SEED, COUNT)
        async with asyncio.TaskGroup() as callers:
            for _ in range(CALLERS):
                callers.create_task(_call(gateway.url, cases, record))

        assert not record.faults, record.report()
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as client:
            last = await client.post("/predict", json={"prompt": "still here"})
            await until(lambda: engine.running == 0)
            gauges = (await client.get("/metrics")).text
        log = gateway.read_log()
        await until(lambda: gateway.count_sockets() < 12)

    check_blocks(tmp_path / "blocks.jsonl")
    assert last.json() == {"response": "answer:still here"}
    for line in log.splitlines():
        assert line.startswith("{"), f"a line that is no event: {line}"
        assert '"request_crashed"' not in line
        assert "Traceback" not in line
        assert not _MARK.search(line), f"a prompt is in the log: {line}"
    assert 'gateway_running_sequences{lane="interactive"} 0' in gauges
    assert 'gateway_running_sequences{lane="batch"} 0' in gauges
    assert engine.unreadable == 0
    served = sum(count for (_, status), count in record.statuses.items() if status == 200)
    refused = record.statuses.total() - served
    assert served > COUNT * 0.3, record.statuses
    assert refused > COUNT * 0.2, record.statuses


async def _call(url: str, cases: Iterator[Case], record: Record) -> None:
    """One caller: takes the next case, on a new connection when the last is spent."""
    while True:
        async with connect(url) as (reader, writer):
            is_open = True
            while is_open:
                case = next(cases, None)
                if case is None:
                    return
                try:
                    is_open = await _try(case, reader, writer, record)
                except (NotHTTP, TimeoutError, ConnectionError) as error:
                    record.blame(case, repr(error))
                    is_open = False


async def _try(
    case: Case, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: Record
) -> bool:
    """Whether the connection can take another."""
    for number, piece in enumerate(case.pieces):
        if number:
            await asyncio.sleep(0.002)
        writer.write(piece)
    if case.hangs_up:
        await asyncio.sleep(0.003)
        return False
    if case.outcome == "torn":
        await _read_torn(case, reader, record)
        return False
    for _ in range(case.answers):
        async with asyncio.timeout(_LONGEST_ANSWER_S):
            answer = await read_answer(reader, case.method)
        if answer is None:
            record.blame(case, "no answer")
            return False
        _check(case, answer, record)
        if not answer.keeps_connection:
            return False
    return True


async def _read_torn(case: Case, reader: asyncio.StreamReader, record: Record) -> None:
    """Whatever comes must be whole answers; a silence is the server waiting for the rest."""
    while True:
        try:
            async with asyncio.timeout(_LONGEST_SILENCE_S):
                answer = await read_answer(reader, case.method)
        except TimeoutError:
            return
        if answer is None:
            return
        _check(case, answer, record)
        if not answer.keeps_connection:
            return


def _check(case: Case, answer: RawAnswer, record: Record) -> None:
    record.statuses[case.kind, answer.status] += 1
    text = _read_text(answer)
    own = {*_MARK.findall(case.sent.decode("latin-1")), mark(case.number)}
    if not own.issuperset(_MARK.findall(text)):
        record.blame(case, "another's number", answer)
    if answer.status not in _ALLOWED:
        record.blame(case, "a status that nothing here calls for", answer)
    if "x-request-id" not in answer.headers:
        record.blame(case, "no request id", answer)
    if answer.status < 400:
        if case.keeps_prompt and mark(case.number) not in text:
            record.blame(case, "its number is not in the answer", answer)
        return
    if case.outcome == "served":
        record.blame(case, "a good request was refused", answer)
    if answer.status in {429, 503} and "retry-after" not in answer.headers:
        record.blame(case, "no Retry-After", answer)
    if case.method != "HEAD" and not _is_envelope(answer):
        record.blame(case, "no envelope", answer)


def _is_envelope(answer: RawAnswer) -> bool:
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return False
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    # The engine's own refusals come in its own words.
    is_whole = set(error) == _ENVELOPE or error.get("source") == "engine"
    return bool(error.get("message")) and is_whole


def _read_text(answer: RawAnswer) -> str:
    """Head and body; a stream's pieces put together, for it comes letter by letter."""
    text = f"{dict(answer.headers)} {answer.body.decode('utf-8', 'replace')}"
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        return text
    lines = (line.removeprefix("data: ") for line in text.split("\n"))
    events = [json.loads(line) for line in lines if line.startswith('{"')]
    return text + "".join(one["text"] for event in events for one in event.get("choices", ()))
