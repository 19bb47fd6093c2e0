"""A real Redis for tests: a process of its own that can be killed, frozen and had back."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from common.ports import find_free_ports

_LONGEST_START_S = 30


class RedisServer:
    """Keeps nothing over its death: what a restart finds is empty."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        (self.port,) = find_free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._process = subprocess.Popen(
            [*command, "--dir", str(self._folder)], stdout=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _LONGEST_START_S
        while not self._answers():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def freeze(self) -> None:
        """It takes connections still, and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as one:
            one.sendall(b"PING\r\n")
            return one.recv(16).startswith(b"+PONG")
        return False


def find_redis() -> str:
    """Skips by name where there is none; where tests must not be skipped, fails."""
    program = shutil.which("redis-server")
    if program is None:
        reason = "no redis-server here; `scripts/system.sh redis` gets it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return program


@contextmanager
def run_redis(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(find_redis(), folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
