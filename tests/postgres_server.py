"""A real PostgreSQL on a port of the loopback, where its programs are."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.ports import find_free_ports

_USER = "postgres"  # PostgreSQL does not run as root


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

    def start(self) -> None:
        options = {"listen_addresses": "127.0.0.1", "port": self.port, "fsync": "off"}
        options |= {"unix_socket_directories": self.folder, "max_connections": 50}
        words = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", *words],
            stderr=subprocess.DEVNULL,
            user=_find_user(),
        )
        deadline = time.monotonic() + 30
        probe: list[str | Path] = [
            self.programs / "pg_isready",
            "-q",
            "-h",
            "127.0.0.1",
            "-p",
            str(self.port),
        ]
        while subprocess.run(probe, check=False).returncode != 0:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.02)

    def stop(self) -> None:
        """At once: whoever has a connection loses it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def find_postgres() -> Path | None:
    """The folder with its programs: Debian has them on no path."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else folders[-1] if folders else None


def _find_user() -> str | None:
    return _USER if os.geteuid() == 0 else None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    if find_postgres() is None:
        message = "PostgreSQL is not here (scripts/system.sh postgres)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    # Not below pytest's own folders, into which no other user may look.
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = Postgres(folder, find_free_ports(1)[0])
    try:
        if (user := _find_user()) is not None:
            entry = pwd.getpwnam(user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        subprocess.run(
            [server.programs / "initdb", "-D", folder / "data", "-U", _USER, "-A", "trust", "-N"],
            check=True,
            stdout=subprocess.DEVNULL,
            user=user,
        )
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
