"""The wheel, installed into an environment of its own and started from somewhere else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import orjson
import pytest

from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.slow  # another Python runs all tests from the wheel

ROOT = Path(__file__).parent.parent
MODEL = Path(__file__).parent / "launcher" / "models" / "qwen3-0.6b"
PACKAGES = ("common", "gateway", "lab", "launcher")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands. The dependencies are those of the environment of the tests."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
    run(*pip, "--no-index", "--no-deps", "--ignore-installed", wheel)
    return venv / "bin"


def run(*words: str | Path, folder: Path | None = None) -> str:
    done = subprocess.run(
        words, cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Without anything that leads back into the checkout."""
    own = ("GATEWAY_", "LAUNCHER_", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


# --- what is in it ---


def test_wheel_holds_every_file_of_the_packages_and_the_licence(wheel: Path) -> None:
    shipped = [*PACKAGES, "demo/model", "demo/questions.jsonl"]
    wanted = run("git", "ls-files", "--cached", "--others", "--exclude-standard", *shipped)
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        licence = [archive.read(name) for name in held if name.endswith("/licenses/LICENSE")]

    assert {"gateway/page/static/index.html", "launcher/plan/flags/flags.toml"} < set(
        wanted.split()
    )
    assert set(wanted.split()) - held == set()
    assert licence == [(ROOT / "LICENSE").read_bytes()]


def test_wheel_holds_no_test_no_script_and_no_page_of_the_docs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} <= {*PACKAGES, "demo"}


def test_every_package_says_that_it_is_typed() -> None:
    assert [name for name in PACKAGES if not (ROOT / name / "py.typed").is_file()] == []


def test_version_is_that_of_the_newest_entry_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]?", changelog, re.MULTILINE)
    assert entries[0] == project["version"]
    assert entries == sorted(entries, key=lambda text: [*map(int, text.split("."))], reverse=True)


# --- what it does ---


def test_packages_come_from_the_wheel(commands: Path, tmp_path: Path) -> None:
    code = "import gateway, lab; print(gateway.__file__, lab.__file__)"
    found = run(commands / "python", "-c", code, folder=tmp_path).split()
    assert [Path(path).is_relative_to(commands.parent) for path in found] == [True, True]


@pytest.mark.parametrize("program", ["gateway", "lab", "launcher"])
def test_version_is_said(commands: Path, tmp_path: Path, program: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for words in ([f"vllm-{program}"], ["python", "-m", program]):
        said = run(commands / words[0], *words[1:], "--version", folder=tmp_path)
        assert said == f"vllm-{program} {project['version']}\n"


def test_lab_lists_its_commands(commands: Path, tmp_path: Path) -> None:
    assert "selftest" in run(commands / "vllm-lab", "--help", folder=tmp_path)
    for command in ("grade", "bench", "selftest", "load"):
        run(commands / "vllm-lab", command, "--help", folder=tmp_path)


def test_launcher_explains_a_gpu_that_is_not_here(commands: Path, tmp_path: Path) -> None:
    explain = ("explain", "--all", "--gpu", "H200", "--model", MODEL)
    said = run(commands / "vllm-launcher", *explain, folder=tmp_path)
    assert "H200 (140 GiB, sm_90)" in said
    assert "--max-num-seqs 384" in said


def test_launcher_finds_the_demo_model(commands: Path, tmp_path: Path) -> None:
    said = run(commands / "vllm-launcher", "explain", "--all", "--gpu", "H200", folder=tmp_path)
    assert f"model    {commands.parent}" in said


def test_gateway_checks_its_settings(commands: Path, tmp_path: Path) -> None:
    check = ("check", "--prompt-style", "raw", "--system-prompt-file", "one-line")
    assert "are good" in run(commands / "vllm-gateway", *check, folder=tmp_path)


async def test_gateway_answers_over_an_engine_and_shows_its_page(
    commands: Path, tmp_path: Path
) -> None:
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine,
        serve_installed(commands / "vllm-gateway", engine, tmp_path) as client,
    ):
        response = await client.post("/predict", json={"prompt": ["what is a warp?"]})
        assert response.json() == {"response": ["answer:what is a warp?"]}
        page = await client.get("/ui")
        assert page.status_code == 200
        parts = set(re.findall(r'(?:src|href)="(ui/[^"]+)"', page.text))
        assert parts
        assert {(await client.get(f"/{part}")).status_code for part in parts} == {200}


@contextlib.asynccontextmanager
async def serve_installed(
    command: Path, engine: str, folder: Path
) -> AsyncIterator[httpx.AsyncClient]:
    log = folder / "gateway.log"
    flags = ["--port", "0", "--engines", engine, "--prompt-style", "raw"]
    flags += ["--warmup-prompts", "2", "--log-format", "json"]
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            command, *flags, cwd=folder, env=environment(), stdout=file, stderr=file
        )
    try:
        await until(lambda: read_port(log) or process.returncode is not None, PROGRAM_S)
        url = f"http://127.0.0.1:{read_port(log)}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=NO_TLS) as client:
            await until(lambda: is_ready(client), PROGRAM_S)
            yield client
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        code = await asyncio.wait_for(process.wait(), PROGRAM_S)
    assert code == 0, log.read_text(encoding="utf-8")


def read_port(log: Path) -> int | None:
    for line in log.read_bytes().splitlines():
        if b'"gateway_listening"' in line:
            return int(orjson.loads(line)["port"])
    return None


async def is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200
