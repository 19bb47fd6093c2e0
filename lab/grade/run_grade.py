"""The course's judge, at home: asks every question, scores the answers, says what is wrong.

Without --no_start_server it starts `python -m launcher up` and stops it again; a server that
answers at the address already is used as it is. What stands behind `--` goes to the launcher:

    python -m lab grade                                     the demo model, its own questions
    python -m lab grade --no_start_server --server_url http://10.0.0.5:8000 --questions q.txt
    python -m lab grade --model_path Qwen/Qwen3-0.6B --questions q.txt -- --profile course
    python -m lab grade --compare before.json after.json    is the difference real?

Exit codes: 0 no faults, 1 faults (or, comparing, really worse), 2 bad options or a file that cannot
be written, 3 never ready, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from common.questions import BadQuestions, QuestionSet, read_questions
from lab.grade.comparison import (
    BadGrade,
    Comparison,
    compare,
    describe,
    measure,
    read_measured,
)
from lab.grade.findings import Bounds, Finding, find_all
from lab.grade.grade_result import (
    Facts,
    Grade,
    build_answers,
    build_run,
    find_ceiling,
    write_ungraded,
)
from lab.grade.judge import Judge, Mode, NeverReady, Plan, Run
from lab.grade.token_counts import TokenCounts, count_tokens
from lab.launched_server import (
    Order,
    Started,
    ended_by_sigterm,
    is_anyone_there,
    read_engine,
    read_model,
    start_server,
)
from lab.options import is_address, is_key
from lab.paths import DEMO_QUESTIONS, ROOT
from lab.records.record import (
    describe_command,
    describe_commit,
    describe_machine,
    take_record,
    write_record,
)
from lab.reports.grade_console import build_figures, describe_grade
from lab.reports.grade_page import write_report
from lab.reports.output_files import Unwritable, accept_every_text, ensure_writable, show
from lab.reports.progress import Progress

DEMO_MODEL = "demo"
_DEMO_SHARE = 0.95
_MOST_QUESTIONS = 1_000_000
# Options that name a file; a shell leaves the ~ of `--questions=~/file` alone.
_PATHS = ("questions", "details_out", "report_out", "record", "baseline")
# The seed entry's options for its own server, as settings of ours.
_SEED_SETTINGS = {
    "batch_size": "GATEWAY_WARMUP_PROMPTS",
    "max_input_length": "GATEWAY_MAX_INPUT_TOKENS",
    "max_new_tokens": "GATEWAY_MAX_TOKENS",
}
_SEED_ENGINE_OPTIONS = {
    "vllm_tp_size": "tensor-parallel-size",
    "vllm_dtype": "dtype",
    "vllm_max_model_len": "max-model-len",
    "vllm_max_num_seqs": "max-num-seqs",
    "vllm_gpu_mem_util": "gpu-memory-utilization",
}


class BadOptions(Exception):
    """Options that cannot work together."""


def main(words: Sequence[str] | None = None) -> int:
    accept_every_text()
    arguments = parse_arguments(sys.argv[1:] if words is None else words)
    try:
        with ended_by_sigterm():
            if arguments.compare:
                return run_comparison(*arguments.compare)
            check_outputs(arguments)
            asked = choose_questions(arguments)
            return run_grade(arguments, asked)
    except (BadOptions, BadQuestions, BadGrade, Unwritable) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("grade: interrupted", file=sys.stderr)
        return 130


def run_comparison(first: str, second: str) -> int:
    before, after = read_measured(Path(first)), read_measured(Path(second))
    comparison = compare(before, after)
    show(describe(comparison, before, after))
    if Path(first).samefile(second):
        show(["both are one and the same file"])
    return int(comparison.is_worse)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before the work: each can be written, and none is what another needs."""
    outputs = {
        "--details_out": Path(arguments.details_out),
        "--report_out": place_report(arguments),
    }
    if arguments.record:
        outputs["--record"] = Path(arguments.record)
    if not arguments.no_start_server:
        outputs["the server's log"] = place_log(arguments)
    taken = {Path(arguments.questions).resolve(): "--questions"}
    for name, path in outputs.items():
        other = taken.setdefault(path.resolve(), name)
        if other != name:
            raise BadOptions(f"{name} and {other} are the same file, {path}; give it another name")
        ensure_writable(path)


