"""Runs in a child of its starter, around its main; it dies with the starter.

Usage: `parent_death.py STARTER_PID KILL_S USERS MODULE ARGS…`. USERS is a pipe that those who need
the program hold open for writing, by its number here, or `-`.

A program, never imported. It stands on Python's own library alone, and has a walk of /proc of its
own: it runs with -P before anything else, so that nothing of this project can hide a package. The
launcher starts engine and gateway so; grader and benchmark start the launcher so. Two things only
the child's own process can do:
- die with its starter. SIGTERM first: vLLM then ends its core and workers, which would survive it
  otherwise, and the gateway lets its requests finish. While it loads vLLM does not listen to that,
  so a watcher in the same session sends SIGKILL to all of it, KILL_S seconds later. An engine whose
  gateway still finishes its requests is left alone until that has ended, for KILL_S at most.
- say how its children ended. vLLM exits 0 when its core is killed, and Linux tells the signal to
  the parent alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import resource
import runpy
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_POLL_S = 0.1
_FORCED_PATIENCE_S = 30.0


def main() -> None:
    starter, kill_s, module = int(sys.argv[1]), float(sys.argv[2]), sys.argv[4]
    users = -1 if sys.argv[3] == "-" else int(sys.argv[3])
    die_with(starter, kill_s, users)
    report_children()
    # A hung engine is ended by SIGABRT, for the stacks; nobody wants its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.argv = [module, *sys.argv[5:]]
    # Started with -P, so that nothing here hides a package; a checkout's own are found last.
    sys.path.append(str(Path(__file__).parents[2]))
    import_without_collecting(module)
    # alter_sys: multiprocessing finds `__main__` by its module name, as after `python -m`.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def import_without_collecting(name: str) -> None:
    """All that the program imports, before it runs: looking for garbage among vLLM's modules, which
    are none, took a quarter of the seven seconds that their import takes.
    """
    gc.disable()
    try:
        module = importlib.import_module(name)
    finally:
        gc.enable()
    if not hasattr(module, "__path__"):  # or runpy would warn that it is there already
        del sys.modules[name]


def die_with(starter: int, kill_s: float, users: int) -> None:
    if sys.platform != "linux":
        return
    death = -1
    with contextlib.suppress(OSError):  # a sandbox without pidfd leaves the signal alone
        death = os.pidfd_open(starter)
    # Never another's session: started by hand, this one would be the terminal's.
    is_watched = death >= 0 and os.getsid(0) == os.getpid()
    if users < 0 or not is_watched:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != starter:  # it died before we asked
        sys.exit("parent_death: the starter is gone")
    if is_watched:
        start_watcher(death, kill_s, users)
    for fd in (death, users):
        if fd >= 0:
            os.close(fd)


def start_watcher(death: int, kill_s: float, users: int) -> None:
    """Forked twice: no child of the program's, which may wait for or end all of its own."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        watch(death, kill_s, users)
    finally:
        os._exit(0)


def watch(death: int, kill_s: float, users: int) -> None:
    """The starter ends it with the rest of the session; without one it ends the session."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"parent_death")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # who reads the program's output waits for its last holder
        os.dup2(nothing, fd)
    select.select([death], [], [])
    if users >= 0:
        select.select([users], [], [], kill_s)  # until nobody holds the pipe any more
        with contextlib.suppress(ProcessLookupError):
            os.kill(os.getsid(0), signal.SIGTERM)
    gone = time.monotonic()
    was_empty = False  # twice: what is forked during a look, by one that ends, is seen by the next
    while (others := list_others()) or not was_empty:
        was_empty = not others
        if time.monotonic() > gone + kill_s + _FORCED_PATIENCE_S:
            return
        if time.monotonic() > gone + kill_s:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)


def list_others() -> list[int]:
    """Everything in this session but ourselves."""
    own, session, others = os.getpid(), os.getsid(0), []
    for pid in [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]:
        with contextlib.suppress(ProcessLookupError):
            if pid != own and os.getsid(pid) == session:
                others.append(pid)
    return others


def report_children() -> None:
    wait = os.waitpid

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        child, status = wait(pid, options)
        if child and os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(2, f"parent_death: child {child} was killed by {name}\n".encode())
        return child, status

    os.waitpid = waitpid


if __name__ == "__main__":
    main()
