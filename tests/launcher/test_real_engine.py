"""The same promises kept with the real vLLM on a CPU."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from launcher.engine.process import list_group
from launcher.engine.temporary_folder import find_temporary_folder
from tests.launcher.programs import MODEL, Launcher, ask_in_background, running, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
START_S = 240.0


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One launcher for the module: every test leaves it with an engine that is ready."""
    settings = {
        "LAUNCHER_HANG_TIMEOUT_S": "6",
        "LAUNCHER_CANARY_INTERVAL_S": "3",
        "LAUNCHER_DRAIN_TIMEOUT_S": "60",
        "LAUNCHER_KILL_TIMEOUT_S": "15",
    }
    started = Launcher(tmp_path_factory.mktemp("real"), settings=settings, fake=None)
    with running(started):
        started.wait_state("ready", within_s=START_S)
        yield started


def find_core(launcher: Launcher) -> int:
    group = launcher.status()["engine"]["pid"]
    return next(m.pid for m in list_group(group) if m.name.startswith("VLLM::EngineCor"))


def test_engine_starts_with_a_minute_of_work(launcher: Launcher) -> None:
    """By the CPU time of its processes: others may have the cores meanwhile."""
    members = list_group(launcher.status()["engine"]["pid"])
    times = [psutil.Process(member.pid).cpu_times() for member in members]
    assert sum(one.user + one.system for one in times) < 60
    assert launcher.status()["progress"]["stage"] == "listening"


def test_core_computes_itself_and_no_worker_polls_beside_it(launcher: Launcher) -> None:
    names = {member.name for member in list_group(launcher.status()["engine"]["pid"])}
    assert any(name.startswith("VLLM::EngineCor") for name in names)
    assert not any(name.startswith("VLLM::Worker") for name in names)


def test_its_sockets_are_in_a_folder_of_its_own(launcher: Launcher) -> None:
    folder = find_temporary_folder(launcher.state)
    assert any(path.is_socket() for path in folder.iterdir())


def test_core_killed_during_a_batch_engine_returns_and_card_names_it(launcher: Launcher) -> None:
    group = launcher.status()["engine"]["pid"]
    core = find_core(launcher)

    async def scenario() -> httpx.Response | BaseException:
        task = ask_in_background(launcher.engine_url, 358, max_tokens=1500)
        await asyncio.sleep(1.5)  # the batch is inside
        assert not task.done()
        os.kill(core, signal.SIGKILL)
        return (await asyncio.gather(task, return_exceptions=True))[0]

    answer = asyncio.run(scenario())
    assert isinstance(answer, BaseException) or answer.status_code >= 500
    launcher.wait_state("ready", restarts=1, within_s=START_S)
    card = launcher.crash_card()
    assert card["signal"] == "SIGKILL"
    assert card["exit_code"] == 0  # what vLLM itself calls this
    assert (card["killed_children"][0]["pid"], card["reason"]) == (core, "exit")
    assert list_group(group) == []
    crashes = [line for line in launcher.err.splitlines() if "engine_crashed" in line]
    assert ["reason=exit returncode=0" in line for line in crashes] == [True]
    metrics = launcher.read("/metrics")
    assert metrics is not None
    assert 'launcher_engine_restarts_total{reason="exit"} 1.0' in metrics.text


def test_core_stopped_watchdog_restarts_it_with_stacks(launcher: Launcher) -> None:
    group = launcher.status()["engine"]["pid"]
    restarts = sum(launcher.status()["engine"]["restarts"].values())
    os.kill(find_core(launcher), signal.SIGSTOP)
    launcher.wait_state("ready", restarts=restarts + 1, within_s=START_S)
    card = launcher.crash_card()
    assert card["reason"] == "hang"
    assert any("VLLM::EngineCor: state T" in line for line in card["dump"])
    assert any("run_busy_loop" in line for line in card["dump"])
    assert list_group(group) == []


def test_launcher_killed_next_start_finds_nothing_running(launcher: Launcher) -> None:
    group = launcher.status()["engine"]["pid"]
    launcher.send(signal.SIGKILL)
    launcher.wait()
    launcher.start()
    launcher.wait_state("ready", within_s=START_S)
    assert list_group(group) == []


