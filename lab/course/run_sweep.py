"""Which way of asking suits a model: prompt style x system prompt x max_tokens x single_line.

The engine is started once, and before it, for each combination, a gateway with those settings; each
is asked every question as the judge asks, scored and timed. What is measured already is not
measured again, unless the model, the questions, course.toml or a file of --system-prompt changed:

    python -m lab sweep --model models/my-ft --count 60            all combinations, on 60 questions
    python -m lab sweep --prompt-style chat qa --max-tokens 96 256 fewer of them
    python -m lab sweep --system-prompt none one-line mine.txt     a file with a text of your own
    python -m lab sweep --write course.toml                        the best one goes in there
    python -m lab sweep --engine URL --model models/my-ft …        over an engine that runs already

Exit codes: 0 done, 2 bad options, or no combination works, 3 the engine does not start, 130
interrupted (what was measured is kept).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from common.command_line.output import show
from common.files import read_text
from common.ports import find_free_ports
from common.project import DEMO_MODEL
from common.questions import QuestionSet, read_questions
from common.toml_edit import set_values
from lab import options
from lab.course.sweep_result import (
    SweepArm,
    SweepResult,
    SweptArm,
    digest_system_prompt,
    digest_text,
)
from lab.failures import BadOptions
from lab.grade.grade_result import build_answers, build_run
from lab.grade.judge import Judge, SendingPlan
from lab.launched_server import LaunchCommand, LaunchedServer, launch, launch_program
from lab.paths import OUT, ROOT
from lab.readiness import POLL_S, Problem, ServerNeverReady, wait_ready
from lab.reports.console import ProgressLine
from lab.reports.output_files import ensure_writable
from lab.service import open_http
from launcher.config import ServeSettings, load_settings
from launcher.models.model import Model, find_model
from launcher.plan.fingerprint import describe_model

STYLES = ("chat", "chatml", "qa", "raw")
NO_SYSTEM_PROMPT = "none"
_COURSE = ROOT / "course.toml"
_GATEWAY_START_S = 300.0


def main(words: Sequence[str]) -> int:
    arguments = options.parse_options(build_parser(), words)
    check_system_prompts(arguments.system_prompt)
    asked = read_questions(Path(arguments.questions).expanduser()).take(arguments.count)
    out = Path(arguments.out)
    outputs = [out, out.with_suffix(".html"), out.with_name("sweep-engine.log")]
    for path in (*outputs, *([Path(arguments.write)] if arguments.write else [])):
        ensure_writable(path)
    model = find_asked_model(arguments)
    context = describe_context(arguments, asked, model)
    result = SweepResult.read(out, "" if arguments.again else context) or SweepResult(context)
    progress = ProgressLine()
    try:
        sweep(arguments, asked, model.path, result, progress)
    finally:
        progress.close()
        result.write(out)
    show(result.describe(list_arms(arguments)))
    best = result.find_best(list_arms(arguments))
    if best is None:
        raise BadOptions("no combination works with this model; the reasons stand above")
    show([f"details: {out}  page: {out.with_suffix('.html')}"])
    if arguments.write:
        set_values(Path(arguments.write), "gateway", best.arm.settings())
        show([f"{arguments.write} has the best of them now: {best.arm.name}"])
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = options.build_parser("sweep", __doc__)
    options.add_questions(parser, "--official-test")
    add, positive = parser.add_argument, options.whole_number(1)
    help_ = "a folder, or a hub's name (default: the demo)"
    add("--model", default="", metavar="MODEL", help=help_)
    help_ = "use one that runs; --model is what it serves"
    add("--engine", type=options.address, default="", metavar="URL", help=help_)
    help_ = "ask so many: the first N, or the file again from its start (default: 358)"
    add("--count", type=positive, default=358, metavar="N", help=help_)
    add("--prompt-style", nargs="+", choices=STYLES, default=list(STYLES), help="default: all")
    help_ = "`none`, the shipped `one-line`, or files (default: the first two)"
    default = [NO_SYSTEM_PROMPT, "one-line"]
    add("--system-prompt", nargs="+", default=default, metavar="NAME", help=help_)
    help_ = "default: 256"
    add("--max-tokens", nargs="+", type=positive, default=[256], metavar="N", help=help_)
    help_ = "default: both"
    add("--single-line", nargs="+", choices=("no", "yes"), default=["no", "yes"], help=help_)
    add("--write", metavar="FILE", help="put the best into the [gateway] table of this file")
    add("--again", action="store_true", help="measure what an earlier run has measured, too")
    default_out = str(OUT / "sweep.json")
    help_ = f"what was measured; the page goes beside it (default: {default_out})"
    add("--out", default=default_out, metavar="FILE", help=help_)
    return parser


def check_system_prompts(names: Sequence[str]) -> None:
    """Before an engine is started."""
    for name in names:
        if name not in (NO_SYSTEM_PROMPT, "one-line"):
            try:
                read_text(Path(name))
            except (OSError, UnicodeDecodeError) as error:
                raise BadOptions(f"--system-prompt {name}: cannot be read ({error})") from None


def find_asked_model(arguments: argparse.Namespace) -> Model:
    """Its folder has the tokenizer, which a gateway needs for `chat`; a hub's is fetched."""
    if arguments.engine and not arguments.model:
        raise BadOptions("--engine needs --model: which one it serves")
    arguments.model = arguments.model or str(DEMO_MODEL)
    words = ["--config", str(_COURSE)] if _COURSE.is_file() else []
    words += ["--model", arguments.model, *arguments.launcher_options]
    settings = load_settings(ServeSettings, words)
    return find_model(settings, config_only=bool(arguments.engine))


