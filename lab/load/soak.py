"""A soak: mixed traffic and chosen faults against a running gateway, every answer checked.

Each request asks for something that only it has asked for (a number, or a question whose answer the
model knows by heart), and must get just that back: a gateway that gives one caller another's answer
can be fast and quiet. At the end the gateway's own counters must add up to what was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from common.questions import BadQuestions, read_questions
from lab.options import is_address
from lab.paths import DEMO_QUESTIONS
from lab.records.record import Figure, take_record, write_record
from lab.reports.output_files import Unwritable, accept_every_text, ensure_writable

SAMPLE_S = 2.0
GROWTH_MB = 16.0
_SERIES = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PREDICT, CHAT, COMPLETIONS = "/predict", "/v1/chat/completions", "/v1/completions"
# What a fault may cost those who meet it: an honest error, or their connection.
_FAULT_STATUSES = frozenset((502, 503, 504))


class Wrong(Exception):
    """An answer that is not the one to what was asked."""


class Lost(Exception):
    """No answer, or an error where there should be none."""


class NoGateway(Exception):
    """Nobody answers, or somebody who is no gateway."""


# What comes of reading an answer that has another shape than it should.
_MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, RecursionError)


@dataclass
class Tally:
    """What was sent and what came back."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    hung_up: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, kind: str, outcome: str, example: str = "") -> None:
        self.outcomes[kind, outcome] += 1
        if example and len(self.examples) < 20:
            self.examples.append(f"{kind}: {outcome}: {example[:300]}")

    def count(self, outcome: str) -> int:
        return sum(number for (_, one), number in self.outcomes.items() if one == outcome)