def place_report(arguments: argparse.Namespace) -> Path:
    if arguments.report_out:
        return Path(arguments.report_out)
    return Path(arguments.details_out).with_suffix(".html")


def place_log(arguments: argparse.Namespace) -> Path:
    return Path(arguments.details_out).with_name("grade-server.log")


def choose_questions(arguments: argparse.Namespace) -> QuestionSet:
    asked = read_questions(Path(arguments.questions))
    total = (arguments.count or len(asked.pairs)) * arguments.repeat
    if total > _MOST_QUESTIONS:
        raise BadOptions(f"{total:,} questions are too many; --count or --repeat can be smaller")
    if arguments.count:
        asked = asked.take(arguments.count)
    return asked.repeat(arguments.repeat)


def run_grade(arguments: argparse.Namespace, asked: QuestionSet) -> int:
    baseline = read_measured(Path(arguments.baseline)) if arguments.baseline else None
    progress = Progress(arguments.timeout, arguments.runs)
    details, report = Path(arguments.details_out), place_report(arguments)
    try:
        with serve(arguments, progress) as started:
            evidence = asyncio.run(examine(arguments, asked, progress, started))
        progress.working("scoring")
        grade = build_grade(arguments, asked, evidence)
    except NeverReady as error:
        progress.say(f"grade: {error.problem.code}: {error}")
        # An earlier grade must not be taken for this one.
        write_ungraded(Finding(error.problem.code, "error", error.problem.text), details)
        report.unlink(missing_ok=True)
        return 3
    finally:
        progress.close()
    if baseline:
        comparison = compare(baseline, measure("this grade", grade.pack()))
        worse = tuple(find_worse(comparison, arguments.baseline))
        notes = [Finding("baseline_remark", "note", note) for note in comparison.notes]
        notes += [
            Finding("baseline_remark", "note", f"{one.name}: cannot be told: {one.unclear}")
            for one in comparison.differences
            if one.unclear
        ]
        grade = replace(grade, findings=(*worse, *grade.findings, *notes))
    complaints = list(write_all(grade, arguments, details, report))
    show(describe_grade(grade, coloured=sys.stdout.isatty()))
    if complaints:  # the figures were dear; they are shown all the same
        raise Unwritable("; ".join(complaints))
    show([f"details saved: {details}  report: {report}"])
    return 0 if grade.is_good else 1


def write_all(
    grade: Grade, arguments: argparse.Namespace, details: Path, report: Path
) -> Iterator[str]:
    """Complaints about those that cannot be written; one does not keep the others from it."""
    writes = [partial(grade.write, details), partial(write_report, grade, report)]
    if arguments.record:
        writes.append(partial(keep_record, grade, Path(arguments.record)))
    for write in writes:
        try:
            write()
        except Unwritable as error:
            yield str(error)


@contextlib.contextmanager
def serve(arguments: argparse.Namespace, progress: Progress) -> Iterator[Started | None]:
    """A server of our own while inside, unless there is one or none is wanted."""
    order = build_order(arguments)
    if arguments.no_start_server or is_anyone_there(arguments.server_url):
        if not arguments.no_start_server:
            progress.say(
                f"something answers at {arguments.server_url} already: it is graded as it is"
            )
        if order.options or order.environment:
            progress.say("options for a server have no effect on one that is running")
        yield None
        return
    where = urlsplit(arguments.server_url)
    if where.scheme != "http" or where.path.strip("/"):
        raise BadOptions(f"cannot start a server at {arguments.server_url}; add --no_start_server")
    log_path = place_log(arguments)
    progress.say(f"starting {' '.join(order.command()[1:])}; its log is {log_path}")
    with start_server(order, log_path) as started:
        yield started


