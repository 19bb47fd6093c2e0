"""The benchmark over sockets: every load through real doors, good ones and bad ones."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from common import processes as cpu
from common.questions import read_questions
from lab.bench import run_bench as program
from lab.bench import vllm_bench as outside
from lab.bench.answer_book import MixedUp
from lab.bench.bench_figures import BenchFailed, Series
from lab.bench.bench_result import Result, describe_quiet
from lab.bench.bench_scale import PARTS, QUICK
from lab.bench.rate_sweep import Point, Sweep
from lab.bench.relay.relay_comparison import CPU, LATENCY, Caller, Load, measure_relay
from lab.bench.rounds import Budget, take_rounds
from lab.bench.run_bench import Bench
from lab.bench.targets import CallFailed
from lab.reports.bench_console import describe_result
from lab.reports.bench_page import render
from lab.reports.progress import Progress
from tests.fake_engine import MODEL_FOLDER, Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import serve_gateway
from tests.lab.grade.test_run_grade import environment
from tests.launcher.programs import FAKE_VLLM, ROOT

ENGINE_PARTS = "one,batch,calls,streams,sweep"
TINY = replace(
    QUICK,
    seconds=dict.fromkeys(PARTS, 60.0),
    fewest=6,
    most=6,
    prompts=12,
    streams=(1, 8),
    sweep_rounds=1,
    sweep_window_s=0.2,
    sweep_arrivals=20,
    outside=outside.Asked(prompts=4, output_tokens=8),
)


def build_bench(gateway: str, engine: str, *options: str, **scale: Any) -> Bench:
    fixed = ["--url", gateway, "--direct-url", engine, "--tokenizer", str(MODEL_FOLDER)]
    fixed += ["--status-url", "http://127.0.0.1:9"]  # nobody's
    arguments = program.parse_arguments([*fixed, *options])
    arguments.scale = replace(TINY, **scale)
    asked = read_questions(Path(arguments.questions)).take(24)
    return Bench(arguments, asked, Progress(0, 1, io.StringIO()))


@dataclass
class DoorSettings:
    """A gateway of the tests' own, and how it goes wrong."""

    delay_s: float = 0.0
    mixes: bool = False
    status: int = 200
    timing: str = "engine;dur=1"
    cuts_streams: bool = False
    places: int | None = None
    refuses_above: int | None = None
    calls: int = 0
    inside: int = 0
    before: str = ""
    at_work: asyncio.Semaphore | None = None


@contextlib.asynccontextmanager
async def serve_door(door: DoorSettings) -> AsyncIterator[str]:
    """It answers as the fake engine does, without asking it."""
    door.at_work = asyncio.Semaphore(door.places) if door.places else None
    app = web.Application()

    async def root(_request: web.Request) -> web.Response:
        return web.json_response({"status": "batch"})

    async def predict(request: web.Request) -> web.Response:
        prompt = (await request.json())["prompt"]
        questions = prompt if isinstance(prompt, list) else [prompt]
        texts = [await _answer(door, question) for question in questions]
        if door.mixes and len(texts) > 1:
            texts[0], texts[-1] = texts[-1], texts[0]
        response = texts if isinstance(prompt, list) else texts[0]
        return _reply(door, {"response": response})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if door.refuses_above is not None and door.inside >= door.refuses_above:
            return web.json_response({"error": {"message": "full"}}, status=503)
        text = await _answer(door, body["messages"][0]["content"])
        if body["stream"]:
            return await _stream(door, request, text)
        message = {"role": "assistant", "content": text}
        return _reply(door, {"choices": [{"index": 0, "message": message}]})

    app.router.add_get("/", root)
    app.router.add_post("/predict", predict)
    app.router.add_post("/v1/chat/completions", chat)
    async with serve_app(app) as url:
        yield url


def _reply(door: DoorSettings, body: Any) -> web.Response:
    return web.json_response(body, status=door.status, headers={"Server-Timing": door.timing})


async def _answer(door: DoorSettings, question: str) -> str:
    """When it mixes, the answer to the question before."""
    door.calls += 1
    door.inside += 1
    try:
        async with door.at_work or contextlib.nullcontext():
            await asyncio.sleep(door.delay_s)
    finally:
        door.inside -= 1
    other = door.before if door.mixes and door.before else question
    door.before = question
    return f"answer:{other}"