def test_term_during_a_batch_the_batch_finishes_and_exit_is_0(launcher: Launcher) -> None:
    group = launcher.status()["engine"]["pid"]

    async def scenario() -> httpx.Response:
        task = ask_in_background(launcher.engine_url, 358, max_tokens=250)
        await asyncio.sleep(0.7)  # the batch is inside
        assert not task.done()
        launcher.send(signal.SIGTERM)
        return await task

    response = asyncio.run(scenario())
    assert response.status_code == 200
    choices = response.json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["length"] * 358
    assert launcher.wait(within_s=60) == 0
    assert list_group(group) == []
    assert not find_temporary_folder(launcher.state).exists()


def test_up_launcher_killed_what_runs_and_waits_is_answered(tmp_path: Path) -> None:
    settings = {
        "GATEWAY_MAX_RUNNING": "16",
        "GATEWAY_WARMUP_PROMPTS": "16",
        "LAUNCHER_DRAIN_TIMEOUT_S": "60",
        "LAUNCHER_SET": "max-num-seqs=16",
    }
    launcher = Launcher(tmp_path, "up", settings, fake=None)

    async def scenario() -> list[httpx.Response]:
        url = f"http://127.0.0.1:{launcher.port}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=100) as client:
            body = {"model": "demo", "prompt": "a", "max_tokens": 1000, "ignore_eos": True}
            calls = [client.post("/v1/completions", json={**body, "stream": True})]
            for batch in range(4):
                prompts = [f"{batch} {number} is a number" for number in range(16)]
                fields = {"prompt": prompts, "max_tokens": 256}
                calls.append(client.post("/predict", json=fields))
            tasks = [asyncio.ensure_future(call) for call in calls]
            await asyncio.sleep(0.5)  # some run, some wait
            assert not all(task.done() for task in tasks)
            launcher.send(signal.SIGKILL)
            return await asyncio.gather(*tasks)

    with running(launcher):
        wait_for(lambda: launcher.out, "it is ready", within_s=START_S)
        stream, *batches = asyncio.run(scenario())
        assert stream.text.endswith("data: [DONE]\n\n")
        assert [batch.status_code for batch in batches] == [200] * 4
        assert ["errors" in batch.json() for batch in batches] == [False] * 4
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "engine and gateway end", within_s=120)


def test_crash_loop_ends_with_4_within_its_budget(tmp_path: Path) -> None:
    """Its core dies, and from then on its weights are too short to be loaded."""
    folder = copy_model(tmp_path)
    settings = {"LAUNCHER_MODEL": str(folder), "LAUNCHER_RESTART_LIMIT": "1"}
    launcher = Launcher(tmp_path, settings=settings, fake=None)
    with running(launcher):
        launcher.wait_state("ready", within_s=START_S)
        cut_weights(folder)
        os.kill(find_core(launcher), signal.SIGKILL)
        assert launcher.wait(within_s=START_S) == 4
    crashes = [line for line in launcher.err.splitlines() if "engine_crashed" in line]
    assert ["returncode=0" in line for line in crashes] == [True, False]
    last = launcher.err.splitlines()[-1]
    assert last.startswith("launcher: the engine crashed 2 times within 600 s")
    assert "SafetensorError" in last
    assert launcher.processes() == []


def test_unservable_model_ends_with_3_and_its_reason(tmp_path: Path) -> None:
    folder = copy_model(tmp_path)
    config = (folder / "config.json").read_text().replace("Qwen3ForCausalLM", "Qwen9ForNobody")
    (folder / "config.json").write_text(config)
    launcher = Launcher(tmp_path, settings={"LAUNCHER_MODEL": str(folder)}, fake=None)
    with running(launcher):
        assert launcher.wait(within_s=START_S) == 3
    assert "Qwen9ForNobody" in launcher.err.splitlines()[-1]
    assert launcher.processes() == []


def copy_model(into: Path) -> Path:
    return Path(shutil.copytree(MODEL, into / "model"))


def cut_weights(folder: Path) -> None:
    """As a full disk or a bad one leaves them."""
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
