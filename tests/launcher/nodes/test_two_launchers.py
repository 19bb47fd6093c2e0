"""Two launchers of one engine over the fake vLLM, as two hosts: joining, losing, coming back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.ports import find_free_row
from launcher.engine.process import list_group
from tests.launcher.programs import MODEL, ROOT, Launcher, running, wait_for

pytestmark = pytest.mark.programs


@pytest.fixture
def head(tmp_path: Path) -> Launcher:
    """The engine alone: what its gateway does without it is told elsewhere."""
    port = find_free_row(3)
    settings = {
        "LAUNCHER_NODES": "2",
        "LAUNCHER_NODE_PORT": str(port),
        "LAUNCHER_NODES_TOKEN": "the-word",
        "LAUNCHER_NODE_TIMEOUT_S": "5",
        "LAUNCHER_SET": "tensor-parallel-size=2",
        "LAUNCHER_ENGINE_LOG": "all",
    }
    return Launcher(tmp_path / "head", settings=settings)


@pytest.fixture
def worker(head: Launcher, tmp_path: Path) -> Launcher:
    settings = {
        "LAUNCHER_JOIN": f"127.0.0.1:{head.settings['LAUNCHER_NODE_PORT']}",
        "LAUNCHER_NODES_TOKEN": "the-word",
        "LAUNCHER_NODE_TIMEOUT_S": "5",
        "LAUNCHER_ENGINE_LOG": "all",
    }
    return Launcher(tmp_path / "worker", command="up", settings=settings)


@pytest.fixture
def both(head: Launcher, worker: Launcher) -> Iterator[tuple[Launcher, Launcher]]:
    with running(head), running(worker):
        yield head, worker
    assert head.processes() + worker.processes() == []


def test_engine_of_two_hosts_lives_and_dies_as_one(both: tuple[Launcher, Launcher]) -> None:
    """One start of both for all of it."""
    head, worker = both
    check_start(head, worker)
    check_killed_part(head, worker)
    check_killed_launcher(head, worker)
    check_stopped_launcher(head, worker)
    check_killed_head(head, worker)
    assert head.stop() == 0
    worker.wait_state("joining")
    assert worker.stop() == 0
    check_log(head)


def check_start(head: Launcher, worker: Launcher) -> None:
    """Nothing starts before both are there; then both, each with its rank."""
    head.wait_state("ready")
    other = worker.wait_state("ready")
    wait_for(lambda: head.status()["hosts"][1]["state"] == "running", "the head has heard it")
    status = head.status()
    first, second = status["hosts"]

    assert "nodes_missing here=1 of 2 missing=node 1" in head.err
    assert first["runs"] == "process 0 of 2: tensor 0 of 2"
    assert (second["state"], second["runs"]) == ("running", "process 1 of 2: tensor 1 of 2")
    assert "--headless" not in status["argv"]
    assert [other["argv"][other["argv"].index(word) + 1] for word in ("--node-rank", "serve")] == [
        "1",
        str(MODEL),
    ]
    assert "--headless" in other["argv"]
    assert "--port" not in other["argv"]
    assert "the-word" not in str(status) + str(other)


def check_killed_part(head: Launcher, worker: Launcher) -> None:
    """vLLM's head would serve on, and hang."""
    group = worker.status()["engine"]["pid"]
    os.kill(group, signal.SIGKILL)
    head.wait_state("ready", restarts=1)
    worker.wait_state("ready", restarts=1)
    card = head.crash_card()

    assert card["reason"] == "host"
    assert card["lost_host"]
    assert "lost its part of the engine: it was killed by signal 9" in card["cause"]
    assert worker.crash_card()["signal"] == "SIGKILL"


