"""Runs inside the engine's process, around vLLM's own main: `leash.py LAUNCHER_PID MODULE ARGS…`.

A program, never imported. Two things only the engine's own process can do:
- die with the launcher. SIGTERM, not SIGKILL: vLLM then ends its core and workers, which would
  survive it otherwise.
- say how its children ended. vLLM exits 0 when its core is killed, and Linux tells the signal to
  the parent alone.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    launcher, module = int(sys.argv[1]), sys.argv[2]
    die_with(launcher)
    report_children()
    # A hung engine is ended by SIGABRT, for the stacks; nobody wants its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    sys.argv = [module, *sys.argv[3:]]
    # alter_sys: multiprocessing finds `__main__` by its module name, as after `python -m`.
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def die_with(launcher: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died before we asked
        sys.exit("the launcher is gone")


def report_children() -> None:
    wait = os.waitpid

    def waitpid(pid: int, options: int) -> tuple[int, int]:
        child, status = wait(pid, options)
        if child and os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            print(f"leash: child {child} was killed by {name}", file=sys.stderr, flush=True)  # noqa: T201
        return child, status

    os.waitpid = waitpid


if __name__ == "__main__":
    main()
