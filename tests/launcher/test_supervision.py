"""Every way an engine can misbehave, with a fake one in a real process; seconds each."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from launcher.engine import process
from launcher.engine.process import list_group
from tests.launcher.programs import (
    Launcher,
    ask_in_background,
    members_of,
    running,
    wait_for,
)
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_process_that_one_look_missed_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was forked between a look's list of numbers and the reading of them; its parent ended."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = subprocess.Popen(sleeper, start_new_session=True)
    missed = iter([list[process.GroupMember]()])
    monkeypatch.setattr(process, "list_group", lambda group: next(missed, list_group(group)))

    asyncio.run(process.end_group(program.pid))

    assert program.poll() == -signal.SIGKILL


def test_serve_healthy_engine_says_ready_in_one_line(launcher: Launcher) -> None:
    with running(launcher):
        launcher.wait_state("ready")
        assert launcher.stop() == 0
    assert len(launcher.out.splitlines()) == 1
    assert launcher.engine_url in launcher.out
    assert launcher.processes() == []


def test_engine_exit_zero_unasked_is_a_crash(launcher: Launcher) -> None:
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(exit=0)
        launcher.wait_state("ready", restarts=1)
        card = launcher.crash_card()
        assert (card["reason"], card["exit_code"], card["signal"]) == ("exit", 0, None)
        metrics = launcher.read("/metrics")
        assert metrics is not None
        assert 'launcher_engine_restarts_total{reason="exit"} 1.0' in metrics.text
        assert "launcher_engine_up 1.0" in metrics.text


def test_engine_core_killed_card_names_the_signal(launcher: Launcher) -> None:
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(kill_core=True)
        launcher.wait_state("ready", restarts=1)
        card = launcher.crash_card()
    assert card["signal"] == "SIGKILL"
    assert card["killed_children"][0]["name"] == "python"
    assert card["uptime_s"] > 0
    assert "--max-num-seqs" in card["argv"]
    assert card["versions"]["vllm"] == "vllm 0.32.0"


def test_engine_killed_itself_card_names_the_signal(launcher: Launcher) -> None:
    with running(launcher):
        pid = launcher.wait_state("ready")["engine"]["pid"]
        os.kill(pid, signal.SIGSEGV)
        launcher.wait_state("ready", restarts=1)
        assert launcher.crash_card()["signal"] == "SIGSEGV"
        assert members_of(pid) == []


def test_many_killed_workers_card_has_the_first_ten(launcher: Launcher) -> None:
    died = (
        "(EngineCore pid=7) ERROR 01-01 00:00:00 [multiproc_executor.py:315] Worker proc "
        "VllmWorker-{} died unexpectedly (exit code: -9), shutting down executor."
    )
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(say="\n".join(map(died.format, range(30))))
        log = launcher.state / "engine.log"
        wait_for(lambda: "VllmWorker-29 " in log.read_text(), "the lines have been read")
        launcher.order(kill_core=True)
        launcher.wait_state("ready", restarts=1)
        card = launcher.crash_card()
    names = [one["name"] for one in card["killed_children"]]
    assert [name for name in names if name.startswith("VllmWorker-")] == [
        f"VllmWorker-{number}" for number in range(10)
    ]


def test_worker_killed_for_an_instruction_card_says_what_to_do(launcher: Launcher) -> None:
    died = (
        "(EngineCore pid=7) ERROR 01-01 00:00:00 [multiproc_executor.py:315] Worker proc "
        "VllmWorker-1 died unexpectedly (exit code: -4), shutting down executor."
    )
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(say=died)
        log = launcher.state / "engine.log"
        wait_for(lambda: "VllmWorker-1" in log.read_text(), "the line has been read")
        launcher.order(kill_core=True)
        launcher.wait_state("ready", restarts=1)
        card = launcher.crash_card()
    worker, core = card["killed_children"]
    assert worker == {"pid": None, "name": "VllmWorker-1", "signal": "SIGILL"}
    assert core["signal"] == "SIGKILL"
    assert card["signal"] == "SIGILL"
    assert card["cause"].startswith("its worker VllmWorker-1 was killed by SIGILL: ")
    assert "--set dtype=float32" in card["cause"]


def test_card_names_the_worker_that_ray_lost_and_its_host(launcher: Launcher) -> None:
    lines = [
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
        "\tclass_name: RayWorkerWrapper",
        "\tpid: 6845",
        "\tip: 192.0.2.2",
        "The actor died because its node has died. Node Id: 6771fd6fc2ce",
    ]
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(say="\n".join(f"(EngineCore pid=7) {line}" for line in lines))
        launcher.order(exit=1)
        launcher.wait_state("ready", restarts=1)
        card, status = launcher.crash_card(), launcher.status()

    assert card["lost_host"] == status["last_crash"]["lost_host"] == "192.0.2.2"
    assert card["lost_actor"] == {
        "host": "192.0.2.2",
        "pid": 6845,
        "name": "RayWorkerWrapper",
        "why": lines[-1],
        "has_lost_host": True,
    }


def test_crash_card_of_a_host_whose_gpu_is_ill_holds_nothing_up(launcher: Launcher) -> None:
    """nvidia-smi answers the start and hangs when the card asks: as after a GPU's fall."""
    launcher.folder.mkdir(exist_ok=True)
    asked = launcher.folder / "asked"
    program = launcher.folder / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$1" in *compute_cap*) exit 9;; esac\n'
        f"echo $$ > {asked}.part && mv {asked}.part {asked}\nexec sleep 600\n"
    )
    program.chmod(0o755)
    launcher.settings["PATH"] = f"{launcher.folder}:{os.environ['PATH']}"
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(exit=0)
        wait_for(asked.is_file, "the card asks for the GPUs")
        answer = launcher.read("/status")
        assert answer is not None, "no answer while nvidia-smi hangs"
        assert answer.json()["engine"]["restarts"] == {}
        launcher.wait_state("ready", restarts=1)
        assert launcher.crash_card()["gpus"] == []
        assert launcher.stop() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(asked.read_text()), 0)