def build_order(arguments: argparse.Namespace) -> Order:
    where = urlsplit(arguments.server_url)
    given = vars(arguments)
    environment = {
        variable: str(given[name]) for name, variable in _SEED_SETTINGS.items() if given[name]
    }
    if arguments.vllm_disable_warmup:
        environment["GATEWAY_WARMUP_PROMPTS"] = "1"
    options = list(arguments.launcher_options)
    for name, key in _SEED_ENGINE_OPTIONS.items():
        if given[name]:
            options += ["--set", f"{key}={given[name]}"]
    port = where.port or 80
    return Order(where.hostname or "127.0.0.1", port, arguments.model_path, options, environment)


@dataclass(frozen=True)
class Evidence:
    """All that a server is asked for; what it is worth is found without it."""

    runs: Sequence[Run]
    counted: TokenCounts
    facts: Facts


async def examine(
    arguments: argparse.Namespace,
    asked: QuestionSet,
    progress: Progress,
    started: Started | None,
) -> Evidence:
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    # A new connection for every call, as the seed entry's evaluator makes them: one that was
    # kept and closed by the server meanwhile must not look like a fault.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(trust_env=False, limits=limits, headers=headers) as client:
        judge = Judge(arguments.server_url, client, progress)
        began = time.monotonic()
        find_end = started.find_end if started else lambda: None
        mode = await judge.wait_ready(arguments.ready_timeout, find_end)
        ready_s = time.monotonic() - began
        plan = build_plan(arguments, mode)
        questions = [pair.question for pair in asked.pairs]
        runs = []
        for number in range(1, arguments.runs + 1):
            progress.begin_run(number)
            runs.append(await judge.ask(questions, plan))
            if has_ended(runs[-1]):
                break
        progress.working("counting tokens")
        texts = [text for run in runs for text in run.answers]
        folder = find_folder(arguments.model_path)
        counted = await count_tokens(texts, folder, arguments.server_url, client)
        facts = await collect_facts(arguments, asked, plan, counted, client)
    return Evidence(runs, counted, replace(facts, mode=mode, ready_s=ready_s))


def has_ended(run: Run) -> bool:
    """After these, further runs would only say the same again."""
    return any(problem.code in ("server_died", "too_slow") for problem in run.problems)


def build_plan(arguments: argparse.Namespace, mode: Mode) -> Plan:
    return Plan(
        mode=mode if arguments.mode == "auto" else arguments.mode,
        chunk_size=arguments.request_chunk_size,
        concurrency=arguments.concurrency,
        limit_s=arguments.timeout,
    )


def find_folder(model_path: str) -> Path | None:
    folder = Path(model_path).expanduser() if model_path else None
    return folder if folder and folder.is_dir() else None


async def collect_facts(
    arguments: argparse.Namespace,
    asked: QuestionSet,
    plan: Plan,
    counted: TokenCounts,
    client: httpx.AsyncClient,
) -> Facts:
    where = urlsplit(arguments.server_url)
    host = f"[{where.hostname}]" if ":" in (where.hostname or "") else where.hostname
    status_url = arguments.status_url or f"http://{host}:{(where.port or 80) + 2}"
    secrets = (arguments.api_key, where.password or "")
    return Facts(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=describe_commit(),
        machine=arguments.machine or describe_machine(),
        command=hide(describe_command(), *secrets),
        server_url=hide(arguments.server_url, *secrets),
        mode=plan.mode,
        sending=plan.describe(len(asked.pairs)),
        limit_s=plan.limit_s,
        ready_s=0.0,
        model=await read_model(arguments.server_url, client),
        engine=await read_engine(status_url, client),
        questions_file=asked.path.removeprefix(f"{ROOT}/"),
        questions_digest=asked.digest,
        questions=len(asked.pairs),
        unique_questions=len({pair.question for pair in asked.pairs}),
        skipped=asked.skipped,
        ceiling=0.0,
        unscored=0,
        tokens_by="" if counted.counts is None else counted.source,
        tokens_missing=counted.source if counted.counts is None else "",
    )


