"""A Docker daemon of the test's own: its data in a scratch folder, nothing of it in anybody's way.

It runs in namespaces of its own for processes and mounts, so that ending its first process ends
everything; another daemon on the same machine notices nothing. Images are built on the machine's
network and run on one that has no way out.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.patience import PROGRAM_S

ROOT = Path(__file__).parent.parent.parent
_CI = "tests/stack/compose.ci.yaml"
ONE_ENGINE = ("compose.yaml", _CI)
TWO_ENGINES = ("compose.yaml", "compose.scale.yaml", _CI)
TWO_GATEWAYS = (
    *("compose.yaml", "compose.replicas.yaml"),
    *(_CI, "tests/stack/compose.replicas.ci.yaml"),
)
_CGROUP = "vllm-gateway-stack-test"
_SCRATCH = "vllm-gateway-stack-"
_CLONE_NEWNET = 0x40000000
_STOP_S = 60
# On the machine's own network the daemon changes nothing.
_BUILD_NETWORK = ("--bridge=none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")
_OWN_NETWORK = (
    "--bip=10.213.0.1/24",
    "--default-address-pool=base=10.214.0.0/16,size=24",
)


class DockerError(Exception):
    """A command that failed, with what it said."""


@dataclass(frozen=True)
class Said:
    """What a command wrote."""

    out: str
    err: str


class Docker:
    """The daemon, the client, and Compose over this project's files."""

    def __init__(self, scratch: Path, variables: Mapping[str, str]) -> None:
        self.scratch = scratch
        self.log = scratch / "dockerd.log"
        self._daemon: subprocess.Popen[bytes] | None = None
        self._environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("DOCKER_")},
            **variables,
            "DOCKER_HOST": f"unix://{scratch}/docker.sock",
            "DOCKER_BUILDKIT": "1",
        }

    # --- the daemon ---

    def start(self, *, can_build: bool) -> None:
        command = [
            *("setpriv", "--pdeathsig", "KILL"),  # a killed test must not leave it behind
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("dockerd", f"--host=unix://{self.scratch}/docker.sock"),
            *(f"--data-root={self.scratch}/data", f"--exec-root={self.scratch}/exec"),
            *(f"--pidfile={self.scratch}/dockerd.pid", f"--cgroup-parent=/{_CGROUP}"),
            *("--storage-driver=overlay2", "--ip6tables=false"),
            *(_BUILD_NETWORK if can_build else _OWN_NETWORK),
        ]
        (self.scratch / "dockerd.pid").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + PROGRAM_S
        while not self._answers():
            if self._daemon.poll() is not None or time.monotonic() > deadline:
                raise DockerError(f"dockerd does not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """SIGTERM to dockerd, which ends its containers; SIGKILL to all of it after a while."""
        if self._daemon is None:
            return
        for pid in _children(self._daemon.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        try:
            self._daemon.wait(timeout=_STOP_S)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
        self._daemon = None
        _remove_cgroups()

    def _answers(self) -> bool:
        with contextlib.suppress(DockerError):
            self.run("version", "--format", "{{.Server.Version}}", timeout_s=5)
            return True
        return False

    # --- the client ---

    def run(self, *words: str, timeout_s: float = 60, stdin: bytes | None = None) -> str:
        return self.call(["docker", *words], timeout_s, stdin=stdin).out

    def compose(
        self,
        *words: str,
        files: Sequence[str] = ONE_ENGINE,
        timeout_s: float = 60,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        said = self.compose_said(*words, files=files, timeout_s=timeout_s, variables=variables)
        return said.out

    def compose_said(
        self,
        *words: str,
        files: Sequence[str] = ONE_ENGINE,
        timeout_s: float = 60,
        variables: Mapping[str, str] | None = None,
    ) -> Said:
        command = ["docker", "compose", *(part for file in files for part in ("-f", file))]
        return self.call([*command, *words], timeout_s, variables=variables)

    def inspect(self, name: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self.run("inspect", name))
        return found[0]

    def call(
        self,
        command: Sequence[str],
        timeout_s: float,
        *,
        stdin: bytes | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Said:
        """Any command that finds this daemon."""
        try:
            result = subprocess.run(
                command,
                cwd=ROOT,
                env={**self._environment, **(variables or {})},
                input=stdin or b"",
                capture_output=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise DockerError(f"{' '.join(command)}: not done after {timeout_s:.0f} s") from None
        said = Said(
            result.stdout.decode("utf-8", "replace"), result.stderr.decode("utf-8", "replace")
        )
        if result.returncode:
            raise DockerError(
                f"{' '.join(command)}: code {result.returncode}\n{(said.err + said.out)[-3000:]}"
            )
        return said


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """Moves this thread, and whatever it starts, into a network of its own: a loopback, no more."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET):
            raise DockerError(f"unshare: {os.strerror(ctypes.get_errno())}")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)  # noqa: S607
        yield
    finally:
        libc.setns(before, _CLONE_NEWNET)
        os.close(before)


def kill_container(docker: Docker, name: str) -> None:
    """As the kernel would, out of memory, and waited for: until then its port takes requests.
    `docker kill` counts as asked for: nothing restarts.
    """
    for pid in _processes(docker, name):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:"))
        if numbers.split()[-1] == "1":  # its number in the container's own world
            end = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            is_gone, _, _ = select.select([end], [], [], PROGRAM_S)
            os.close(end)
            if is_gone:
                return
    raise DockerError(f"{name}: its first process was not found, or did not end; is it running?")


def kill_process(docker: Docker, name: str, title: str) -> None:
    """SIGKILL to one process of a container, by its title."""
    for pid in _processes(docker, name):
        if title in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace"):
            os.kill(pid, signal.SIGKILL)
            return
    raise DockerError(f"{name} runs no {title}")


def _processes(docker: Docker, name: str) -> list[int]:
    """By this machine's numbers: the daemon, in a world of its own, knows others."""
    identity = docker.inspect(name)["Id"]
    for hierarchy in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        file = hierarchy / _CGROUP / identity / "cgroup.procs"
        if file.is_file():
            return [int(pid) for pid in file.read_text(encoding="ascii").split()]
    raise DockerError(f"{name} has no control group; is it running?")


def make_scratch() -> Path:
    """Gigabytes for a while; what a killed test could not remove goes first."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        owner = left / "owner"
        if owner.is_file() and not Path(f"/proc/{owner.read_text()}").exists():
            remove_scratch(left)
    scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH))
    (scratch / "owner").write_text(str(os.getpid()))
    return scratch


def remove_scratch(scratch: Path) -> None:
    shutil.rmtree(scratch, ignore_errors=True)
    if scratch.exists():  # a mount that outlived its namespace
        raise DockerError(f"{scratch} cannot be removed")


def _children(pid: int) -> list[int]:
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:
        return []


def _remove_cgroups() -> None:
    """Docker removes its containers' groups, not the parent it was told."""
    for parent in (*Path("/sys/fs/cgroup").glob(f"*/{_CGROUP}"), Path("/sys/fs/cgroup") / _CGROUP):
        for folder in sorted(parent.rglob("*/"), key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                folder.rmdir()
        with contextlib.suppress(OSError):
            parent.rmdir()
