"""The course's judge and its clock, at home: builds the image, runs it without a network, grades.

Builds this checkout as the judge does, without arguments, starts one container on a network with no
way out, waits until it is healthy, asks every question and grades the answers; each step against
the limit of its track. What stands behind `--` goes to `docker run`:

    python -m lab judge                                        build, run, grade: PASS or FAIL
    python -m lab judge --track other --questions test.txt     the shorter limits, the course's file
    python -m lab judge --no-cache                             the build's time as on a new machine
    python -m lab judge --image course                         one that is built already
    python -m lab judge --publish 8000                         Docker Desktop; it has a network then

Exit codes: 0 PASS, 1 FAIL, 2 bad options or no docker, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.command_line.output import show
from lab import options
from lab.course import container
from lab.course.container import BuildFailed, Container
from lab.failures import BadOptions
from lab.grade import grade_options, run_grade
from lab.grade.grade_result import GradeResult
from lab.paths import OUT
from lab.readiness import Mode, Problem, ServerNeverReady, wait_ready
from lab.reports.console import BOLD, GREEN, RED, ProgressLine, paint
from lab.reports.output_files import ensure_writable
from lab.service import open_http

_HEALTH_POLL_S = 0.5


@dataclass(frozen=True)
class Track:
    """Seconds that a track of the course allows, as public entries tell them."""

    build_s: float
    healthy_s: float
    answers_s: float


TRACKS = {"5090": Track(1500, 420, 360), "other": Track(900, 180, 360)}
_ADVICE = {
    "build_failed": "read the build's log; a model that is not there is named in its last lines",
    "build_too_slow": "fetch from a nearer hub (HUB=modelscope, HF_ENDPOINT), or a smaller model",
    "never_started": "read the container's log; `python -m launcher doctor` names most causes",
    "never_ready": "a smaller model, or the profile `development`, which captures no graphs; with "
    "Docker Desktop, which hides such networks, --publish 8000",
    "never_healthy": "GET / answers, but HEALTHCHECK does not agree; read the container's log",
    "too_slow": "fewer max_tokens in course.toml, and `python -m launcher tune`",
    "server_died": "read the container's log; it is memory, as often as not",
    "below_floor": "`python -m lab sweep` says which prompt suits the model",
    "empty_answers": "another prompt_style in course.toml; `python -m lab sweep` tries them",
    "same_answer": "another prompt_style in course.toml: it may be asked in a form it never saw",
    "unrelated_answers": "another prompt_style in course.toml, or a model that was trained more",
    "refused": "`max_input_tokens` in course.toml cuts questions that are too long",
}


@dataclass(frozen=True)
class JudgedStep:
    """One step against its limit. `problems` are what is to be mended."""

    name: str
    limit_s: float | None
    seconds: float | None
    problems: tuple[Problem, ...] = ()
    note: str = ""

    @property
    def is_good(self) -> bool:
        return not self.problems


@dataclass
class Verdict:
    """All steps; one that failed is the last."""

    steps: list[JudgedStep] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return all(step.is_good for step in self.steps)

    def describe(self, *, coloured: bool) -> Iterator[str]:
        yield ""
        for step in self.steps:
            word = paint("ok  ", GREEN, coloured=coloured)
            word = word if step.is_good else paint("FAIL", RED, coloured=coloured)
            time_s = "" if step.seconds is None else f"{step.seconds:8.1f} s"
            limit = "" if step.limit_s is None else f" of {step.limit_s:g}"
            yield f"{word}  {step.name:<8}{time_s:>10}{limit:<9} {step.note}".rstrip()
        for problem in (problem for step in self.steps for problem in step.problems):
            yield f"mend: {problem.code}: {problem.text}"
            if problem.code in _ADVICE:
                yield f"      {_ADVICE[problem.code]}"
        word, colour = ("PASS", GREEN) if self.is_good else ("FAIL", RED)
        yield paint(word, colour if coloured else BOLD, coloured=coloured)


def main(words: Sequence[str]) -> int:
    arguments = options.parse_options(build_parser(), words)
    for path in (arguments.out, *(place(arguments, name) for name in ("build", "container"))):
        ensure_writable(Path(path))
    progress = ProgressLine()
    verdict = Verdict()
    try:
        judge(arguments, progress, verdict)
    finally:
        progress.close()
    show(verdict.describe(coloured=sys.stdout.isatty()))
    return 0 if verdict.is_good else 1


def build_parser() -> argparse.ArgumentParser:
    parser = options.build_parser("judge", __doc__)
    options.add_questions(parser, "--official-test")
    add = parser.add_argument
    tracks = "; ".join(
        f"{name}: {track.build_s:g}, {track.healthy_s:g}, {track.answers_s:g} s"
        for name, track in TRACKS.items()
    )
    add("--track", choices=TRACKS, default="5090", help=f"its limits ({tracks})")
    help_ = "ask so many: the first N, or the file again from its start (default: 358)"
    add("--count", type=options.whole_number(1), default=358, metavar="N", help=help_)
    add("--image", default="", metavar="NAME", help="judge this one; build nothing")
    add("--no-cache", action="store_true", help="build every layer anew, as a new machine does")
    help_ = "NAME=VALUE for the build; the judge gives none"
    add("--build-arg", action="append", default=[], metavar="ARG", help=help_)
    help_ = "reach it by this port of 127.0.0.1; it is not cut off from the network then"
    add("--publish", type=options.port, metavar="PORT", help=help_)
    default = str(OUT / "judge.json")
    help_ = f"the grade's details; report and logs go beside it (default: {default})"
    add("--out", default=default, metavar="FILE", help=help_)
    return parser


def place(arguments: argparse.Namespace, what: str) -> Path:
    path = Path(arguments.out)
    return path.with_name(f"{path.stem}-{what}.log")


def judge(arguments: argparse.Namespace, progress: ProgressLine, verdict: Verdict) -> None:
    track, image = TRACKS[arguments.track], arguments.image or container.NAME
    if not arguments.image:
        verdict.steps.append(build(arguments, track, progress))
    elif arguments.no_cache or arguments.build_arg:
        raise BadOptions("--image is built already; leave out --no-cache and --build-arg")
    if not verdict.is_good:
        return
    run_options = choose_run_options(arguments.launcher_options)
    log_path = place(arguments, "container")
    with container.run_container(
        image, run_options, log_path, published=arguments.publish
    ) as running:
        step = wait_healthy(running, track.healthy_s, progress)
        verdict.steps.append(step)
        if step.is_good:
            verdict.steps += grade(arguments, running, track)


def choose_run_options(given: Sequence[str]) -> list[str]:
    """The judge's machine has a GPU and gives it; here only where there is one."""
    has_gpu = shutil.which("nvidia-smi") is not None
    wants = not any(word.startswith("--gpus") for word in given)
    return [*(["--gpus", "all"] if has_gpu and wants else []), *given]


