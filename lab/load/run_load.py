"""A soak: mixed traffic and chosen faults against a running gateway, every answer checked.

Each request asks for something that only it has asked for (a number, or a question whose answer the
model knows by heart), and must get just that back: a gateway that gives one client another's answer
can be fast and quiet. At the end the gateway's own counters must add up to what was sent, and what
gateway and launcher hold (memory, files, sockets, threads, tasks) must not surely grow with time.
With --slices a run of hours is made of several, which count together:

    python -m lab load --duration 3600 --fault kill-core --fault pause-core --fault-pause 300 \\
        --endless --slices docs/soak.json --record docs/results/soak-demo.json

Exit codes: 0 all held, 1 something did not, 2 bad options or no gateway, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import aiohttp

from common.questions import QuestionPair, read_questions
from lab import options
from lab.intervals import Slope
from lab.load.process_faults import FAULTS
from lab.load.soak import Soak
from lab.load.soak_slices import SoakSlice, fit_slopes, read_slices, write_slices
from lab.records.record import RecordFigure, RunRecord, take_facts, write_record
from lab.reports.output_files import ensure_writable

_CALL_TIMEOUT_S = 180.0
_OURS = ("gateway", "launcher")
_MOST_MB_AN_HOUR = 8.0
_MOST_AN_HOUR = 4.0  # files, sockets, threads, tasks
_FEWEST_JUDGED = 30  # minutes; an interval over fewer says too little of hours
_OUTCOMES = ("good", "lost to a fault", "failed", "wrong")


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    pairs = read_questions(Path(arguments.questions)).pairs
    for path in filter(None, (arguments.record, arguments.slices)):
        ensure_writable(Path(path))
    earlier = read_slices(Path(arguments.slices)) if arguments.slices else []
    return asyncio.run(run_load(arguments, list(pairs), earlier))


async def run_load(
    arguments: argparse.Namespace, pairs: list[QuestionPair], earlier: Sequence[SoakSlice] = ()
) -> int:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    headers = options.build_headers(arguments.api_key)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:
        soak = Soak(arguments, session)
        await soak.run(pairs)
    slices = [*earlier, build_slice(soak)]
    print("\n".join(describe_soak(soak, slices)))
    if arguments.slices:
        write_slices(slices, Path(arguments.slices))
    if arguments.record:
        about = f"{arguments.callers} callers, {sum(one.seconds for one in slices):g} s"
        about += f" in {len(slices)} slices" if len(slices) > 1 else ""
        about += f", faults: {', '.join(arguments.fault)}" if arguments.fault else ", no faults"
        facts = take_facts(arguments.machine, arguments.api_key)
        figures = tuple(build_figures(soak, slices))
        record = RunRecord(arguments.name, figures=figures, about=about, **facts)
        write_record(record, Path(arguments.record))
    return 1 if find_problems(slices) else 0


def build_slice(soak: Soak) -> SoakSlice:
    facts = take_facts()
    return SoakSlice(
        date=facts["date"],
        commit=facts["commit"],
        seconds=round(soak.lasted_s),
        outcomes={f"{kind}: {outcome}": n for (kind, outcome), n in soak.tally.outcomes.items()},
        hung_up=sum(soak.tally.hung_up.values()),
        recoveries=[(name, round(took_s, 1)) for name, took_s in soak.recoveries],
        problems=list(soak.problems),
        lives=soak.held.list_lives(),
    )


def find_problems(slices: Sequence[SoakSlice]) -> list[str]:
    """What did not hold in any slice, the earlier ones named, and what grows over all of them. Only
    the former is kept with the slices: growth is judged anew with each that is added.
    """
    *earlier, own = slices
    problems = [f"{one.date}: {problem}" for one in earlier for problem in one.problems]
    return [*problems, *own.problems, *find_growing(fit_slopes(slices))]


def find_growing(slopes: Mapping[str, Slope]) -> Iterator[str]:
    """What surely grows, and by more than a service of weeks can bear; not over few minutes."""
    for measure, slope in slopes.items():
        program, _, what = measure.partition(": ")
        most = _MOST_MB_AN_HOUR if what == "memory_mb" else _MOST_AN_HOUR
        if program in _OURS and slope.points >= _FEWEST_JUDGED and slope.low > most:
            yield f"{measure} grows by {slope.value:.1f} an hour, surely by {slope.low:.1f}"


def build_figures(soak: Soak, slices: Sequence[SoakSlice]) -> list[RecordFigure]:
    growth = soak.find_growth_mb()
    figures = [
        RecordFigure("hours", round(sum(one.seconds for one in slices) / 3600, 2)),
        RecordFigure("requests", sum(sum(one.outcomes.values()) for one in slices)),
        RecordFigure("wrong answers", count(slices, "wrong")),
        RecordFigure("failed without a fault", count(slices, "failed")),
        RecordFigure("lost to a fault", count(slices, "lost to a fault")),
        RecordFigure("callers who hung up", sum(one.hung_up for one in slices)),
        RecordFigure("sums that did not add up", len(find_problems(slices))),
    ]
    if growth is not None:
        last = soak.samples[-1]
        figures += [
            RecordFigure("gateway's memory at the end", round(last.memory_mb, 1), "MB"),
            RecordFigure("gateway's growth", round(growth, 1), "MB"),
            RecordFigure("open sockets at the end", last.sockets),
        ]
    for measure, slope in fit_slopes(slices).items():
        unit = "MB/h" if measure.endswith("memory_mb") else "/h"
        values = (round(one, 2) for one in (slope.value, slope.low, slope.high))
        name = f"growth of {measure.replace('memory_mb', 'memory')}"
        value, low, high = values
        note = f"{slope.points} minutes"
        note += ", too few to judge" if slope.points < _FEWEST_JUDGED else ""
        figures.append(RecordFigure(name, value, unit, low, high, note))
    recoveries: defaultdict[str, list[float]] = defaultdict(list)
    for name, took_s in (one for part in slices for one in part.recoveries):
        recoveries[name].append(took_s)
    figures += [
        RecordFigure(
            f"recovery from {name}",
            round(statistics.median(times), 1),
            "s",
            *(min(times), max(times)),
            f"{len(times)} times",
        )
        for name, times in recoveries.items()
    ]
    return figures


def count(slices: Sequence[SoakSlice], outcome: str) -> int:
    return sum(
        number
        for one in slices
        for name, number in one.outcomes.items()
        if name.endswith(f": {outcome}")
    )


def describe_soak(soak: Soak, slices: Sequence[SoakSlice]) -> list[str]:
    outcomes = soak.tally.outcomes
    lines = ["", f"{'':24}" + "".join(f"{outcome:>17}" for outcome in _OUTCOMES)]
    lines += [
        f"{kind:24}" + "".join(f"{outcomes[kind, one]:17}" for one in _OUTCOMES)
        for kind in sorted({kind for kind, _ in outcomes})
    ]
    lines.append("")
    for one in build_figures(soak, slices):
        about = "" if one.low is None else f"  ({one.low:g} to {one.high:g}, {one.note})"
        lines.append(f"{one.name:32}{one.value:>12g} {one.unit}{about}")
    lines += [f"  {example}" for example in soak.tally.examples]
    problems = find_problems(slices)
    lines += [f"NOT HELD  {problem}" for problem in problems]
    return [*lines, f"{len(problems)} did not hold" if problems else "all held"]


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("load", __doc__)
    options.add_service(parser, "load", ["--url", "--server-url"])
    add = parser.add_argument
    add("--duration", type=options.seconds, default=600.0, metavar="S", help="default: 600")
    callers = options.whole_number(1)
    add("--callers", type=callers, default=12, metavar="N", help="clients at once (default: 12)")
    help_ = "of each client between two requests, on average (default: none)"
    add("--pause", type=options.seconds, default=0.0, metavar="S", help=help_)
    help_ = "one after another, repeatable; stop-core needs LAUNCHER_HANG_TIMEOUT_S"
    add("--fault", action="append", choices=sorted(FAULTS), default=[], help=help_)
    add("--endless", action="store_true", help="the faults begin again after the last")
    add("--fault-pause", type=options.seconds, default=20.0, metavar="S", help="before each")
    add("--recovery-limit", type=options.seconds, default=180.0, metavar="S", help="for each")
    options.add_questions(parser)
    add("--seed", type=int, default=1, help="of what is asked when")
    help_ = "earlier slices of one long soak, kept there, count with this one"
    add("--slices", default="", metavar="FILE", help=help_)
    add("--name", default="soak", help="of the record")
    options.add_record(parser, "--json")
    arguments = options.parse_options(parser, words)
    arguments.url = arguments.url or f"http://127.0.0.1:{options.GATEWAY_PORT}"
    arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    return arguments
