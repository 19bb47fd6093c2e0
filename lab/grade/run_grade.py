"""The course's judge, at home: asks every question, scores the answers, says what is wrong.

Without --no_start_server it starts `python -m launcher up` and stops it again; a server that
answers at the address already is used as it is. What stands behind `--` goes to the launcher:

    python -m lab grade                                        the demo model, its own questions
    python -m lab grade --no_start_server --server_url http://10.0.0.5:8000 --questions q.txt
    python -m lab grade --model_path Qwen/Qwen3-0.6B --questions q.txt -- --profile course
    python -m lab grade --compare before.json after.json       is the difference real?

Exit codes: 0 no faults, 1 faults (or, comparing, really worse), 2 bad options or a file that cannot
be written, 3 never ready, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from common.command_line.output import show
from common.project import DEMO_QUESTIONS
from common.questions import QuestionSet
from lab.failures import BadOptions, Unwritable
from lab.grade import grade_options, grade_result
from lab.grade.comparison import GradeComparison, compare, describe, extract_grade, read_grade
from lab.grade.findings import GradeFinding, ScoreFloor, find_all
from lab.grade.grade_console import build_figures, describe_grade
from lab.grade.grade_page import write_report
from lab.grade.grade_result import GradeFacts, GradeResult
from lab.grade.judge import Judge, JudgeRun, SendingPlan
from lab.grade.token_counts import TokenCounts, count_tokens
from lab.launched_server import LaunchedServer, launch
from lab.options import build_headers, hide
from lab.paths import ROOT
from lab.readiness import Mode, ServerNeverReady, wait_ready
from lab.records.record import take_facts, take_record, write_record
from lab.reports.console import ProgressLine
from lab.service import is_anyone_there, open_http, read_launcher, read_model

DEMO_MODEL = "demo"
_DEMO_SHARE = 0.95


def main(words: Sequence[str]) -> int:
    arguments = grade_options.parse_arguments(words, __doc__)
    if arguments.compare:
        return run_comparison(*map(Path, arguments.compare))
    grade_options.check_outputs(arguments)
    grade = take_grade(arguments, grade_options.choose_questions(arguments))
    return 0 if grade.is_good else 1


def run_comparison(first: Path, second: Path) -> int:
    before, after = read_grade(first), read_grade(second)
    comparison = compare(before, after)
    show(describe(comparison, before, after))
    if first.samefile(second):
        show(["both are one and the same file"])
    return int(comparison.is_worse)


def take_grade(arguments: argparse.Namespace, asked: QuestionSet) -> GradeResult:
    """Asked, scored, written and shown."""
    baseline = read_grade(Path(arguments.baseline)) if arguments.baseline else None
    progress = ProgressLine(arguments.timeout, arguments.runs)
    details, report = Path(arguments.details_out), Path(arguments.report_out)
    try:
        with serve(arguments, progress) as launched:
            evidence = asyncio.run(examine(arguments, asked, progress, launched))
        progress.working("scoring")
        grade = build_grade(arguments, asked, evidence)
    except ServerNeverReady as error:
        # An earlier grade must not be taken for this one.
        grade_result.write_ungraded(
            GradeFinding(error.problem.code, "error", error.problem.text), details
        )
        report.unlink(missing_ok=True)
        raise
    finally:
        progress.close()
    if baseline:
        comparison = compare(baseline, extract_grade("this grade", grade.pack()))
        worse, remarks = find_worse(comparison, arguments.baseline), find_remarks(comparison)
        grade = replace(grade, findings=(*worse, *grade.findings, *remarks))
    complaints = list(write_all(grade, arguments))
    show(describe_grade(grade, coloured=sys.stdout.isatty()))
    if complaints:  # the figures were dear; they are shown all the same
        raise Unwritable("; ".join(complaints))
    show([f"details saved: {details}  report: {report}"])
    return grade


def write_all(grade: GradeResult, arguments: argparse.Namespace) -> Iterator[str]:
    """Complaints about those that cannot be written; one does not keep the others from it."""
    writes = [
        partial(grade.write, Path(arguments.details_out)),
        partial(write_report, grade, Path(arguments.report_out)),
    ]
    if arguments.record:
        writes.append(partial(keep_record, grade, Path(arguments.record)))
    for write in writes:
        try:
            write()
        except Unwritable as error:
            yield str(error)


@contextlib.contextmanager
def serve(arguments: argparse.Namespace, progress: ProgressLine) -> Iterator[LaunchedServer | None]:
    """A server of our own while inside, unless there is one or none is wanted."""
    command = grade_options.build_launch_command(arguments)
    if arguments.no_start_server or is_anyone_there(arguments.url):
        if not arguments.no_start_server:
            progress.say(f"something answers at {arguments.url} already: it is graded as it is")
        if command.options or command.environment:
            progress.say("options for a server have no effect on one that is running")
        yield None
        return
    where = urlsplit(arguments.url)
    if where.scheme != "http" or where.path.strip("/"):
        raise BadOptions(f"cannot start a server at {arguments.url}; add --no_start_server")
    log_path = Path(grade_options.place_beside(arguments, "grade-server.log"))
    with launch(command, log_path, progress) as launched:
        yield launched


@dataclass(frozen=True)
class Evidence:
    """All that a server is asked for; what it is worth is found without it."""

    runs: Sequence[JudgeRun]
    counted: TokenCounts
    facts: GradeFacts


async def examine(
    arguments: argparse.Namespace,
    asked: QuestionSet,
    progress: ProgressLine,
    launched: LaunchedServer | None,
) -> Evidence:
    # A new connection for every call, as the seed entry's evaluator makes them: one that was
    # kept and closed by the server meanwhile must not look like a fault.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with open_http(limits=limits, headers=build_headers(arguments.api_key)) as client:
        began = time.monotonic()
        find_end = launched.find_end if launched else None
        limit_s = arguments.ready_timeout
        mode = await wait_ready(arguments.url, client, progress, limit_s, find_end)
        ready_s = time.monotonic() - began
        plan = build_plan(arguments, mode)
        judge = Judge(arguments.url, client, asked.questions, plan)
        runs = []
        for number in range(1, arguments.runs + 1):
            progress.begin_run(number)
            runs.append(await judge.ask(progress))
            if any(call.is_final for call in runs[-1].calls):
                break
        progress.working("counting tokens")
        texts = [text for run in runs for text in run.answers]
        counted = await count_tokens(texts, arguments.model_path, arguments.url, client)
        facts = await collect_facts(arguments, asked, plan, counted, client)
    return Evidence(runs, counted, replace(facts, mode=mode, ready_s=ready_s))


def build_plan(arguments: argparse.Namespace, mode: Mode) -> SendingPlan:
    return SendingPlan(
        mode=mode if arguments.mode == "auto" else arguments.mode,
        chunk_size=arguments.request_chunk_size,
        concurrency=arguments.concurrency,
        limit_s=arguments.timeout,
    )


async def collect_facts(
    arguments: argparse.Namespace,
    asked: QuestionSet,
    plan: SendingPlan,
    counted: TokenCounts,
    client: httpx.AsyncClient,
) -> GradeFacts:
    secrets = (arguments.api_key, urlsplit(arguments.url).password or "")
    launcher = await read_launcher(arguments.status_url, client)
    return GradeFacts(
        **take_facts(arguments.machine, *secrets),
        server_url=hide(arguments.url, *secrets),
        mode=plan.mode,
        sending=plan.describe(len(asked.pairs)),
        limit_s=plan.limit_s,
        model=await read_model(arguments.url, client),
        engine=launcher.describe_engine(),
        questions_file=asked.path.removeprefix(f"{ROOT}/"),
        questions_digest=asked.digest,
        questions=len(asked.pairs),
        unique_questions=len(set(asked.questions)),
        skipped=asked.skipped,
        tokens_by="" if counted.counts is None else counted.source,
        tokens_missing=counted.source if counted.counts is None else "",
    )


def build_grade(
    arguments: argparse.Namespace, asked: QuestionSet, evidence: Evidence
) -> GradeResult:
    """Outside the event loop, which would not hear of a Ctrl-C meanwhile."""
    ceiling, unscored = grade_result.find_ceiling([pair.reference for pair in asked.pairs])
    runs, facts = evidence.runs, replace(evidence.facts, ceiling=ceiling, unscored=unscored)
    answers = grade_result.build_answers(asked, runs, evidence.counted.counts)
    results = [grade_result.build_run(run, number, answers) for number, run in enumerate(runs)]
    findings = find_all(facts, answers, results, choose_floor(arguments, facts))
    return GradeResult(facts, tuple(results), tuple(answers), tuple(findings))


def choose_floor(arguments: argparse.Namespace, facts: GradeFacts) -> ScoreFloor | None:
    if arguments.floor is not None:
        return ScoreFloor(arguments.floor, "--floor")
    if facts.model == DEMO_MODEL and Path(arguments.questions).resolve() == DEMO_QUESTIONS:
        reason = "the demo model knows its page by heart"
        return ScoreFloor(_DEMO_SHARE * facts.ceiling, reason)
    return None


def find_worse(comparison: GradeComparison, path: str) -> Iterator[GradeFinding]:
    for one in comparison.changes:
        if one.is_worse:
            code = "slower_than_baseline" if one.is_relative else "worse_than_baseline"
            before, after = f"{one.before:,.4g}", f"{one.after:,.4g}"
            yield GradeFinding(code, "error", f"{one.name}: {after}, but {before} in {path}")


def find_remarks(comparison: GradeComparison) -> Iterator[GradeFinding]:
    unclear = (
        f"{one.name}: cannot be told: {one.unclear}" for one in comparison.changes if one.unclear
    )
    for text in (*comparison.notes, *unclear):
        yield GradeFinding("baseline_remark", "note", text)


def keep_record(grade: GradeResult, path: Path) -> None:
    facts = grade.facts
    name = f"Grade of {facts.model or facts.server_url}, {facts.questions} questions"
    about = f"{facts.questions_file} {facts.sending}; {len(grade.runs)} runs."
    if facts.engine:
        known = (f"{key} {facts.engine[key]}" for key in ("profile", "device", "fingerprint"))
        about += f" {facts.engine['vllm']}, {', '.join(known)}."
    figures = build_figures(grade)
    record = take_record(name, figures, about=about, command=facts.command, machine=facts.machine)
    write_record(record, path)
