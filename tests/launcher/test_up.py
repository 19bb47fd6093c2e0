"""`launcher up`: engine and gateway together, over the fake engine and the real gateway."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from common.errors import SettingsError
from common.ports import find_free_ports
from launcher.config import LauncherSettings
from launcher.gateway_process import check_gateway
from launcher.models.model import find_model
from launcher.plan.command import find_vllm
from launcher.plan.flags.known_flags import read_flags
from launcher.plan.prepare import decide
from tests.launcher.programs import MODEL, ROOT, Launcher, running, wait_for
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path, command="up")


def wait_ready(launcher: Launcher) -> str:
    line = wait_for(lambda: launcher.out, f"ready line; {launcher.err[-2000:]}")
    return str(line)


def test_up_prints_one_line_whose_curl_works(launcher: Launcher) -> None:
    with running(launcher):
        line = wait_ready(launcher)
        assert line.count("\n") == 1
        address, _, body = line.partition("try: curl -s ")[2].partition(" -H ")
        assert address == f"http://127.0.0.1:{launcher.port}/predict"
        assert f"(page: http://127.0.0.1:{launcher.port}/ui)" in line
        content = body.split(" -d ")[1].strip().strip("'")
        headers = {"Content-Type": "application/json"}
        reply = httpx.post(
            address, content=content, headers=headers, trust_env=False, verify=NO_TLS
        )
        assert reply.json()["response"]
        assert launcher.stop() == 0
    assert launcher.processes() == []


def test_up_gateway_lets_in_what_the_engine_runs_at_once(launcher: Launcher) -> None:
    launcher.settings["LAUNCHER_SET"] = "max-num-seqs=160"
    with running(launcher):
        wait_ready(launcher)
        status = launcher.status()
        metrics = httpx.get(
            f"http://127.0.0.1:{launcher.port}/metrics", trust_env=False, verify=NO_TLS
        ).text

        assert (status["max_num_seqs"], status["engine_port"]) == (160, launcher.engine_port)
        assert "\ngateway_max_running_sequences 180.0\n" in metrics  # and an eighth more
        assert launcher.stop() == 0


def test_up_logs_of_both_are_told_apart_without_colour(launcher: Launcher) -> None:
    launcher.settings["LAUNCHER_ENGINE_LOG"] = "all"
    with running(launcher):
        wait_ready(launcher)
        assert launcher.stop() == 0
    prefixes = {line.split("|")[0] for line in launcher.err.splitlines()}
    assert prefixes == {"launcher ", "engine   ", "gateway  "}
    assert "\x1b[" not in launcher.err


def test_up_interrupted_stops_the_gateway_before_the_engine(launcher: Launcher) -> None:
    with running(launcher):
        wait_ready(launcher)
        launcher.send(signal.SIGINT)
        assert launcher.wait() == 0
    assert launcher.err.index("launcher | gateway_stopped") < launcher.err.index("engine_draining")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_signal_while_it_imports_ends_it_with_0_and_no_word(
    launcher: Launcher, tmp_path: Path, number: signal.Signals
) -> None:
    slow, mark = tmp_path / "slow", tmp_path / "imports"
    slow.mkdir()
    (slow / "pydantic.py").write_text(f"import time\nopen({str(mark)!r}, 'w')\ntime.sleep(60)\n")
    launcher.path = f"{slow}:"
    with running(launcher):
        wait_for(mark.exists, "the imports have begun")
        launcher.send(number)
        assert launcher.wait() == 0
    assert launcher.err == ""


def test_up_gateway_killed_comes_back(launcher: Launcher) -> None:
    with running(launcher):
        wait_ready(launcher)
        os.kill(launcher.status()["gateway"]["pid"], signal.SIGKILL)
        gateway = wait_for(
            lambda: (g := launcher.status()["gateway"])["restarts"] and g["state"] == "ready" and g,
            "the gateway is ready again",
        )
        assert gateway["restarts"] == {"signal": 1}
        assert launcher.status()["engine"]["restarts"] == {}


def test_up_gateway_stopped_is_noticed_and_comes_back(launcher: Launcher) -> None:
    launcher.settings["LAUNCHER_GATEWAY_HANG_TIMEOUT_S"] = "1"
    with running(launcher):
        wait_ready(launcher)
        stopped = launcher.status()["gateway"]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        gateway = wait_for(
            lambda: (g := launcher.status()["gateway"])["restarts"] and g["state"] == "ready" and g,
            "the gateway is ready again",
            within_s=60,
        )
        assert gateway["restarts"] == {"hang": 1}
        assert gateway["pid"] != stopped
        assert launcher.status()["engine"]["restarts"] == {}
        metrics = launcher.read("/metrics")
        assert metrics is not None
        assert 'launcher_gateway_restarts_total{reason="hang"} 1.0' in metrics.text
        assert launcher.stop() == 0
    assert "ERROR gateway_hung detail=no answer and no work for " in launcher.err
    assert "(state T)" in launcher.err


def test_up_launcher_killed_nothing_is_left_and_the_port_is_free(launcher: Launcher) -> None:
    launcher.fake = "ignore_term"
    launcher.settings["LAUNCHER_DRAIN_TIMEOUT_S"] = "1"
    with running(launcher):
        wait_ready(launcher)
        gateway = launcher.status()["gateway"]["pid"]
        os.kill(gateway, signal.SIGSTOP)  # so that it cannot even hear of it
        launcher.send(signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "engine and gateway are ended")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", launcher.port))


def test_up_second_signal_ends_a_busy_gateway_at_once(launcher: Launcher) -> None:
    with busy_gateway(launcher):
        launcher.send(signal.SIGTERM)
        wait_for(lambda: "gateway_draining" in launcher.err, "the gateway drains")
        launcher.send(signal.SIGTERM)
        assert launcher.wait() == 0
        assert launcher.processes() == []


def test_up_launcher_killed_no_stopped_gateway_is_left(launcher: Launcher) -> None:
    launcher.settings["LAUNCHER_DRAIN_TIMEOUT_S"] = "1"
    with busy_gateway(launcher) as gateway:
        os.kill(gateway, signal.SIGSTOP)  # so that it cannot even hear of it
        launcher.send(signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "engine and gateway are ended")


@contextlib.contextmanager
def busy_gateway(launcher: Launcher) -> Iterator[int]:
    """Its pid, with requests inside that would take longer than the test."""
    launcher.settings["GATEWAY_DEDUP"] = "false"
    calls: list[socket.socket] = []
    with running(launcher):
        wait_ready(launcher)
        gateway = launcher.status()["gateway"]["pid"]
        launcher.order(delay_s=60)
        try:
            while len(calls) < 8:
                call = socket.create_connection(("127.0.0.1", launcher.port))
                calls.append(call)
                body = b'{"prompt": "%d"}' % len(calls)
                head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                call.sendall(head % len(body) + body)
            wait_for(lambda: launcher.order()["running"] >= 8, "all are in the engine")
            yield gateway
        finally:
            for call in calls:
                call.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(gateway, signal.SIGKILL)


def test_up_engine_killed_gateway_stays_and_serves_again(launcher: Launcher) -> None:
    with running(launcher):
        wait_ready(launcher)
        pid = launcher.status()["gateway"]["pid"]
        launcher.order(exit=0)
        launcher.wait_state("ready", restarts=1)

        def answer() -> bool:
            url = f"http://127.0.0.1:{launcher.port}/predict"
            reply = httpx.post(url, json={"prompt": "x"}, trust_env=False, verify=NO_TLS)
            return reply.status_code == httpx.codes.OK

        assert wait_for(answer, "an answer after the restart")
        assert launcher.status()["gateway"]["pid"] == pid


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GATEWAY_PROMPT_STYLE", "poem", "GATEWAY_PROMPT_STYLE: Input should be"),
        ("GATEWAY_MAX_TOKEN", "3", "unknown setting GATEWAY_MAX_TOKEN; did you mean"),
        ("LAUNCHER_HOST", "0.0.0.0", "without API keys"),
        ("GATEWAY_WARMUP_FILE", str(ROOT / "README.md"), "README.md: no question in it"),
    ],
)
def test_up_what_the_gateway_refuses_is_one_line_and_starts_nothing(
    launcher: Launcher, name: str, value: str, message: str
) -> None:
    launcher.settings[name] = value
    with running(launcher):
        assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert line.startswith("launcher: the gateway cannot start: ")
    assert message in line
    assert not (launcher.state / "engine.log").exists()
    assert launcher.processes() == []


@pytest.mark.engine  # it plans for the vLLM that is installed
def test_gateway_check_that_hangs_is_one_line_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gateway.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.chdir(tmp_path)  # where `-m` looks first
    settings = LauncherSettings(model=str(MODEL))
    vllm = find_vllm()
    plan = decide(settings, vllm, read_flags(vllm.version, tmp_path), find_model(settings))
    monkeypatch.setattr("launcher.gateway_process._CHECK_TIMEOUT_S", 1.0)
    with pytest.raises(SettingsError, match=r"`python -m gateway check` took over 1 s"):
        check_gateway(settings, plan)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("LAUNCHER_ENGINE_PORT", "LAUNCHER_PORT"),
        ("LAUNCHER_ENGINE_PORT", "LAUNCHER_STATUS_PORT"),
        ("LAUNCHER_PORT", "LAUNCHER_STATUS_PORT"),
    ],
)
def test_up_one_port_for_two_is_one_line_and_starts_nothing(
    launcher: Launcher, one: str, other: str
) -> None:
    (port,) = find_free_ports(1)
    launcher.settings |= {one: str(port), other: str(port)}
    with running(launcher):
        assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert line.startswith(f"launcher: {one} and {other} are both {port}: ")
    assert not (launcher.state / "engine.log").exists()


def test_up_port_in_use_ends_with_2_and_starts_nothing(launcher: Launcher) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", launcher.port))
        other.listen()
        with running(launcher):
            assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert "LAUNCHER_PORT" in line
    assert launcher.processes() == []
