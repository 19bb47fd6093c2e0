"""A Python without the project's packages: one line that says which one has them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common


@pytest.mark.parametrize(
    "words",
    [
        ("launcher", "explain"),
        ("gateway",),
        ("gateway", "--help"),
        ("lab", "bench", "--help"),
        ("lab", "grade"),
    ],
    ids=" ".join,
)
def test_program_in_an_interpreter_without_its_packages_says_which_has_them(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """As in a shell in which nobody has activated the environment."""
    packages = Path(common.__file__ or "").parent.parent
    done = subprocess.run(
        [sys.executable, "-S", "-m", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{words[0]}: {sys.executable} has no ")
    ways = ("make setup", f".venv/bin/python -m {words[0]}", "pip install")  # the last of a wheel
    assert any(way in line for way in ways)


def test_lab_lists_its_commands_without_any_package(tmp_path: Path) -> None:
    packages = Path(common.__file__ or "").parent.parent
    done = subprocess.run(
        [sys.executable, "-S", "-m", "lab", "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "bench" in done.stdout


@pytest.mark.parametrize("words", ["gateway --version", "launcher --version", "lab grade --help"])
def test_program_imports_nothing_that_it_does_not_use(words: str) -> None:
    """Garbage is looked for again; and Rich can still be had where it is, as beside vLLM."""
    program, *rest = words.split()
    last = "import rich" if importlib.util.find_spec("rich") else ""
    code = f"""
import gc, sys
from {program}.__main__ import main
sys.argv[1:] = {rest}
try:
    main()
except SystemExit:
    pass
print(gc.isenabled(), [one for one in ("click", "pygments", "rich") if one in sys.modules])
{last}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True []"
