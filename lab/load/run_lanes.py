"""What a batch job costs those who wait: time to the first token beside it, and without it.

Three arms take turns in random order: streams while nothing else runs, the same once more (the
control), and the same while a job of /v1/batches runs with as many requests at once as the gateway
lets it. Without --url it starts `python -m launcher up` with batches on; what stands behind `--`
goes to the launcher.

Exit codes: 0 measured; 1 more than --limit of the time without a batch; 2 bad options or no
gateway; 3 it did not start.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from common.ports import find_free_row
from common.prometheus_text import parse_samples
from common.questions import read_questions
from lab import options
from lab.failures import NoService
from lab.intervals import quantile
from lab.launched_server import LaunchCommand, launch
from lab.paths import OUT
from lab.readiness import wait_ready
from lab.records.record import RecordFigure, take_record, write_record
from lab.reports.console import ProgressLine
from lab.reports.output_files import ensure_writable
from lab.service import open_http

ALONE, CONTROL, BESIDE = "alone", "control", "beside a batch"
ARMS = (ALONE, CONTROL, BESIDE)
_ENDED = 409  # of a batch that is to be cancelled
_POLL_S = 0.2
_READY_S, _IDLE_S = 600.0, 120.0
_HOST = "127.0.0.1"
_ANSWER_TOKENS = 32
CountLines = Callable[[], Awaitable[int]]


@dataclass
class Measured:
    """Of one arm, over all rounds."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)  # of each round
    lines: int = 0  # of the batch, while it was measured
    seconds: float = 0.0


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.record:
        ensure_writable(Path(arguments.record))
    progress = ProgressLine()
    with ExitStack() as exits:
        exits.callback(progress.close)
        url = arguments.url or start(arguments, exits, progress)
        measured = asyncio.run(measure(arguments, url, progress))
    progress.close()
    figures = build_figures(measured)
    for one in figures:
        span = "" if one.low is None else f"{one.low:.3f} to {one.high:.3f}"
        print(f"{one.name:52}{one.value:10.3f} {one.unit:8}{span}")
    if arguments.record:
        about = (
            f"{arguments.callers} callers, one stream of {_ANSWER_TOKENS} tokens after another; "
            f"{arguments.rounds} interleaved rounds of {arguments.calls} streams an arm; the job's "
            f"requests are of {arguments.line_tokens} tokens each."
        )
        record = take_record("A batch beside callers who wait", figures, about=about)
        write_record(record, Path(arguments.record))
    ratio = find_ratio(measured, BESIDE)
    return int(ratio > arguments.limit)


def start(arguments: argparse.Namespace, exits: ExitStack, progress: ProgressLine) -> str:
    """On free ports, with batches in a folder that goes with it."""
    port = find_free_row(3)
    folder = exits.enter_context(tempfile.TemporaryDirectory())
    state = os.environ.get("LAUNCHER_STATE_DIR", str(OUT.resolve() / "bench-state"))
    environment = {
        "GATEWAY_BATCH_FOLDER": folder,
        "LAUNCHER_STATE_DIR": state,
        "LAUNCHER_ENGINE_PORT": str(port + 1),
        "LAUNCHER_STATUS_PORT": str(port + 2),
    }
    words = arguments.launcher_options
    command = LaunchCommand(_HOST, port, arguments.model, words, environment)
    launched = exits.enter_context(launch(command, OUT / "lanes-stack.log", progress))
    url = f"http://{_HOST}:{port}"

    async def wait() -> None:
        async with open_http() as client:
            await wait_ready(url, client, progress, _READY_S, launched.find_end)

    asyncio.run(wait())
    return url


