"""`python -m lab judge` as an entrant starts it: the verdict, what to mend, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.course.container import NoDocker
from lab.course.run_judge import JudgedStep, Verdict, main
from lab.failures import BadOptions
from lab.readiness import Problem
from tests.launcher.programs import ROOT

pytestmark = pytest.mark.slow  # programs and files; the same on every Python


@pytest.fixture
def docker(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "docker"
    (folder / "bin").mkdir(parents=True)
    (folder / "behaves").write_text("")
    program = folder / "bin" / "docker"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.lab.course.fake_docker "$@"\n')
    program.chmod(0o755)
    yield folder
    if (pid := folder / "pid").exists():
        os.kill(int(pid.read_text()), signal.SIGTERM)
        pytest.fail("a container was left behind")


def judge(docker: Path, *options: str) -> subprocess.CompletedProcess[str]:
    out = docker.parent / "out" / "judge.json"
    return subprocess.run(
        [sys.executable, "-m", "lab", "judge", "--out", str(out), *options],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{docker / 'bin'}:{os.environ['PATH']}",
            "FAKE_DOCKER": str(docker),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def read_calls(docker: Path) -> list[str]:
    return (docker / "calls").read_text().splitlines()


def test_judge_builds_without_arguments_runs_without_a_network_and_passes(docker: Path) -> None:
    done = judge(docker, "--count", "20", "--track", "other", "--", "--memory", "8g")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "PASS"
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith("ok ")]
    assert [step[1] for step in steps] == ["build", "healthy", "answers", "grade"]
    assert [step[step.index("of") + 1] for step in steps[:3]] == ["900", "180", "360"]
    calls = read_calls(docker)
    (build,) = [call for call in calls if call.startswith("build")]
    assert build.split()[1:] == ["--progress=plain", "--tag", "vllm-gateway-judged", "."]
    assert "network create --internal vllm-gateway-judged" in calls
    (run,) = [call for call in calls if call.startswith("run")]
    assert run.endswith("--network vllm-gateway-judged --memory 8g vllm-gateway-judged")
    assert "-p" not in run.split()
    out = docker.parent / "out"
    assert (out / "judge.html").is_file()
    assert (out / "judge-build.log").read_text() == "built\n"
    assert "what the container said" in (out / "judge-container.log").read_text()
    assert calls[-1] == "network rm vllm-gateway-judged"


@pytest.mark.parametrize(
    ("behaves", "says"),
    [
        ("fails_to_build", ["mend: build_failed", "no such model", "read the build's log"]),
        ("ends", ["mend: never_started: the container ended with 3", "what the container said"]),
        ("unhealthy", ["mend: never_", "unhealthy"]),
    ],
)
def test_judge_of_what_fails_says_what_to_mend(docker: Path, behaves: str, says: list[str]) -> None:
    (docker / "behaves").write_text(behaves)
    done = judge(docker, "--count", "20", "--track", "other")
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "FAIL"
    for word in says:
        assert word in done.stdout


def test_judge_of_an_image_that_is_there_builds_nothing(docker: Path) -> None:
    done = judge(docker, "--count", "12", "--image", "mine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any(call.startswith("build") for call in read_calls(docker))
    assert any(call.startswith("run") and call.endswith(" mine") for call in read_calls(docker))
    with pytest.raises(BadOptions, match="leave out --no-cache"):
        main(["--image", "mine", "--no-cache", "--out", str(docker / "judge.json")])


def test_judge_without_docker_says_so(docker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NoDocker, match="cannot run docker"):
        main(["--out", str(docker / "judge.json")])


def test_verdict_of_too_slow_an_answer_has_its_advice() -> None:
    late = Problem("too_slow", "no answer within the limit of 360 s")
    verdict = Verdict([JudgedStep("answers", 360, 360.0, (late,))])
    said = "\n".join(verdict.describe(coloured=False))
    assert "mend: too_slow: no answer within" in said
    assert "fewer max_tokens in course.toml" in said
    assert said.endswith("FAIL")