def hide(text: str, *secrets: str) -> str:
    """A key stands on the command line, but must not stand in a report."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "…")
    return text


def build_grade(arguments: argparse.Namespace, asked: QuestionSet, evidence: Evidence) -> Grade:
    """Outside the event loop, which would not hear of a Ctrl-C meanwhile."""
    ceiling, unscored = find_ceiling([pair.reference for pair in asked.pairs])
    runs, facts = evidence.runs, replace(evidence.facts, ceiling=ceiling, unscored=unscored)
    answers = build_answers(asked, runs, evidence.counted.counts)
    results = [build_run(run, number, answers) for number, run in enumerate(runs)]
    findings = find_all(facts, answers, results, build_bounds(arguments, facts))
    return Grade(facts, tuple(results), tuple(answers), tuple(findings))


def build_bounds(arguments: argparse.Namespace, facts: Facts) -> Bounds:
    if arguments.floor is not None:
        return Bounds(arguments.floor, "--floor")
    if facts.model == DEMO_MODEL and Path(arguments.questions).resolve() == DEMO_QUESTIONS:
        return Bounds(_DEMO_SHARE * facts.ceiling, "the demo model knows its page by heart")
    return Bounds()


def find_worse(comparison: Comparison, path: str) -> Iterator[Finding]:
    for one in comparison.differences:
        if one.is_real and one.change < 0:
            code = "slower_than_baseline" if one.is_percent else "worse_than_baseline"
            before, after = f"{one.before:,.4g}", f"{one.after:,.4g}"
            yield Finding(code, "error", f"{one.name}: {after}, but {before} in {path}")


def keep_record(grade: Grade, path: Path) -> None:
    facts = grade.facts
    name = f"Grade of {facts.model or facts.server_url}, {facts.questions} questions"
    about = f"{facts.questions_file} {facts.sending}; {len(grade.runs)} runs."
    if facts.engine:
        known = (f"{key} {facts.engine[key]}" for key in ("profile", "device", "fingerprint"))
        about += f" {facts.engine['vllm']}, {', '.join(known)}."
    figures = build_figures(grade)
    record = take_record(name, figures, about=about, command=facts.command, machine=facts.machine)
    write_record(record, path)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Dashes and underscores mean the same in a name; what follows `--` is the launcher's."""
    own, launcher = list(words), []
    if "--" in own:
        at = own.index("--")
        own, launcher = own[:at], own[at + 1 :]
    parser = build_parser()
    arguments = parser.parse_args([_normalise(word) for word in own])
    arguments.launcher_options = launcher
    url = arguments.server_url.strip() or f"http://{arguments.host}:{arguments.port}"
    arguments.server_url = url.rstrip("/")
    for name, one in (("server_url", url), ("status_url", arguments.status_url)):
        if one and not is_address(one):
            parser.error(f"--{name} {one} is no http address, like http://127.0.0.1:8000")
    if not is_key(arguments.api_key):
        parser.error("--api_key holds characters that no HTTP header can carry")
    for name in _PATHS:
        expanded = Path(vars(arguments)[name] or "").parts[:1]
        if expanded and expanded[0].startswith("~"):
            with contextlib.suppress(RuntimeError):  # a user who is none stays as it is
                setattr(arguments, name, str(Path(vars(arguments)[name]).expanduser()))
    return arguments


