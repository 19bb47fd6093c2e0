"""Runs in a child of its starter, around its main; it dies with the starter.

Usage: `parent_death.py STARTER_PID KILL_S MODULE ARGS…`.

A program, never imported. It stands on Python's own library alone, and has a walk of /proc of its
own: it runs with -P before anything else, so that nothing of this project can hide a package. The
launcher starts engine and gateway so; grader and benchmark start the launcher so. Two things only
the child's own process can do:
- die with its starter. SIGTERM first: vLLM then ends its core and workers, which would survive it
  otherwise, and the gateway lets its requests finish. While it loads vLLM does not listen to that,
  so a watcher in the same session sends SIGKILL to all of it, KILL_S seconds later.
- say how its children ended. vLLM exits 0 when its core is killed, and Linux tells the signal to
  the parent alone.
"""

from __future__ import annotations

import contextlib
import ctypes
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
    starter, kill_s, module = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
    die_with(starter, kill_s)
    report_children()
    # A hung engine is ended by SIGABRT, for the stacks; nobody wants its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.argv = [module, *sys.argv[4:]]
    # Started with -P, so that nothing here hides a package; a checkout's own are found last.
    sys.path.append(str(Path(__file__).parents[2]))
    # alter_sys: multiprocessing finds `__main__` by its module name, as after `python -m`.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_with(starter: int, kill_s: float) -> None:
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    death = -1
    with contextlib.suppress(OSError):  # a sandbox without pidfd leaves the signal alone
        death = os.pidfd_open(starter)
    if os.getppid() != starter:  # it died before we asked
        sys.exit("parent_death: the starter is gone")
    if death >= 0:
        # Never another's session: started by hand, this one would be the terminal's.
        if os.getsid(0) == os.getpid():
            start_watcher(death, kill_s)
        os.close(death)


def start_watcher(death: int, kill_s: float) -> None:
    """Forked twice: no child of the program's, which may wait for or end all of its own."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        watch(death, kill_s)
    finally:
        os._exit(0)


def watch(death: int, kill_s: float) -> None:
    """The starter ends it with the rest of the session; without one it ends the session."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"parent_death")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # who reads the program's output waits for its last holder
        os.dup2(nothing, fd)
    select.select([death], [], [])
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
            print(f"parent_death: child {child} was killed by {name}", file=sys.stderr, flush=True)  # noqa: T201
        return child, status

    os.waitpid = waitpid


if __name__ == "__main__":
    main()
