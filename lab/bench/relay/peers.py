"""What the relay comparison may put beside the gateway: other routers for vLLM, another checkout.

Each router lives in a virtual environment of its own below out/, made once from the package index.
They run as they come, but for quiet logs and the plainest policy: there is one engine to choose.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.bench.bench_figures import BenchFailed
from lab.failures import BadOptions

GATEWAY_FLAGS = ("--prompt-style", "raw", "--warmup-prompts", "1", "--log-format", "json")
_INSTALL_TIMEOUT_S = 600


@dataclass(frozen=True)
class Contender:
    """A further arm: started by the engine's address, its own port and one for its metrics."""

    name: str
    build_command: Callable[[str, int, int], list[str]]
    folder: Path | None = None


@dataclass(frozen=True)
class RelayPeer:
    name: str
    requirement: str
    command: tuple[str, ...]

    def place(self, home: Path) -> Contender:
        def build_command(engine: str, port: int, metrics_port: int) -> list[str]:
            program, *words = self.command
            words += ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine]
            words += ["--prometheus-port", str(metrics_port)]
            return [str(home / "bin" / program), *words]

        return Contender(self.name, build_command)


_QUIET = ("--policy", "round_robin", "--log-level", "error")
PEERS = (
    RelayPeer("vllm-router", "vllm-router==0.1.17", ("vllm-router", *_QUIET)),
    RelayPeer("smg", "smg==1.13.0", ("smg", "launch", *_QUIET)),
)


def install_peers(folder: Path, say: Callable[[str], None]) -> list[Contender]:
    """Installed below `folder` where they are not there yet."""
    for peer in PEERS:
        home = folder / peer.name
        installed = home / "installed"
        if installed.is_file() and installed.read_text(encoding="utf-8") == peer.requirement:
            continue
        say(f"installing {peer.requirement} into {home}")
        _run(peer, sys.executable, "-m", "venv", "--clear", str(home))
        pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        _run(peer, str(home / "bin" / "python"), *pip, peer.requirement)
        installed.write_text(peer.requirement, encoding="utf-8")
    return [peer.place(folder / peer.name) for peer in PEERS]


def build_gateway_command(engine: str, port: int, _metrics_port: int = 0) -> list[str]:
    words = ["--port", str(port), "--engines", engine, *GATEWAY_FLAGS]
    return [sys.executable, "-m", "gateway", *words]


def place_checkout(folder: Path) -> Contender:
    """The gateway of another checkout of this project, such as an older one."""
    if not (folder / "gateway" / "__main__.py").is_file():
        raise BadOptions(f"{folder} is no checkout of this project: it has no gateway")
    return Contender("beside", build_gateway_command, folder)


def _run(peer: RelayPeer, *command: str) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise BenchFailed(f"{peer.requirement} was not installed in ten minutes") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BenchFailed(f"cannot install {peer.requirement}: {said}; leave --peers out")
