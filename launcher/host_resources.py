"""What a launcher needs for itself on its host: ports that are free, folders that it can write,
GPUs that no other launcher has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

import structlog

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.errors import NoFreeGpu

log = structlog.get_logger("launcher")
S = TypeVar("S", bound=LauncherSettings)

_NODE_ADDRESS = "LAUNCHER_NODE_ADDRESS"


@dataclass(frozen=True)
class Listener:
    """An address that something of ours will listen on, and the setting that moves it."""

    host: str
    port: int
    setting: str
    elsewhere: str = ""  # the setting of its address, where that is not called as the port's is

    def ensure_free(self) -> None:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                is_used = error.errno == errno.EADDRINUSE
                named = self.setting.replace("PORT", "HOST").replace("port", "host")
                elsewhere = self.elsewhere or named
                other = "stop what uses it" if is_used else f"set {elsewhere}"
                raise SettingsError(
                    f"cannot listen on {self.host}:{self.port} ({error.strerror}); "
                    f"{other} or set {self.setting}"
                ) from None


def list_listeners(engines: Sequence[LauncherSettings], *, with_gateway: bool) -> list[Listener]:
    """Refuses one port for two of them: the later one would fail when all the others run."""
    settings, *others = engines
    listeners = [Listener(settings.engine_host, settings.engine_port, "LAUNCHER_ENGINE_PORT")]
    for number, engine in enumerate(others, start=2):
        name = f"engine_port of [[engine]] {number}"
        listeners.append(Listener(engine.engine_host, engine.engine_port, name))
    if with_gateway:
        listeners.append(Listener(settings.host, settings.port, "LAUNCHER_PORT"))
    if settings.status_port_used:
        host = settings.status_host
        status = Listener(host, settings.status_port_used, "LAUNCHER_STATUS_PORT")
        listeners.append(status)
    if settings.nodes > 1 and settings.nodes_backend == "mp":
        names = ("LAUNCHER_NODE_PORT", "LAUNCHER_NODE_PORT (+1)", "LAUNCHER_NODE_PORT (+2)")
        listeners += [
            Listener(settings.node_address_used, settings.node_port + step, name, _NODE_ADDRESS)
            for step, name in enumerate(names)
        ]
    for one, other in itertools.combinations(listeners, 2):
        if one.port == other.port:
            raise SettingsError(
                f"{one.setting} and {other.setting} are both {one.port}: "
                "each needs a port of its own"
            )
    return listeners


def make_folder(path: Path, setting: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot make {path} ({error.strerror}); set {setting}") from None


@contextlib.contextmanager
def hold_state(folder: Path) -> Iterator[None]:
    """Two launchers with one state folder would end each other's engines."""
    lock = _take_lock(folder / "lock", "LAUNCHER_STATE_DIR")
    if lock is None:
        raise SettingsError(
            f"another launcher runs with {folder}; stop it or set LAUNCHER_ENGINE_PORT"
        )
    with lock:
        yield


@contextlib.contextmanager
def hold_gpus(
    settings: S, find_places: Callable[[S], tuple[str, Iterable[str], int]]
) -> Iterator[S]:
    """Where launchers share a host, the first GPUs that none of them has, as many as the engine
    needs. On a CPU there is nothing to agree on but folders of its own.
    """
    folder, taken = settings.gpu_locks, list[str]()
    if folder is None:
        yield settings
        return
    with contextlib.ExitStack() as held:
        # One launcher at a time: two that need two GPUs would end with one each, and both would
        # fetch the model.
        with _wait_for_lock(folder / "lock"):
            kind, numbers, needed = find_places(settings)
            for number in numbers:
                if lock := _take_lock(folder / f"{kind}-{number}"):
                    held.enter_context(lock)
                    taken.append(number)
                if len(taken) == needed:
                    break
        if len(taken) < needed:
            raise NoFreeGpu(
                f"no free GPU: the engine needs {needed}, and {len(taken)} of those that it may "
                f"have are no other launcher's ({folder}); start fewer engines"
            )
        yield settings.put_at(kind, taken)


def _wait_for_lock(path: Path) -> IO[str]:
    lock = _take_lock(path)
    if lock is None:
        log.info("launcher_waiting", why="another launcher of this host looks for its GPUs")
        lock = path.open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def _take_lock(path: Path, setting: str = "LAUNCHER_GPU_LOCKS") -> IO[str] | None:
    """None where another process has it; else it is held until the file is closed, by the kernel
    where this process is killed.
    """
    make_folder(path.parent, setting)
    with contextlib.ExitStack() as unless_taken:
        try:
            lock = unless_taken.enter_context(path.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:  # some file systems have no locks
            reason = f"cannot lock {path} ({error.strerror})"
            raise SettingsError(f"{reason}; set {setting}") from None
        unless_taken.pop_all()
    return lock
