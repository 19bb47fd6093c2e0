"""What the gateway costs: gateway against direct in one run, every answer checked.

Three arms take turns in random order: the engine itself, the engine once more (the control) and
the gateway before that engine. Without --url it starts `python -m launcher up` and stops it again;
what stands behind `--` goes to the launcher:

    python -m lab bench                              everything, eleven minutes on two cores
    python -m lab bench --quick                      a minute's look
    python -m lab bench --only batch,relay           some parts alone
    python -m lab bench --against out/before.json    which figures have really changed?
    python -m lab bench --url http://127.0.0.1:8000 --direct-url http://127.0.0.1:8001
    python -m lab bench --model Qwen/Qwen3-0.6B -- --profile course

Parts: one (prompt), batch, calls, streams, sweep (open loop), outside (`vllm bench serve`), relay
(beside a plain relay and a stand-in engine). docs/benchmarks.md says how to read the figures.

Exit codes: 0 measured; 1 a bound surely broken, really worse than --against, or answers mixed up;
2 bad options, or a file that cannot be written; 3 no figures.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import urlsplit

from common.processes import build_meter
from common.questions import BadQuestions, QuestionSet, read_questions
from gateway.config import Settings, SettingsError
from gateway.prompts.builder import PromptBuilder
from gateway.schemas.predict import default_sampling
from lab.bench import earlier_run as against
from lab.bench import vllm_bench as outside
from lab.bench.answer_book import MixedUp, build_book
from lab.bench.bench_figures import BenchFailed
from lab.bench.bench_result import Facts, Result
from lab.bench.bench_scale import (
    FULL,
    PARTS,
    QUICK,
    QUICK_PARTS,
    SINGLE_TITLE,
    Questions,
    Scale,
    batch_title,
    list_workloads,
    plan_sweep,
)
from lab.bench.rate_sweep import Sweep, find_knees
from lab.bench.relay.relay_comparison import Relayed, measure_relay
from lab.bench.rounds import Measured, Say, Site, measure_workload
from lab.bench.stack import (
    Addresses,
    Standing,
    read_standing,
    start_stack,
    wait_ready,
)
from lab.bench.targets import Asking, Door, ask_all, open_client
from lab.grade.judge import NeverReady
from lab.launched_server import Started
from lab.paths import DEMO_QUESTIONS, ROOT
from lab.records.record import (
    describe_command,
    describe_commit,
    describe_machine,
    take_record,
    write_record,
)
from lab.reports.bench_console import describe_result
from lab.reports.bench_page import write_report
from lab.reports.output_files import Unwritable, ensure_writable
from lab.reports.progress import Progress

_QUIET_LOAD = 0.5


class BadOptions(Exception):
    """Options that cannot work."""


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if words is None else words)
    progress = Progress(0.0, 1)
    try:
        return run(arguments, progress)
    except (BadOptions, BadQuestions, SettingsError, against.BadRun, Unwritable) as error:
        progress.say(f"bench: {error}")
        return 2
    except MixedUp as error:
        progress.say(f"bench: ANSWERS WERE MIXED UP, so there are no figures: {error}")
        return 1
    except (BenchFailed, NeverReady) as error:
        progress.say(f"bench: {error}")
        return 3
    except KeyboardInterrupt:
        progress.say("bench: interrupted")
        return 130
    finally:
        progress.close()


def run(arguments: argparse.Namespace, progress: Progress) -> int:
    # Whatever is wrong with the files is said before ten minutes are spent.
    before = against.read_stored(Path(arguments.against)) if arguments.against else None
    asked = read_questions(Path(arguments.questions).expanduser())
    out = Path(arguments.out)
    for path in (out, out.with_suffix(".html"), Path(arguments.record or out)):
        ensure_writable(path)
    result = asyncio.run(Bench(arguments, asked, progress).measure())
    if before:
        changes = tuple(against.compare(before, result.stored()))
        result = replace(result, changes=changes, against=arguments.against)
    result.write(out)
    write_report(result, out.with_suffix(".html"))
    progress.close()
    print("\n".join(describe_result(result, coloured=sys.stdout.isatty())))
    print(f"saved: {out}  report: {out.with_suffix('.html')}")
    if arguments.record:
        keep_record(result, Path(arguments.record))
    return 0 if result.is_good else 1


def keep_record(result: Result, path: Path) -> None:
    facts = result.facts
    engine = ", ".join(f"{k} {v}" for k, v in facts.engine.items() if k != "command")
    about = (
        f"Gateway against direct, {facts.model or 'a stand-in engine'}, in {facts.seconds:.0f} s; "
        "medians and their 95 % intervals; × direct is taken round by round, over both direct arms."
    )
    about += f" Engine: {engine}." if engine else ""
    name = f"Benchmark, {facts.model or 'relay'}"
    record = take_record(name, result.figures(), about=about, command=facts.command)
    write_record(record, path)


@dataclass
class _Found:
    """What the engine's parts gave."""

    addresses: Addresses
    standing: Standing
    answers: str
    workloads: list[Measured]
    outside: Measured | None = None
    sweep: Sweep | None = None


