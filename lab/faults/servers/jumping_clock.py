"""Runs a program whose wall clock jumps: `python -m … FILE MODULE ARGS…`.

The file has the seconds by which Python's wall clock differs from the host's; a host's own clock is
everybody's. Clocks that only count on are left alone, as a jump leaves them.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path

_NS = 1_000_000_000


def main() -> None:
    path, module = Path(sys.argv[1]), sys.argv[2]
    host_time, host_time_ns = time.time, time.time_ns
    time.time = lambda: host_time() + read_jump_s(path)
    time.time_ns = lambda: host_time_ns() + int(read_jump_s(path) * _NS)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def read_jump_s(path: Path) -> float:
    return float(path.read_text(encoding="ascii"))


if __name__ == "__main__":
    main()
