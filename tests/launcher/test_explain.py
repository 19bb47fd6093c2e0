"""`explain` and `doctor`, as people call them."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.programs import ROOT, Launcher, running

MODELS = Path(__file__).parent / "models"


def call(launcher: Launcher, *arguments: str, timeout_s: float = 60) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        cwd=ROOT,
        env=launcher.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_explain_json_is_the_command_that_is_started(launcher: Launcher) -> None:
    code, out, _ = call(launcher, "explain", "--json")
    facts = json.loads(out)
    assert code == 0
    with running(launcher):
        status = launcher.wait_state("ready")
        assert status["argv"] == facts["argv"]
        assert status["fingerprint"] == facts["fingerprint"]


def test_explain_warns_where_the_batch_would_run_in_waves(launcher: Launcher) -> None:
    words = ["explain", "--profile", "course", "--gpu"]
    model = ["--model", str(MODELS / "qwen3-8b")]

    small = call(launcher, *words, "RTX 4090", *model)[1]
    large = call(launcher, *words, "H200", *model)[1]

    assert re.search(r"warning  max-num-seqs is 1\d\d, .* a batch of 358 runs in waves", small)
    assert "warning" not in large


def test_explain_says_whose_scheduler_runs(launcher: Launcher) -> None:
    _, out, _ = call(launcher, "explain")
    (line,) = (line for line in out.splitlines() if line.startswith("schedule "))
    assert "vLLM's own: this vLLM 0.32.0 has another scheduler than the one released" in line
    assert "--scheduler-cls" not in out


@pytest.mark.engine
def test_explain_and_fingerprint_name_the_launchers_scheduler(launcher: Launcher) -> None:
    launcher.fake = None
    for arguments, name, start in (
        ((), "launcher.plugins.decode_scheduler.build_scheduler", "the launcher's"),
        (("--set", "scheduler-cls="), "vllm", "vLLM's own"),
    ):
        facts = json.loads(call(launcher, "explain", "--json", *arguments)[1])
        assert facts["scheduler"].startswith(start)
        assert facts["fingerprint"]["scheduler"] == name
        assert ("--scheduler-cls" in facts["argv"]) == (name != "vllm")


def test_explain_says_whether_the_next_start_is_warm(launcher: Launcher) -> None:
    assert "cold" in call(launcher, "explain")[1]
    with running(launcher):
        launcher.wait_state("ready")
    assert "warm" in call(launcher, "explain")[1]
    assert "cold" in call(launcher, "explain", "--set", "max-num-seqs=3")[1]


def test_explain_named_gpu_needs_no_gpu(launcher: Launcher) -> None:
    model = str(MODELS / "qwen3-0.6b")
    code, out, _ = call(launcher, "explain", "--gpu", "RTX 5090", "--model", model)
    assert code == 0
    assert "attention-backend = TRITON_ATTN" in out
    assert "56.0 KiB a token" in out  # 28 layers x 8 heads x 128 x 2, one byte each
    assert "vllm.entrypoints.cli.main serve" in out


def test_serve_for_a_gpu_that_vllm_cannot_use_is_refused(launcher: Launcher) -> None:
    code, _, err = call(launcher, "serve", "--gpu", "H200")
    assert code == 2
    assert "explain" in err


@pytest.mark.engine
def test_doctor_healthy_host_exits_0_with_a_line_per_finding(launcher: Launcher) -> None:
    launcher.fake = None
    code, out, err = call(launcher, "doctor")
    assert (code, err) == (0, "")
    subjects = {line.split()[1] for line in out.splitlines()}
    named = {"vllm", "torch", "device", "model", "memory", "flags", "gateway", "port", "disk"}
    assert named | {"schedule"} <= subjects


@pytest.mark.engine
def test_doctor_names_refused_flag_bad_setting_and_taken_port(launcher: Launcher) -> None:
    launcher.fake = None
    launcher.settings["GATEWAY_PROMPT_STYLE"] = "poem"
    with socket.socket() as other:
        other.bind(("127.0.0.1", launcher.engine_port))
        other.listen()
        code, out, _ = call(launcher, "doctor", "--set", "seed=none")
    assert code == 2
    failures = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert len(failures) == 3
    assert "seed" in failures[0]
    assert "GATEWAY_PROMPT_STYLE" in failures[1]
    assert "LAUNCHER_ENGINE_PORT" in failures[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("servv",), "did you mean serve"), (("up", "--prot", "1"), "did you mean --port")],
)
def test_command_line_mistyped_is_one_line_and_2(
    launcher: Launcher, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = call(launcher, *arguments)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_of_every_command_exits_0(launcher: Launcher) -> None:
    for command in ("up", "serve", "explain", "doctor", "tune"):
        code, out, _ = call(launcher, command, "--help")
        assert code == 0
        assert "--engine-port" in out
