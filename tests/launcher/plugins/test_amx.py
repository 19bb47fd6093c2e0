"""AMX, which the kernel allows to a process that asks for it: who asks, and what if it refuses."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from launcher.config import LauncherSettings
from launcher.doctor import ask_for_amx, describe_amx
from launcher.models.model import find_model
from launcher.plan.command import InstalledVllm
from launcher.plan.engine_plan import EnginePlan
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.prepare import decide
from tests.launcher.programs import MODEL
from tests.vllm_python import VllmPython

FLAGS = read_shipped_flags()
OURS = "launcher.plugins.cpu_worker.AmxWorker"
# What is put on is the CPU, with AMX or without, and the kernel, which allows it or does not.
PROGRAM = """
import json, sys
import torch
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.worker.cpu_worker import CPUWorker
from launcher.plugins.cpu_worker import AmxWorker
has, allows = json.loads(sys.argv[1])
events = []
def ask():
    events.append("asked")
    return allows
torch.cpu._is_amx_tile_supported = lambda: has
torch.cpu._init_amx = ask
CPUWorker.init_device = lambda self: events.append("device")
AmxWorker.init_device(object.__new__(AmxWorker))
print(json.dumps([*events, _get_attn_isa(torch.bfloat16, 128, 64)]))
"""


def plan_for(
    *pairs: str, gpu: str = "cpu", build: str = "cpu", profile: str = "auto"
) -> EnginePlan:
    settings = LauncherSettings(model=str(MODEL), gpu=gpu, profile=profile, set=pairs)
    vllm = InstalledVllm("vllm", FLAGS.version, build, "vllm.entrypoints.cli.main", True)
    return decide(settings, vllm, FLAGS, find_model(settings, config_only=True))


@pytest.mark.parametrize(
    ("settings", "worker"),
    [
        ({}, OURS),
        ({"gpu": "H200", "build": "gpu"}, None),
        ({"gpu": "H200", "build": "gpu", "profile": "cpu"}, None),
    ],
)
def test_worker_of_an_engine_on_a_cpu_is_the_launchers(
    settings: dict[str, str], worker: str | None
) -> None:
    assert plan_for(**settings).value("worker-cls") == worker


@pytest.mark.parametrize(("pair", "worker"), [("", None), ("mine.Worker", "mine.Worker")])
def test_worker_asked_for_is_left_to_who_asks(pair: str, worker: str | None) -> None:
    assert plan_for(f"worker-cls={pair}").value("worker-cls") == worker


@pytest.mark.engine
@pytest.mark.parametrize(
    ("has", "allows", "events", "isa"),
    [
        (False, False, ["device"], "vec"),
        (True, True, ["asked", "device"], "amx"),
        (True, False, ["asked", "device"], "vec"),
    ],
)
def test_worker_asks_first_and_without_permission_vllm_computes_without_amx(
    vllm_python: VllmPython, has: bool, allows: bool, events: list[str], isa: str
) -> None:
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    words = [sys.executable, "-c", PROGRAM, json.dumps([has, allows])]

    done = vllm_python.run(words, env=environment)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [*events, isa]


@pytest.mark.engine
def test_doctor_asks_a_process_of_its_own() -> None:
    """As the kernel's flags have it; a sandbox may refuse even so."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")

    answer = ask_for_amx()

    assert answer in ("none", "allowed", "refused")
    if "amx_tile" in flags:
        assert answer != "none"


@pytest.mark.parametrize(
    ("answer", "level", "word"),
    [("allowed", "ok", "the kernel allows it"), ("refused", "warn", "without it, and slower")],
)
def test_doctor_says_whether_amx_is_allowed(answer: str, level: str, word: str) -> None:
    (finding,) = describe_amx(answer)

    assert (finding.level, finding.subject) == (level, "device")
    assert finding.text.startswith("AMX: ")
    assert word in finding.text


@pytest.mark.parametrize("answer", ["none", ""])
def test_doctor_says_nothing_of_a_cpu_without_amx(answer: str) -> None:
    assert list(describe_amx(answer)) == []
