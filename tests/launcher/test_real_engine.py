"""The same promises kept with the real vLLM on a CPU. Each start of it takes 20 s of a core."""

from __future__ import annotations

import asyncio
import json
import os
import re
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
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
START_S = 240.0


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """One launcher for the module: each test but the last that uses it leaves an engine that is
    ready. It gives up at the third crash.
    """
    folder = tmp_path_factory.mktemp("real")
    settings = {
        "LAUNCHER_MODEL": str(copy_model(folder)),
        "LAUNCHER_SERVED_MODEL_NAME": "demo",
        "LAUNCHER_RESTART_LIMIT": "2",
        "LAUNCHER_RESTART_WINDOW_S": "3600",
        "LAUNCHER_HANG_TIMEOUT_S": "6",
        "LAUNCHER_CANARY_INTERVAL_S": "3",
        "LAUNCHER_KILL_TIMEOUT_S": "15",
    }
    started = Launcher(folder, settings=settings, fake=None)
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


def test_core_has_asked_for_amx_as_it_computes(launcher: Launcher) -> None:
    log = (launcher.state / "engine.log").read_text()
    assert re.search(r"\(EngineCore pid=\d+\) .*\] AMX: (?:none|allowed|refused)", log)


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


def test_core_stopped_is_a_crash_with_stacks_and_the_last_of_a_loop_ends_it_with_4(
    launcher: Launcher,
) -> None:
    """The watchdog sees it; the engine that it starts then finds weights too short to be loaded."""
    group = launcher.status()["engine"]["pid"]
    crashes = sum(launcher.status()["engine"]["restarts"].values())
    cut_weights(Path(launcher.settings["LAUNCHER_MODEL"]))
    os.kill(find_core(launcher), signal.SIGSTOP)
    assert launcher.wait(within_s=START_S) == 4

    files = sorted((launcher.state / "crashes").iterdir())
    card, last = (json.loads(files[place].read_text()) for place in (crashes, -1))
    assert card["reason"] == "hang"
    assert any("VLLM::EngineCor: state T" in line for line in card["dump"])
    assert any("run_busy_loop" in line for line in card["dump"])
    assert list_group(group) == []
    assert (last["reason"], last["was_ready"]) == ("exit", False)
    assert last["exit_code"] != 0
    line = launcher.err.splitlines()[-1]
    assert line.startswith("launcher: the engine crashed 3 times within 3600 s")
    assert "SafetensorError" in line
    assert launcher.processes() == []
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
        async with httpx.AsyncClient(
            base_url=url, trust_env=False, timeout=100, verify=NO_TLS
        ) as client:
            body = {"model": "demo", "prompt": "a", "max_tokens": 600, "ignore_eos": True}
            calls = [client.post("/v1/completions", json={**body, "stream": True})]
            for batch in range(4):
                prompts = [f"{batch} {number} is a number" for number in range(16)]
                fields = {"prompt": prompts, "max_tokens": 128}
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