@pytest.mark.parametrize("victim", ["core", "server"])
def test_engine_stopped_watchdog_restarts_it(launcher: Launcher, victim: str) -> None:
    launcher.settings |= {"LAUNCHER_HANG_TIMEOUT_S": "1", "LAUNCHER_CANARY_INTERVAL_S": "0.3"}
    with running(launcher):
        pid = launcher.wait_state("ready")["engine"]["pid"]
        if victim == "core":
            launcher.order(stall=True)
        else:
            os.kill(pid, signal.SIGSTOP)
        launcher.wait_state("ready", restarts=1)
        card = launcher.crash_card()
    assert card["reason"] == "hang"
    assert any("state" in line for line in card["dump"])
    assert any("most recent call first" in line for line in card["dump"])


def test_engine_slow_but_moving_is_left_alone(launcher: Launcher) -> None:
    launcher.settings |= {"LAUNCHER_HANG_TIMEOUT_S": "1", "LAUNCHER_CANARY_INTERVAL_S": "0.3"}
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(delay_s=4)
        response = httpx.post(
            f"{launcher.engine_url}/v1/completions",
            json={"prompt": "x"},
            trust_env=False,
            timeout=20,
            verify=NO_TLS,
        )
        assert response.status_code == 200
        assert launcher.status()["engine"]["restarts"] == {}


def test_crash_loop_ends_with_4_within_its_budget(launcher: Launcher) -> None:
    launcher.fake = "exit_after=0.8"
    launcher.settings |= {"LAUNCHER_RESTART_LIMIT": "2"}
    with running(launcher):
        assert launcher.wait() == 4
    assert launcher.err.count("engine_crashed") == 3
    assert "crashed 3 times" in launcher.err.splitlines()[-1]
    assert launcher.processes() == []


def test_engine_dead_while_loading_ends_with_3_and_its_reason(launcher: Launcher) -> None:
    launcher.fake = "exit_loading=1"
    with running(launcher):
        assert launcher.wait() == 3
    last = launcher.err.splitlines()[-1]
    assert last.startswith("launcher: the engine never became ready")
    assert "ValueError: the fake model is not supported" in last
    assert launcher.processes() == []


def test_engine_refusing_its_flags_ends_with_2(launcher: Launcher) -> None:
    launcher.fake = "exit_loading=2"
    with running(launcher):
        assert launcher.wait() == 2