async def measure(
    arguments: argparse.Namespace, url: str, progress: ProgressLine
) -> dict[str, Measured]:
    questions = [pair.question for pair in read_questions(Path(arguments.questions)).pairs]
    measured = {arm: Measured() for arm in ARMS}
    chance = random.Random(arguments.seed)
    async with aiohttp.ClientSession(
        url, headers=options.build_headers(arguments.api_key), trust_env=False
    ) as session:
        lanes = Lanes(session, questions, arguments)
        await lanes.find_model()
        for number in range(1 + arguments.rounds):
            kept = measured if number else {arm: Measured() for arm in ARMS}  # it warms up
            for arm in chance.sample(ARMS, len(ARMS)):
                progress.working(f"round {number} of {arguments.rounds}: {arm}")
                await lanes.take_turn(arm, kept[arm], chance)
    return measured


class Lanes:
    """Callers who wait and a job that does not, before one gateway."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        questions: Sequence[str],
        arguments: argparse.Namespace,
    ) -> None:
        self._session, self._arguments = session, arguments
        self._questions = itertools.cycle(questions)
        self._model = ""

    async def find_model(self) -> None:
        async with self._session.get("/v1/models") as answer:
            told = await answer.json()
        if answer.status != 200:
            raise NoService(f"GET /v1/models answers {answer.status}")
        self._model = told["data"][0]["id"]

    async def take_turn(self, arm: str, measured: Measured, chance: random.Random) -> None:
        if arm != BESIDE:
            await self._take_streams(measured, chance)
            return
        async with self._run_batch() as count_lines:
            began, before = time.monotonic(), await count_lines()
            await self._take_streams(measured, chance)
            measured.seconds += time.monotonic() - began
            measured.lines += await count_lines() - before

    async def _take_streams(self, measured: Measured, chance: random.Random) -> None:
        count, callers = self._arguments.calls, self._arguments.callers
        firsts: list[float] = []

        async def act(calls: int) -> None:
            for _ in range(calls):
                await asyncio.sleep(chance.uniform(0, 2 * self._arguments.think))
                first_s, between_s = await self._stream()
                firsts.append(first_s)
                measured.between_s.append(between_s)

        await asyncio.gather(*(act(count // callers) for _ in range(callers)))
        measured.first_s += firsts
        measured.p99_s.append(quantile(firsts, 0.99))

    async def _stream(self) -> tuple[float, float]:
        """Time to the first token, and from there between two."""
        body = {**self._build_chat(_ANSWER_TOKENS), "stream": True}
        began, times = time.perf_counter(), list[float]()
        async with self._session.post("/v1/chat/completions", json=body) as answer:
            if answer.status != 200:
                raise NoService(f"a stream was answered with {answer.status}")
            async for line in answer.content:
                if line.startswith(b"data: {") and b'"content":"' in line:
                    times.append(time.perf_counter())
        if not times:
            raise NoService("a stream had no token")
        return times[0] - began, (times[-1] - times[0]) / max(1, len(times) - 1)

    def _build_chat(self, tokens: int) -> dict[str, object]:
        messages = [{"role": "user", "content": next(self._questions)}]
        return {
            "model": self._model,
            "messages": messages,
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }

    @asynccontextmanager
    async def _run_batch(self) -> AsyncIterator[CountLines]:
        """Inside it runs with all that it is let; at the end it is cancelled and gone."""
        url = "/v1/chat/completions"
        lines = (
            {
                "custom_id": str(number),
                "method": "POST",
                "url": url,
                "body": self._build_chat(self._arguments.line_tokens),
            }
            for number in range(self._arguments.lines)
        )
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", "\n".join(map(json.dumps, lines)).encode(), filename="lines.jsonl")
        uploaded = await self._post("/v1/files", data=form)
        order = {"input_file_id": uploaded["id"], "endpoint": url, "completion_window": "24h"}
        batch = await self._post("/v1/batches", json=order)
        try:
            await self._wait_running(True)
            await asyncio.sleep(self._arguments.lead)
            yield self._count_lines
        finally:
            await self._post(f"/v1/batches/{batch['id']}/cancel", accepted=(200, _ENDED))
            await self._wait_running(False)

    async def _post(
        self, path: str, accepted: Sequence[int] = (200,), **content: object
    ) -> dict[str, str]:
        async with self._session.post(path, **content) as answer:  # type: ignore[arg-type]
            told: dict[str, str] = await answer.json()
        if answer.status not in accepted:
            raise NoService(f"POST {path} answers {answer.status}: {told}")
        return told

    async def _wait_running(self, is_wanted: bool) -> None:
        """Polled: metrics tell nobody when they change."""
        for _ in range(int(_IDLE_S / _POLL_S)):
            if bool(await self._read("gateway_batch_running_lines")) is is_wanted:
                return
            await asyncio.sleep(_POLL_S)
        raise NoService(f"the batch {'does not run' if is_wanted else 'does not end'}")

    async def _count_lines(self) -> int:
        return int(await self._read("gateway_batch_lines_total"))

    async def _read(self, name: str) -> float:
        async with self._session.get("/metrics") as answer:
            samples = parse_samples(await answer.text())
        return sum(value for _, value in samples.get(name, ()))


def find_ratio(measured: dict[str, Measured], arm: str) -> float:
    return quantile(measured[arm].first_s, 0.99) / quantile(measured[ALONE].first_s, 0.99)


def build_figures(measured: dict[str, Measured]) -> list[RecordFigure]:
    figures = []
    for arm, one in measured.items():
        for share, word in ((0.5, "median"), (0.99, "p99")):
            value = quantile(one.first_s, share) * 1e3
            rounds = [second * 1e3 for second in one.p99_s] if share == 0.99 else []
            low, high = (min(rounds), max(rounds)) if rounds else (None, None)
            figures.append(RecordFigure(f"{arm}: first token, {word}", value, "ms", low, high))
        between_ms = quantile(one.between_s, 0.5) * 1e3
        figures.append(RecordFigure(f"{arm}: between tokens, median", between_ms, "ms"))
    for arm in (CONTROL, BESIDE):
        ratios = [a / b for a, b in zip(measured[arm].p99_s, measured[ALONE].p99_s, strict=True)]
        figures.append(
            RecordFigure(
                f"{arm} over alone: first token, p99",
                find_ratio(measured, arm),
                "×",
                min(ratios),
                max(ratios),
            )
        )
    beside = measured[BESIDE]
    per_s = beside.lines / beside.seconds if beside.seconds else 0.0
    figures.append(RecordFigure("requests of the batch meanwhile", per_s, "/s"))
    return figures


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("lanes", __doc__)
    add, positive = parser.add_argument, options.whole_number(1)
    help_ = "of a gateway with batches on (default: one of its own)"
    add("--url", type=options.address, default="", metavar="URL", help=help_)
    add("--model", default="", help="of the stack that is started (default: the demo)")
    help_ = "for a gateway with keys; also the variable LANES_API_KEY"
    key = os.environ.get("LANES_API_KEY", "")
    add("--api-key", type=options.header_text, default=key, metavar="KEY", help=help_)
    options.add_questions(parser)
    add("--rounds", type=positive, default=6, help="of each arm (default: 6)")
    add("--calls", type=positive, default=40, help="streams of an arm in a round (default: 40)")
    add("--callers", type=positive, default=2, help="who wait, at once (default: 2)")
    add("--think", type=options.seconds, default=0.2, help="seconds between calls (default: 0.2)")
    add("--lines", type=positive, default=3000, help="of the job, which is cancelled in the end")
    add("--line-tokens", type=positive, default=256, help="of each of them (default: 256)")
    help_ = "seconds that the job is alone before it is measured (default: 4)"
    add("--lead", type=options.seconds, default=4.0, help=help_)
    add("--limit", type=options.seconds, default=1.2, help="of p99 without a batch (default: 1.2)")
    add("--seed", type=int, default=1, help="of the order of turns (default: 1)")
    options.add_record(parser)
    return options.parse_options(parser, words)
