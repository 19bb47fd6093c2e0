"""`python -m gateway COMMAND`: what the gateway says of itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.project import read_version
from gateway.config import Settings
from tests.fake_engine import MODEL_FOLDER

pytestmark = pytest.mark.programs


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


@pytest.mark.parametrize("name", ["CONFIG", "KEYS_FILE", "WARMUP_FILE", "SYSTEM_PROMPT_FILE"])
def test_fifo_where_a_file_is_wanted_is_one_line_and_no_wait(tmp_path: Path, name: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "gateway", "check"]
    environment = {
        **os.environ,
        "GATEWAY_TOKENIZER": str(MODEL_FOLDER),
        f"GATEWAY_{name}": str(fifo),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("gateway: ")
    assert str(fifo) in line
    assert "file" in line
