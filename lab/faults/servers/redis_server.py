"""A real Redis: a process of its own that can be killed, frozen, made read-only and had back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from common.ports import find_free_ports
from lab.failures import LabFailure

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
        while not self._ask(b"PING").startswith(b"+PONG"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabFailure("redis-server does not start")
            time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def freeze(self) -> None:
        """It takes connections still, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def refuse_writes(self) -> None:
        """As a replica whose master is elsewhere."""
        self._ask(b"REPLICAOF 127.0.0.1 1")

    def take_writes(self) -> None:
        self._ask(b"REPLICAOF NO ONE")

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            raise LabFailure("redis-server is not running")
        os.kill(self._process.pid, number)

    def _ask(self, command: bytes) -> bytes:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as one:
            one.sendall(command + b"\r\n")
            return one.recv(64)
        return b""
