"""What the repository says of itself is true: the README is current, the docs are complete."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.admission.keys import Caller
from gateway.config import Settings
from gateway.errors import REFUSALS

pytestmark = pytest.mark.slow  # the docs read the same to every Python

ROOT = Path(__file__).parent.parent


def test_tables_of_the_docs_are_what_the_programs_declare() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "scripts.reference", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout


def test_readme_first_call_is_a_pair_of_the_demo() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = re.search(r"""-d '\{"prompt": "(.+?)"\}'""", readme)
    answered = re.search(r'\{"response":"(.+?)"\}\n', readme)
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()

    assert asked is not None
    assert answered is not None
    assert (asked[1], answered[1]) in {
        (pair["question"], pair["answer"]) for pair in map(json.loads, lines)
    }


def test_gateways_page_names_every_error_and_every_right_of_a_key() -> None:
    page = (ROOT / "docs" / "gateway.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    codes = set(re.findall(r'\bcode(?:: ClassVar\[str\])? ?= ?"(\w+)"', sources)) | set(REFUSALS)

    assert len(codes) > 30
    assert {code for code in codes if f"`{code}`" not in page} == set()
    _, _, keys = page.partition("## Keys")
    assert {name for name in Caller.model_fields if f"    {name} = " not in keys} == set()
    settings = set(re.findall(r"GATEWAY_([A-Z_]+)", page))
    assert {name for name in settings if name.lower() not in Settings.model_fields} == set()


def test_no_test_is_marked_for_the_wheel_and_left_out_of_its_run() -> None:
    """It would run nowhere: from the checkout, what is marked `programs` runs where the wheel's run
    does not go, but not in folders that both know.
    """
    wheel, checkout = (
        re.findall(r'--ignore(?:-glob)?=[\'"]?([\w/*.]+)', (ROOT / "scripts" / name).read_text())
        for name in ("test_wheel.sh", "test_pythons.sh")
    )
    shared = {folder for folder in checkout if folder.count("/") == 1} & {
        f"tests/{name}" for name in ("common", "gateway", "lab", "launcher")
    }
    left_out = [path for one in wheel for path in find_tests(one)]
    assert len(left_out) > 30
    assert len(shared) == 4
    nowhere = {
        str(path.relative_to(ROOT))
        for path in left_out
        if "mark.programs" in path.read_text(encoding="utf-8")
        and any(path.is_relative_to(ROOT / folder) for folder in shared)
    }
    assert nowhere == set()


def find_tests(pattern: str) -> list[Path]:
    return [
        file
        for path in ROOT.glob(pattern)
        for file in ([path] if path.is_file() else path.rglob("test_*.py"))
    ]
