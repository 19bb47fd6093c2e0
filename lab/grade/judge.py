"""The judge's side of the contract: wait for GET /, read the mode there, POST the questions.

It never repeats a call and never repairs an answer. What is wrong with one becomes a `Problem`
with a name; what is missing stays blank.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import httpx

from common.json_text import is_whole, mend, parse_json

Mode = Literal["batch", "ok"]
_POLL_S = 0.5
_TICK_S = 0.2
_PROBE_TIMEOUT_S = 2.0
_PROBES_TO_BE_GONE = 3
# What servers answer before they are ready; any other word is told to the user at once.
_NOT_YET = ("", "warming", "warmup", "warming_up", "loading", "initializing", "starting")


@dataclass(frozen=True)
class Problem:
    """Something that went wrong; `code` is its name in the findings."""

    code: str
    text: str


class NeverReady(Exception):
    """The server did not become ready; `problem` says what it did instead."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


@dataclass(frozen=True)
class Call:
    """One POST /predict: which questions, when, and what came of it."""

    first: int
    asked: int
    answered: int
    started_s: float
    seconds: float
    status: int | None
    problems: tuple[Problem, ...] = ()


@dataclass
class Run:
    """All questions once: the answers in the questions' order, blank where there is none.

    `received` holds the places for which an answer came, be it a blank one.
    """

    answers: list[str]
    received: set[int] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    refusals: dict[int, str] = field(default_factory=dict)
    elapsed_s: float = 0.0

    @property
    def problems(self) -> list[Problem]:
        return [problem for call in self.calls for problem in call.problems]


@dataclass(frozen=True)
class Plan:
    """How the questions are sent."""

    mode: Mode
    chunk_size: int = 0
    concurrency: int = 1
    limit_s: float = 360.0

    def cut(self, count: int) -> list[range]:
        size = 1 if self.mode == "ok" else self.chunk_size or count
        return [range(at, min(at + size, count)) for at in range(0, count, max(1, size))]

    def describe(self, count: int) -> str:
        calls = len(self.cut(count))
        if self.mode == "ok":
            how = "one by one"
        elif calls == 1:
            how = "in one call"
        else:
            how = f"in {calls} calls of up to {self.chunk_size}"
        return f"{how}, {self.concurrency} at a time" if self.concurrency > 1 else how


class Watcher(Protocol):
    """What is told how it goes."""

    def waiting(self, seconds: float, said: str) -> None: ...
    def asking(self, answered: int, asked: int, seconds: float) -> None: ...


