"""Where a request's CPU time goes in the gateway, by stage.

    python -m lab.bench.relay.stages [chat | stream | predict] [--rounds N]

Two gateways before an engine's stand-in, in turns: one with probes (`stage_clock.py`), one without
as the control, which tells how far they disturb. 64 callers at once, one of /predict; every answer
is checked.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from common.ports import find_free_ports
from common.processes import read_cpu_s
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.peers import GATEWAY_FLAGS
from lab.bench.relay.relay_arms import is_answering, start_program
from lab.bench.relay.relay_comparison import KINDS, measure_rate
from lab.bench.relay.stage_clock import STAGES, map_sums

SECONDS = 1.0
_WORTH_A_LINE = 0.0005


@dataclass(frozen=True)
class Gateways:
    """Ports and process ids by arm, and what the probes have summed up."""

    ports: Mapping[str, int]
    pids: Mapping[str, int]
    sums: memoryview


async def take_turns(gateways: Gateways, kind: str, rounds: int) -> dict[str, list[float]]:
    """Microseconds of CPU a request: by stage, and of the control as a whole."""
    taken: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for arm, port in random.sample(list(gateways.ports.items()), len(gateways.ports)):
            before, cpu_s = list(gateways.sums), read_cpu_s(gateways.pids[arm])
            count, _ = await measure_rate(port, SECONDS, *KINDS[kind])
            values = {arm: (read_cpu_s(gateways.pids[arm]) - cpu_s) * 1e6 / count}
            if arm == "probed":
                sums = zip(STAGES, before, gateways.sums, strict=True)
                values |= {stage: (now - then) / 1e3 / count for stage, then, now in sums}
            for name, value in values.items() if number else ():  # the first round warms up
                taken.setdefault(name, []).append(value)
    return taken


def start_gateways(exits: ExitStack) -> Gateways:
    folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
    log = exits.enter_context((folder / "log").open("wb"))
    path = folder / "sums"
    path.touch()
    engine, probed, control = find_free_ports(3)
    words = ("lab.bench.relay.stand_in_engine", "engine", "--port", str(engine))
    start_program(exits, log, 0, *words)
    flags = (*GATEWAY_FLAGS, "--engines", f"http://127.0.0.1:{engine}", "--port")
    own = ("lab.bench.relay.stage_clock", str(path), *flags, str(probed))
    arms = {
        "probed": start_program(exits, log, 1, *own).pid,
        "control": start_program(exits, log, 1, "gateway", *flags, str(control)).pid,
    }
    return Gateways({"probed": probed, "control": control}, arms, map_sums(path))


def describe(taken: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """A table in Markdown: medians over the rounds."""
    medians = {name: statistics.median(values) for name, values in taken.items()}
    total_us = sum(medians[name] for name in STAGES)
    yield "| stage | us of CPU | share |"
    yield "|---|---:|---:|"
    for name in STAGES:
        if medians[name] > total_us * _WORTH_A_LINE:
            yield f"| {name} | {medians[name]:,.1f} | {medians[name] / total_us:.1%} |"
    yield f"| all, the probes' own taken off | {total_us:,.1f} | |"
    yield f"| a gateway without probes | {medians['control']:,.1f} | |"


async def run(gateways: Gateways, kind: str, rounds: int) -> None:
    for port in gateways.ports.values():
        if not await is_answering(port, []):
            raise BenchFailed("a gateway did not start")
    for line in describe(await take_turns(gateways, kind, rounds)):
        print(line)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=KINDS, nargs="?", default="chat")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    arguments = parser.parse_args()
    with ExitStack() as exits:
        uvloop.run(run(start_gateways(exits), arguments.kind, arguments.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
