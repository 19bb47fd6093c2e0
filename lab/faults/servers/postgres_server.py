"""A real PostgreSQL, where its programs are: stopped, frozen, made read-only and had back."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from common.ports import find_free_ports
from common.processes import find_tree
from lab.failures import LabFailure

_USER = "postgres"  # PostgreSQL does not run as root
_LONGEST_START_S = 30


@dataclass
class Postgres:
    """A server of its own, with a new database for each who asks."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    databases: int = 0
    programs: Path = field(default_factory=lambda: find_postgres() or Path())

    def make_database(self) -> str:
        self.databases += 1
        name = f"batches_{self.databases}"
        self.ask(f"CREATE DATABASE {name}")
        return f"postgresql://{_USER}@127.0.0.1:{self.port}/{name}"

    def ask(self, statement: str, database: str = "postgres") -> str:
        address = ["-h", "127.0.0.1", "-p", str(self.port), "-U", _USER, "-d", database]
        command = [str(self.programs / "psql"), *address, "-qAtc", statement]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def initialise(self) -> None:
        """Its data, which belong to the user that it runs as."""
        user = _find_user()
        if user is not None:
            entry = pwd.getpwnam(user)
            os.chown(self.folder, entry.pw_uid, entry.pw_gid)
        words = ["-D", str(self.folder / "data"), "-U", _USER, "-A", "trust", "-N"]
        command = [str(self.programs / "initdb"), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=user)

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "fsync": "off"}
        options |= {"unix_socket_directories": self.folder, "max_connections": 50}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", *words],
            stderr=subprocess.DEVNULL,
            user=_find_user(),
        )
        deadline = time.monotonic() + _LONGEST_START_S
        address = ["-q", "-h", "127.0.0.1", "-p", str(self.port)]
        while subprocess.run([self.programs / "pg_isready", *address], check=False).returncode:
            if time.monotonic() > deadline:
                raise LabFailure("PostgreSQL does not start")
            time.sleep(0.02)

    def stop(self) -> None:
        """At once: whoever has a connection loses it."""
        process = self._get()
        process.send_signal(signal.SIGINT)
        process.wait(_LONGEST_START_S)

    def freeze(self) -> None:
        """With all that works for it: connections stand, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def refuse_writes(self) -> None:
        self._set_read_only("on")

    def take_writes(self) -> None:
        self._set_read_only("off")

    def _set_read_only(self, value: str) -> None:
        self.ask(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        self.ask("SELECT pg_reload_conf()")

    def _signal(self, number: signal.Signals) -> None:
        for pid in find_tree(self._get().pid):
            os.kill(pid, number)

    def _get(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise LabFailure("PostgreSQL is not running")
        return self.process


def find_postgres() -> Path | None:
    """The folder with its programs: Debian has them on no path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else folders[-1] if folders else None


@contextmanager
def run_postgres() -> Iterator[Postgres]:
    """Where another user may look, as in a folder of one user it may not."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = Postgres(folder, find_free_ports(1)[0])
    try:
        server.initialise()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find_user() -> str | None:
    return _USER if os.geteuid() == 0 else None
