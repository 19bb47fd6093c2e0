"""What an attack is said to cost: before a gateway that holds, and before ones that do not."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from lab.__main__ import run_command
from lab.load import run_attack
from lab.load.attacks import ATTACKS
from lab.load.ordinary_callers import Window, find_quantile
from lab.load.run_attack import Trial
from tests.fake_engine import serve_app
from tests.gateway.conftest import serve_gateway

pytestmark = pytest.mark.programs


async def attack(url: str, *options: str) -> int:
    fixed = ["--url", url, "--status", "", "--attack", "grammars", "--callers", "8"]
    words = [*fixed, "--window", "1", "--rounds", "1", *options]
    return await asyncio.to_thread(run_command, "attack", run_attack.main, words)


async def test_attack_is_recorded_with_what_it_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it held is not asked here: the same event loop serves, and strikes back."""
    record = tmp_path / "attack.json"
    async with serve_gateway() as served:
        assert await attack(served.url, "--json", str(record)) in {0, 1}

    out = capsys.readouterr().out
    assert "grammars: regular expressions" in out
    assert "times slower" in out
    figures = {row["name"]: row["value"] for row in json.loads(record.read_text())["figures"]}
    assert figures["grammars: requests of the attack"] > 0
    assert figures["grammars: calls that failed"] == 0


async def test_window_in_which_nothing_could_begin_has_one_call_of_each(tmp_path: Path) -> None:
    """On a busy machine a second is over before a process has had its turn."""
    record = tmp_path / "attack.json"
    async with serve_gateway() as served:
        assert await attack(served.url, "--window", "0.001", "--json", str(record)) in {0, 1}

    figures = {row["name"]: row["value"] for row in json.loads(record.read_text())["figures"]}
    assert 0 < figures["grammars: p99 without"] < 1e9
    assert figures["grammars: /healthz at worst"] > 0


async def test_attack_that_blocks_the_server_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    """As one regular expression did: while it is looked at nobody is served."""

    async def pass_on(request: web.Request) -> web.Response:
        body = await request.read()
        if b"structured_outputs" in body:
            time.sleep(0.5)  # noqa: ASYNC251 — the fault
            return web.json_response({}, status=400)
        headers = {"Content-Type": "application/json"}
        url = served.url + request.path
        async with session.request(request.method, url, data=body, headers=headers) as reply:
            kind = reply.content_type
            return web.Response(status=reply.status, body=await reply.read(), content_type=kind)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", pass_on)
    async with serve_gateway() as served, aiohttp.ClientSession() as session, serve_app(app) as url:
        code = await attack(url)

    out = capsys.readouterr().out
    assert code == 1, out
    assert "times that without it" in out
    assert "NOT HELD  /healthz took" in out


async def test_attack_without_a_gateway_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert await attack("http://127.0.0.1:9") == 2
    assert "is the gateway running" in capsys.readouterr().err


def observe(latency_s: float, health_s: float = 0.01, memory_mb: float = 100.0) -> Window:
    return Window([latency_s], [], [health_s], {"gateway": memory_mb})


@pytest.mark.parametrize(
    ("attacked", "problem"),
    [
        (observe(0.19), ""),
        (observe(0.5), "p99 is 2.5 times that without it"),
        (observe(0.1, health_s=0.09), ""),
        (observe(0.1, health_s=0.2), "/healthz took 200 ms"),
        (observe(0.1, memory_mb=320.0), "the gateway grew by 220 MB"),
        (Window([0.1], ["503: no"], [0.01], {"gateway": 100.0}), "1 calls of the others failed"),
    ],
)
def test_verdict_names_what_did_not_hold(attacked: Window, problem: str) -> None:
    trial = Trial("grammars", [observe(0.1), observe(0.2)], [attacked])

    problems = list(trial.find_problems())
    assert len(problems) == bool(problem)
    assert problem in "".join(problems)


def test_verdict_is_held_against_the_slower_neighbour() -> None:
    """A machine that is busy for a while is so in the window beside, too."""
    quiet = [observe(0.1), observe(1.0), observe(0.1), observe(0.1)]
    trial = Trial("grammars", quiet, [observe(1.1), observe(1.2), observe(0.9)])

    assert trial.ratios() == pytest.approx([1.1, 1.2, 9.0])
    assert list(trial.find_problems()) == []


def test_what_the_machine_may_have_done_is_tried_again_and_lost_calls_are_not() -> None:
    quiet = [observe(0.1), observe(0.1)]

    assert Trial("grammars", quiet, [observe(0.5)]).is_in_doubt()
    assert not Trial("grammars", quiet, [observe(0.1)]).is_in_doubt()
    lost = Window([0.5], ["503: no"], [0.01], {"gateway": 100.0})
    assert not Trial("grammars", quiet, [lost]).is_in_doubt()


def test_quantile_is_a_value_that_was_measured() -> None:
    values = [float(number) for number in range(1, 201)]
    assert find_quantile(values, 0.99) == 198.0
    assert find_quantile([3.0], 0.99) == 3.0


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_requests_that_differ_only_in_what_they_attack(name: str) -> None:
    blows = ATTACKS[name].build("demo")

    assert blows
    for blow in blows:
        assert blow.path.startswith("/")
        assert blow.is_packed == ("Content-Encoding" in blow.headers)
        if blow.is_packed:
            assert len(blow.body) < 2**16  # small for who sends it
