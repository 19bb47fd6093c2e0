"""The fuzz: what it says of a gateway that holds, and of those that do not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lab.__main__ import run_command
from lab.fuzz import run_fuzz
from lab.fuzz.callers import Callers, Tally
from lab.fuzz.cases.case import KEY, Case, mark
from lab.fuzz.cases.kinds import KINDS, find_kind
from lab.fuzz.raw_http import address
from lab.fuzz.survival import Vitals, find_changes, judge_log
from tests.gateway.conftest import serve_gateway

Alter = Callable[[bytes], bytes]


async def fuzz(url: str, known_questions: Path, *options: str) -> int:
    fixed = ["--url", url, "--status", "http://127.0.0.1:9"]  # nobody's
    fixed += ["--questions", str(known_questions), "--cases", "60", "--slice", "30"]
    return await asyncio.to_thread(run_command, "fuzz", run_fuzz.main, [*fixed, *options])


@contextlib.asynccontextmanager
async def serve_between(
    url: str, alter: Alter, see: Callable[[bytes], None] = lambda _: None
) -> AsyncIterator[str]:
    """Whatever comes back of a server goes through `alter`; `see` is shown what is sent."""

    async def carry(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Alter
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**20):
                writer.write(change(data))
                await writer.drain()
        writer.close()

    def show(data: bytes) -> bytes:
        see(data)
        return data

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, to_them = await asyncio.open_connection(*address(url))
        await asyncio.gather(carry(reader, to_them, show), carry(theirs, writer, alter))

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.programs
async def test_fuzz_of_a_gateway_that_holds_is_recorded_by_kind(
    known_questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "fuzz.json"
    options = ("--record", str(record), "--api-key", KEY)
    async with serve_gateway(api_keys=(KEY,)) as served:
        assert await fuzz(served.url, known_questions, *options) == 0, capsys.readouterr().out
        more = ("--add", "--first", "60")
        assert await fuzz(served.url, known_questions, *options, *more) == 0, (
            capsys.readouterr().out
        )

    assert "all held" in capsys.readouterr().out
    kept = json.loads(record.read_text(encoding="utf-8"))
    figures = {row["name"]: row["value"] for row in kept["figures"]}
    by_kind = [value for name, value in figures.items() if name.startswith("cases of ")]
    assert (figures["cases"], sum(by_kind), figures["findings"]) == (120, 120, 0)
    assert figures["honest calls answered rightly"] == 8
    assert figures["times that the service was looked at"] == 4
    assert kept["about"] == "cases 0 to 59 of seed 1; cases 60 to 119 of seed 1"
    assert KEY not in record.read_text(encoding="utf-8")


@pytest.mark.programs
@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        (rb"X-Request-Id", b"X-Something-", "no request id"),
        (rb"HTTP/1.1 400 ", b"HTTP/1.1 500 ", "a status that nothing here calls for"),
        (rb"HTTP/1.1 400 ", b"HTTX/1.1 400 ", "no status line"),
        (rb"#0000\d\d#", b"#999999#", "another's number"),
        (rb'\{"error"', b'{"eroor"', "no envelope"),
    ],
)
async def test_fuzz_sees_an_answer_that_must_not_be(
    known_questions: Path,
    capsys: pytest.CaptureFixture[str],
    before: bytes,
    after: bytes,
    fault: str,
) -> None:
    async with (
        serve_gateway(api_keys=(KEY,)) as served,
        serve_between(served.url, lambda data: re.sub(before, after, data)) as url,
    ):
        assert await fuzz(url, known_questions) == 1

    out = capsys.readouterr().err
    assert fault in out
    found = re.search(r"again: --seed 1 --case (\d+)", out)
    assert found is not None
    assert find_kind(1, int(found[1])) in out


@pytest.mark.programs
async def test_fuzz_finds_the_case_that_harms_whoever_comes_after(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one request did that took an engine down: the next honest caller suffers."""
    culprit = next(n for n in range(10, 60) if find_kind(1, n) == "sampling")
    is_harmed = False

    def see(data: bytes) -> None:
        nonlocal is_harmed
        is_harmed = is_harmed or mark(culprit).encode() in data

    def alter(data: bytes) -> bytes:
        nonlocal is_harmed
        if not is_harmed or b"answer:q" not in data:
            return data
        is_harmed = False
        return data.replace(b"answer:q", b"answer:z")

    async with (
        serve_gateway(api_keys=(KEY,)) as served,
        serve_between(served.url, alter, see) as url,
    ):
        assert await fuzz(url, known_questions) == 1

    out, told = capsys.readouterr()
    assert f"case {culprit} (sampling): an honest call got a wrong answer" in told
    assert "1 finding" in out


