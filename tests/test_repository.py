"""What the repository says of itself is true: the pins agree, the README is current."""

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

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"^([\w.-]+)==([^\s\\;]+)(?:\s*;\s*([^\\]+?))?\s*\\?$", re.MULTILINE)


def _pins(name: str) -> dict[tuple[str, str], str]:
    text = (ROOT / "requirements" / name).read_text()
    return {(found[1], found[3] or ""): found[2] for found in PIN.finditer(text)}


@pytest.mark.parametrize("engine", ["cpu.txt", "cuda.txt"])
def test_test_tools_agree_with_the_engines_pins(engine: str) -> None:
    tools, pins = _pins("dev.txt"), _pins(engine)

    shared = tools.keys() & pins.keys()
    assert len(shared) > 20
    assert {key for key in shared if tools[key] != pins[key]} == set()


def test_gateway_pins_are_part_of_every_environment() -> None:
    for name in ("cpu.txt", "cuda.txt", "dev.txt", "otel.txt", "image.txt"):
        versions = {key[0]: version for key, version in _pins(name).items()}
        for (package, _), version in _pins("gateway.txt").items():
            assert versions.get(package) == version, f"{package} in {name}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.stem
)
def test_every_pin_has_a_hash(path: Path) -> None:
    text = path.read_text()

    for requirement in re.split(r"\n(?=[a-z])", text):
        if re.match(r"[\w.-]+==", requirement):
            assert "--hash=sha256:" in requirement, requirement[:60]


def test_cpu_environment_has_no_foreign_torch() -> None:
    assert not {name for name, _ in _pins("cpu.txt") if name.startswith(("torch", "nvidia"))}


def test_readme_tables_are_the_settings() -> None:
    checked = subprocess.run(
        [sys.executable, "scripts/readme.py", "--check"],
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
