"""A server under judgement and the grader's verdict on it, in one call."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from lab.grade import run_grade as program
from lab.grade.grade_options import choose_questions, parse_arguments
from lab.grade.grade_result import GradeResult
from lab.reports.console import ProgressLine
from tests.fake_engine import serve_app
from tests.lab.judged import Judged, build_judged, read_pairs

# A shell's background job ignores Ctrl-C, and so would every program that a test starts and stops.
signal.signal(signal.SIGINT, signal.default_int_handler)

Examine = Callable[..., Coroutine[Any, Any, GradeResult]]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twelve questions of the demo in the course's text form."""
    blocks = [
        f"（{number}. 问题：{pair.question}\n答案：{pair.reference}\n"
        for number, pair in enumerate(read_pairs(12), start=1)
    ]
    path = tmp_path / "questions.txt"
    path.write_text("\n".join(blocks), encoding="utf-8")
    return path


async def grade_at(url: str, questions: Path, *options: str) -> GradeResult:
    fixed = ["--server_url", url, "--no_start_server", "--questions", str(questions)]
    fixed += ["--status_url", "http://127.0.0.1:9"]  # nobody's
    arguments = parse_arguments([*fixed, *options])
    asked = choose_questions(arguments)
    progress = ProgressLine(arguments.timeout, arguments.runs, io.StringIO())
    evidence = await program.examine(arguments, asked, progress, None)
    return program.build_grade(arguments, asked, evidence)


@pytest.fixture
def examine(questions: Path) -> Examine:
    async def run(judged: Judged, *options: str, file: Path = questions) -> GradeResult:
        async with serve_app(build_judged(judged)) as url:
            return await grade_at(url, file, *options)

    return run


def errors_of(grade: GradeResult) -> list[str]:
    """By name, in the alphabet's order."""
    return sorted(finding.code for finding in grade.findings if finding.severity == "error")


def notes_of(grade: GradeResult) -> list[str]:
    return [finding.code for finding in grade.findings if finding.severity == "note"]


def text_of(grade: GradeResult, code: str) -> str:
    return str(next(finding.text for finding in grade.findings if finding.code == code))


@pytest.fixture
def known_questions(tmp_path: Path) -> Path:
    """Such as the stand-in engine answers."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": f"q{n}", "answer": f"answer:q{n}"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path
