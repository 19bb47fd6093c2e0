"""The real vLLM over two hosts: this one, and a network namespace with a network of its own.

Where namespaces cannot be made (no root, no `ip`), the second is another address of the loopback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.ports import find_free_row
from launcher.engine.process import list_group
from tests.launcher.programs import Launcher, list_sessions, running, wait_for
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1800)]
START_S = 500.0


@dataclass(frozen=True)
class Network:
    """Of two hosts."""

    head: str
    worker: str
    within: tuple[str, ...] = ()  # what starts a program on the worker


@pytest.fixture
def network() -> Iterator[Network]:
    """Addresses of a range that is for tests (RFC 2544)."""
    number = os.getpid() % 250
    name, here, there = f"host{number}", f"vh{number}", f"vw{number}"
    head, worker = f"198.18.{number}.1", f"198.18.{number}.2"
    if not shutil.which("ip") or _ip("netns", "add", name):
        yield Network("127.0.0.1", "127.0.0.2")
        return
    try:
        refused = (
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
            or _ip("addr", "add", f"{head}/30", "dev", here)
            or _ip("link", "set", here, "up")
            or _ip("-n", name, "addr", "add", f"{worker}/30", "dev", there)
            or _ip("-n", name, "link", "set", there, "up")
            or _ip("-n", name, "link", "set", "lo", "up")
        )
        assert not refused, refused
        yield Network(head, worker, ("ip", "netns", "exec", name))
    finally:
        _ip("link", "del", here)
        _ip("netns", "del", name)


def _ip(*words: str) -> str:
    """What it objects to."""
    result = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)  # noqa: S607
    return "" if result.returncode == 0 else result.stderr or "refused"


@pytest.fixture
def hosts(
    network: Network, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[Launcher, Launcher]]:
    """The parameter says how the engine is cut."""
    port = find_free_row(3)
    common = {
        "LAUNCHER_NODES_TOKEN": "the-word",
        "LAUNCHER_NODE_TIMEOUT_S": "10",
        "LAUNCHER_KILL_TIMEOUT_S": "15",
    }
    first = common | {
        "LAUNCHER_NODES": "2",
        "LAUNCHER_NODE_ADDRESS": network.head,
        "LAUNCHER_NODE_PORT": str(port),
        "LAUNCHER_SET": f"max-num-seqs=32 {request.param}",
    }
    second = common | {
        "LAUNCHER_JOIN": f"{network.head}:{port}",
        "LAUNCHER_NODE_ADDRESS": network.worker,
    }
    head = Launcher(tmp_path / "head", command="up", settings=first, fake=None)
    worker = Launcher(
        tmp_path / "worker", command="up", settings=second, fake=None, within=network.within
    )
    with running(head), running(worker):
        yield head, worker
    assert head.processes() + worker.processes() == []


@pytest.mark.parametrize("hosts", ["tensor-parallel-size=2"], indirect=True, ids=["tensor"])
def test_engine_over_two_hosts_answers_and_nothing_of_it_is_left_at_the_loss_of_one(
    hosts: tuple[Launcher, Launcher], network: Network
) -> None:
    """Its next start, as the next test shows it, finds the engine's ports free again."""
    head, worker = hosts
    status = head.wait_state("ready", within_s=START_S)
    group = status["engine"]["pid"]
    assert ask(head)
    check_parts(hosts, network, "tensor")

    lose_worker(hosts, network)

    assert list_group(group) == []
    wait_for(lambda: not worker.processes(), "its part has ended with it")
    for port in list_engine_ports(head):
        with socket.create_server((network.head, port)):
            pass


@pytest.mark.parametrize(
    "hosts", ["pipeline-parallel-size=2 enforce-eager="], indirect=True, ids=["pipeline"]
)
def test_stages_over_two_hosts_come_back_after_the_loss_of_one_and_of_a_process(
    hosts: tuple[Launcher, Launcher], network: Network
) -> None:
    head, worker = hosts
    head.wait_state("ready", within_s=START_S)
    answer = ask(head)
    check_parts(hosts, network, "pipeline")

    lose_worker(hosts, network)
    worker.start()
    status = head.wait_state("ready", restarts=1, within_s=START_S)
    assert ask(head) == answer

    os.kill(find_computing(worker), signal.SIGILL)
    head.wait_state("ready", restarts=2, within_s=START_S)
    assert ask(head) == answer
    (card,) = read_cards(worker)
    assert card["signal"] == "SIGILL"
    assert "was killed by SIGILL: it used an instruction" in card["cause"]
    told = head.crash_card()
    assert told["lost_host"] == status["hosts"][1]["host"]
    assert card["cause"] in told["cause"]


def check_parts(hosts: tuple[Launcher, Launcher], network: Network, kind: str) -> None:
    """Each of them a process that computes and has asked for AMX."""
    told = hosts[0].status()["hosts"]
    assert [one["runs"] for one in told] == [
        f"process {number} of 2: {kind} {number} of 2" for number in range(2)
    ]
    assert told[1]["address"] == network.worker
    for host in hosts:
        log = (host.state / "engine.log").read_text()
        assert (
            len(re.findall(r"\(Worker\S* pid=\d+\) .*\] AMX: (?:none|allowed|refused)", log)) == 1
        )


def lose_worker(hosts: tuple[Launcher, Launcher], network: Network) -> None:
    head, worker = hosts
    lost = head.status()["hosts"][1]["host"]
    worker.send(signal.SIGKILL)
    worker.wait()
    head.wait_state("joining", restarts=1, within_s=300)
    card = head.crash_card()
    assert (card["reason"], card["lost_host"]) == ("host", lost)
    assert f"({network.worker}, node 1) has not been heard of" in card["cause"]


def find_computing(launcher: Launcher) -> int:
    """The process that has the model, of one part."""
    (group,) = list_sessions(launcher)
    names = {member.name: member.pid for member in list_group(group)}
    return next(pid for name, pid in names.items() if name.startswith("VLLM::Worker"))


def read_cards(launcher: Launcher) -> list[dict[str, Any]]:
    """Its status is for its own host, which may be a network of its own."""
    return [json.loads(file.read_text()) for file in sorted(launcher.state.glob("crashes/*"))]


def list_engine_ports(head: Launcher) -> tuple[int, ...]:
    """Those beside the launcher's own, by which vLLM's processes on both hosts meet."""
    first = int(head.settings["LAUNCHER_NODE_PORT"])
    return first + 1, first + 2


def ask(head: Launcher) -> str:
    """The gateway, once it has seen that the engine is ready."""

    def post() -> str:
        url = f"http://127.0.0.1:{head.port}/predict"
        try:
            answer = httpx.post(
                url, json={"prompt": "1"}, trust_env=False, verify=NO_TLS, timeout=120
            )
        except httpx.HTTPError:
            return ""
        return str(answer.json()["response"]) if answer.status_code == 200 else ""

    return str(wait_for(post, f"an answer; {head.err[-2000:]}", within_s=300))