async def _stream(door: DoorSettings, request: web.Request, text: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in (text[:4], text[4:]):
        choices = [{"index": 0, "delta": {"content": piece}}]
        await response.write(b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n")
    if not door.cuts_streams:
        await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def engine() -> AsyncIterator[str]:
    async with serve_app(build_fake_engine(Behaviour())) as url:
        yield url


Measure = Callable[..., Any]


@pytest.fixture
def measure(engine: str) -> Measure:
    """A run of some parts through a door of the tests' own."""

    async def run(door: DoorSettings, parts: str, *options: str, **scale: Any) -> Result:
        async with serve_door(door) as url:
            return await build_bench(url, engine, "--only", parts, *options, **scale).measure()

    return run


def find_row(result: Result, name: str) -> Any:
    return next(row for row in result.rows() if row.name == name)


# --- through the real gateway


async def test_every_load_goes_through_all_doors_and_every_answer_is_checked(
    tmp_path: Path,
) -> None:
    async with serve_gateway(dedup=False) as served:
        bench = build_bench(served.url, served.engine_url, "--only", ENGINE_PARTS)
        result = await bench.measure()

    titles = [one.title for one in result.workloads]
    assert titles == [
        "one prompt, 8 tokens",
        "12 prompts in one call",
        "12 calls at once",
        "1 chat stream",
        "8 chat streams at once",
    ]
    for one in result.workloads:
        for series in one.series:
            assert list(series.by_arm) == ["direct", "control", "gateway"]
            assert len({len(values) for values in series.by_arm.values()}) == 1
            assert series.rounds == 6
    assert result.sweep is not None
    assert all(len(knees) == 1 for knees in result.sweep.knees.values())
    assert int(result.facts.answers.split()[0].replace(",", "")) > 700
    assert "as the direct door answered at first" in result.facts.answers
    assert result.facts.gateway["dedup"] == "false"
    assert any("no CPU times" in note for note in result.notes)
    result.write(tmp_path / "run.json")
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert kept["facts"]["model"] == "fake"
    assert {row["name"] for row in kept["rows"]} == {row.name for row in result.rows()}


async def test_gateway_that_shares_answers_is_refused() -> None:
    async with serve_gateway() as served:
        bench = build_bench(served.url, served.engine_url, "--only", "batch", prompts=30)
        with pytest.raises(BenchFailed, match="GATEWAY_DEDUP=false"):
            await bench.measure()


# --- real and not real


async def test_door_that_is_slow_is_really_slower(measure: Measure) -> None:
    result = await measure(DoorSettings(delay_s=0.03), "one")

    added = find_row(result, "one prompt, 8 tokens: time, added")
    assert added.difference == "really more"
    assert 28 < added.span.value < 60
    assert added.bound_verdict == "OVER"
    assert not result.is_good


async def test_door_that_is_no_slower_is_not_called_so(measure: Measure) -> None:
    result = await measure(DoorSettings(), "one")

    added = find_row(result, "one prompt, 8 tokens: time, added")
    assert added.difference != "really more"
    assert added.bound_verdict == "within"


async def test_control_that_moves_is_said_loudly(measure: Measure) -> None:
    """What other programs do to a machine, done to one arm: every second direct call is slow."""
    behaviour = Behaviour()
    slow = itertools.cycle([0.0, 0.04])

    @web.middleware
    async def unsteady(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/v1/completions":
            await asyncio.sleep(next(slow))
        return await handler(request)  # type: ignore[no-any-return]

    app = build_fake_engine(behaviour)
    app.middlewares.append(unsteady)
    async with serve_app(app) as url, serve_door(DoorSettings(delay_s=0.02)) as door:
        bench = build_bench(door, url, "--only", "one")
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
    assert "not quiet" in render(result)


class _InOrder(random.Random):
    def sample(self, population: Any, k: int, *, counts: Any = None) -> list[Any]:
        return list(population)


# --- answers that are not theirs


@pytest.mark.parametrize("part", ["batch", "calls", "streams", "sweep"])
async def test_door_that_mixes_answers_up_gets_no_figures(measure: Measure, part: str) -> None:
    with pytest.raises(MixedUp, match=r"gateway answered question .* answer to question"):
        await measure(DoorSettings(mixes=True), part)


@pytest.mark.parametrize(
    ("door", "part", "said"),
    [
        (DoorSettings(status=500), "one", "answered 500"),
        (DoorSettings(cuts_streams=True), "streams", r"without \[DONE\]"),
        (DoorSettings(status=401), "sweep", "answered 401"),
    ],
)
async def test_door_that_fails_ends_the_run_and_is_named(
    measure: Measure, door: DoorSettings, part: str, said: str
) -> None:
    with pytest.raises(CallFailed, match=said):
        await measure(door, part)


# --- the knee


@pytest.mark.slow
async def test_knee_of_a_door_with_half_the_places_is_half_as_high() -> None:
    """Each call takes 20 ms of one place: 200 a second through four, 100 through two."""
    direct, gateway = (DoorSettings(delay_s=0.02, places=places) for places in (4, 2))
    async with serve_direct(direct) as engine, serve_door(gateway) as url:
        options = ("--only", "sweep", "--p95-bound-s", "0.2")
        bench = build_bench(url, engine, *options, sweep_window_s=1.0, sweep_rounds=1)
        result = await bench.measure()

    assert result.sweep is not None
    knees = {arm: rates[-1] for arm, rates in result.sweep.knees.items()}
    assert 120 < knees["direct"] < 230
    assert 60 < knees["gateway"] < 125
    assert find_row(result, "open loop: knee").span.value < 0.85
    failed = [point for point in result.sweep.points if not point.is_served]
    assert failed
    assert all(re.match(r"95 %|the queue|given|flooded", point.trouble) for point in failed)


@contextlib.asynccontextmanager
async def serve_direct(door: DoorSettings) -> AsyncIterator[str]:
    """The fake engine, whose chat has the door's limits."""
    door.at_work = asyncio.Semaphore(door.places or 1)

    @web.middleware
    async def limited(request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/v1/chat/completions":
            assert door.at_work is not None
            async with door.at_work:
                await asyncio.sleep(door.delay_s)
        return await handler(request)  # type: ignore[no-any-return]

    app = build_fake_engine(Behaviour())
    app.middlewares.append(limited)
    async with serve_app(app) as url:
        yield url


@pytest.mark.slow
async def test_refusals_of_a_full_door_end_its_knee_and_not_the_run(measure: Measure) -> None:
    door = DoorSettings(delay_s=0.05, refuses_above=4)

    result = await measure(door, "sweep", sweep_rounds=1)

    troubles = [point.trouble for point in result.sweep.points if point.arm == "gateway"]
    assert any("refused" in trouble for trouble in troubles)
    assert result.sweep.knees["gateway"][0] < result.sweep.knees["direct"][0]


@pytest.mark.slow
async def test_door_that_never_answers_in_time_has_no_knee(measure: Measure) -> None:
    with pytest.raises(BenchFailed, match=r"gateway served no rate down to .* --p95-bound-s"):
        await measure(DoorSettings(delay_s=0.3), "sweep", "--p95-bound-s", "0.1")


def test_sweep_names_the_load_generator_when_that_was_the_limit() -> None:
    busy = Point("direct", 9000, 9000, 8000, 0.5, 2.0, 0.2, client_share=0.98, trouble="late")
    sweep = Sweep(1.0, [busy], {arm: [8000.0] for arm in ("direct", "control", "gateway")})

    assert sweep.was_client_the_limit()
    assert not Sweep(1.0, [replace(busy, client_share=0.5)]).was_client_the_limit()


# --- rounds


async def test_rounds_drop_the_warm_ups_and_shuffle_the_arms() -> None:
    turns: list[str] = []

    async def measure_arm(arm: str) -> dict[str, float]:
        turns.append(arm)
        return {"time": float(len(turns))}

    taken = await take_rounds(
        ["a", "b", "c"], measure_arm, Budget(9, 20, warmups=2), random.Random(3), lambda _: None
    )

    assert all(len(values) == 20 for values in taken["time"].values())
    assert min(min(values) for values in taken["time"].values()) == 7
    rounds = [tuple(turns[at : at + 3]) for at in range(0, len(turns), 3)]
    assert all(set(one) == {"a", "b", "c"} for one in rounds)
    assert len(set(rounds)) > 3


async def test_rounds_end_with_their_time_but_not_before_enough_were_made() -> None:
    async def measure_arm(_arm: str) -> dict[str, float]:
        await asyncio.sleep(0.01)
        return {"time": 1.0}

    async def count(budget: Budget) -> int:
        taken = await take_rounds(["a", "b"], measure_arm, budget, random.Random(1), lambda _: None)
        return len(taken["time"]["a"])

    assert 2 <= await count(Budget(0.2, 100, fewest=2)) <= 10
    assert await count(Budget(0.1, 100, fewest=6)) >= 3  # 60 % over time
    assert await count(Budget(0.0, 100, fewest=6)) == 2


# --- CPU time


def test_cpu_time_counts_threads_and_children() -> None:
    work = (
        "import threading, subprocess, sys, time\n"
        "def burn():\n end = time.thread_time() + 0.15\n while time.thread_time() < end: pass\n"
        "thread = threading.Thread(target=burn); thread.start(); thread.join()\n"
        "if len(sys.argv) > 1:\n"
        " child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE)\n child.stdout.readline()\n"
        "print('done', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", work, work]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = cpu.find_tree(process.pid)
        alone, together = cpu.sum_cpu_s(tree[:1]), cpu.sum_cpu_s(tree)
        process.kill()

    assert len(tree) == 2
    assert alone >= 0.15
    assert together >= alone + 0.15


def test_cpu_of_processes_that_are_not_this_machines_is_not_read() -> None:
    mine = {"gateway": {"pid": os.getpid()}, "engine": {"pid": os.getpid()}}

    assert cpu.build_meter(mine, "http://10.0.0.9:8002") is None
    assert cpu.build_meter({}, "http://127.0.0.1:8002") is None
    assert cpu.build_meter(mine, "http://127.0.0.1:8002") is None  # pytest is no gateway


# --- the relay comparison


async def test_relay_comparison_has_every_figure_of_the_real_gateway() -> None:
    load = Load(calls=20, seconds=0.05, held_streams=10)

    relayed = await measure_relay(load, Budget(0.1, 2, 2), random.Random(1), lambda _: None)

    by_measure = {one.measure: one.by_arm for one in relayed.series}
    assert set(by_measure[LATENCY]) == {"direct", "control", "plain", "gateway"}
    assert set(by_measure[CPU]) == {"plain", "gateway"}
    rows = {row.name: row for row in relayed.rows()}
    assert rows["added p50 at concurrency 1"].span.value > 0
    assert rows["memory at 10 open streams"].span.value > 20
    assert sum(row.bound is not None for row in rows.values()) == 4


async def test_relay_that_mixes_answers_up_is_named() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"content":"number-2."}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        caller = await Caller.connect(server.sockets[0].getsockname()[1])
        with pytest.raises(MixedUp, match="asked 1"):
            await caller.ask(1)
        await caller.close()


# --- vllm bench serve

FAKE_BENCH = """
import json, pathlib, sys
print("a library that talks on stdout")
def add_cli_args(parser):
    for name in ("--base-url", "--result-dir", "--result-filename", "--num-prompts"):
        parser.add_argument(name)
def main(args):
    with open(pathlib.Path(__file__).with_name("asked"), "a") as file:
        file.write(args.base_url + "\\n")
    if "dies" in args.base_url:
        sys.exit(1)
    lost = 1 if "loses" in args.base_url else 0
    result = {"completed": int(args.num_prompts) - lost, "total_output_tokens": 32,
              "duration": 0.5, "median_ttft_ms": 12.0, "median_tpot_ms": 3.0}
    (pathlib.Path(args.result_dir) / args.result_filename).write_text(json.dumps(result))
"""
FAKE_PARSER = """
import argparse
class FlexibleArgumentParser(argparse.ArgumentParser):
    def parse_args(self, words):
        return self.parse_known_args(words)[0]
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "vllm"
    for name, text in (
        ("benchmarks/serve.py", FAKE_BENCH),
        ("utils/argparse_utils.py", FAKE_PARSER),
    ):
        (package / name).parent.mkdir(parents=True)
        (package / name).write_text(text)
        (package / name).with_name("__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(outside, "find_environment", dict)
    return package / "benchmarks"


async def ask_outside(gateway: str) -> list[Series]:
    urls = {"direct": "http://e", "control": "http://e", "gateway": gateway}
    doors = outside.Doors(urls, "fake", MODEL_FOLDER)
    budget = Budget(5, 3, 3)
    return await outside.measure_outside(
        doors, TINY.outside, budget, random.Random(1), lambda _: None
    )


async def test_outside_opinion_asks_all_doors_in_turn(fake_vllm: Path) -> None:
    series = await ask_outside("http://g")

    assert [one.measure for one in series] == [
        "time for all",
        "first token, median",
        "time per token, median",
    ]
    assert series[0].by_arm["gateway"] == [500.0] * 3
    asked = (fake_vllm / "asked").read_text().split()
    assert len(asked) == 4 * 3
    assert asked.count("http://g") == 4


@pytest.mark.usefixtures("fake_vllm")
async def test_outside_opinion_that_lost_answers_or_died_is_refused() -> None:
    with pytest.raises(BenchFailed, match=r"3 of 4 answers .* through gateway"):
        await ask_outside("http://loses")
    with pytest.raises(BenchFailed, match=r"bench-outside\.log"):
        await ask_outside("http://dies")


async def test_outside_opinion_without_vllm_is_a_note(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none() -> None:
        raise outside.NoVllm("vLLM is not installed")

    monkeypatch.setattr(outside, "find_environment", find_none)

    result = await measure(DoorSettings(), "outside")

    assert result.outside is None
    assert "no outside opinion: vLLM is not installed" in result.notes


# --- the report


async def test_report_is_one_file_with_legible_plots(measure: Measure) -> None:
    result = await measure(DoorSettings(), "one,sweep")
    result = replace(result, facts=replace(result.facts, model="<script>alert(1)</script>"))

    page = render(result)

    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 3
    for plot in plots:
        ET.fromstring(plot)  # noqa: S314 — our own
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:,)', page)
    assert "{{" not in page
    assert "nan" not in page.lower().replace("nanosecond", "")


# --- the program


@pytest.mark.parametrize("option", ["--out", "--record"])
def test_program_says_at_once_what_it_cannot_write(tmp_path: Path, option: str) -> None:
    done = start(tmp_path, option, str(tmp_path))

    assert done.returncode == 2
    assert done.stderr == f"bench: cannot write {tmp_path}: it is a folder; name a file in it\n"


def start(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lab", "bench", "--out", str(folder / "run.json"), *options],
        cwd=ROOT,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_program_starts_its_own_stack_and_stops_it(tmp_path: Path) -> None:
    assert FAKE_VLLM.is_dir()
    record, stored = tmp_path / "record.json", tmp_path / "stored.json"
    span = {"value": 1.0, "low": 0.9, "high": 1.1, "rounds": 9}
    row: dict[str, Any] = {
        "part": "engine",
        "name": "8 prompts in one call: time",
        "unit": "",
        "span": span,
    }
    row = {**row, "control": None, "bound": None}
    stored.write_text(json.dumps({"format": 1, "rows": [row], "setting": {}}))

    done = start(
        tmp_path,
        *("--quick", "--only", "one,batch", "--prompts", "8", "--record", str(record)),
        *("--against", str(stored)),
        FAKE_VLLM="echo",
    )

    assert done.returncode in (0, 1), done.stderr
    kept = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert kept["facts"]["engine"]["fingerprint"]
    assert (
        kept["setting"]["engine"]["engine configuration"] == kept["facts"]["engine"]["fingerprint"]
    )
    cpu_rows = [
        row for row in kept["rows"] if row["name"].endswith("CPU of the gateway, a request")
    ]
    assert len(cpu_rows) == 2
    assert all(0 < row["span"]["value"] < 1000 for row in cpu_rows)
    assert "gateway/direct (95 %)" in done.stdout
    assert "<!doctype html>" in (tmp_path / "run.html").read_text(encoding="utf-8")
    assert json.loads(record.read_text(encoding="utf-8"))["figures"]
    assert "launcher_stopped" in (tmp_path / "bench-stack.log").read_text()
    assert "cannot be told: another machine" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--url", "http://127.0.0.1:1"], "--url and --direct-url go together"),
        (["--url", "nowhere"], "nowhere is no http address"),
        (["--only", "batch,lunch"], "lunch: no such part"),
        (["--against", "/nowhere.json"], "/nowhere.json"),
        (["--questions", "/nowhere.txt"], "/nowhere.txt"),
        (["--p95-bound-s", "0"], "0 is no time in seconds"),
    ],
)
def test_program_refuses_what_cannot_work_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(asyncio, "run", pytest.fail)

    try:
        code: object = program.main(options)
    except SystemExit as error:
        code = error.code

    assert code == 2
    assert said in capsys.readouterr().err
