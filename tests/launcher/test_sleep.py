"""Engines that take turns on a GPU and sleep instead of being stopped, by vLLM's sleep mode; and
where they cannot.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.errors import SettingsError
from common.ports import find_free_ports
from launcher.config import LauncherSettings
from launcher.plan.hardware import parse_device
from launcher.plan.sharing import check_sleep
from tests.launcher.programs import MODEL, Launcher, running, wait_for
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs

_ROUTES = ("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/v1/sleep")


def make_launcher(folder: Path, level: int = 1, **settings: str) -> Launcher:
    """Two models on one GPU, which is nobody's: the engines are fakes."""
    other = shutil.copytree(MODEL, folder / "models" / "other")
    launcher = Launcher(folder, command="up")
    config = folder / "launcher.toml"
    config.write_text(
        f"""
        takes_turns = true
        shortest_turn_s = 0
        sleep_level = {level}
        gpu = "H200"
        [[engine]]
        [[engine]]
        model = "{other}"
        engine_port = {find_free_ports(1)[0]}
        """
    )
    launcher.settings |= {"LAUNCHER_CONFIG": str(config), **settings}
    # The fake calls itself a build for CPUs; here it is found as one for GPUs.
    build = folder / "build" / "vllm-0.32.0.dist-info"
    build.mkdir(parents=True)
    (build / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    launcher.path = f"{build.parent}:"
    return launcher


def ask(launcher: Launcher, model: str) -> int:
    url = f"http://127.0.0.1:{launcher.port}/v1/completions"
    body = {"model": model, "prompt": "q"}
    return httpx.post(url, json=body, trust_env=False, verify=NO_TLS, timeout=60).status_code


def read_engines(launcher: Launcher) -> list[dict[str, Any]]:
    engines: list[dict[str, Any]] = launcher.status()["engines"]
    return [one["engine"] for one in engines]


def wait_states(launcher: Launcher, *states: str) -> list[dict[str, Any]]:
    def have_come() -> list[dict[str, Any]] | None:
        engines = read_engines(launcher)
        return engines if tuple(one["state"] for one in engines) == states else None

    found: list[dict[str, Any]] = wait_for(have_come, f"{states}; {launcher.err[-2000:]}")
    return found


def wait_ready(launcher: Launcher) -> None:
    wait_for(lambda: launcher.out, f"ready; {launcher.err[-2000:]}")


def test_engines_sleep_and_wake_without_another_start(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path)
    with running(launcher):
        wait_ready(launcher)
        first = ask(launcher, "other")
        asleep = wait_states(launcher, "sleeping", "ready")
        is_ready = launcher.read("/readyz")
        orders = launcher.order()["orders"]
        back = ask(launcher, "demo")
        awake = wait_states(launcher, "ready", "sleeping")
        hidden = ask_developer_routes(launcher)
        assert launcher.stop() == 0
    assert launcher.processes() == []

    assert (first, back) == (200, 200)
    assert orders == ["/sleep?level=1"]
    assert is_ready is not None
    assert is_ready.status_code == 200
    # The same processes: nothing was loaded again.
    assert [one["pid"] for one in awake] == [one["pid"] for one in asleep]
    assert len(re.findall(r"engine_starting\b", launcher.err)) == 2
    assert hidden == {404}
    assert "engine_crashed" not in launcher.err


def ask_developer_routes(launcher: Launcher) -> set[int]:
    url = f"http://127.0.0.1:{launcher.port}"
    return {
        httpx.request(method, url + path, json={}, verify=NO_TLS).status_code
        for path in _ROUTES
        for method in ("GET", "POST")
    }


def test_engine_without_weights_reads_them_before_it_serves(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path, level=2)
    with running(launcher):
        wait_ready(launcher)
        answers = ask(launcher, "other"), ask(launcher, "demo")
        wait_states(launcher, "ready", "sleeping")
        orders = launcher.order()["orders"]

    assert answers == (200, 200)
    assert orders == [
        "/sleep?level=2",
        "/wake_up?tags=weights",
        "reload_weights",
        "/wake_up?tags=kv_cache",
    ]


def test_engine_that_does_not_fall_asleep_is_stopped(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path)
    launcher.fake = "no_sleep"
    with running(launcher):
        wait_ready(launcher)
        answers = ask(launcher, "other"), ask(launcher, "demo")
        engines = wait_states(launcher, "ready", "parked")
        assert launcher.stop() == 0

    assert answers == (200, 200)
    assert engines[1]["pid"] is None
    assert re.search(r"engine_not_asleep .*500 Internal Server Error", launcher.err)


def test_engine_that_does_not_wake_up_is_started_again(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path)
    launcher.fake = "no_waking"
    with running(launcher):
        wait_ready(launcher)
        answers = ask(launcher, "other"), ask(launcher, "demo")
        engines = wait_states(launcher, "ready", "sleeping")
        card = launcher.crash_card()
        assert launcher.stop() == 0

    assert answers == (200, 200)
    assert engines[0]["restarts"] == {"hang": 1}
    assert card["cause"].startswith("it does not wake up: ")


def test_engine_that_dies_in_its_sleep_starts_when_it_is_wanted(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path)
    with running(launcher):
        wait_ready(launcher)
        first = ask(launcher, "other")
        [asleep, _] = wait_states(launcher, "sleeping", "ready")
        os.killpg(asleep["pid"], signal.SIGKILL)
        wait_states(launcher, "parked", "ready")
        back = ask(launcher, "demo")
        assert launcher.stop() == 0
    assert launcher.processes() == []

    assert (first, back) == (200, 200)


@pytest.mark.parametrize(
    ("gpu", "fields", "told"),
    [
        ("H200", {"takes_turns": False}, "sleep_level is for engines that take turns"),
        ("H200", {"nodes": 2}, "an engine over several hosts does not sleep"),
        ("H200", {"engine_host": "0.0.0.0"}, "set engine_host to 127.0.0.1"),
    ],
)
def test_sleep_that_cannot_be_is_refused(gpu: str, fields: dict[str, Any], told: str) -> None:
    settings = LauncherSettings(**{"sleep_level": 1, "takes_turns": True, **fields})

    with pytest.raises(SettingsError, match=told):
        check_sleep(settings, parse_device(gpu))


def test_engines_on_a_cpu_stop_and_say_so(tmp_path: Path) -> None:
    launcher = make_launcher(tmp_path, LAUNCHER_GPU="cpu")
    with running(launcher):
        wait_ready(launcher)
        answer = ask(launcher, "other")
        engines = wait_states(launcher, "parked", "ready")
        assert launcher.stop() == 0

    assert answer == 200
    assert engines[0]["pid"] is None
    assert "on a CPU vLLM frees nothing when it sleeps" in launcher.err