class Bench:
    """One run."""

    def __init__(
        self, arguments: argparse.Namespace, asked: QuestionSet, progress: Progress
    ) -> None:
        self._arguments, self._progress = arguments, progress
        self._scale: Scale = arguments.scale
        self._parts: tuple[str, ...] = arguments.parts
        self._pairs = {pair.question: pair.reference for pair in asked.pairs}
        self._digest = asked.digest
        self._asked = Questions(tuple(self._pairs), arguments.max_tokens)
        self._chance = random.Random(arguments.seed)
        self._notes: list[str] = []

    async def measure(self) -> Result:
        began, load_before = time.monotonic(), os.getloadavg()[0]
        if load_before > _QUIET_LOAD * len(os.sched_getaffinity(0)):
            self._progress.say(
                f"this machine is busy already (load {load_before:.1f}): the control will tell"
            )
        found = await self._measure_engine() if set(self._parts) != {"relay"} else None
        relayed = await self._measure_relay() if "relay" in self._parts else None
        return Result(
            facts=self._collect_facts(found, load_before, time.monotonic() - began),
            workloads=tuple(found.workloads) if found else (),
            outside=found.outside if found else None,
            sweep=found.sweep if found else None,
            relayed=relayed,
            batch_title=batch_title(self._scale.prompts),
            single_title=SINGLE_TITLE,
            notes=tuple(self._notes),
        )

    async def _measure_engine(self) -> _Found:
        with ExitStack() as stack:
            addresses, started = self._open_stack(stack)
            self._progress.working("waiting for the gateway")
            await wait_ready(addresses.gateway, self._progress, started)
            standing = await read_standing(addresses, self._headers())
            return await self._measure_doors(addresses, standing)

    def _open_stack(self, stack: ExitStack) -> tuple[Addresses, Started | None]:
        arguments = self._arguments
        if arguments.url:
            status = arguments.status_url or _neighbour(arguments.url, 2)
            return Addresses(arguments.url, arguments.direct_url, status), None
        folder = Path(arguments.out).resolve().parent
        options = arguments.launcher_options
        return stack.enter_context(start_stack(arguments.model, options, folder, self._progress))

    async def _measure_doors(self, addresses: Addresses, standing: Standing) -> _Found:
        asking = self._build_asking(standing)
        places = (("direct", addresses.engine), ("control", addresses.engine))
        doors = tuple(Door(name, url, is_gateway=False, asking=asking) for name, url in places)
        key = self._arguments.api_key
        doors += (Door("gateway", addresses.gateway, is_gateway=True, asking=asking, api_key=key),)
        meter = build_meter(standing.status, addresses.status)
        if meter is None:
            self._notes.append(
                "no CPU times: no launcher on this machine says which processes are measured"
            )
        async with open_client() as client:
            self._progress.working("asking every question once, directly")
            learned = await ask_all(client, doors[0], self._asked.known)
            client.book = build_book(self._pairs, learned)
            site = Site(doors, client, meter, self._chance, self._progress.working)
            found = _Found(addresses, standing, "", [])
            for workload, budget in list_workloads(self._parts, self._scale, self._asked):
                self._announce(workload.title)
                found.workloads.append(
                    await measure_workload(
                        workload, replace(site, say=self._say(workload.title)), budget
                    )
                )
            if "sweep" in self._parts:
                self._announce("open loop")
                plan = plan_sweep(self._scale, self._asked, self._arguments.p95_bound_s)
                found.sweep = await find_knees(replace(site, say=self._say("open loop")), plan)
            book = client.book
        if "outside" in self._parts:
            found.outside = await self._measure_outside(addresses, asking, standing)
        how = "known by heart" if book.is_by_heart else "as the direct door answered at first"
        found.answers = f"{book.checked:,} answers held against their questions, {how}"
        if book.differing:
            self._notes.append(
                f"{book.differing} of {book.checked} answers differed from the first one to their "
                "question (greedy decoding may depend on the batch); none was another question's"
            )
        return found

    def _build_asking(self, standing: Standing) -> Asking:
        folder = self._find_tokenizer(standing)
        settings = Settings(tokenizer=folder)
        builder = PromptBuilder(settings)
        sampling = builder.complete(default_sampling(settings))
        return Asking(standing.model, builder, sampling, self._arguments.max_tokens)

    def _find_tokenizer(self, standing: Standing) -> Path:
        given = self._arguments.tokenizer
        folder = Path(given).expanduser() if given else standing.model_folder
        if folder is None or not (folder / "tokenizer.json").is_file():
            raise BadOptions(
                f"{folder or 'no folder'} has no tokenizer.json; --tokenizer names the folder of "
                "the served model (direct calls send token ids, as the gateway does)"
            )
        return folder

    async def _measure_outside(
        self, addresses: Addresses, asking: Asking, standing: Standing
    ) -> Measured | None:
        urls = {"direct": addresses.engine, "control": addresses.engine}
        urls["gateway"] = addresses.gateway
        folder = self._find_tokenizer(standing)
        doors = outside.Doors(urls, asking.model, folder, self._arguments.api_key)
        asked, budget = self._scale.outside, self._scale.budget("outside", 20)
        self._announce(asked.title)
        try:
            series = await outside.measure_outside(
                doors, asked, budget, self._chance, self._say(asked.title)
            )
        except outside.NoVllm as error:
            self._notes.append(f"no outside opinion: {error}")
            return None
        return Measured(asked.title, tuple(series), (), None)

    async def _measure_relay(self) -> Relayed:
        self._announce("relay beside a stand-in engine")
        budget = self._scale.budget("relay", 20)
        return await measure_relay(self._scale.relay, budget, self._chance, self._say("relay"))

    def _announce(self, title: str) -> None:
        """On a terminal the line that changes says it too."""
        if not sys.stderr.isatty():
            self._progress.say(title)

    def _say(self, title: str) -> Say:
        return lambda text: self._progress.working(f"{title}: {text}")

    def _headers(self) -> dict[str, str]:
        key = self._arguments.api_key
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _collect_facts(self, found: _Found | None, load_before: float, seconds: float) -> Facts:
        arguments, machine = self._arguments, describe_machine()
        engine = found.standing.engine_facts() if found else {}
        asked = {
            "prompts": self._scale.prompts,
            "max tokens": arguments.max_tokens,
            "p95 bound, s": arguments.p95_bound_s,
            "scale": "quick" if arguments.quick else "full",
            "questions": f"{arguments.questions} {self._digest}".removeprefix(f"{ROOT}/"),
        }
        workload = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:12]
        same_engine = {
            "machine": machine,
            "model": found.standing.model if found else "",
            "engine configuration": str(engine.get("fingerprint", "")),
            "workload": workload,
        }
        same_relay = {"machine": machine, "load": repr(self._scale.relay)}
        command = describe_command()
        return Facts(
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            commit=describe_commit(),
            machine=machine,
            command=command.replace(arguments.api_key, "…") if arguments.api_key else command,
            gateway_url=found.addresses.gateway if found else "",
            engine_url=found.addresses.engine if found else "",
            model=found.standing.model if found else "",
            answers=found.answers if found else "",
            asked=asked,
            engine=engine,
            gateway=found.standing.settings if found else {},
            load_before=load_before,
            load_after=os.getloadavg()[0],
            seconds=seconds,
            seed=arguments.seed,
            setting={"engine": same_engine, "relay": same_relay},
        )