def test_engine_hanging_while_loading_ends_with_3(launcher: Launcher) -> None:
    launcher.fake = "hang_loading"
    launcher.settings |= {"LAUNCHER_START_TIMEOUT_S": "1.5"}
    with running(launcher):
        assert launcher.wait() == 3
    assert "did not answer within" in launcher.err.splitlines()[-1]
    assert launcher.processes() == []


def test_engine_whose_core_died_while_loading_is_not_waited_for(launcher: Launcher) -> None:
    """Its API server waits for the core's first word, and would for all of the time to start."""
    launcher.fake = "hang_loading dead_core"
    launcher.settings |= {"LAUNCHER_START_TIMEOUT_S": "600", "LAUNCHER_KILL_TIMEOUT_S": "1"}
    with running(launcher):
        assert launcher.wait() == 3
    assert "did not answer within" in (last := launcher.err.splitlines()[-1])
    assert "RuntimeError: Executor failed." in last
    assert launcher.processes() == []


def test_engine_ignoring_term_is_killed(launcher: Launcher) -> None:
    launcher.fake = "ignore_term"
    launcher.settings |= {"LAUNCHER_DRAIN_TIMEOUT_S": "0"}
    with running(launcher):
        launcher.wait_state("ready")
        began = time.monotonic()
        assert launcher.stop() == 0
        assert time.monotonic() - began < 30
    assert launcher.processes() == []


def test_second_signal_does_not_wait(launcher: Launcher) -> None:
    launcher.fake = "ignore_term"
    launcher.settings |= {"LAUNCHER_DRAIN_TIMEOUT_S": "60"}
    with running(launcher):
        launcher.wait_state("ready")
        launcher.send(signal.SIGINT)
        wait_for(lambda: "engine_draining" in launcher.err, "draining")
        launcher.send(signal.SIGINT)
        assert launcher.wait() == 0
    assert launcher.processes() == []


def test_engine_leaving_a_core_behind_group_is_emptied(launcher: Launcher) -> None:
    launcher.fake = "fork"
    with running(launcher):
        launcher.wait_state("ready")
        core = launcher.order()["core"]
        assert any(line.startswith(f"{core} ") for line in launcher.processes())
        assert launcher.stop() == 0
    assert launcher.processes() == []


def test_engine_flooding_its_log_is_kept_and_serves(launcher: Launcher) -> None:
    launcher.fake = "flood"
    with running(launcher):
        launcher.wait_state("ready")
        assert launcher.stop() == 0
    assert launcher.err.count("flood.py") < 5_000
    kept = sum(f.read_text().count("flood.py") for f in launcher.state.glob("engine.log*"))
    assert kept == 50_000


def test_state_that_cannot_be_written_is_a_warning_and_ends_nothing(launcher: Launcher) -> None:
    launcher.state.mkdir()
    (launcher.state / "engine.log").symlink_to("/dev/full")
    (launcher.state / "engine.json").mkdir()
    (launcher.state / "crashes").touch()
    (launcher.folder / "cache").mkdir()
    (launcher.folder / "cache" / "starts").touch()
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(exit=0)
        launcher.wait_state("ready", restarts=1)
        assert launcher.crash_card()["reason"] == "exit"
        assert launcher.stop() == 0
    assert launcher.engine_url in launcher.out
    lines = [line for line in launcher.err.splitlines() if "WARNING not_kept" in line]
    for name, count in (("engine.log", 1), ("engine.json", 2), ("crashes", 1), ("cache", 1)):
        assert sum(f"/{name} why=" in line for line in lines) == count
    assert "engine.log why=No space left on device" in "\n".join(lines)
    assert "Traceback" not in launcher.err
    assert launcher.processes() == []


def test_term_during_a_batch_lets_it_finish(launcher: Launcher) -> None:
    async def scenario() -> httpx.Response:
        task = ask_in_background(launcher.engine_url, 4)
        await asyncio.sleep(0.5)  # the batch is inside
        launcher.send(signal.SIGTERM)
        return await task

    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(delay_s=2)
        response = asyncio.run(scenario())
        assert len(response.json()["choices"]) == 4
        assert launcher.wait() == 0


def test_term_before_the_batch_has_reached_the_core_lets_it_finish(launcher: Launcher) -> None:
    async def scenario() -> httpx.Response:
        task = ask_in_background(launcher.engine_url, 4)
        await asyncio.sleep(0.5)  # the batch is at the server
        launcher.send(signal.SIGTERM)
        return await task

    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(tokenize_s=2)
        choices = asyncio.run(scenario()).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["length"] * 4
        assert launcher.wait() == 0