def _normalise(word: str) -> str:
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    return "--" + name[2:].replace("-", "_") + equals + value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lab grade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    asking = parser.add_argument_group("what is asked, and how").add_argument
    asking(
        "--questions",
        "--official_test",
        default=str(DEMO_QUESTIONS),
        metavar="FILE",
        help="the course's text form, JSON or JSONL (default: the demo's)",
    )
    asking(
        "--count",
        type=_positive,
        metavar="N",
        help="ask so many: the first N, or the file again from its start",
    )
    asking(
        "--repeat",
        type=_positive,
        default=1,
        metavar="N",
        help="the whole list so many times in one run (default: 1)",
    )
    asking(
        "--runs",
        type=_positive,
        default=1,
        metavar="N",
        help="measure so many times; five tell chance from change (default: 1)",
    )
    asking(
        "--request_chunk_size",
        type=_not_negative,
        default=0,
        metavar="N",
        help="questions a call in batch mode; 0: all in one (default)",
    )
    asking(
        "--mode",
        choices=("auto", "batch", "ok"),
        default="auto",
        help="auto: what GET / says (default); ok: one question a call",
    )
    asking(
        "--concurrency", type=_positive, default=1, metavar="N", help="calls at a time (default: 1)"
    )
    asking(
        "--timeout",
        type=_seconds,
        default=360.0,
        metavar="S",
        help="limit for all answers of a run (default: 360)",
    )
    asking(
        "--ready_timeout",
        type=_seconds,
        default=420.0,
        metavar="S",
        help="limit for GET / to name a mode (default: 420)",
    )
    _add_server_options(parser)
    _add_judging_options(parser)
    add(
        "--compare",
        nargs=2,
        metavar=("BEFORE", "AFTER"),
        help="two details files: which differences are real; nothing is asked",
    )
    return parser  # fmt: skip


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the server").add_argument
    add("--server_url", default="", metavar="URL", help="default: http://HOST:PORT")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=_port, default=8000, help="default: 8000")
    add("--no_start_server", action="store_true", help="grade a running server")
    add(
        "--api_key",
        default=os.environ.get("GRADE_API_KEY", ""),
        metavar="KEY",
        help="for a gateway with keys; also the variable GRADE_API_KEY",
    )
    add(
        "--status_url",
        default="",
        metavar="URL",
        help="the launcher's status page (default: two ports above the server's)",
    )
    add("--machine", default="", help="what to write down as the machine, if it is another one")
    add(
        "--model_path",
        default="",
        metavar="MODEL",
        help="the model that a started server serves; its tokenizer counts the tokens "
        "(else the server's /tokenize does)",
    )
    names = {**_SEED_SETTINGS, **{k: f"--set {v}" for k, v in _SEED_ENGINE_OPTIONS.items()}}
    for name, meaning in names.items():
        add(f"--{name}", default=None, metavar="VALUE", help=f"of a started server: {meaning}")
    add("--vllm_disable_warmup", action="store_true",
        help="of a started server: a warm-up of one question")  # fmt: skip


def _add_judging_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what comes of it").add_argument
    add(
        "--floor",
        type=_share,
        metavar="SCORE",
        help="the least ROUGE-L in the course reading that is no fault",
    )
    add(
        "--baseline",
        metavar="FILE",
        help="earlier details; really worse or slower than those is a fault",
    )
    add(
        "--details_out",
        default=str(Path("out") / "grade.json"),
        metavar="FILE",
        help="JSON details (default: out/grade.json)",
    )
    add(
        "--report_out", default="", metavar="FILE", help="HTML report (default: beside the details)"
    )
    add("--record", metavar="FILE",
        help="the figures as a record of a run, for docs/results/")  # fmt: skip


def _positive(text: str) -> int:
    return _at_least(text, 1)


def _not_negative(text: str) -> int:
    return _at_least(text, 0)


def _at_least(text: str, least: int) -> int:
    if not (text.isdecimal() and len(text) < 19) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} on")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is no time in seconds")
    return value


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no score from 0 to 1")
    return value


def _port(text: str) -> int:
    number = _at_least(text, 1)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port from 1 to 65535")
    return number
