"""Hundreds of engines behind one gateway: how it shares, waits and fails, and what it costs.

The simulation lives in virtual time: thousands of callers and the gateway's own pool, queue,
attempts, capacity and limits, before engines that take as long as measured ones (docs/results/). A
tenth of them die in the middle and come back. `lanes` has a batch join a few callers before one
engine, in the same way. The process is measured for real: a gateway before so many stand-ins that
answer at once. Without options all is made, in six minutes on two cores:

    python -m lab scale
    python -m lab scale --parts simulation --engines 10,100 --clients 2000

docs/scale.md says how to read it. Exit codes: 0 measured; 2 bad options; 3 something did not start.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from lab import options
from lab.bench.bench_figures import BenchFailed
from lab.intervals import quantile
from lab.records.record import RecordFigure, take_record, write_record
from lab.records.results_page import format_number
from lab.reports.output_files import ensure_writable
from lab.scale.gateway_process import (
    ProcessFigures,
    ProcessLoad,
    RedisFigures,
    measure_process,
    measure_redis,
)
from lab.scale.lanes_simulation import CPU_TIMES, LaneOutcome, LaneScenario, simulate_lanes
from lab.scale.service_times import H200_TIMES, ServiceTimes
from lab.scale.simulation import Outcome, Scenario, simulate

PARTS = ("simulation", "lanes", "process")
_FAILED = 3


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.record:
        ensure_writable(Path(arguments.record))
    times = H200_TIMES
    figures: list[RecordFigure] = []
    try:
        if "simulation" in arguments.parts:
            figures += run_simulation(arguments, times)
        if "lanes" in arguments.parts:
            figures += run_lanes(times)
        if "process" in arguments.parts:
            figures += asyncio.run(run_process(arguments))
    except BenchFailed as error:
        print(f"scale: {error}", file=sys.stderr)
        return _FAILED
    if arguments.record:
        is_batch = arguments.parts == ["lanes"]
        name = "A batch beside callers" if is_batch else "Many engines behind one gateway"
        about = describe_conditions(arguments, times)
        record = take_record(name, figures, about=about, machine=arguments.machine)
        write_record(record, Path(arguments.record))
    return 0


def run_simulation(arguments: argparse.Namespace, times: ServiceTimes) -> list[RecordFigure]:
    columns = []
    for engines in arguments.engines:
        say(f"simulating {engines:,} engines, {arguments.clients:,} callers …")
        scenario = Scenario(
            engines,
            arguments.clients,
            sequences=arguments.sequences,
            tokens=arguments.tokens,
            think_s=arguments.think,
            seconds=arguments.seconds,
            seed=arguments.seed,
            is_told=arguments.told,
        )
        columns.append(describe_outcome(simulate(scenario, times)))
    print_table(f"simulated, {arguments.clients:,} callers", arguments.engines, columns)
    return name_figures("simulated", arguments.engines, columns)


def run_lanes(times: ServiceTimes) -> list[RecordFigure]:
    """Beside a quarter of the window whatever that does, as it was, and as it is."""
    say("simulating a batch beside callers who wait …")
    columns = {
        f"{name}, {way}": describe_lanes(
            simulate_lanes(LaneScenario(follows_first_tokens=follows), engine)
        )
        for name, engine in (("CPU", CPU_TIMES), ("H200", times))
        for way, follows in (("a quarter", False), ("followed", True))
    }
    print_table("a batch beside callers who wait", list(columns), list(columns.values()))
    return [
        figure(f"batch beside callers, {head}: {name}", *told)
        for head, column in columns.items()
        for name, told in column.items()
    ]


def describe_lanes(outcome: LaneOutcome) -> dict[str, Row]:
    alone, _, beside = (quantile(one, 0.99) * 1e3 for one in outcome.first_s)
    return {
        "first token alone, p99": ((alone,), "ms"),
        "first token beside the batch, p99": ((beside,), "ms"),
        "beside over alone": ((beside / alone,), "×"),
        "lines of the batch": ((outcome.lines / LaneScenario.seconds * 3,), "/s"),
    }


async def run_process(arguments: argparse.Namespace) -> list[RecordFigure]:
    columns = []
    load = ProcessLoad(rounds=arguments.rounds)
    for engines in (1, *arguments.engines):
        say(f"measuring one gateway before {engines:,} engines …")
        columns.append(describe_process(await measure_process(engines, load)))
    print_table("one gateway process", (1, *arguments.engines), columns)
    figures = name_figures("process", (1, *arguments.engines), columns)
    say("measuring limits in Redis …")
    redis = await measure_redis(load)
    if redis is not None:
        rows = describe_redis(redis)
        print_table("limits", ("",), [rows])
        figures += [figure(f"limits: {name}", *told) for name, told in rows.items()]
    return figures


Row = tuple[Sequence[float], str]  # values of one figure, and their unit


def describe_outcome(outcome: Outcome) -> dict[str, Row]:
    scenario = outcome.scenario
    sessions = outcome.sessions_kept + outcome.sessions_moved
    limited = outcome.refused.get("requests_per_minute", 0)
    rows: dict[str, tuple[float | None, str]] = {
        "calls answered": (outcome.answered / scenario.seconds, "/s"),
        "tokens": (outcome.tokens / scenario.seconds, "/s"),
        "first token, median": (quantile(outcome.first_token_s, 0.5) * 1e3, "ms"),
        "first token, p99": (quantile(outcome.first_token_s, 0.99) * 1e3, "ms"),
        "wait in the queue, p99": (quantile(outcome.queue_s["interactive"], 0.99) * 1e3, "ms"),
        "the same of the lane batch": (quantile(outcome.queue_s["batch"], 0.99) * 1e3, "ms"),
        "what an engine runs is known after": (outcome.known_after_s, "s"),
        "busiest engine over the mean": (statistics.fmean(outcome.most_over_mean or [0.0]), "×"),
        "calls that stay with their session's engine": (
            outcome.sessions_kept / sessions * 100 if sessions else 100.0,
            "%",
        ),
        "refused, but for the limited key": (outcome.refused.total() - limited, ""),
        "calls let in of a key with 60 a minute": (outcome.limited, ""),
        "running on the tenth that died": (outcome.lost_at_once, ""),
        "of those lost": (outcome.lost.total(), ""),
        "sent again": (outcome.sent_again, ""),
        "out of use after": (outcome.out_after_s * 1e3, "ms"),
        "all of them at work again after": (outcome.back_after_s, "s"),
    }
    return {name: ((value,), unit) for name, (value, unit) in rows.items() if value is not None}


def describe_process(figures: ProcessFigures) -> dict[str, Row]:
    return {
        "CPU of a call": (figures.call_cpu_ms, "ms"),
        "CPU of a call by prefix": (figures.affinity_cpu_ms, "ms"),
        "CPU of a chunk of a stream": (figures.chunk_cpu_us, "µs"),
        "the same of one that comes alone": ((figures.late_chunk_cpu_us,), "µs"),
        "CPU until all engines are ready": ((figures.start_cpu_s,), "s"),
        "cores when nobody asks": ((figures.idle_cores,), ""),
        "memory": ((figures.memory_mb,), "MiB"),
        "open files when nobody asks": ((figures.files,), ""),
        "CPU of a scrape of /metrics": ((figures.scrape_cpu_ms,), "ms"),
        "size of that": ((figures.scrape_kib,), "KiB"),
        "calls lost with a tenth of the engines": ((figures.lost_calls,), ""),
        "time in which they were": ((figures.lost_for_s * 1e3,), "ms"),
        "the tenth at work again after": ((figures.back_after_s,), "s"),
    }


def describe_redis(figures: RedisFigures) -> dict[str, Row]:
    return {
        "CPU of a call, limits in the process": (figures.local_cpu_ms, "ms"),
        "CPU of a call, limits in Redis": (figures.redis_cpu_ms, "ms"),
        "Redis's own CPU of that": ((figures.server_cpu_ms,), "ms"),
    }


def name_figures(
    part: str, engines: Sequence[int], columns: Sequence[dict[str, Row]]
) -> list[RecordFigure]:
    return [
        figure(f"{part}, {count:,} engine{'s' if count > 1 else ''}: {name}", *told)
        for count, column in zip(engines, columns, strict=True)
        for name, told in column.items()
    ]


def figure(name: str, values: Sequence[float], unit: str) -> RecordFigure:
    value = round(statistics.median(values), 4)
    if len(values) == 1:
        return RecordFigure(name, value, unit)
    return RecordFigure(name, value, unit, round(min(values), 4), round(max(values), 4))


def print_table(title: str, heads: Sequence[object], columns: Sequence[dict[str, Row]]) -> None:
    told = [f"{head:,}" if isinstance(head, int) else str(head) for head in heads]
    print(f"{title:46}" + "".join(f"{head:>16}" for head in told))
    for name in dict.fromkeys(name for column in columns for name in column):
        cells = (describe_cell(*column[name]) if name in column else "–" for column in columns)
        print(f"{name:46}" + "".join(f"{cell:>16}" for cell in cells))
    print(flush=True)


def describe_cell(values: Sequence[float], unit: str) -> str:
    return f"{format_number(statistics.median(values))} {unit}".rstrip()


def describe_conditions(arguments: argparse.Namespace, times: ServiceTimes) -> str:
    told = {
        "simulation": (
            f"Simulation: {arguments.clients:,} callers think {arguments.think:g} s and ask for "
            f"{arguments.tokens:g} tokens on the mean, for {arguments.seconds:g} s; engines run "
            f"{arguments.sequences} sequences, take {times.intake_s * 1e3:.2f} ms for each call, "
            f"one after another, and {times.time_step(1) * 1e3:.2f} to "
            f"{times.time_step(arguments.sequences) * 1e3:.2f} ms for a step (records gpu-streams "
            "and gpu-course); a tenth of them are away from a third of the time to two thirds."
        ),
        "lanes": (
            f"Batch: {LaneScenario.callers} callers of {LaneScenario.answer_tokens} tokens before "
            "one engine, as fast as on two CPU cores and as those of the simulation; alone for a "
            f"third of {LaneScenario.seconds:g} s, then beside lines of "
            f"{LaneScenario.line_tokens} tokens; figures are the last third's."
        ),
        "process": (
            "Process: stand-ins that answer at once, 64 connections, CPU of the gateway alone; "
            f"medians of {arguments.rounds} rounds and all that was seen."
        ),
    }
    return " ".join(told[part] for part in PARTS if part in arguments.parts)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("scale", __doc__)
    positive = options.whole_number(1)
    add = parser.add_argument
    help_ = "how many, one size after another (default: 10,100,1000)"
    add("--engines", type=options.whole_numbers, default=(10, 100, 1000), metavar="N,…", help=help_)
    add(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        metavar="PART",
        help="some of them",
    )
    add("--rounds", type=positive, default=3, help="of what a call costs (default: 3)")
    add = parser.add_argument_group("the simulation").add_argument
    add("--clients", type=positive, default=5000, help="callers (default: 5000)")
    add("--seconds", type=options.seconds, default=30.0, help="of virtual time (default: 30)")
    add("--sequences", type=positive, default=64, help="that an engine runs (default: 64)")
    add("--tokens", type=positive, default=128, help="of an answer, on the mean (default: 128)")
    add("--think", type=options.seconds, default=1.0, help="seconds between calls (default: 1)")
    add("--told", action="store_true", help="the gateway is told what an engine runs")
    add("--seed", type=int, default=1, help="of the callers' ways (default: 1)")
    add = parser.add_argument_group("what comes of it").add_argument
    add("--machine", default="", help="what to write down as the machine, if it is another one")
    options.add_record(parser)
    return options.parse_options(parser, words)
