"""What every program's commands say on standard output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.programs

COMMANDS = [
    ["launcher", "explain", "--gpu", "H200", "--model", "demo/model", "--all"],
    ["launcher", "schema"],
    ["gateway", "schema"],
    ["gateway", "--help"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_reader_who_has_left_is_no_fault(command: list[str]) -> None:
    words = [sys.executable, "-m", *command]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None
        assert one.stderr is not None
        one.stdout.close()
        assert (one.stderr.read(), one.wait()) == ("", 0)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_full_disk_is_one_line(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    said = f"{command[0]}: cannot write standard output: No space left on device\n"
    assert (done.stderr, done.returncode) == (said, 2)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_standard_output_that_is_closed_is_no_fault(command: list[str]) -> None:
    words = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", *command]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
