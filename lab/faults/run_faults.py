"""The fault table: each fault injected for real into a running service, while callers of every
kind ask.

The service is started and ended by the command itself (`launcher up`, with the demo model on the
CPU unless variables say otherwise); with --url it is one that runs on this host, as far as that may
be hurt. Streams, whole chats, questions and batches of /predict, jobs of /v1/batches and hang-ups
go on during each fault, and every answer is held against the one that is right. A row says what
each kind of caller got, how long it took until all was well, what was left.

Exit codes: 0 all held; 1 an answer was wrong, doubled, swapped or lost without a word, or something
neither recovered nor ended as documented, or showed nowhere; 2 bad options, 3 the service did not
start, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import aiohttp

from common.questions import read_questions
from lab import options
from lab.failures import BadOptions
from lab.faults.fault import Fault, FaultResult
from lab.faults.reliability import (
    PAGE,
    add_rows,
    build_record,
    describe_ending,
    describe_got,
    describe_memory,
    describe_verdict,
    read_record,
    write_page,
    write_record,
)
from lab.faults.runner import ExperimentRunner
from lab.faults.signs import Signboard
from lab.faults.stores import OthersStores, Stores
from lab.faults.table import list_faults
from lab.load.answers import KnownModel, learn_model
from lab.paths import ROOT
from lab.reports.console import ProgressLine, count
from lab.reports.output_files import ensure_writable

_CALL_TIMEOUT_S = 90.0
# Times that people set to minutes; the faults of a table must be over in seconds.
_QUICK = {
    "LAUNCHER_RESTART_LIMIT": "1000",
    "LAUNCHER_RESTART_DELAY_S": "0.2",
    "LAUNCHER_RESTART_DELAY_MAX_S": "1",
    "LAUNCHER_HANG_TIMEOUT_S": "8",
    "LAUNCHER_GATEWAY_HANG_TIMEOUT_S": "5",
    "LAUNCHER_KILL_TIMEOUT_S": "5",
    "GATEWAY_BREAKER_PAUSE_S": "1",
    "GATEWAY_WARMUP_PROMPTS": "16",
}


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.list:
        width = max(len(one.name) for one in list_faults())
        for one in list_faults():
            print(f"{one.name:{width}}  {one.what}")
        return 0
    for path in (arguments.record, arguments.page):
        if path:
            ensure_writable(Path(path))
    if arguments.from_record:
        write_page(read_record(Path(arguments.from_record)), Path(arguments.page or PAGE))
        return 0
    if not (ROOT / "deploy").is_dir():
        raise BadOptions(
            "the alerts, panels and runbook that a fault is looked for in are not in the package; "
            "run this in a checkout of the project"
        )
    return asyncio.run(run_faults(arguments, choose_faults(arguments.only)))


def choose_faults(names: Sequence[str]) -> list[Fault]:
    known = list_faults()
    if unknown := set(names) - {one.name for one in known}:
        raise BadOptions(f"there is no fault {', '.join(sorted(unknown))}; --list names them all")
    return [one for one in known if not names or one.name in names]


async def run_faults(arguments: argparse.Namespace, faults: Sequence[Fault]) -> int:
    began = time.monotonic()
    progress = ProgressLine()
    rows: list[FaultResult] = []
    earlier = read_record(Path(arguments.record)) if arguments.add else None

    def keep(row: FaultResult) -> None:
        """At once: half an hour's work is not lost with its last minute."""
        rows.append(row)
        print("\n".join(describe_row(row)), flush=True)
        record = build_record(rows, time.monotonic() - began, arguments.machine)
        record = add_rows(earlier, record) if earlier else record
        if arguments.record:
            write_record(record, Path(arguments.record))
        if arguments.page:
            write_page(record, Path(arguments.page))

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            await run_all(arguments, faults, Path(folder), progress, keep)
        finally:
            progress.close()
    red = [one for one in rows if one.problems]
    away = [one for one in rows if one.not_here]
    print(f"{count(len(rows), 'fault')}: {len(red)} not held, {len(away)} not here")
    return 1 if red else 0


async def run_all(
    arguments: argparse.Namespace,
    faults: Sequence[Fault],
    folder: Path,
    progress: ProgressLine,
    keep: Callable[[FaultResult], None],
) -> None:
    pairs = read_questions(Path(arguments.questions)).pairs
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    needs = {need for fault in faults for need in fault.needs}
    place = folder / "stores"
    given = (arguments.url, arguments.status_url) if arguments.url else None
    own = OthersStores(place, needs, arguments.api_key) if given else Stores(place, needs)
    async with own as stores:
        headers = options.build_headers(stores.key)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers
        ) as session:

            async def learn(url: str) -> KnownModel:
                return await learn_model(session, url, pairs)

            async with ExperimentRunner(
                folder,
                session,
                stores,
                environment=_QUICK,
                signboard=Signboard(),
                learn=learn,
                given=given,
            ) as runner:
                for number, fault in enumerate(faults, start=1):
                    progress.say(f"{number} of {len(faults)}: {fault.name}: {fault.what}")
                    keep(await runner.run(fault))


def describe_row(row: FaultResult) -> list[str]:
    facts = [row.name, describe_verdict(row)]
    if row.not_here:
        return [f"{'  '.join(facts)}: {row.not_here}"]
    facts += [describe_ending(row), describe_memory(row)]
    lines = ["  ".join(filter(None, facts))]
    lines += [f"    {kind:20} {describe_got(got)}" for kind, got in sorted(row.got.items())]
    if row.fired is not None:
        lines.append(f"    fires should it last: {', '.join(row.fired) or 'no alert'}")
    lines += [f"    {note}" for note in row.notes]
    return [*lines, *(f"    NOT HELD  {problem}" for problem in row.problems)]


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("faults", __doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="name the faults and end")
    names = "of the faults to inject, separated by commas (default: all)"
    add("--only", type=split_names, default=[], metavar="NAMES", help=names)
    add("--record", metavar="FILE", help="the table as JSON, row by row")
    kept = "put the rows into the record that is there, each with its own date and commit"
    add("--add", action="store_true", help=kept)
    add("--page", metavar="FILE", help="the table as a page, such as docs/reliability.md")
    again = "inject nothing: write the page (default: docs/reliability.md) of this record"
    add("--from", dest="from_record", metavar="FILE", help=again)
    options.add_service(parser, "faults", ["--url", "--server-url"])
    options.add_questions(parser)
    arguments = options.parse_options(parser, words)
    if arguments.add and not arguments.record:
        parser.error("--add: to which record? name it with --record")
    if arguments.url:
        arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    return arguments


def split_names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
