"""`python -m gateway COMMAND`: what the gateway says of itself."""

from __future__ import annotations

import json
import subprocess
import sys

from common.project import read_version
from gateway.config import Settings


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gateway", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_version_is_the_projects() -> None:
    assert _run("--version").stdout == f"vllm-gateway {read_version()}\n"


def test_schema_knows_every_setting_and_no_other() -> None:
    schema = json.loads(_run("schema").stdout)

    assert schema["properties"].keys() == Settings.model_fields.keys()
    assert schema["additionalProperties"] is False


def test_completion_is_a_script_that_bash_reads_and_knows_the_flags() -> None:
    script = _run("completion", "bash").stdout

    assert "--max-running" in script
    read = subprocess.run(
        ["/bin/bash", "-n"], input=script, text=True, capture_output=True, check=False
    )
    assert (read.returncode, read.stderr) == (0, "")


def test_completion_for_an_unknown_shell_names_the_known_ones() -> None:
    refused = _run("completion", "basch")

    assert refused.returncode == 2
    assert "bash, zsh, fish; did you mean bash?" in refused.stderr
