"""`explain` and `doctor`, as people call them."""

from __future__ import annotations

import io
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.config import DoctorSettings, ExplainSettings, load_settings
from launcher.doctor import run_doctor
from launcher.explain import explain
from launcher.sections import list_engines
from tests.launcher.programs import ROOT, Launcher, running

pytestmark = pytest.mark.programs

MODELS = Path(__file__).parent / "models"


def call(launcher: Launcher, *arguments: str, timeout_s: float = 240) -> tuple[int, str, str]:
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
    _, out, _ = call(launcher, "explain", "--all")
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


def write_sections(launcher: Launcher, text: str) -> None:
    config = launcher.folder / "launcher.toml"
    config.write_text(text)
    launcher.settings["LAUNCHER_CONFIG"] = str(config)


def test_explain_several_engines_is_one_list_and_minds_what_was_tuned(launcher: Launcher) -> None:
    tuned = 'profile = "cpu"\ndevice = "none"\nmodel = "none"\nvllm = "0"\nsummary = "fast"'
    write_sections(
        launcher,
        f"""
        [[launcher.engine]]
        served_model_name = "one"
        [[launcher.engine]]
        served_model_name = "two"
        [tuned]
        {tuned}
        options = {{}}
        environment = {{}}
        """,
    )

    code, out, _ = call(launcher, "explain", "--json")

    facts = json.loads(out)
    assert code == 0
    for name, one in zip(("one", "two"), facts, strict=True):
        assert one["argv"][one["argv"].index("--served-model-name") + 1] == name
        (note,) = one["notes"]
        assert re.search(r"\[tuned\] of .*launcher.toml was measured for device none, .*not", note)


def test_doctor_asks_the_gateway_once_for_engines_that_take_turns(launcher: Launcher) -> None:
    write_sections(launcher, "takes_turns = true\n[[engine]]\n[[engine]]\n")

    out = call(launcher, "doctor")[1]

    gateway = [line for line in out.splitlines() if line.split()[1] == "gateway"]
    assert gateway == ["ok    gateway  it has nothing against its settings"]


def test_doctor_names_two_engines_on_one_port(launcher: Launcher) -> None:
    port = launcher.engine_port
    write_sections(launcher, f"[[engine]]\n[[engine]]\nengine_port = {port}\n")

    code, out, _ = call(launcher, "doctor")

    assert code == 2
    assert f"engine_port of [[engine]] 2 are both {port}" in out


def test_explain_named_gpu_needs_no_gpu(launcher: Launcher) -> None:
    model = str(MODELS / "qwen3-0.6b")
    code, out, _ = call(launcher, "explain", "--all", "--gpu", "RTX 5090", "--model", model)
    assert code == 0
    assert "attention-backend = TRITON_ATTN" in out
    assert "56.0 KiB a token" in out  # 28 layers x 8 heads x 128 x 2, one byte each
    assert "vllm.entrypoints.cli.main serve" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["2x H200"], "1 of 2 GPUs stay idle: --copies 2 starts an engine on each"),
        (["2x H200", "--set", "tensor-parallel-size=2"], ""),
        (["2x H200", "--copies", "2"], ""),
        (["H200"], ""),
    ],
)
def test_explain_says_which_gpus_stay_idle(tmp_path: Path, words: list[str], told: str) -> None:
    model = ["--model", str(MODELS / "qwen3-0.6b"), "--cache-dir", str(tmp_path)]
    settings = load_settings(ExplainSettings, ["--gpu", *words, *model])

    output = "\n".join(explain(list_engines(settings), as_json=False))

    assert "runs     384 sequences at once" in output
    assert ("stay idle" in output, told in output) == (bool(told), True)


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
@pytest.mark.usefixtures("quick_parser")
def test_doctor_names_refused_flag_bad_setting_and_taken_port(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.fake = None
    launcher.settings["GATEWAY_PROMPT_STYLE"] = "poem"
    for name, value in launcher.environment().items():
        monkeypatch.setenv(name, value)
    settings, said = load_settings(DoctorSettings, ["--set", "seed=none"]), list[str]()
    with socket.socket() as other:
        other.bind(("127.0.0.1", launcher.engine_port))
        other.listen()
        code = run_doctor([settings], said.append, io.StringIO())
    assert code == 2
    failures = [line for line in said if line.startswith("FAIL")]
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


def test_explain_begins_with_a_conclusion_that_fits_a_screen(launcher: Launcher) -> None:
    model = str(MODELS / "qwen3-0.6b")
    words = ["explain", "--gpu", "NVIDIA GeForce RTX 5090", "--model", model]

    short = call(launcher, *words)[1]
    long = call(launcher, *words, "--all")[1]

    assert len(short.splitlines()) <= 12
    assert "on RTX 5090 (32 GiB, sm_120), profile course" in short.splitlines()[0]
    at_once = r"^runs     \d+ sequences at once, of up to [\d,]+ tokens each$"
    assert re.search(at_once, short, re.MULTILINE)
    assert "GiB of weights" in short
    assert "`--all` shows the" in short
    assert long.startswith(short.rpartition("\n\n")[0])
    assert "attention-backend = " not in short
    assert len(long.splitlines()) > 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "gpu-memory-utilization=1.5"), "at most 1"),
        (("--set", "tensor-parallel-size=2"), "needs 2 GPUs and there is 1"),
        (("--gpu", "H20"), "did you mean H200?"),
    ],
)
def test_explain_refuses_what_cannot_work_in_one_line(
    launcher: Launcher, words: tuple[str, ...], message: str
) -> None:
    gpu = () if "--gpu" in words else ("--gpu", "H200")
    code, _, err = call(launcher, "explain", "--model", str(MODELS / "qwen3-8b"), *gpu, *words)

    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_doctor_on_a_terminal_says_what_it_looks_at() -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen, said = Screen(), list[str]()
    settings = load_settings(DoctorSettings, ["--model", "/nowhere"])

    assert run_doctor([settings], said.append, screen) == 2
    assert "looking at 4 of 11: model" in screen.getvalue()
    assert screen.getvalue().endswith("\r\033[K")
    assert any("no folder" in line for line in said)
