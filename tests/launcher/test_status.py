"""What the status port answers before, while and after everything is ready, and what it counts."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families

import gateway.page
from common.web.foreign_pages import PageGuard
from launcher.engine.status import (
    _STATES,
    SchedulerStatus,
    StatusSource,
    build_status_app,
    list_metrics,
)
from launcher.engine.supervisor import ProgramStatus, RestartPolicy

LABELS = {
    "vllm": "0.32.0",
    "model": "demo",
    "profile": "cpu",
    "device": "CPU (8 GiB, cpu)",
    "fingerprint": "abc",
}
GUARD = PageGuard("127.0.0.1", (), "LAUNCHER_STATUS_ALLOWED_HOSTS")
CRASH = {"time": "2026-01-02T03:04:05+00:00", "reason": "signal", "exit_code": None}
HOSTS = {"wanted": 3, "joined": 2, "lost": 1}
NVIDIA_SMI = """#!/bin/sh
echo '0, NVIDIA H200, 87, 120000, 143771, 512.40, 54, 1980'
echo '1, NVIDIA H200, 3, 900, 143771, [N/A], 31, 345'
"""


def make_source(engine: str, gateway: str, **fields: Any) -> StatusSource:
    programs = {"engine": ProgramStatus(engine), "gateway": ProgramStatus(gateway)}
    policy = RestartPolicy(limit=5, window_s=600, delay_s=1, delay_max_s=60)
    given: dict[str, Any] = {
        "crash": lambda: None,
        "dropped": lambda: {"shown": 2},
        "scheduler": lambda: SchedulerStatus("vLLM's own"),
    } | fields
    return StatusSource(programs, {}, LABELS, lambda: None, policy=policy, **given)


async def read_metrics(source: StatusSource) -> str:
    async with TestClient(TestServer(build_status_app(source, GUARD))) as client:
        response = await client.get("/metrics")
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        return await response.text()


@pytest.mark.parametrize(
    ("engine", "gateway", "status"),
    [("ready", "ready", 200), ("starting", "ready", 503), ("ready", "warming", 503)],
)
async def test_readyz_says_whether_all_programs_are_ready(
    engine: str, gateway: str, status: int
) -> None:
    source = make_source(engine, gateway)
    async with TestClient(TestServer(build_status_app(source, GUARD))) as client:
        response = await client.get("/readyz")
        assert response.status == status
        assert await response.json() == {"engine": engine, "gateway": gateway}


async def test_metrics_are_those_declared_with_type_labels_and_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    source = make_source(
        "ready", "ready", crash=lambda: CRASH, has_gpu=True, count_hosts=lambda: HOSTS
    )
    for status in source.programs.values():
        status.start_seconds = 12.5

    text = await read_metrics(source)

    exported = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {tuple(sample.labels) for sample in family.samples}
        exported[name] = (family.type, labels, family.documentation)
    assert exported == {
        one.name: (one.kind, {tuple(sorted(one.labels))}, one.meaning) for one in list_metrics()
    }


@pytest.mark.parametrize("state", _STATES)
def test_state_has_a_word_on_the_gateways_page(state: str) -> None:
    page = Path(gateway.page.__path__[0])
    words = (page / "static/common/translations.js").read_text(encoding="utf-8")

    assert f'"state.{state}": [' in words


async def test_metrics_tell_of_gpus_what_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    text = await read_metrics(make_source("ready", "ready", has_gpu=True))

    assert 'launcher_gpu_utilization_ratio{gpu="0",name="NVIDIA H200"} 0.87' in text
    assert 'launcher_gpu_power_watts{gpu="0",name="NVIDIA H200"} 512.4' in text
    assert 'launcher_gpu_power_watts{gpu="1"' not in text
    assert 'launcher_gpu_clock_hertz{gpu="1",name="NVIDIA H200"} 3.45e+08' in text


async def test_metrics_do_not_wait_for_a_gpu_that_is_ill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    began = time.monotonic()

    text = await read_metrics(make_source("ready", "ready", has_gpu=True))

    assert time.monotonic() - began < 60
    assert "launcher_engine_up 1.0" in text
    assert "launcher_gpu_" not in text
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


async def test_metrics_take_a_remark_of_nvidia_smi_for_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho No devices were found\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    text = await read_metrics(make_source("ready", "ready", has_gpu=True))

    assert "launcher_engine_up 1.0" in text
    assert "launcher_gpu_" not in text


async def test_metrics_say_whose_scheduler_runs_and_how_often_it_gave_up() -> None:
    state = SchedulerStatus("the launcher's", "on")
    source = make_source("ready", "ready", scheduler=lambda: state)
    text = await read_metrics(source)
    assert "launcher_engine_own_scheduler 1.0" in text
    assert "launcher_engine_scheduler_fallbacks_total 0.0" in text

    state = SchedulerStatus("the launcher's", "gave up", "Contradiction: …", 1)
    text = await read_metrics(source)
    assert "launcher_engine_own_scheduler 0.0" in text
    assert "launcher_engine_scheduler_fallbacks_total 1.0" in text


async def test_metrics_count_restarts_from_zero_and_date_the_last_crash() -> None:
    source = make_source("ready", "ready", crash=lambda: CRASH)
    source.programs["engine"].restarts["signal"] = 2

    text = await read_metrics(source)

    assert 'launcher_engine_restarts_total{reason="signal"} 2.0' in text
    assert 'launcher_engine_restarts_total{reason="hang"} 0.0' in text
    assert "launcher_engine_last_crash_timestamp_seconds 1.767323045e+09" in text
    assert "launcher_gpu_" not in text


@pytest.mark.parametrize("path", ["/status", "/crash", "/readyz", "/metrics"])
async def test_status_port_is_not_for_a_web_page_whose_name_points_here(path: str) -> None:
    source = make_source("ready", "ready")
    async with TestClient(TestServer(build_status_app(source, GUARD))) as client:
        for headers, code in (
            ({"Host": "rebound.example:8002"}, "host_not_allowed"),
            ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, "cross_site"),
        ):
            response = await client.get(path, headers=headers)
            told = await response.json()
            assert (response.status, told["code"]) == (403, code)
            assert "LAUNCHER_STATUS_ALLOWED_HOSTS" in told["error"]


@pytest.mark.parametrize("host", ["engine:8002", "10.1.2.3:8002", "engine.default.svc:8002"])
async def test_status_port_is_for_whoever_has_a_name_of_the_network(host: str) -> None:
    async with TestClient(
        TestServer(build_status_app(make_source("ready", "ready"), GUARD))
    ) as client:
        response = await client.get("/status", headers={"Host": host})
        assert response.status == 200