class Caller:
    """One client's requests, one after another."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        model: str,
        known: list[tuple[str, str]],
        tally: Tally,
        seed: int,
    ) -> None:
        self._session, self._url, self._model = session, url, model
        self._known, self._tally = known, tally
        self._random = random.Random(seed)
        self._number = seed * 1_000_000

    def kinds(self) -> dict[str, tuple[int, Callable[[], Awaitable[None]]]]:
        """Each with its weight."""
        return {
            "predict one": (6, self.predict_one),
            "predict batch": (2, self.predict_batch),
            "chat stream": (5, self.chat_stream),
            "chat whole": (3, self.chat_whole),
            "completion with echo": (4, self.complete_echo),
            "tokens there and back": (3, self.tokens),
            "slow reader": (1, self.slow_reader),
            "hang-up in a stream": (2, self.hang_up_stream),
            "hang-up of a batch": (1, self.hang_up_batch),
            "bad request": (3, self.bad_request),
        }

    async def run(self, until: float, is_fault_time: Callable[[], bool]) -> None:
        kinds = self.kinds()
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        while time.monotonic() < until:
            name = self._random.choices(names, weights)[0]
            began_in_fault = is_fault_time()
            try:
                await kinds[name][1]()
            except Wrong as error:
                self._tally.note(name, "wrong", str(error))
            except _MISSHAPEN as error:
                # A client's errors that are ValueErrors too are no answers at all.
                outcome = "failed" if isinstance(error, aiohttp.ClientError) else "wrong"
                self._tally.note(name, outcome, f"{type(error).__name__}: {error}")
            except (Lost, aiohttp.ClientError, TimeoutError) as error:
                excused = began_in_fault or is_fault_time()
                text = f"{type(error).__name__}: {error}"
                self._tally.note(name, "lost to a fault" if excused else "failed", text)
                await asyncio.sleep(0.2 if excused else 0)
            else:
                self._tally.note(name, "good")

    # --- the kinds of traffic ---

    async def predict_one(self) -> None:
        question, answer = self._random.choice(self._known)
        reply = await self._post(PREDICT, {"prompt": question})
        self._tally.characters += len(reply["response"])
        _same(reply["response"], answer, question)

    async def predict_batch(self) -> None:
        pairs = self._random.choices(self._known, k=self._random.randint(2, 24))
        reply = await self._post(PREDICT, {"prompt": [question for question, _ in pairs]})
        self._tally.characters += sum(map(len, reply["response"]))
        if "errors" in reply:
            raise Lost(json.dumps(reply["errors"])[:200])
        for (question, answer), got in zip(pairs, reply["response"], strict=True):
            _same(got, answer, question)

    async def chat_whole(self) -> None:
        question, answer = self._random.choice(self._known)
        reply = await self._post(CHAT, self._chat(question))
        _same(reply["choices"][0]["message"]["content"], answer, question)

    async def chat_stream(self, pause_s: float = 0.0) -> None:
        question, answer = self._random.choice(self._known)
        pieces = []
        async for event in self._stream(self._chat(question, stream=True), pause_s):
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        _same("".join(pieces), answer, question)

    async def slow_reader(self) -> None:
        await self.chat_stream(pause_s=0.1)

    async def complete_echo(self) -> None:
        text = f"number-{self._next()}."
        body = {"prompt": text, "echo": True, "max_tokens": 1, "temperature": 0}
        reply = await self._post(COMPLETIONS, {"model": self._model, **body})
        if not reply["choices"][0]["text"].startswith(text):
            raise Wrong(f"asked {text}, got {reply['choices'][0]['text']!r}")

    async def tokens(self) -> None:
        text = f"number-{self._next()}: 共享内存"
        known = {"model": self._model, "add_special_tokens": False}
        ids = (await self._post("/tokenize", {**known, "prompt": text}))["tokens"]
        back = await self._post("/detokenize", {"model": self._model, "tokens": ids})
        _same(back["prompt"], text, text)

    async def hang_up_stream(self) -> None:
        question, _ = self._random.choice(self._known)
        body = self._chat(question, stream=True)
        self._tally.hung_up[CHAT] += 1
        async with self._session.post(self._url + CHAT, json=body) as answer:
            if self._random.random() < 0.5:
                await answer.content.readany()
            answer.close()

    async def hang_up_batch(self) -> None:
        pairs = self._random.choices(self._known, k=16)
        self._tally.hung_up[PREDICT] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.01, 0.1)):
                body = {"prompt": [question for question, _ in pairs]}
                async with self._session.post(self._url + PREDICT, json=body) as answer:
                    answer.close()

    async def bad_request(self) -> None:
        path, body, status = self._random.choice(
            (
                (PREDICT, b"{", 400),
                (PREDICT, b'{"prompt": 7}', 400),
                (PREDICT, b'{"prompt": [1]}', 400),
                (CHAT, b'{"model": "nobody", "messages": []}', 404),
                (COMPLETIONS, b'{"model": "nobody", "prompt": "x", "n": 10000}', 400),
                ("/v1/nothing", b"{}", 404),
            )
        )
        async with self._session.post(self._url + path, data=body) as answer:
            got = await answer.json()
            self._count(path, answer.status)
            if answer.status in _FAULT_STATUSES:
                raise Lost(f"{answer.status}: {got}")
            if answer.status not in {400, 404} or not got["error"]["message"]:
                raise Wrong(f"{path} {body!r}: {answer.status} instead of {status}: {got}")

    # --- how they are sent ---

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _chat(self, question: str, **fields: object) -> dict[str, object]:
        messages = [{"role": "user", "content": question}]
        return {"model": self._model, "messages": messages, "temperature": 0, **fields} | {
            "max_tokens": 256
        }

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        try:
            async with self._session.post(self._url + path, json=body) as answer:
                text = await answer.text()
                self._count(path, answer.status)
        except (aiohttp.ClientError, TimeoutError):
            self._tally.unanswered[path] += 1
            raise
        if answer.status != 200:
            raise Lost(f"{answer.status}: {text[:200]}")
        reply: dict[str, Any] = json.loads(text)
        return reply

    async def _stream(
        self, body: dict[str, object], pause_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        is_done = False
        try:
            async with self._session.post(self._url + CHAT, json=body) as answer:
                if answer.status != 200:
                    text = await answer.text()
                    self._count(CHAT, answer.status)
                    raise Lost(f"{answer.status}: {text[:200]}")
                async for line in answer.content:
                    if pause_s:
                        await asyncio.sleep(pause_s)
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            self._count(CHAT, 200)
                            raise Lost(f"in the stream: {event['error']}")
                        yield event
                    is_done = is_done or line.startswith(b"data: [DONE]")
                self._count(CHAT, 200)
        except (aiohttp.ClientError, TimeoutError):
            self._tally.unanswered[CHAT] += 1
            raise
        if not is_done:
            raise Lost("a stream without its end")

    def _count(self, path: str, status: int) -> None:
        self._tally.statuses[path if path != "/v1/nothing" else "other", status] += 1


def _same(got: str, wanted: str, asked: str) -> None:
    if got.strip() != wanted.strip():
        raise Wrong(f"asked {asked!r}: {got!r} instead of {wanted!r}")


# --- what is watched meanwhile --------------------------------------------------------------------


@dataclass
class Sample:
    """What the gateway's process holds."""

    at_s: float
    memory_mb: float
    sockets: int