def build(arguments: argparse.Namespace, track: Track, progress: ProgressLine) -> JudgedStep:
    words = ["--no-cache"] if arguments.no_cache else []
    for pair in arguments.build_arg:
        words += ["--build-arg", pair]
    note = "" if arguments.no_cache else "with layers of earlier builds: --no-cache tells more"
    if arguments.build_arg:
        note = f"with --build-arg {' '.join(arguments.build_arg)}, which the judge does not give"
    log_path = place(arguments, "build")
    progress.say(f"building {container.NAME}; the log is {log_path}")
    try:
        took = container.build_image(container.NAME, words, track.build_s, log_path, progress)
    except BuildFailed as error:
        return JudgedStep("build", track.build_s, None, (error.problem,), note)
    return JudgedStep("build", track.build_s, took, (), note)


def wait_healthy(running: Container, limit_s: float, progress: ProgressLine) -> JudgedStep:
    """Until GET / names a mode, and Docker's own health check says so too."""

    def took() -> float:
        return time.monotonic() - running.started

    progress.say(f"container started; its log will be {running.log_path}")
    try:
        mode = asyncio.run(wait_mode(running, limit_s - took(), progress))
    except ServerNeverReady as error:
        return JudgedStep("healthy", limit_s, took(), (error.problem,))
    while (health := running.read_health()) == "starting" and took() < limit_s:
        time.sleep(_HEALTH_POLL_S)
    problems: tuple[Problem, ...] = ()
    if health not in ("healthy", ""):
        text = f"its HEALTHCHECK says {health} after {took():.0f} s"
        problems = (Problem("never_healthy", text),)
    return JudgedStep("healthy", limit_s, took(), problems, f"GET / says {mode}")


async def wait_mode(running: Container, limit_s: float, progress: ProgressLine) -> Mode:
    async with open_http() as client:
        return await wait_ready(running.url, client, progress, limit_s, running.find_end)


def grade(arguments: argparse.Namespace, running: Container, track: Track) -> list[JudgedStep]:
    """The answers against the clock, and what they are worth."""
    words = ["--no-start-server", "--server-url", running.url, "--questions", arguments.questions]
    words += ["--count", str(arguments.count), "--timeout", str(track.answers_s)]
    words += ["--details-out", arguments.out, "--ready-timeout", "30"]
    told = grade_options.parse_arguments(words)
    try:
        found = run_grade.take_grade(told, grade_options.choose_questions(told))
    except ServerNeverReady as error:
        return [JudgedStep("answers", track.answers_s, None, (error.problem,))]
    late = tuple(Problem(one.code, one.text) for one in found.findings if one.code == "too_slow")
    faults = tuple(
        Problem(one.code, one.text)
        for one in found.findings
        if one.severity == "error" and one.code != "too_slow"
    )
    seconds = max(run.elapsed_s for run in found.runs)
    return [
        JudgedStep("answers", track.answers_s, seconds, late),
        JudgedStep("grade", None, None, faults, describe_score(found)),
    ]


def describe_score(found: GradeResult) -> str:
    first = found.runs[0]
    return f"ROUGE-L {first.rouge_course:.4f} of at most {found.facts.ceiling:.4f}"
