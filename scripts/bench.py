"""Gateway time over direct time: the same prompts to both doors, interleaved in random order.

Two direct arms run beside each other, so that the difference between them (the control) says how
far any other difference can be believed. Without --gateway it starts its own stack on free ports.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gateway.config import Settings  # noqa: E402
from gateway.prompts import PromptBuilder  # noqa: E402
from gateway.wire import Prompt, Sampling, build_completion_call, default_sampling  # noqa: E402

LARGEST_BATCH_RATIO = 1.02
LARGEST_SINGLE_ADDED_MS = 5.0
QUIET_CONTROL = 0.03


@dataclass(frozen=True)
class Arm:
    """One way of asking: a name and a call that returns the answers."""

    name: str
    ask: Callable[[], Awaitable[list[str]]]


@dataclass
class Comparison:
    """Times of the three arms for one workload, round by round."""

    title: str
    seconds: dict[str, list[float]]

    def ratio(self, arm: str) -> tuple[float, float, float]:
        """Median and quartiles of the paired ratios to the direct arm."""
        pairs = zip(self.seconds[arm], self.seconds["direct"], strict=True)
        low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
        return middle, low, high

    def added_ms(self, arm: str) -> float:
        pairs = zip(self.seconds[arm], self.seconds["direct"], strict=True)
        return statistics.median(a - b for a, b in pairs) * 1e3

    def is_quiet(self) -> bool:
        return abs(self.ratio("control")[0] - 1) <= QUIET_CONTROL

    def lines(self) -> Iterator[str]:
        yield self.title
        for arm, times in self.seconds.items():
            middle, low, high = self.ratio(arm)
            yield (
                f"  {arm:8} {statistics.median(times) * 1e3:10.2f} ms   ratio {middle:6.3f} "
                f"({low:.3f} to {high:.3f})   added {self.added_ms(arm):+7.2f} ms"
            )


class Doors:
    """The two doors and the questions; every answer is kept for comparison."""

    def __init__(
        self, session: aiohttp.ClientSession, gateway: str, engine: str, arguments: Any
    ) -> None:
        self.session, self.gateway, self.engine = session, gateway, engine
        settings = Settings(tokenizer=Path(arguments.tokenizer))
        self.builder = PromptBuilder(settings)
        self.sampling: Sampling = replace(
            default_sampling(settings),
            stop=self.builder.stop,
            stop_token_ids=self.builder.stop_token_ids,
        )
        self.model = ""

    async def learn_model(self) -> None:
        async with self.session.get(f"{self.engine}/v1/models") as answer:
            self.model = (await answer.json())["data"][0]["id"]

    async def arms(self, questions: list[str], max_tokens: int) -> list[Arm]:
        prompts = await self.builder.build(questions, None, None)
        ids: list[Prompt] = [prompt for prompt in prompts if isinstance(prompt, list)]
        sampling = replace(self.sampling, max_tokens=max_tokens)
        direct_body = build_completion_call(self.model, ids, sampling)
        asked = questions if len(questions) > 1 else questions[0]
        gateway_body = orjson.dumps({"prompt": asked, "max_tokens": max_tokens})

        async def direct() -> list[str]:
            data = await self._post(f"{self.engine}/v1/completions", direct_body)
            return [choice["text"].strip() for choice in data["choices"]]

        async def through() -> list[str]:
            data = await self._post(f"{self.gateway}/predict", gateway_body)
            answer = data["response"]
            return answer if isinstance(answer, list) else [answer]

        return [Arm("direct", direct), Arm("control", direct), Arm("gateway", through)]

    async def _post(self, url: str, body: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        async with self.session.post(url, data=body, headers=headers) as answer:
            data = await answer.json(loads=orjson.loads)
            if "dedup" in answer.headers.get("Server-Timing", ""):
                raise SystemExit("bench: the gateway shares answers; start it with --no-dedup")
            if answer.status != 200:
                raise SystemExit(f"bench: {url} answered {answer.status}: {data}")
            return data


async def compare(title: str, arms: list[Arm], rounds: int, warmups: int) -> Comparison:
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    expected: list[str] | None = None
    for number in range(-warmups, rounds):
        progress(f"{title}: round {number + 1} of {rounds}" if number >= 0 else f"{title}: warm-up")
        for arm in random.sample(arms, len(arms)):
            started = time.perf_counter()
            answers = await arm.ask()
            took_s = time.perf_counter() - started
            expected = expected or answers
            if answers != expected:
                wrong = first_difference(answers, expected)
                raise SystemExit(
                    f"bench: {arm.name} answered prompt {wrong} differently: "
                    f"{answers[wrong : wrong + 1]}, not {expected[wrong : wrong + 1]}"
                )
            if number >= 0:
                seconds[arm.name].append(took_s)
    progress("")
    return Comparison(title, seconds)


def first_difference(answers: list[str], expected: list[str]) -> int:
    pairs = itertools.zip_longest(answers, expected)
    return next(index for index, (answer, other) in enumerate(pairs) if answer != other)


@contextlib.asynccontextmanager
async def own_stack(arguments: argparse.Namespace) -> AsyncIterator[tuple[str, str]]:
    """The launcher on free ports, or the addresses that were given."""
    if arguments.gateway:
        yield arguments.gateway.rstrip("/"), arguments.engine.rstrip("/")
        return
    port, engine_port, status_port = free_ports(3)
    command = [sys.executable, "-m", "launcher", "up", "--port", str(port)]
    command += ["--engine-port", str(engine_port), "--status-port", str(status_port)]
    if arguments.model:
        command += ["--model", arguments.model]
    log_path = ROOT / "out" / "bench-stack.log"
    log_path.parent.mkdir(exist_ok=True)
    with log_path.open("wb") as log:
        stack = subprocess.Popen(  # noqa: ASYNC220
            # The same prompts are asked again and again: sharing answers would be cheating.
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=os.environ | {"GATEWAY_DEDUP": "false"},
        )
        try:
            gateway = f"http://127.0.0.1:{port}"
            await wait_ready(gateway, stack, log_path)
            yield gateway, f"http://127.0.0.1:{engine_port}"
        finally:
            stack.send_signal(signal.SIGTERM)
            stack.wait(timeout=60)


async def wait_ready(gateway: str, stack: subprocess.Popen[bytes], log_path: Path) -> None:
    started = time.monotonic()
    async with aiohttp.ClientSession() as session:
        while stack.poll() is None:
            progress(f"waiting for the engine ({time.monotonic() - started:.0f} s)")
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{gateway}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise SystemExit(f"bench: the stack did not start; see {log_path}")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def read_questions(path: Path, count: int) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    known = [json.loads(line)["question"] for line in lines if line.strip()]
    return list(itertools.islice(itertools.cycle(known), count))


async def run(arguments: argparse.Namespace) -> int:
    questions = read_questions(Path(arguments.questions), arguments.prompts)
    timeout = aiohttp.ClientTimeout(total=1800)
    async with (
        own_stack(arguments) as (gateway, engine),
        aiohttp.ClientSession(timeout=timeout) as session,
    ):
        doors = Doors(session, gateway, engine, arguments)
        await doors.learn_model()
        batch_arms = await doors.arms(questions, arguments.max_tokens)
        # A short answer: what is added to one call does not depend on its length, the noise does.
        single_arms = await doors.arms(questions[:1], 8)
        batch = await compare(
            f"{len(questions)} prompts in one call", batch_arms, arguments.rounds, 2
        )
        single = await compare("one prompt", single_arms, arguments.rounds * 8, 4)
    return report(batch, single, arguments)


def report(batch: Comparison, single: Comparison, arguments: argparse.Namespace) -> int:
    for line in itertools.chain(batch.lines(), single.lines()):
        print(line)
    quiet = batch.is_quiet() and single.is_quiet()
    ratio, added_ms = batch.ratio("gateway")[0], single.added_ms("gateway")
    passed = ratio <= LARGEST_BATCH_RATIO and added_ms <= LARGEST_SINGLE_ADDED_MS
    verdict = "within" if passed else "OVER"
    print(
        f"{verdict} the bound: batch {ratio:.3f} (at most {LARGEST_BATCH_RATIO}), "
        f"single +{added_ms:.2f} ms (at most {LARGEST_SINGLE_ADDED_MS:g} ms)"
    )
    if not quiet:
        print(f"the control moved by more than {QUIET_CONTROL:.0%}: this machine is not quiet")
    if arguments.json:
        result = {
            "batch": batch.seconds,
            "single": single.seconds,
            "batch_ratio": ratio,
            "single_added_ms": added_ms,
            "quiet": quiet,
        }
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    return 0 if passed else 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gateway", help="a running gateway; default: start an own stack")
    parser.add_argument("--engine", default="http://127.0.0.1:8001", help="the engine behind it")
    parser.add_argument("--model", help="model of the own stack")
    parser.add_argument("--tokenizer", default=str(ROOT / "demo" / "model"), help="model folder")
    parser.add_argument("--questions", default=str(ROOT / "demo" / "questions.jsonl"))
    parser.add_argument("--prompts", type=int, default=358, help="prompts in the batch")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds of the batch")
    parser.add_argument("--json", help="write the times there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(parse_arguments())))
