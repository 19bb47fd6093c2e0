"""A soak: mixed traffic and chosen faults against a running gateway, every answer checked.

Each request asks for something that only it has asked for (a number, or a question whose answer the
model knows by heart), and must get just that back: a gateway that gives one client another's answer
can be fast and quiet. At the end the gateway's own counters must add up to what was sent.

Exit codes: 0 all held, 1 something did not, 2 bad options or no gateway, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

import aiohttp

from common.questions import QuestionPair, read_questions
from lab import options
from lab.load.process_faults import FAULTS
from lab.load.soak import Soak
from lab.records.record import RecordFigure, RunRecord, take_facts, write_record
from lab.reports.output_files import ensure_writable

_CALL_TIMEOUT_S = 180.0
_OUTCOMES = ("good", "lost to a fault", "failed", "wrong")


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    pairs = read_questions(Path(arguments.questions)).pairs
    if arguments.record:
        ensure_writable(Path(arguments.record))
    return asyncio.run(run_load(arguments, list(pairs)))


async def run_load(arguments: argparse.Namespace, pairs: list[QuestionPair]) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    headers = options.build_headers(arguments.api_key)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        soak = Soak(arguments, session)
        await soak.run(pairs)
    print("\n".join(describe_soak(soak)))
    if arguments.record:
        about = f"{arguments.callers} callers, {arguments.duration:g} s"
        about += f", faults: {', '.join(arguments.fault)}" if arguments.fault else ", no faults"
        facts = take_facts(arguments.machine, arguments.api_key)
        figures = tuple(build_figures(soak))
        record = RunRecord(arguments.name, figures=figures, about=about, **facts)
        write_record(record, Path(arguments.record))
    return 1 if soak.problems else 0


def build_figures(soak: Soak) -> list[RecordFigure]:
    tally, growth = soak.tally, soak.find_growth_mb()
    figures = [
        RecordFigure("requests", sum(tally.outcomes.values())),
        RecordFigure("wrong answers", tally.count("wrong")),
        RecordFigure("failed without a fault", tally.count("failed")),
        RecordFigure("lost to a fault", tally.count("lost to a fault")),
        RecordFigure("callers who hung up", sum(tally.hung_up.values())),
        RecordFigure("sums that did not add up", len(soak.problems)),
    ]
    if growth is not None:
        last = soak.samples[-1]
        figures += [
            RecordFigure("gateway's memory at the end", round(last.memory_mb, 1), "MB"),
            RecordFigure("gateway's growth", round(growth, 1), "MB"),
            RecordFigure("open sockets at the end", last.sockets),
        ]
    recoveries = ((f"recovery from {name}", round(took_s, 1)) for name, took_s in soak.recoveries)
    return [*figures, *(RecordFigure(*one, "s") for one in recoveries)]


def describe_soak(soak: Soak) -> list[str]:
    outcomes = soak.tally.outcomes
    lines = ["", f"{'':24}" + "".join(f"{outcome:>17}" for outcome in _OUTCOMES)]
    lines += [
        f"{kind:24}" + "".join(f"{outcomes[kind, one]:17}" for one in _OUTCOMES)
        for kind in sorted({kind for kind, _ in outcomes})
    ]
    lines.append("")
    lines += [f"{one.name:32}{one.value:>12g} {one.unit}" for one in build_figures(soak)]
    lines += [f"  {example}" for example in soak.tally.examples]
    lines += [f"NOT HELD  {problem}" for problem in soak.problems]
    return [*lines, f"{len(soak.problems)} did not hold" if soak.problems else "all held"]


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("load", __doc__)
    options.add_service(parser, "load", ["--url", "--server-url"])
    add = parser.add_argument
    add("--duration", type=options.seconds, default=600.0, metavar="S", help="default: 600")
    callers = options.whole_number(1)
    add("--callers", type=callers, default=12, metavar="N", help="clients at once (default: 12)")
    help_ = "one after another, repeatable; stop-core needs LAUNCHER_HANG_TIMEOUT_S"
    add("--fault", action="append", choices=sorted(FAULTS), default=[], help=help_)
    add("--fault-pause", type=options.seconds, default=20.0, metavar="S", help="before each")
    add("--recovery-limit", type=options.seconds, default=180.0, metavar="S", help="for each")
    options.add_questions(parser)
    add("--seed", type=int, default=1, help="of what is asked when")
    add("--name", default="soak", help="of the record")
    options.add_record(parser, "--json")
    arguments = options.parse_options(parser, words)
    arguments.url = arguments.url or f"http://127.0.0.1:{options.GATEWAY_PORT}"
    arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    return arguments