def read_sample(pid: int, started: float) -> Sample | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        names = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]  # noqa: PTH115
    except OSError:
        return None
    memory = re.search(r"VmRSS:\s+(\d+) kB", status)
    sockets = sum(name.startswith("socket:") for name in names)
    return Sample(time.monotonic() - started, int(memory[1]) / 1024 if memory else 0.0, sockets)


def read_pairs(path: str) -> list[tuple[str, str]]:
    return [(pair.question, pair.reference) for pair in read_questions(Path(path)).pairs]


def parse_series(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (name, tuple(sorted(_LABEL.findall(labels or "")))): float(value)
        for name, labels, value in _SERIES.findall(text)
    }


Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def sum_by(series: Series, name: str, *labels: str) -> Counter[tuple[str, ...]]:
    sums: Counter[tuple[str, ...]] = Counter()
    for (one, pairs), value in series.items():
        if one == name:
            told = dict(pairs)
            sums[tuple(told.get(label, "") for label in labels)] += int(value)
    return sums


class Launcher:
    """The launcher's status: which processes are whose, for faults and for watching."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def pid(self, program: str) -> int | None:
        if not self._url:
            return None
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, KeyError):
            async with self._session.get(self._url + "/status") as answer:
                pid = (await answer.json())[program]["pid"]
                return int(pid) if pid else None
        return None

    async def core(self) -> int | None:
        """The engine's core: a child of its server, by name."""
        engine = await self.pid("engine")
        if engine is None:
            return None
        return find_core(engine)


def find_core(engine: int) -> int | None:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and "EngineCore" in (entry / "cmdline").read_text():
                session_id = (entry / "stat").read_text().rpartition(")")[2].split()[3]
                if int(session_id) == os.getsid(engine):
                    return int(entry.name)
    return None


# Which process, which signal, and whether it goes on by itself after some seconds.
FAULTS: dict[str, tuple[str, signal.Signals, float]] = {
    "kill-core": ("core", signal.SIGKILL, 0.0),
    "kill-engine": ("engine", signal.SIGKILL, 0.0),
    "stop-core": ("core", signal.SIGSTOP, 0.0),
    "pause-core": ("core", signal.SIGSTOP, 5.0),
    "kill-gateway": ("gateway", signal.SIGKILL, 0.0),
}


