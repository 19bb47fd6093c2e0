"""The benchmark over processes: the real gateway, relays, vLLM's client, the program."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common import processes
from lab.__main__ import run_command
from lab.bench import run_bench as program
from lab.bench import vllm_bench as outside
from lab.bench.answer_book import MixedUp
from lab.bench.bench_figures import BenchFailed, RoundSeries
from lab.bench.cpu_time import build_meter
from lab.bench.relay import peers
from lab.bench.relay.peers import RelayPeer
from lab.bench.relay.relay_comparison import CPU, LATENCY, PREDICT_CPU, RelayLoad, measure_relay
from lab.bench.relay.relay_connection import RelayConnection
from lab.bench.rounds import RoundBudget
from lab.failures import BadOptions
from lab.service import LauncherStatus
from tests.fake_engine import MODEL_FOLDER
from tests.gateway.conftest import serve_gateway
from tests.lab.bench.fake_gateway import TINY, build_bench
from tests.lab.grade.test_run_grade import environment
from tests.launcher.programs import FAKE_VLLM, ROOT

pytestmark = pytest.mark.slow  # programs and relays; what they do is tested on every Python

ENGINE_PARTS = "one,batch,calls,streams"


# --- through the real gateway


async def test_every_load_goes_through_all_targets_and_every_answer_is_checked(
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
    assert int(result.facts.answers.split()[0].replace(",", "")) > 700
    assert "as the engine itself answered at first" in result.facts.answers
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
        tree = processes.find_tree(process.pid)
        alone, together = processes.sum_cpu_s(tree[:1]), processes.sum_cpu_s(tree)
        process.kill()

    assert len(tree) == 2
    assert alone >= 0.15
    assert together >= alone + 0.15


def test_cpu_of_processes_that_are_not_this_machines_is_not_read() -> None:
    mine = {"gateway": {"pid": os.getpid()}, "engine": {"pid": os.getpid()}}

    assert build_meter(LauncherStatus("http://10.0.0.9:8002", mine)) is None
    assert build_meter(LauncherStatus("http://127.0.0.1:8002", {})) is None
    # pytest is no gateway
    assert build_meter(LauncherStatus("http://127.0.0.1:8002", mine)) is None


# --- the relay comparison


async def test_relay_comparison_has_every_figure_of_the_real_gateway() -> None:
    load = RelayLoad(calls=20, seconds=0.05, held_streams=10)

    relayed = await measure_relay(load, RoundBudget(0.1, 2, 2), random.Random(1), lambda _: None)

    by_measure = {one.measure: one.by_arm for one in relayed.series}
    assert set(by_measure[LATENCY]) == {"direct", "control", "plain", "gateway"}
    assert set(by_measure[CPU]) == set(by_measure[PREDICT_CPU]) == {"plain", "gateway"}
    rows = {row.name: row for row in relayed.rows()}
    assert rows["added p50 at concurrency 1"].span.value > 0
    assert rows["memory at 10 open streams"].span.value > 20
    assert sum(row.bound is not None for row in rows.values()) == 4


async def test_relay_comparison_beside_other_routers_has_their_figures_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two more plain relays in the place of the routers, which are no packages of this project."""
    program = "import sys; from lab.bench.relay.stand_in_engine import main; "
    program += "words = dict(zip(sys.argv[1::2], sys.argv[2::2])); "
    program += (
        "sys.argv = ['', 'plain', '--port', words['--port'], '--url', words['--worker-urls']]"
    )
    for name in ("swift", "sturdy"):
        script = tmp_path / name / "bin" / name
        script.parent.mkdir(parents=True)
        script.write_text(f"#!{sys.executable}\n{program}; main()\n", encoding="utf-8")
        script.chmod(0o755)
    fakes = [RelayPeer(name, "", (name,)).place(tmp_path / name) for name in ("swift", "sturdy")]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    load = RelayLoad(calls=20, seconds=0.05, held_streams=10)

    relayed = await measure_relay(
        load, RoundBudget(0.1, 2, 2), random.Random(1), lambda _: None, fakes
    )

    assert relayed.peers == ["swift", "sturdy"]
    units = Counter(row.unit for row in relayed.rows())
    assert units["× swift"] == units["× sturdy"] == 3
    assert units["× plain relay"] == 4  # which has a /predict
    names = [row.name for row in relayed.rows()]
    assert {"added p50 at concurrency 1, swift", "memory at 10 open streams, sturdy"} <= {*names}
    assert len(names) == len({*names})


async def test_relay_comparison_beside_another_checkout_has_its_figures_too() -> None:
    load = RelayLoad(calls=20, seconds=0.05, held_streams=10)
    another = peers.place_checkout(ROOT)
    relayed = await measure_relay(
        load, RoundBudget(0.1, 2, 2), random.Random(1), lambda _: None, [another]
    )
    assert relayed.peers == ["beside"]
    with pytest.raises(BadOptions, match="no checkout of this project"):
        peers.place_checkout(ROOT / "docs")


def test_router_that_cannot_be_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = RelayPeer("none", "no-such-router-anywhere==1", ("none",))
    monkeypatch.setattr(peers, "PEERS", (missing,))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BenchFailed, match="cannot install no-such-router-anywhere==1"):
        peers.install_peers(tmp_path, lambda _: None)


async def test_relay_that_mixes_answers_up_is_named() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"content":"number-2."}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        caller = await RelayConnection.connect(server.sockets[0].getsockname()[1])
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


async def ask_outside(gateway: str) -> list[RoundSeries]:
    urls = {"direct": "http://e", "control": "http://e", "gateway": gateway}
    targets = outside.VllmBenchTargets(urls, "fake", MODEL_FOLDER)
    budget = RoundBudget(5, 3, 3)
    return await outside.measure_vllm_bench(
        targets, TINY.outside, budget, random.Random(1), lambda _: None
    )


async def test_outside_opinion_asks_all_targets_in_turn(fake_vllm: Path) -> None:
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
        (["--prompts", "0"], "0 is no whole number from 1 on"),
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
        code: object = run_command("bench", program.main, options)
    except SystemExit as error:
        code = error.code

    assert code == 2
    assert said in capsys.readouterr().err
