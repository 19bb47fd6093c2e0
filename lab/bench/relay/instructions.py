"""How many instructions a request takes, in the gateway and in a plain relay.

    python -m lab.bench.relay.instructions [chat | stream | predict]

They are the same each time to a hundredth, however busy the machine is; what the kernel does for
them is not among them. Needs valgrind. Every answer is checked.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import uvloop

from common.ports import find_free_ports
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.peers import GATEWAY_FLAGS
from lab.bench.relay.relay_arms import is_answering, start_program
from lab.bench.relay.relay_comparison import KINDS, measure_rate

_START_TIMEOUT_S = 300.0  # it runs at a fiftieth of its speed
_WARM_UP_S, _SECONDS = 5.0, 15.0
_TOTAL = re.compile(r"^(?:summary|totals): (\d+)", re.MULTILINE)


class CountedProgram:
    """A relay that callgrind runs; at first it counts nothing."""

    def __init__(self, exits: ExitStack, module: str, port: int, *words: str) -> None:
        self._port, self._folder = port, Path(exits.enter_context(tempfile.TemporaryDirectory()))
        log = exits.enter_context((self._folder / "log").open("wb"))
        tool = (
            "--tool=callgrind",
            "--instr-atstart=no",
            f"--callgrind-out-file={self._folder}/out",
        )
        words = (*words, "--port", str(port))
        process = start_program(exits, log, 1, module, *words, under=("valgrind", *tool))
        self._pid = str(process.pid)

    def count(self, kind: str) -> float:
        """A request's."""
        if not uvloop.run(is_answering(self._port, [], _START_TIMEOUT_S)):
            raise BenchFailed("it did not start")
        self._ask(kind, _WARM_UP_S)
        self._control("--instr=on")
        self._ask(kind, 0.0)
        self._control("--zero")
        requests = self._ask(kind, _SECONDS)
        self._control("--dump")
        *_, last = sorted(self._folder.glob("out*"), key=lambda path: path.stat().st_mtime_ns)
        found = _TOTAL.search(last.read_text(encoding="utf-8", errors="replace"))
        if found is None:
            raise BenchFailed("callgrind told nothing")
        return int(found[1]) / requests

    def _ask(self, kind: str, seconds: float) -> int:
        return uvloop.run(measure_rate(self._port, seconds, *KINDS[kind]))[0]

    def _control(self, order: str) -> None:
        program = shutil.which("callgrind_control") or "callgrind_control"
        subprocess.run([program, order, self._pid], check=True, capture_output=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS, nargs="?", default="chat")
    kind = parser.parse_args().kind
    if shutil.which("valgrind") is None:
        print("it is valgrind that counts instructions: install it", file=sys.stderr)
        return 2
    engine, gateway, plain = find_free_ports(3)
    url, stand_in = f"http://127.0.0.1:{engine}", "lab.bench.relay.stand_in_engine"
    with ExitStack() as exits:
        log = exits.enter_context(Path("/dev/null").open("wb"))
        start_program(exits, log, 0, stand_in, "engine", "--port", str(engine))
        programs = {
            "gateway": ("gateway", gateway, ("--engines", url, *GATEWAY_FLAGS)),
            "plain relay": (stand_in, plain, ("plain", "--url", url)),
        }
        for name, (module, port, words) in programs.items():
            number = CountedProgram(exits, module, port, *words).count(kind)
            print(f"{name:12} {number:12,.0f} instructions a request", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