def _neighbour(url: str, above: int) -> str:
    """The same host, so many ports above."""
    where = urlsplit(url)
    return f"{where.scheme}://{where.hostname}:{(where.port or 80) + above}"


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """What follows `--` is the launcher's."""
    own, launcher = list(words), []
    if "--" in own:
        at = own.index("--")
        own, launcher = own[:at], own[at + 1 :]
    parser = build_parser()
    arguments = parser.parse_args(own)
    arguments.launcher_options = launcher
    arguments.scale = QUICK if arguments.quick else FULL
    if arguments.prompts:
        arguments.scale = replace(arguments.scale, prompts=arguments.prompts)
    arguments.parts = arguments.only or (QUICK_PARTS if arguments.quick else PARTS)
    if bool(arguments.url) != bool(arguments.direct_url):
        parser.error("--url and --direct-url go together: the gateway, and the engine behind it")
    if arguments.url and (launcher or arguments.model):
        parser.error("a model and options for the launcher have no effect on a running stack")
    for name in ("url", "direct_url", "status_url"):
        where = urlsplit(getattr(arguments, name))
        if getattr(arguments, name) and (where.scheme not in ("http", "https") or not where.netloc):
            parser.error(
                f"--{name.replace('_', '-')} {getattr(arguments, name)} is no http address"
            )
        setattr(arguments, name, getattr(arguments, name).rstrip("/"))
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_stack_options(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--quick", action="store_true", help="a minute's look: fewer prompts, too few rounds")
    add("--only", type=_parts, metavar="PART,…", help=f"some of {', '.join(PARTS)}")
    add("--prompts", type=_positive, metavar="N", help="in the batch, and calls at once (358; 64)")
    add("--max-tokens", type=_positive, default=256, metavar="N", help="an answer (default: 256)")
    add(
        "--p95-bound-s",
        type=_seconds,
        default=1.0,
        metavar="S",
        help="the sweep's knee keeps 95 %% of the calls within this (default: 1)",
    )
    add("--seed", type=int, default=1, help="of the order of turns and of arrivals (default: 1)")
    add = parser.add_argument_group("what comes of it").add_argument
    add(
        "--out",
        default=str(Path("out") / "bench.json"),
        metavar="FILE",
        help="JSON; the HTML report goes beside it (default: out/bench.json)",
    )
    add("--against", default="", metavar="FILE", help="a stored run: what has really changed?")
    add("--record", metavar="FILE", help="the figures as a record of a run, for docs/results/")
    return parser


def _add_stack_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the stack").add_argument
    add("--url", type=_url, default="", help="a running gateway, started with GATEWAY_DEDUP=false")
    add("--direct-url", type=_url, default="", metavar="URL", help="the engine behind it")
    add(
        "--status-url",
        type=_url,
        default="",
        metavar="URL",
        help="their launcher's status page (default: two ports above the gateway)",
    )
    add(
        "--api-key",
        default=os.environ.get("BENCH_API_KEY", ""),
        metavar="KEY",
        help="for a gateway with keys; also the variable BENCH_API_KEY",
    )
    add("--model", default="", help="model of the stack that is started (default: the demo)")
    add(
        "--tokenizer",
        default="",
        metavar="FOLDER",
        help="of the served model (default: the folder that the launcher serves)",
    )
    add(
        "--questions",
        default=str(DEMO_QUESTIONS),
        metavar="FILE",
        help="the course's text form, JSON or JSONL (default: the demo's)",
    )


def _parts(text: str) -> tuple[str, ...]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in chosen if part not in PARTS]
    if unknown or not chosen:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: no such part")
    return tuple(part for part in PARTS if part in chosen)


def _url(text: str) -> str:
    where = urlsplit(text)
    if text and (where.scheme not in ("http", "https") or not where.hostname):
        raise argparse.ArgumentTypeError(f"{text} is no http address")
    return text.rstrip("/")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds")
    return value