def test_term_with_a_count_that_never_ends_does_not_wait_for_it(launcher: Launcher) -> None:
    launcher.settings |= {"LAUNCHER_DRAIN_TIMEOUT_S": "60"}
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(lost=1)
        began = time.monotonic()
        assert launcher.stop() == 0
        assert time.monotonic() - began < 50


def test_launcher_killed_engine_dies_with_it(launcher: Launcher) -> None:
    with running(launcher):
        pid = launcher.wait_state("ready")["engine"]["pid"]
        launcher.send(signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not members_of(pid), "the engine ends by itself")


def test_launcher_killed_during_the_start_engine_and_core_are_ended(launcher: Launcher) -> None:
    launcher.fake = "hang_loading ignore_term"
    with running(launcher):
        log = launcher.state / "engine.log"
        wait_for(lambda: log.is_file() and "deaf" in log.read_text(), "it hears no SIGTERM")
        assert len(launcher.processes()) == 4  # launcher, engine, core, watcher
        launcher.send(signal.SIGKILL)
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "nothing is left, the watcher included")


def test_launcher_killed_next_start_ends_what_is_left(launcher: Launcher) -> None:
    launcher.fake = "ignore_term"  # so that the signal at the launcher's death is in vain
    launcher.settings["LAUNCHER_KILL_TIMEOUT_S"] = "60"
    with running(launcher):
        pid = launcher.wait_state("ready")["engine"]["pid"]
        launcher.send(signal.SIGKILL)
        launcher.wait()
        assert members_of(pid)
        launcher.settings["LAUNCHER_KILL_TIMEOUT_S"] = "1"
        launcher.start()
        fresh = launcher.wait_state("ready")["engine"]["pid"]
        assert fresh != pid
        assert members_of(pid) == []
        assert "leftover_ended" in launcher.err
        assert launcher.stop() == 0


def test_port_in_use_ends_with_2_and_names_the_setting(launcher: Launcher) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", launcher.engine_port))
        other.listen()
        with running(launcher):
            assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert "LAUNCHER_ENGINE_PORT" in line
    assert launcher.processes() == []


def test_status_port_in_use_ends_with_2(launcher: Launcher) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", launcher.status_port))
        other.listen()
        with running(launcher):
            assert launcher.wait() == 2
    assert "LAUNCHER_STATUS_PORT" in launcher.err


def test_second_launcher_same_engine_ends_with_2(launcher: Launcher) -> None:
    with running(launcher):
        launcher.wait_state("ready")
        second = Launcher(launcher.folder / "second")
        second.state = launcher.state
        second.start()
        assert second.wait() == 2
        assert "another launcher" in second.err
        assert launcher.status()["engine"]["state"] == "ready"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LAUNCHER_MODEL", "/nowhere/model", "'/nowhere/model'"),
        ("LAUNCHER_PORTT", "1", "did you mean LAUNCHER_PORT?"),
        ("LAUNCHER_PORT", "many", "LAUNCHER_PORT"),
        ("LAUNCHER_PROFILE", "corse", "did you mean course?"),
        ("LAUNCHER_GPU", "H20O", "did you mean H200?"),
        ("LAUNCHER_SET", "max-num-seq=3", "did you mean max-num-seqs?"),
        ("LAUNCHER_SET", "swap_space=4", "kv-offloading-size"),
        ("LAUNCHER_SET", "port=4", "LAUNCHER_ENGINE_PORT"),
    ],
)
def test_bad_setting_ends_with_2_in_one_line(
    launcher: Launcher, name: str, value: str, message: str
) -> None:
    launcher.settings[name] = value
    with running(launcher):
        assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert line.startswith("launcher: ")
    assert message in line


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("LAUNCHER_STATE_DIR", "/proc/nosuch/x", "cannot make /proc/nosuch/x"),
        ("LAUNCHER_STATE_DIR", "file", "File exists"),
        ("LAUNCHER_STATE_DIR", "locked", "lock (Is a directory)"),
        ("LAUNCHER_CACHE_DIR", "/proc/nosuch", "cannot make /proc/nosuch"),
        ("LAUNCHER_CACHE_DIR", "file/x", "Not a directory"),
    ],
)
def test_folder_that_cannot_be_used_ends_with_2_in_one_line(
    launcher: Launcher, name: str, place: str, message: str
) -> None:
    (launcher.folder / "file").touch()
    (launcher.folder / "locked" / "lock").mkdir(parents=True)
    launcher.settings[name] = str(launcher.folder / place)
    with running(launcher):
        assert launcher.wait() == 2
    (line,) = launcher.err.splitlines()
    assert line.startswith("launcher: cannot ")
    assert message in line
    assert line.endswith(f"set {name}")