@pytest.mark.programs
async def test_fuzz_ends_before_a_service_that_does_not_become_well_again(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = 0

    def alter(data: bytes) -> bytes:
        nonlocal answers
        answers += b"answer:q" in data
        return data.replace(b"answer:q", b"answer:z") if answers > 1 else data

    async with (
        serve_gateway(api_keys=(KEY,)) as served,
        serve_between(served.url, alter) as url,
    ):
        assert await fuzz(url, known_questions) == 1

    out = capsys.readouterr().err
    assert "it did not become well again, after the cases 0 to 29 together" in out
    assert "--first 0 --cases 30" in out


@pytest.mark.programs
async def test_fuzz_sends_one_case_again_and_shows_what_came(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(n for n in range(100) if find_kind(1, n) == "values")
    async with serve_gateway(api_keys=(KEY,)) as served:
        assert await fuzz(served.url, known_questions, "--case", str(number)) == 0

    out, shown = capsys.readouterr()
    assert f"case {number} (values)" in shown
    assert mark(number) in shown
    assert "got " in shown
    assert "all held" in out


@pytest.mark.programs
async def test_fuzz_without_a_gateway_says_so(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await fuzz("http://127.0.0.1:9", known_questions) == 2
    assert "is the gateway running" in capsys.readouterr().err


def test_fuzz_names_its_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fuzz.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown and kind.meaning in shown for name, kind in KINDS.items())


async def test_caller_blames_a_server_that_never_answers_and_one_that_cuts_off() -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def cut_off(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(5)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{")
        writer.close()

    case = Case(3, (b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",), "answered", kind="valid")
    for serve, fault in ((be_silent, "no answer within 0.2 s"), (cut_off, "a body breaks off")):
        server, tally = await asyncio.start_server(serve, "127.0.0.1", 0), Tally()
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            await Callers(url, tally, silence_s=0.1, longest_s=0.2).send(iter([case]))

        (found,) = tally.findings
        assert fault in found.fault
        assert "--seed 5 --case 3" in found.describe(5)


WELL = Vitals({"engine": 10, "gateway": 11}, 0, {"trips": 1.0}, {"engine": 500.0, "gateway": 90.0})


@pytest.mark.parametrize(
    ("after", "change"),
    [
        (WELL, ""),
        (
            Vitals({"engine": 12, "gateway": 11}, 0, WELL.counts, WELL.memory_mb),
            "the engine is another process: 10 has become 12",
        ),
        (
            Vitals({"gateway": 11}, 0, WELL.counts, WELL.memory_mb),
            "the engine is another process: 10 has become none",
        ),
        (Vitals(WELL.pids, 1, WELL.counts, WELL.memory_mb), "the engine was restarted 1 times"),
        (Vitals(WELL.pids, 0, {"trips": 3.0}, WELL.memory_mb), "trips rose by 2"),
        (
            Vitals(WELL.pids, 0, WELL.counts, {"engine": 500.0, "gateway": 300.0}),
            "the gateway has grown by 210 MB",
        ),
    ],
)
def test_service_that_has_changed_is_named(after: Vitals, change: str) -> None:
    assert list(find_changes(WELL, WELL, after)) == ([change] if change else [])


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"event": "request_done"}', ""),
        (b'{"event": "request_crashed", "exception": "x"}', "tells of a crash"),
        (b'{"event": "connection_crashed"}', "tells of a crash"),
        (b"Traceback (most recent call last):", "tells of a crash"),
        (b"Task exception was never retrieved", "is no event"),
        (b'{"event": "request_done", "path": "say #000123#"}', "a prompt is in"),
    ],
)
def test_line_that_no_gateway_may_log_is_named(line: bytes, fault: str) -> None:
    found = list(judge_log(b'{"event": "gateway_listening"}\n' + line))

    assert len(found) == bool(fault)
    assert fault in "".join(found)
