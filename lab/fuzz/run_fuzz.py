"""Hostile requests by the hundred thousand, before a gateway and the engine behind it.

Right requests, and the same ones spoilt in framing, headers, bodies, schemas, regular expressions,
tools, token ids, forms, files, ids and hang-ups, many at once. Whatever is sent, an answer is whole
HTTP with the request's id, an error is in the envelope and of a status that the request calls for,
and no answer holds another's number. After each slice of cases an honest caller must be answered
rightly by the same processes, the breaker never opened, the event loop never blocked for 50 ms of
CPU, memory within a bound, nothing in the log that tells of a crash or of a prompt.

The service is started and ended by the command itself (the demo model on the CPU unless variables
or what stands behind `--` say otherwise); with --url it is one that runs. Every case is made of the
seed and its number alone: `--seed 1 --case 4711` sends it again and shows what came.

Exit codes: 0 all held, 1 something did not, 2 bad options or no gateway, 3 it did not start, 130
interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import aiohttp

from common.questions import read_questions
from lab import options
from lab.failures import NoService
from lab.fuzz import fuzzed_service
from lab.fuzz.cases.case import KEY, Target
from lab.fuzz.cases.kinds import KINDS, find_kind
from lab.fuzz.fuzz_record import add_figures, build_figures
from lab.fuzz.fuzz_run import FuzzRun
from lab.fuzz.survival import Survival, Watched
from lab.load.answers import MISSHAPEN, KnownModel, learn_model
from lab.records.record import RunRecord, read_record, take_facts, write_record
from lab.reports.console import ProgressLine, count
from lab.reports.output_files import ensure_writable

_CALL_TIMEOUT_S = 180.0


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.list:
        width = max(map(len, KINDS))
        for name, kind in KINDS.items():
            print(f"{name:{width}}  {kind.meaning}")
        return 0
    if arguments.record:
        ensure_writable(Path(arguments.record))
    progress = ProgressLine()
    with ExitStack() as exits:
        exits.callback(progress.close)
        watched = find_service(arguments, exits, progress)
        run = asyncio.run(run_cases(arguments, watched, progress))
    print("\n".join(describe_run(run)))
    return 1 if run.tally.findings else 0


def find_service(
    arguments: argparse.Namespace, exits: ExitStack, progress: ProgressLine
) -> Watched:
    if arguments.url:
        return Watched(arguments.url, arguments.status_url)
    folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-")))
    return fuzzed_service.start(folder, arguments.launcher_options, exits, progress)


async def run_cases(
    arguments: argparse.Namespace, watched: Watched, progress: ProgressLine
) -> FuzzRun:
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    key = arguments.api_key or KEY
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=timeout,
        headers=options.build_headers(key),
    ) as session:
        model = await _learn(session, watched.url, arguments.questions)
        ids = await store_some(session, watched.url, model.name)
        target = Target(model.name, key, echoes=False, ids=ids)
        survival = Survival(session, watched, model)
        await survival.begin()
        run = FuzzRun(arguments.seed, target, survival, progress)
        if arguments.case is not None:
            await run.try_alone(arguments.case)
        else:
            numbers, keep = choose_numbers(arguments), build_keeper(arguments)
            await run.run(numbers, arguments.cases, arguments.slice, keep)
        return run


async def _learn(session: aiohttp.ClientSession, url: str, questions: str) -> KnownModel:
    try:
        return await learn_model(session, url, read_questions(Path(questions)).pairs)
    except aiohttp.ClientConnectorError as error:
        raise NoService(f"{error}; is the gateway running? `make serve`") from None
    except (aiohttp.ClientError, TimeoutError, *MISSHAPEN) as error:
        text = f"{url} does not answer as a gateway ({type(error).__name__}: {error})"
        raise NoService(text) from None


async def store_some(session: aiohttp.ClientSession, url: str, model: str) -> dict[str, str]:
    """What ids are asked for: of a stored response and a file, where the service keeps such."""
    ids: dict[str, str] = {}
    asked = {"model": model, "input": "what is a warp?", "max_output_tokens": 4}
    async with session.post(f"{url}/v1/responses", json=asked) as answer:
        if answer.status == 200:
            ids["response"] = (await answer.json())["id"]
    form = aiohttp.FormData({"purpose": "batch"})
    body = f'{{"model": "{model}", "prompt": "a", "max_tokens": 1}}'
    line = f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}'
    form.add_field("file", line.encode(), filename="a.jsonl")
    async with session.post(f"{url}/v1/files", data=form) as answer:
        if answer.status != 200:
            return ids
        ids["file"] = (await answer.json())["id"]
    asked = {"input_file_id": ids["file"], "endpoint": "/v1/completions"}
    async with session.post(
        f"{url}/v1/batches", json={**asked, "completion_window": "24h"}
    ) as answer:
        if answer.status == 200:
            ids["batch"] = (await answer.json())["id"]
    return ids


def choose_numbers(arguments: argparse.Namespace) -> Iterator[int]:
    """From the first on, those of the kinds that are wanted."""
    only = frozenset(arguments.only)
    number, left = arguments.first, arguments.cases
    while left:
        if not only or find_kind(arguments.seed, number) in only:
            left -= 1
            yield number
        number += 1


def build_keeper(arguments: argparse.Namespace) -> Callable[[FuzzRun], None]:
    """Writes the record of what has been sent so far, if one is wanted."""
    path = Path(arguments.record) if arguments.record else None
    earlier = read_record(path) if path is not None and arguments.add and path.exists() else None

    def keep(run: FuzzRun) -> None:
        if path is None:
            return
        figures, about = build_figures(run), describe_cases(run, arguments)
        if earlier is not None:
            figures, about = add_figures(earlier.figures, figures), f"{earlier.about}; {about}"
        facts = take_facts(arguments.machine, arguments.api_key)
        write_record(RunRecord(arguments.name, figures=tuple(figures), about=about, **facts), path)

    return keep


def describe_cases(run: FuzzRun, arguments: argparse.Namespace) -> str:
    kinds = f", of them {', '.join(arguments.only)}" if arguments.only else ""
    return f"cases {arguments.first:,} to {run.last:,} of seed {arguments.seed}{kinds}"


def describe_run(run: FuzzRun) -> list[str]:
    tally = run.tally
    lines = ["", f"{'':14}{'cases':>9}{'2xx':>9}{'4xx':>9}{'5xx':>9}"]
    for kind in sorted(tally.cases):
        statuses = [run.count_statuses(kind, hundreds) for hundreds in (2, 4, 5)]
        lines.append(f"{kind:14}{tally.cases[kind]:9,}" + "".join(f"{n:9,}" for n in statuses))
    lines.append("")
    lines += [f"{one.name:44}{one.value:>12,g} {one.unit}" for one in build_figures(run)]
    for text, number in tally.failures.most_common():
        lines.append(f"  {number} times {text}, as case {tally.failed_first[text]}")
    number = len(tally.findings)
    return [*lines, f"{count(number, 'finding')}" if number else "all held"]


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("fuzz", __doc__)
    options.add_service(parser, "fuzz", ["--url", "--server-url"])
    add = parser.add_argument
    number = options.whole_number(1)
    add("--list", action="store_true", help="name the kinds and end")
    add("--cases", type=number, default=100_000, metavar="N", help="default: 100,000")
    add("--first", type=options.whole_number(0), default=0, metavar="N", help="default: 0")
    add("--slice", type=number, default=500, metavar="N", help="cases between checks (500)")
    add("--only", action="append", choices=sorted(KINDS), default=[], help="repeatable")
    add("--seed", type=int, default=1, help="of all cases (default: 1)")
    add("--case", type=options.whole_number(0), metavar="N", help="this one alone, shown")
    options.add_questions(parser)
    add("--name", default="fuzz", help="of the record")
    options.add_record(parser)
    kept = "add the figures to those of the record that is there"
    add("--add", action="store_true", help=kept)
    arguments = options.parse_options(parser, words)
    if arguments.url and not arguments.status_url:
        arguments.status_url = options.find_neighbour(arguments.url)
    return arguments