def check_killed_launcher(head: Launcher, worker: Launcher) -> None:
    was = worker.status()["engine"]["pid"]
    worker.send(signal.SIGKILL)
    worker.wait()
    status = head.wait_state("joining", restarts=2)
    assert "has not been heard of for" in head.crash_card()["cause"]
    assert status["last_crash"]["lost_host"] == head.crash_card()["lost_host"]
    missing = status["hosts"][1]
    assert missing["state"] == "missing"
    assert missing["last"].endswith("(127.0.0.1)")
    wait_for(lambda: not list_group(was), "its part has ended with it")

    worker.start()
    head.wait_state("ready", restarts=2)
    worker.wait_state("ready")


def check_stopped_launcher(head: Launcher, worker: Launcher) -> None:
    """It says so: nobody waits for its silence."""
    assert worker.stop() == 0
    head.wait_state("joining", restarts=3)
    assert head.crash_card()["cause"].endswith("node 1) has left")

    worker.start()
    head.wait_state("ready", restarts=3)
    worker.wait_state("ready")


def check_killed_head(head: Launcher, worker: Launcher) -> None:
    """The part does not outlive it, and the host joins the next one."""
    was = worker.status()["engine"]["pid"]
    head.send(signal.SIGKILL)
    head.wait()
    worker.wait_state("joining")
    wait_for(lambda: not list_group(was), "the part has ended with the head")
    assert "head_away" in worker.err

    head.start()
    head.wait_state("ready")
    worker.wait_state("ready")


def check_log(head: Launcher) -> None:
    for word in ("node_joined", "nodes_complete", "engine_joining", "reason=host"):
        assert word in head.err


def call(launcher: Launcher, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=ROOT,
        env=launcher.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def change_model(folder: Path) -> Path:
    """The same, but for its config."""
    model = folder / "model"
    model.mkdir()
    for file in MODEL.iterdir():
        (model / file.name).symlink_to(file)
    (model / "config.json").unlink()
    text = (MODEL / "config.json").read_text()
    (model / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    )
    return model


def test_host_that_does_not_fit_is_refused_by_name_on_both_sides(
    head: Launcher, worker: Launcher, tmp_path: Path
) -> None:
    def refuse(**settings: str) -> str:
        kept = dict(worker.settings)
        worker.settings |= settings
        result = call(worker, "up")
        worker.settings = kept
        assert result.returncode == 2, result.stderr
        return result.stderr

    with running(head):
        head.wait_state("joining")
        told: dict[str, Any] = {
            "set LAUNCHER_NODES_TOKEN to the same": {"LAUNCHER_NODES_TOKEN": "wrong"},
            "is not the head's": {"LAUNCHER_MODEL": str(change_model(tmp_path))},
            "max-num-seqs is 7 here by LAUNCHER_SET": {"LAUNCHER_SET": "max-num-seqs=7"},
            "VLLM_USE_X is exported as '1' here": {"VLLM_USE_X": "1"},
        }
        for words, settings in told.items():
            assert words in refuse(**settings)
        wait_for(lambda: "VLLM_USE_X" in head.err, "the head tells it, too")
        assert "node_refused" in head.err
        assert head.status()["engine"]["state"] == "joining"


def test_doctor_of_a_joining_host_compares_it_with_the_head(
    head: Launcher, worker: Launcher
) -> None:
    alone = call(worker, "doctor")
    with running(head):
        head.wait_state("joining")
        fits = call(worker, "doctor")
        worker.settings["LAUNCHER_SET"] = "max-num-seqs=7"
        differs = call(worker, "doctor")
        assert head.status()["hosts"][1]["state"] == "missing"  # a look is no joining

    assert (alone.returncode, "start `up --nodes` there first" in alone.stdout) == (2, True)
    for words in ("wants 2 hosts", "reaches this host as 127.0.0.1", "the flags are the head's"):
        assert words in fits.stdout
    # Of what has nothing to do with it, a Python without vLLM lacks torch.
    failures = [line for line in fits.stdout.splitlines() if line.startswith("FAIL")]
    assert [line for line in failures if "torch" not in line] == []
    assert differs.returncode == 2
    assert "FAIL  hosts    max-num-seqs is 7 here" in differs.stdout
