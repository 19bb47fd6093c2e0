"""Other routers for vLLM, beside which the relay comparison may put the gateway.

Each lives in a virtual environment of its own below out/, made once from the package index. They
run as they come, but for quiet logs and the plainest policy: there is one engine to choose from.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lab.bench.bench_figures import BenchFailed

_INSTALL_TIMEOUT_S = 600


@dataclass(frozen=True)
class RelayPeer:
    name: str
    requirement: str
    command: tuple[str, ...]

    def build_command(self, folder: Path, engine: str, port: int, metrics_port: int) -> list[str]:
        program, *words = self.command
        words += ["--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine]
        words += ["--prometheus-port", str(metrics_port)]
        return [str(folder / self.name / "bin" / program), *words]


_QUIET = ("--policy", "round_robin", "--log-level", "error")
PEERS = (
    RelayPeer("vllm-router", "vllm-router==0.1.17", ("vllm-router", *_QUIET)),
    RelayPeer("smg", "smg==1.13.0", ("smg", "launch", *_QUIET)),
)


def install_peers(folder: Path, say: Callable[[str], None]) -> None:
    """Those that are not there yet."""
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