def test_json_logs_wrap_the_engine_lines_in_the_same_keys(launcher: Launcher) -> None:
    launcher.settings |= {"LAUNCHER_LOG_FORMAT": "json", "LAUNCHER_ENGINE_LOG": "all"}
    with running(launcher):
        launcher.wait_state("ready")
        assert launcher.stop() == 0

    rows = [json.loads(line) for line in launcher.err.splitlines()]
    assert {row["source"] for row in rows} == {"launcher", "engine"}
    assert all({"timestamp", "level", "event"} <= row.keys() for row in rows)
    assert all("message" in row for row in rows if row["source"] == "engine")
    announced = json.loads(launcher.out)
    assert announced["event"] == "ready"
    assert launcher.engine_url in announced["message"]


def test_engine_without_counters_is_never_called_hung(launcher: Launcher) -> None:
    launcher.fake = "no_metrics"
    launcher.settings |= {"LAUNCHER_HANG_TIMEOUT_S": "0.6", "LAUNCHER_CANARY_INTERVAL_S": "0.2"}
    with running(launcher):
        since = launcher.wait_state("ready")["engine"]["since_s"]
        launcher.order(stall=True)
        wait_for(lambda: launcher.status()["engine"]["since_s"] > since + 3, "three seconds")
        assert launcher.status()["engine"]["restarts"] == {}


def test_engine_whose_counters_come_late_is_watched_from_then_on(launcher: Launcher) -> None:
    launcher.fake = "late_metrics=2"
    launcher.settings |= {"LAUNCHER_HANG_TIMEOUT_S": "1", "LAUNCHER_CANARY_INTERVAL_S": "0.3"}
    with running(launcher):
        launcher.wait_state("ready")
        wait_for(lambda: "watchdog_on" in launcher.err, "the counters are found")
        assert launcher.err.count("WARNING watchdog_off") == 1
        launcher.order(stall=True)
        launcher.wait_state("ready", restarts=1)
        assert launcher.crash_card()["reason"] == "hang"


def test_group_whose_first_thread_is_dead_is_still_alive() -> None:
    # 60 is exit of one thread (x86-64); killed servers pass this state with open ports.
    code = (
        "import ctypes, platform, threading, time\n"
        "threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "ctypes.CDLL(None).syscall(60 if platform.machine() == 'x86_64' else 93, 0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        try:
            wait_for(lambda: ") Z " in stat.read_text(), "its first thread is gone")
            assert members_of(process.pid) == [process.pid]
        finally:
            process.kill()
    assert members_of(process.pid) == []


def test_scheduler_that_gives_up_is_shown_counted_and_tried_again(launcher: Launcher) -> None:
    line = "(EngineCore pid=7) {} 01-01 00:00:00 [decode_scheduler.py:1] Decode scheduler: {}"
    with running(launcher):
        status = launcher.wait_state("ready")
        assert status["scheduler"]["planned"].startswith("vLLM's own: ")  # the fake is no vLLM
        assert status["scheduler"]["state"] == ""

        launcher.order(say=line.format("INFO", "on, bundles of 16 tokens"))
        wait_for(lambda: launcher.status()["scheduler"]["state"] == "on", "it is on")
        launcher.order(say=line.format("WARNING", "gave up, vLLM's own runs from here on: why"))
        wait_for(lambda: launcher.status()["scheduler"]["state"] == "gave up", "it gave up")
        scheduler = launcher.status()["scheduler"]
        assert (scheduler["reason"], scheduler["fallbacks"]) == ("why", 1)
        wait_for(lambda: "gave up" in launcher.err + launcher.out, "its line")

        launcher.order(exit=1)
        scheduler = launcher.wait_state("ready", restarts=1)["scheduler"]
        assert (scheduler["state"], scheduler["fallbacks"]) == ("", 1)
