"""`python -m lab`: its commands, and what ends any of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.project import read_version
from common.questions import BadQuestions
from lab.__main__ import COMMANDS, main, run_command
from lab.failures import BadOptions

ROOT = Path(__file__).parents[2]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "lab", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_help_names_every_command_and_loads_none() -> None:
    done = run("--help")

    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "common.questions" in done.stderr
    assert not [module for module, _ in COMMANDS.values() if module in done.stderr]
    assert "httpx" not in done.stderr


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])

    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vllm-lab {read_version()}\n"


@pytest.mark.parametrize("words", [[], ["lunch"], ["--lunch"]])
def test_command_that_is_none_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)

    assert caught.value.code == 2


@pytest.mark.parametrize("name", list(COMMANDS))
def test_command_has_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])

    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m lab {name} ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadOptions("these do not go together"), 2, "grade: these do not go together\n"),
        (BadQuestions("q.txt: no question in it"), 2, "grade: q.txt: no question in it\n"),
        (KeyboardInterrupt(), 130, "grade: interrupted\n"),
    ],
)
def test_what_ends_a_command_is_one_line_and_a_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: Sequence[str]) -> int:
        raise error

    assert run_command("grade", fail, []) == code
    assert capsys.readouterr().err == said


def test_command_without_the_extra_says_how_to_get_it() -> None:
    code = (
        "import sys; sys.modules['rouge_score'] = None; sys.argv[1:] = ['grade', '--help']; "
        "from lab.__main__ import main; sys.exit(main())"
    )
    refused = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert refused.returncode == 2
    assert refused.stderr.startswith("grade: it needs rouge_score, of the extra `lab`")
