"""Waiting for a server as the judge waits for it: until GET / names a mode."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import httpx

from common.json_text import parse_json
from lab.failures import LabFailure
from lab.reports.console import ProgressLine, ticking

Mode = Literal["batch", "ok"]
POLL_S = 0.5
PROBE_TIMEOUT_S = 2.0
# What servers answer before they are ready; any other word is told to the user at once.
_NOT_YET = ("", "warming", "warmup", "warming_up", "loading", "initializing", "starting")


@dataclass(frozen=True)
class Problem:
    """Something that went wrong; `code` is its name in the findings."""

    code: str
    text: str


class ServerNeverReady(LabFailure):
    """The server did not become ready; `problem` says what it did instead."""

    exit_code = 3

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.code}: {problem.text}")
        self.problem = problem


async def wait_ready(
    url: str,
    client: httpx.AsyncClient,
    progress: ProgressLine,
    timeout_s: float,
    find_end: Callable[[], Problem | None] | None = None,
) -> Mode:
    """The mode that GET / names; `find_end` tells of a server that has ended meanwhile."""
    started = time.monotonic()
    said, is_other_word = "nothing was asked yet", False
    async with ticking(lambda: progress.waiting(time.monotonic() - started, said)):
        while (waited_s := time.monotonic() - started) < timeout_s:
            try:
                # A server may hold the request until it is warm.
                async with asyncio.timeout(timeout_s - waited_s):
                    timeout = httpx.Timeout(None, connect=PROBE_TIMEOUT_S)
                    answer = await client.get(f"{url}/", timeout=timeout)
            except httpx.HTTPError as error:
                said, is_other_word = describe_error(error), False
            except TimeoutError:
                said, is_other_word = "GET / was not answered to its end", False
            else:
                status = _read_status(answer)
                if status in ("batch", "ok") and answer.status_code == httpx.codes.OK:
                    return "ok" if status == "ok" else "batch"
                said = f"GET / answers {answer.status_code} {answer.text[:100]!r}"
                said += describe_redirect(answer)
                is_other_word = answer.is_success and status not in _NOT_YET
            if find_end and (end := find_end()):
                raise ServerNeverReady(end)
            await asyncio.sleep(min(POLL_S, timeout_s / 4))
    code = "unknown_mode" if is_other_word else "never_ready"
    wish = '; the judge knows {"status": "batch"} and {"status": "ok"}' if is_other_word else ""
    raise ServerNeverReady(Problem(code, f"not ready within {timeout_s:g} s: {said}{wish}"))


def _read_status(answer: httpx.Response) -> str:
    try:
        data = parse_json(answer.content)
    except ValueError:
        return ""
    return str(data.get("status", "")).strip().lower() if isinstance(data, dict) else ""


def describe_redirect(answer: httpx.Response) -> str:
    where = answer.headers.get("location", "")
    return f" (a redirect to {where!r}, which is not followed)" if answer.is_redirect else ""


def describe_error(error: Exception) -> str:
    """httpx's texts are often empty; the class says more."""
    cause: BaseException | None = error
    while cause and not str(cause):
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {cause}" if cause else type(error).__name__