class Soak:
    """The run: callers, faults, samples, and the sums at its end."""

    def __init__(self, arguments: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._arguments, self._session = arguments, session
        self._url: str = arguments.url.rstrip("/")
        self._launcher = Launcher(session, arguments.status.rstrip("/"))
        self._samples: list[Sample] = []
        self._in_fault = False
        self._recoveries: list[tuple[str, float]] = []
        self.tally = Tally()
        self.problems: list[str] = []

    async def run(self) -> None:
        pairs = read_pairs(self._arguments.questions)
        try:
            model, known = await self._learn(pairs)
            before = await self._read_series()
        except aiohttp.ClientConnectorError as error:
            raise NoGateway(f"{error}; is the gateway running? `make serve`") from None
        except (aiohttp.ClientError, TimeoutError, *_MISSHAPEN) as error:
            text = f"{self._url} does not answer as a gateway ({type(error).__name__}: {error})"
            raise NoGateway(text) from None
        started = time.monotonic()
        until = started + self._arguments.duration
        callers = [
            Caller(
                self._session,
                self._url,
                model=model,
                known=known,
                tally=self.tally,
                seed=self._arguments.seed + n,
            )
            for n in range(self._arguments.callers)
        ]
        beside = [asyncio.create_task(self._watch(started, until))]
        if self._arguments.fault:
            beside.append(asyncio.create_task(self._disturb(known[0], until)))
        try:
            await asyncio.gather(*(one.run(until, lambda: self._in_fault) for one in callers))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        await self._settle(before)
        self._judge()

    async def _learn(self, pairs: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
        """The model's name, and the questions it answers word for word when nothing else runs."""
        async with self._session.get(self._url + "/v1/models") as answer:
            model: str = (await answer.json())["data"][0]["id"]
        body = {"prompt": [question for question, _ in pairs]}
        async with self._session.post(self._url + PREDICT, json=body) as answer:
            replies = (await answer.json())["response"]
        known = [
            pair for pair, got in zip(pairs, replies, strict=True) if got.strip() == pair[1].strip()
        ]
        if len(known) < 10:
            raise SystemExit(
                f"load: the model knows {len(known)} of the {len(pairs)} answers in "
                f"{self._arguments.questions}; a soak needs 10 that it knows by heart, or nobody "
                "could tell a wrong answer"
            )
        print(f"{model}: {len(known)} of {len(pairs)} answers known by heart", flush=True)
        return model, known

    async def _read_series(self) -> Series:
        async with self._session.get(self._url + "/metrics") as answer:
            return parse_series(await answer.text())

    async def _watch(self, started: float, until: float) -> None:
        shown = 0.0
        while True:
            pid = await self._launcher.pid("gateway")
            sample = read_sample(pid, started) if pid else None
            if sample:
                self._samples.append(sample)
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                memory = f", gateway {sample.memory_mb:.0f} MB" if sample else ""
                print(
                    f"{shown - started:5.0f} s, {max(0.0, until - shown):.0f} left: "
                    f"{sum(self.tally.outcomes.values())} requests, "
                    f"{self.tally.count('wrong')} wrong, {self.tally.count('failed')} failed"
                    f"{memory}",
                    flush=True,
                )
            await asyncio.sleep(SAMPLE_S)

    async def _disturb(self, pair: tuple[str, str], until: float) -> None:
        """One fault after another, each once the last one has been got over."""
        for name in self._arguments.fault:
            await asyncio.sleep(self._arguments.fault_pause)
            if time.monotonic() > until:
                return
            await self._strike(name, pair)

    async def _strike(self, name: str, pair: tuple[str, str]) -> None:
        target, number, pause_s = FAULTS[name]
        pid = await (self._launcher.core() if target == "core" else self._launcher.pid(target))
        if pid is None:
            self.problems.append(f"{name}: no {target} found; is --status the launcher's address?")
            return
        self._in_fault = True
        struck = time.monotonic()
        print(f"fault: {name} (process {pid})", flush=True)
        os.kill(pid, number)
        if pause_s:
            await asyncio.sleep(pause_s)
            os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(1)
        await self._wait_recovered(pair, struck + self._arguments.recovery_limit)
        took_s = time.monotonic() - struck
        if took_s > self._arguments.recovery_limit:
            self.problems.append(f"{name}: not over after {took_s:.0f} s")
        self._recoveries.append((name, took_s))
        await asyncio.sleep(2)  # what was under way in the fault may still end in an error
        self._in_fault = False
        print(f"fault: {name} got over after {took_s:.1f} s", flush=True)

    async def _wait_recovered(self, pair: tuple[str, str], deadline: float) -> None:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, KeyError):
                async with asyncio.timeout(5), self._session.get(self._url + "/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)

    async def _settle(self, before: Series) -> None:
        """Nothing runs any more; then the counters must add up."""
        try:
            await self._add_up(before)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.problems.append(f"the gateway's counters cannot be read at the end: {error!r}")

    async def _add_up(self, before: Series) -> None:
        deadline = time.monotonic() + 60
        running = 1
        while running and time.monotonic() < deadline:
            await asyncio.sleep(0.3)
            after = await self._read_series()
            running = sum(sum_by(after, "gateway_running_sequences", "lane").values())
            running += sum(sum_by(after, "gateway_waiting_sequences", "lane").values())
        if running:
            self.problems.append(f"{running} sequences are still counted as running or waiting")
        if any(name == "kill-gateway" for name, _ in self._recoveries):
            print("counters are not compared: the gateway was killed, and with it its counters")
            return
        self._compare(before, after)

    def _compare(self, before: Series, after: Series) -> None:
        """By route and status. One who hung up counts as 499, as 200 if he was too late, or not."""
        name = "gateway_requests_total"
        counted = sum_by(after, name, "route", "status")
        counted.subtract(sum_by(before, name, "route", "status"))
        for path in {route for route, _ in self.tally.statuses} | set(self.tally.hung_up):
            sent = {
                status: n for (route, status), n in self.tally.statuses.items() if route == path
            }
            got = {int(status): n for (route, status), n in counted.items() if route == path}
            # The model list and the first batch are not among the callers' requests.
            loose = self.tally.hung_up[path] + self.tally.unanswered[path]
            spare = sum(got.values()) - sum(sent.values())
            short = {status: n - got.get(status, 0) for status, n in sent.items()}
            # One who hangs up may be gone before anybody has seen what he asked.
            if not 0 <= spare <= loose:
                self.problems.append(
                    f"{path}: {sum(sent.values())} answered and {loose} left, the gateway counted "
                    f"{sum(got.values())}: {got}"
                )
            elif any(missing > 0 for missing in short.values()):
                self.problems.append(f"{path}: sent {sent}, the gateway counted {got}")
        characters = sum_by(after, "gateway_predict_characters_total")[()]
        characters -= sum_by(before, "gateway_predict_characters_total")[()]
        if not self.tally.hung_up[PREDICT] and characters != self.tally.characters:
            self.problems.append(
                f"/predict: {self.tally.characters} characters came, {characters} were counted"
            )

    def _judge(self) -> None:
        for outcome in ("wrong", "failed"):
            if number := self.tally.count(outcome):
                self.problems.append(f"{number} requests {outcome}")
        if not self.tally.count("good"):
            self.problems.append("nothing was answered")
        growth = self.growth_mb()
        if growth is not None and growth > GROWTH_MB:
            self.problems.append(f"the gateway grew by {growth:.1f} MB")
        if self._samples and self._samples[-1].sockets > 4 * self._arguments.callers + 40:
            self.problems.append(f"{self._samples[-1].sockets} sockets are open")

    def growth_mb(self) -> float | None:
        """From the second tenth of the run to its last: the first fills caches and pools."""
        if len(self._samples) < 20 or any(name == "kill-gateway" for name, _ in self._recoveries):
            return None
        tenth = len(self._samples) // 10
        early = statistics.median(one.memory_mb for one in self._samples[tenth : 2 * tenth])
        return statistics.median(one.memory_mb for one in self._samples[-tenth:]) - early

    def figures(self) -> list[Figure]:
        total = sum(self.tally.outcomes.values())
        rows = [
            Figure("requests", total),
            Figure("wrong answers", self.tally.count("wrong")),
            Figure("failed without a fault", self.tally.count("failed")),
            Figure("lost to a fault", self.tally.count("lost to a fault")),
            Figure("callers who hung up", sum(self.tally.hung_up.values())),
            Figure("sums that did not add up", len(self.problems)),
        ]
        growth = self.growth_mb()
        if growth is not None:
            memory = [one.memory_mb for one in self._samples]
            rows.append(Figure("gateway's memory at the end", round(memory[-1], 1), "MB"))
            rows.append(Figure("gateway's growth", round(growth, 1), "MB"))
            rows.append(Figure("open sockets at the end", self._samples[-1].sockets))
        for name, took_s in self._recoveries:
            rows.append(Figure(f"recovery from {name}", round(took_s, 1), "s"))
        return rows

    def report(self) -> None:
        kinds = sorted({kind for kind, _ in self.tally.outcomes})
        outcomes = ("good", "lost to a fault", "failed", "wrong")
        print(f"\n{'':24}" + "".join(f"{outcome:>17}" for outcome in outcomes))
        for kind in kinds:
            cells = "".join(f"{self.tally.outcomes[kind, outcome]:17}" for outcome in outcomes)
            print(f"{kind:24}{cells}")
        print()
        for figure in self.figures():
            print(f"{figure.name:32}{figure.value:>12g} {figure.unit}")
        for example in self.tally.examples:
            print(f"  {example}")
        for problem in self.problems:
            print(f"NOT HELD  {problem}")
        print("all held" if not self.problems else f"{len(self.problems)} did not hold")


async def run(arguments: argparse.Namespace) -> int:
    timeout = aiohttp.ClientTimeout(total=180)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        soak = Soak(arguments, session)
        try:
            if arguments.json:
                ensure_writable(Path(arguments.json))
            await soak.run()
        except (NoGateway, BadQuestions, Unwritable) as error:
            print(f"load: {error}", file=sys.stderr)
            return 2
    soak.report()
    if arguments.json:
        about = f"{arguments.callers} callers, {arguments.duration:g} s"
        about += f", faults: {', '.join(arguments.fault)}" if arguments.fault else ", no faults"
        write_record(take_record(arguments.name, soak.figures(), about=about), Path(arguments.json))
    return 1 if soak.problems else 0


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway")
    parser.add_argument(
        "--status",
        default="http://127.0.0.1:8002",
        help="the launcher's status; empty: no faults, no look at the process",
    )
    parser.add_argument("--duration", type=float, default=600.0, help="seconds")
    parser.add_argument("--callers", type=int, default=12, help="clients at once")
    parser.add_argument(
        "--fault",
        action="append",
        choices=sorted(FAULTS),
        default=[],
        help="one after another, repeatable; stop-core needs LAUNCHER_HANG_TIMEOUT_S",
    )
    parser.add_argument("--fault-pause", type=float, default=20.0, help="seconds before each")
    parser.add_argument("--recovery-limit", type=float, default=180.0, help="seconds for each")
    parser.add_argument("--questions", default=str(DEMO_QUESTIONS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="soak", help="of the record")
    parser.add_argument("--json", help="write the record there")
    arguments = parser.parse_args(words)
    for name, url in (("url", arguments.url), ("status", arguments.status or arguments.url)):
        if not is_address(url):
            parser.error(f"--{name} {url} is no http address, like http://127.0.0.1:8000")
    if arguments.callers < 1 or not 0 < arguments.duration < 1e7:
        parser.error("--callers and --duration need more than nothing")
    return arguments


def main(words: list[str] | None = None) -> int:
    accept_every_text()
    try:
        return asyncio.run(run(parse_arguments(words)))
    except Unwritable as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("load: interrupted", file=sys.stderr)
        return 130
