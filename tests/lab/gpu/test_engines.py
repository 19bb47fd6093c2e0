"""A program with all that it starts: stopped, woken and ended as one, and with its starter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from common.processes import find_session
from lab.gpu.engines import ProgramSession
from launcher.engine.process import bind_to_parent, list_group
from tests.launcher.programs import ROOT, wait_for

_CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])\n"
_STARTER = """
import os, signal, sys, time
from pathlib import Path
from lab.gpu.engines import ProgramSession
from launcher.engine.process import bind_to_parent
argv = bind_to_parent("busy", kill_s=0.2)
ProgramSession("busy", argv, os.environ, Path("log"))
time.sleep(600)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "busy.py").write_text(_CHILD)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def list_states(leader: int) -> list[tuple[bool, str]]:
    """Of each process whether it is the watcher, and its state, once all three are there."""
    states = sorted((m.name == "parent_death", m.state) for m in list_group(leader))
    return states if len(states) == 3 and states[-1][0] else []


async def test_session_is_stopped_woken_and_ended_as_one(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    session = ProgramSession(
        "busy", bind_to_parent("busy", kill_s=1), environment, tmp_path / "log"
    )
    leader = session.pid
    try:
        wait_for(lambda: list_states(leader), "the program, its child, its watcher")
        session.signal(signal.SIGSTOP)
        stopped = [(False, "T"), (False, "T"), (True, "S")]
        wait_for(lambda: list_states(leader) == stopped, "the stop")
        session.signal(signal.SIGCONT)
        session.refresh()
        used = dict(session.list_cpu_s())
        wait_for(lambda: dict(session.list_cpu_s())["others"] > used["others"], "its child's work")
        session.signal(signal.SIGSTOP)
    finally:
        await session.end()

    assert session.has_ended
    wait_for(lambda: not list_group(leader), "nothing to be left")


def test_stopped_session_dies_with_its_starter(tmp_path: Path, environment: dict[str, str]) -> None:
    starter = subprocess.Popen([sys.executable, "-c", _STARTER], cwd=tmp_path, env=environment)
    try:
        child = wait_for(lambda: psutil.Process(starter.pid).children(), "the program")[0]
        wait_for(lambda: list_states(child.pid), "the program, its child, its watcher")
        for process in find_session(child.pid):
            if process.name() != "parent_death":
                process.send_signal(signal.SIGSTOP)
    finally:
        starter.kill()
        starter.wait()
    wait_for(lambda: not list_group(child.pid), "its end")