class Judge:
    """Talks to one server."""

    def __init__(self, url: str, client: httpx.AsyncClient, watcher: Watcher) -> None:
        self.url = url.rstrip("/")
        self._client = client
        self._watcher = watcher

    async def wait_ready(
        self, timeout_s: float, find_end: Callable[[], Problem | None] = lambda: None
    ) -> Mode:
        """The mode that GET / names; `find_end` tells of a server that has ended meanwhile."""
        started = time.monotonic()
        said, is_other_word = "nothing was asked yet", False

        def tell() -> None:
            self._watcher.waiting(time.monotonic() - started, said)

        async with _ticking(tell):
            while (waited_s := time.monotonic() - started) < timeout_s:
                try:
                    # A server may hold the request until it is warm.
                    async with asyncio.timeout(timeout_s - waited_s):
                        timeout = httpx.Timeout(None, connect=_PROBE_TIMEOUT_S)
                        answer = await self._client.get(f"{self.url}/", timeout=timeout)
                except httpx.HTTPError as error:
                    said, is_other_word = describe_error(error), False
                except TimeoutError:
                    said, is_other_word = "GET / was not answered to its end", False
                else:
                    status = _read_status(answer)
                    if status in ("batch", "ok") and answer.status_code == httpx.codes.OK:
                        return "ok" if status == "ok" else "batch"
                    said = f"GET / answers {answer.status_code} {answer.text[:100]!r}"
                    said += _describe_redirect(answer)
                    is_other_word = answer.is_success and status not in _NOT_YET
                if (end := find_end()) is not None:
                    raise NeverReady(end)
                await asyncio.sleep(min(_POLL_S, timeout_s / 4))
        code = "unknown_mode" if is_other_word else "never_ready"
        wish = '; the judge knows {"status": "batch"} and {"status": "ok"}' if is_other_word else ""
        raise NeverReady(Problem(code, f"not ready within {timeout_s:g} s: {said}{wish}"))

    async def ask(self, questions: Sequence[str], plan: Plan) -> Run:
        """Every question once, within the limit."""
        pieces = plan.cut(len(questions))
        run = Run([""] * len(questions))
        started = time.perf_counter()
        state = _State(iter(pieces), started, started + plan.limit_s)

        def tell() -> None:
            answered = sum(call.answered for call in run.calls)
            self._watcher.asking(answered, len(questions), time.perf_counter() - started)

        async with _ticking(tell), asyncio.TaskGroup() as group:
            for _ in range(min(plan.concurrency, len(pieces))):
                group.create_task(self._work(questions, plan, run, state))
        tell()
        run.elapsed_s = state.ended - started
        run.calls.sort(key=lambda call: call.first)
        return run

    async def _work(self, questions: Sequence[str], plan: Plan, run: Run, state: _State) -> None:
        while (piece := next(state.pieces, None)) is not None:
            call, reply = await self._call(questions, piece, plan, state)
            run.calls.append(call)
            places = range(piece.start, piece.start + len(reply.answers))
            run.answers[places.start : places.stop] = reply.answers
            run.received.update(places)
            run.refusals |= {piece.start + place: why for place, why in reply.refusals.items()}
            state.ended = max(state.ended, state.started + call.started_s + call.seconds)
            if any(problem.code in ("too_slow", "server_died") for problem in call.problems):
                state.stop()

    async def _call(
        self, questions: Sequence[str], piece: range, plan: Plan, state: _State
    ) -> tuple[Call, Reply]:
        began = time.perf_counter()
        status: int | None = None
        reply, loss = Reply([], ()), None
        try:
            async with asyncio.timeout(max(0.0, state.deadline - began)):
                answer = await self._post(questions[piece.start : piece.stop], plan.mode)
                status = answer.status_code
                reply = read_reply(status, answer.content, len(piece), plan.mode)
                if answer.is_redirect:
                    text = f"POST /predict answered {status}{_describe_redirect(answer)}"
                    reply = _fail("http_error", text)
        except httpx.DecodingError as error:
            reply = _fail("not_json", f"the answer cannot be unpacked: {error}")
        except TimeoutError:
            reply = _fail("too_slow", f"no answer within the limit of {plan.limit_s:g} s")
        except httpx.HTTPError as error:
            loss = error
        seconds = time.perf_counter() - began
        if loss is not None:
            problem = await self._explain_loss(loss, piece, len(questions), seconds)
            reply = Reply([], (problem,))
        answered = sum(bool(text.strip()) for text in reply.answers)
        started_s = began - state.started
        call = Call(
            piece.start, len(piece), answered, started_s, seconds, status, tuple(reply.problems)
        )
        return call, reply

    async def _post(self, questions: Sequence[str], mode: Mode) -> httpx.Response:
        prompt = questions[0] if mode == "ok" else list(questions)
        body = json.dumps({"prompt": prompt}, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{self.url}/predict"
        return await self._client.post(url, content=body, headers=headers, timeout=None)

    async def _explain_loss(
        self, error: httpx.HTTPError, piece: range, total: int, seconds: float
    ) -> Problem:
        """A connection that broke: is the server gone, or only this call?"""
        where = f"questions {piece.start + 1} to {piece.stop} of {total}"
        broke = f"the connection broke {seconds:.1f} s into the call for {where}"
        for _ in range(_PROBES_TO_BE_GONE):
            try:
                async with asyncio.timeout(2 * _PROBE_TIMEOUT_S):
                    await self._client.get(f"{self.url}/", timeout=_PROBE_TIMEOUT_S)
            except (httpx.ReadTimeout, TimeoutError):
                break  # it holds the request, so it lives
            except httpx.HTTPError as other:
                gone = describe_error(other)
                await asyncio.sleep(_POLL_S)
            else:
                break
        else:
            text = f"{broke} ({describe_error(error)}), and GET / fails since: {gone}"
            return Problem("server_died", text)
        return Problem("connection_lost", f"{broke} ({describe_error(error)}); GET / still answers")


@contextlib.asynccontextmanager
async def _ticking(tell: Callable[[], None]) -> AsyncIterator[None]:
    """While inside, somebody is told how it goes."""

    async def tick() -> None:
        while True:
            tell()
            await asyncio.sleep(_TICK_S)

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


@dataclass
class _State:
    """What the workers of one run share."""

    pieces: Iterator[range]
    started: float
    deadline: float
    ended: float = field(init=False)

    def __post_init__(self) -> None:
        self.ended = self.started

    def stop(self) -> None:
        """The rest is not asked."""
        self.pieces = iter(())


@dataclass(frozen=True)
class Reply:
    """The answers in an answer, and what was wrong with it."""

    answers: list[str]
    problems: tuple[Problem, ...]
    refusals: dict[int, str] = field(default_factory=dict)


def read_reply(status: int, body: bytes, asked: int, mode: Mode) -> Reply:
    shown = body[:200].decode(errors="replace")
    if status != httpx.codes.OK:
        return _fail("http_error", f"POST /predict answered {status}: {shown}")
    try:
        data = parse_json(body)
    except ValueError as error:
        return _fail("not_json", f"the answer is no JSON ({error}): {shown!r}")
    if not isinstance(data, dict) or "response" not in data:
        return _fail("no_response", f"the answer has no `response`: {shown}")
    response = data["response"]
    if mode == "ok":
        reply = _read_single(response)
    elif not isinstance(response, list):
        kind = _name_type(response)
        return _fail("no_list", f"`response` is {kind}, not a list of {asked}: {shown}")
    else:
        reply = _read_list(response, data.get("errors"), asked)
    return _mend_texts(_note_error(reply, data.get("error")))


def _note_error(reply: Reply, error: Any) -> Reply:
    if not error:
        return reply
    text = f"the answer has an `error` beside its `response`: {str(error)[:200]}"
    return replace(reply, problems=(*reply.problems, Problem("error_beside", text)))


def _mend_texts(reply: Reply) -> Reply:
    broken = [place for place, text in enumerate(reply.answers) if not is_whole(text)]
    refusals = {place: mend(why) for place, why in reply.refusals.items()}
    problems = [Problem(one.code, mend(one.text)) for one in reply.problems]
    if broken:
        text = (
            f"{len(broken)} answers hold half a character (a lone surrogate), which no file can "
            f"hold; the first is number {broken[0] + 1}"
        )
        problems.append(Problem("broken_text", text))
    return Reply([mend(text) for text in reply.answers], tuple(problems), refusals)


def _read_single(response: Any) -> Reply:
    if isinstance(response, str):
        return Reply([response], ())
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], str):
        note = "a single prompt is answered with a list of one, as one entry of the course does"
        return Reply(list(response), (Problem("list_of_one", note),))
    return _fail("not_text", f"`response` to a single prompt is {_name_type(response)}, not a text")


