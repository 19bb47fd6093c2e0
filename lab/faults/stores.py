"""What the service keeps things in, as far as this machine has it: disks, Redis, PostgreSQL.

Each is there only if a chosen fault needs it, and says so if this machine lacks it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Collection, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from gateway.admission.keys import make_key
from lab.faults.servers.link import Link
from lab.faults.servers.postgres_server import Postgres, find_postgres, run_postgres
from lab.faults.servers.redis_server import RedisServer

REDIS, POSTGRES, DISK, GPU_TOOL = "redis", "postgres", "disk", "gpu-tool"
_DISK_MIB = 24
_NOT_OURS = "the service was given by its address: what it keeps things in is not ours to hurt"
_PROGRAMS = {
    name: f"no {name} here; your distribution's package has it" for name in ("strace", "openssl")
}


class Disk:
    """Small, in memory, and of nobody else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def mount(self) -> None:
        self.folder.mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={_DISK_MIB}m", "tmpfs", str(self.folder))

    def unmount(self) -> None:
        _run("umount", "--lazy", str(self.folder))

    def fill(self) -> None:
        """To its last byte."""
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"\0" * 2**12):
                pass

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def refuse_writes(self) -> bool:
        """Not while somebody has a file open for writing."""
        return _try("mount", "-o", "remount,ro", str(self.folder)) == ""

    def take_writes(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.folder))


class GpuTool:
    """A stand-in for nvidia-smi: it finds no GPU, and hangs when it is told to."""

    def __init__(self, folder: Path, *, is_used: bool) -> None:
        self.folder, self.is_used = folder, is_used
        self._flag = folder / "hangs"

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        program = self.folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n[ -e {self._flag} ] && exec sleep 600\nexit 9\n")
        program.chmod(0o755)

    def hang(self) -> None:
        self._flag.touch()

    def answer(self) -> None:
        self._flag.unlink(missing_ok=True)


class Stores:
    """While entered; `environment` is what the service is told of them."""

    def __init__(self, folder: Path, needs: Collection[str]) -> None:
        self._folder, self._needs = folder, needs
        self._exits = AsyncExitStack()
        self._missing: dict[str, str] = {}
        self.key, self._entry = make_key("faults")
        self.redis: RedisServer | None = None
        self.redis_link: Link | None = None
        self.postgres: Postgres | None = None
        self.postgres_link: Link | None = None
        self.batch_disk: Disk | None = None
        self.state_disk: Disk | None = None
        self.gpu_tool = GpuTool(folder / "bin", is_used=GPU_TOOL in needs)
        self._database = ""

    async def __aenter__(self) -> Stores:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self.gpu_tool.is_used:
            self.gpu_tool.write()
        limits = "requests_per_minute = 1000000\n"
        (self._folder / "keys.toml").write_text(self._entry + limits, encoding="utf-8")
        if REDIS in self._needs:
            await self._start_redis()
        if POSTGRES in self._needs:
            await self._start_postgres()
        if DISK in self._needs:
            self._mount_disks()
        for name, advice in _PROGRAMS.items():
            if name in self._needs and shutil.which(name) is None:
                self._missing[name] = advice
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    def key_environment(self) -> dict[str, str]:
        """Of a gateway that keeps nothing."""
        return {"GATEWAY_KEYS_FILE": str(self._folder / "keys.toml")}

    def environment(self) -> dict[str, str]:
        batches = self.batch_disk.folder if self.batch_disk else self._folder
        told = {"GATEWAY_BATCH_FOLDER": str(batches / "batches"), "GATEWAY_BATCH_LEASE_S": "3"}
        if self.gpu_tool.is_used:
            told["PATH"] = f"{self.gpu_tool.folder}:{os.environ['PATH']}"
        if self.state_disk:
            told["LAUNCHER_STATE_DIR"] = str(self.state_disk.folder / "state")
        if self.redis_link:
            told["GATEWAY_REDIS_URL"] = f"redis://127.0.0.1:{self.redis_link.port}/0"
        if self._database:
            told |= dict.fromkeys(
                ("GATEWAY_BATCH_DATABASE", "GATEWAY_USAGE_DATABASE"), self._database
            )
        return {**self.key_environment(), **told}

    def find_missing(self, needs: Sequence[str]) -> str:
        return "; ".join(self._missing[one] for one in needs if one in self._missing)

    async def _start_redis(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            self._missing[REDIS] = "no redis-server here; `scripts/system.sh redis` gets it"
            return
        self.redis = RedisServer(program, self._folder)
        self.redis.start()
        self._exits.callback(self.redis.kill)
        self.redis_link = await self._exits.enter_async_context(Link(self.redis.port).serve())

    async def _start_postgres(self) -> None:
        if find_postgres() is None:
            self._missing[POSTGRES] = "no PostgreSQL here; `scripts/system.sh postgres` gets it"
            return
        self.postgres = self._exits.enter_context(run_postgres())
        self.postgres_link = await self._exits.enter_async_context(Link(self.postgres.port).serve())
        direct = self.postgres.make_database()
        self._database = direct.replace(f":{self.postgres.port}/", f":{self.postgres_link.port}/")

    def _mount_disks(self) -> None:
        if os.geteuid() != 0:
            self._missing[DISK] = "only root may mount a small disk"
            return
        batch, state = (Disk(self._folder / name) for name in ("batch-disk", "state-disk"))
        for disk in (batch, state):
            try:
                disk.mount()
            except subprocess.CalledProcessError as error:
                self._missing[DISK] = f"no disk may be mounted here: {error.stderr.strip()}"
                return
            self._exits.callback(disk.unmount)
        self.batch_disk, self.state_disk = batch, state


class OthersStores(Stores):
    """Of a service that was given by its address: what it keeps is not ours to hurt."""

    def __init__(self, folder: Path, needs: Collection[str], key: str) -> None:
        super().__init__(folder, [one for one in needs if one != GPU_TOOL])
        self.key = key

    def key_environment(self) -> dict[str, str]:
        return {"GATEWAY_API_KEYS": self.key} if self.key else {}

    async def _start_redis(self) -> None:
        self._missing[REDIS] = _NOT_OURS

    async def _start_postgres(self) -> None:
        self._missing[POSTGRES] = _NOT_OURS

    def _mount_disks(self) -> None:
        self._missing[DISK] = _NOT_OURS


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _try(*command: str) -> str:
    """What went wrong; nothing, if nothing did."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip() or str(done.returncode)