def describe_context(arguments: argparse.Namespace, asked: QuestionSet, model: Model) -> str:
    """What else than an arm's own settings moves its figures: what is asked of what, and how."""
    course = read_text(_COURSE) if _COURSE.is_file() else ""
    words = [course, *arguments.launcher_options]
    where = arguments.engine or arguments.model
    asked_of = f"{where} {describe_model(model)} {asked.digest} {len(asked.pairs)}"
    return f"{asked_of} {digest_text(json.dumps(words))}"


def list_arms(arguments: argparse.Namespace) -> list[SweepArm]:
    systems = ["" if one == NO_SYSTEM_PROMPT else one for one in arguments.system_prompt]
    return [
        SweepArm(style, system, tokens, line == "yes", digest_system_prompt(system))
        for style, system, tokens, line in itertools.product(
            arguments.prompt_style, systems, arguments.max_tokens, arguments.single_line
        )
    ]


def sweep(
    arguments: argparse.Namespace,
    asked: QuestionSet,
    folder: Path,
    result: SweepResult,
    progress: ProgressLine,
) -> None:
    """`folder` is the model's."""
    arms = list_arms(arguments)
    left = [arm for arm in arms if result.find(arm) is None]
    if len(left) < len(arms):
        progress.say(f"{len(arms) - len(left)} of {len(arms)} are measured already (--again)")
    if not left:
        return
    with run_engine(arguments, progress) as (url, launched):
        asyncio.run(wait_engine(url, launched, progress))
        for number, arm in enumerate(left, start=1):
            swept = measure(Path(arguments.out), asked, arm, url, folder)
            result.add(swept)
            result.write(Path(arguments.out))
            progress.say(f"{number} of {len(left)}  {arm.name}: {swept.describe()}")


@contextlib.contextmanager
def run_engine(
    arguments: argparse.Namespace, progress: ProgressLine
) -> Iterator[tuple[str, LaunchedServer | None]]:
    if arguments.engine:
        yield arguments.engine, None
        return
    port = find_free_ports(1)[0]
    own = ["--engine-port", str(port), "--status-port", "0", *arguments.launcher_options]
    environment = {"LAUNCHER_CONFIG": str(_COURSE)} if _COURSE.is_file() else {}
    command = LaunchCommand("127.0.0.1", 8000, arguments.model, own, environment, "serve")
    with launch(command, Path(arguments.out).with_name("sweep-engine.log"), progress) as launched:
        yield f"http://127.0.0.1:{port}", launched


async def wait_engine(url: str, launched: LaunchedServer | None, progress: ProgressLine) -> None:
    """vLLM's own word; the gateways wait for more."""
    progress.say("waiting for the engine")
    async with open_http(timeout=5.0) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).is_success:
                    return
            if launched and (end := launched.find_end()):
                raise ServerNeverReady(end)
            if launched is None:
                raise ServerNeverReady(Problem("never_ready", f"no engine answers at {url}"))
            await asyncio.sleep(POLL_S)


def measure(
    out: Path, asked: QuestionSet, arm: SweepArm, engine_url: str, folder: Path
) -> SweptArm:
    """By a gateway of its own: what is measured is what the judge would see."""
    port = find_free_ports(1)[0]
    words = ["--port", str(port), "--engines", engine_url, *arm.flags()]
    words += ["--warmup-prompts", str(min(len(asked.pairs), 64))]
    environment = {"GATEWAY_CONFIG": str(_COURSE)} if _COURSE.is_file() else {}
    words += ["--tokenizer", str(folder)]
    log_path = out.with_name("sweep-gateway.log")
    with launch_program("gateway", words, environment, log_path) as gateway:
        try:
            return asyncio.run(ask(asked, arm, f"http://127.0.0.1:{port}", gateway))
        except ServerNeverReady as error:
            return SweptArm(arm, failure=" ".join(error.problem.text.split())[-300:])


async def ask(asked: QuestionSet, arm: SweepArm, url: str, gateway: LaunchedServer) -> SweptArm:
    quiet = ProgressLine(stream=io.StringIO())
    async with open_http() as client:
        await wait_ready(url, client, quiet, _GATEWAY_START_S, gateway.find_end)
        plan = SendingPlan("batch", limit_s=_GATEWAY_START_S)
        run = await Judge(url, client, asked.questions, plan).ask(quiet)
    scored = build_run(run, 0, build_answers(asked, [run], None))
    return SweptArm(
        arm,
        rouge_course=scored.rouge_course,
        rouge_whitespace=scored.rouge_whitespace,
        seconds=scored.elapsed_s,
        characters_per_s=scored.speed.characters_per_s,
        answered=scored.answered,
        asked=scored.asked,
    )