def _read_list(response: list[Any], errors: Any, asked: int) -> Reply:
    problems = []
    if len(response) != asked:
        code = "too_few" if len(response) < asked else "too_many"
        problems.append(Problem(code, f"{len(response)} answers to {asked} questions"))
    response = response[:asked]
    odd = [place for place, one in enumerate(response) if not isinstance(one, str)]
    if odd:
        kind = _name_type(response[odd[0]])
        text = f"{len(odd)} answers are no texts; the first, {kind}, is number {odd[0] + 1}"
        problems.append(Problem("not_text", text))
    # What is no text counts as the seed entry's evaluator counts it.
    answers = ["" if one is None else str(one) for one in response]
    refusals = _read_refusals(errors, asked)
    if errors and not (isinstance(errors, dict) and len(refusals) == len(errors)):
        text = f"`errors` names something else than places in the list: {str(errors)[:200]}"
        problems.append(Problem("odd_errors", text))
    return Reply(answers, tuple(problems), refusals)


def _read_refusals(errors: Any, asked: int) -> dict[int, str]:
    """By place in the list; others would be blamed on another call's questions."""
    if not isinstance(errors, dict):
        return {}
    places = {str(place): place for place in range(asked)}
    return {
        places[key]: str(why.get("message") or why) if isinstance(why, dict) else str(why)
        for key, why in errors.items()
        if key in places
    }


def _fail(code: str, text: str) -> Reply:
    return Reply([], (Problem(code, text),))


def _name_type(value: object) -> str:
    names = {str: "a text", dict: "an object", list: "a list", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")


def _describe_redirect(answer: httpx.Response) -> str:
    where = answer.headers.get("location", "")
    return f" (a redirect to {where!r}, which is not followed)" if answer.is_redirect else ""


def _read_status(answer: httpx.Response) -> str:
    try:
        data = parse_json(answer.content)
    except ValueError:
        return ""
    return str(data.get("status", "")).strip().lower() if isinstance(data, dict) else ""


def describe_error(error: Exception) -> str:
    """httpx's texts are often empty; the class says more."""
    causes = itertools.chain([error], _walk_causes(error))
    text = next((str(one) for one in causes if str(one)), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _walk_causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__
