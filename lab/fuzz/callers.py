"""Who sends the cases: several at once, every answer read to its last byte and checked."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from lab.fuzz.answer_checks import check_answer, describe_failure, is_engines
from lab.fuzz.cases.case import Case
from lab.fuzz.cases.stored_cases import fill_id
from lab.fuzz.raw_http import NotHTTP, RawAnswer, connect, read_answer

CALLERS = 32
LONGEST_ANSWER_S = 120.0  # what takes longer hangs, however busy the machine is
_PAUSE_S = 0.002  # between two pieces of a request, and before a caller leaves at once
_MOST_SHOWN = 700


@dataclass(frozen=True)
class Finding:
    """One answer, or what came instead, that must not be."""

    number: int
    kind: str
    fault: str
    sent: bytes = b""
    got: str = ""
    again: str = ""  # the options that send it once more

    def describe(self, seed: int) -> str:
        lines = [f"case {self.number} ({self.kind}): {self.fault}"]
        if self.sent:
            shown, rest = self.sent[:_MOST_SHOWN], len(self.sent) - _MOST_SHOWN
            lines.append(f"  sent {shown!r}" + (f" and {rest} bytes more" if rest > 0 else ""))
        if self.got:
            lines.append(f"  got  {self.got}")
        lines.append(f"  again: --seed {seed} {self.again or f'--case {self.number}'}")
        return "\n".join(lines)


@dataclass
class Tally:
    """What came of the cases."""

    cases: Counter[str] = field(default_factory=Counter)  # by kind
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)  # of the engine's own, by its words
    failed_first: dict[str, int] = field(default_factory=dict)  # the first case of each
    findings: list[Finding] = field(default_factory=list)
    longest_s: float = 0.0

    def count_statuses(self, least: int, most: int) -> int:
        return sum(n for (_, status), n in self.statuses.items() if least <= status <= most)

    def blame(self, case: Case, fault: str, answer: RawAnswer | None = None) -> None:
        got = f"{answer.status} {answer.headers} {answer.body[:400]!r}" if answer else "nothing"
        self.findings.append(Finding(case.number, case.kind, fault, case.sent, got))


class Callers:
    """`silence_s`: how long they wait whose request may not be whole, and so gets no answer,
    rightly; `longest_s`: how long the others do. `tell` is shown every answer.
    """

    def __init__(
        self,
        url: str,
        tally: Tally,
        *,
        silence_s: float,
        longest_s: float = LONGEST_ANSWER_S,
        count: int = CALLERS,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self._url, self._tally = url, tally
        self._silence_s, self._longest_s = silence_s, longest_s
        self._count, self._tell = count, tell

    async def send(self, cases: Iterator[Case]) -> None:
        async with asyncio.TaskGroup() as callers:
            for _ in range(self._count):
                callers.create_task(self._call(cases))

    async def _call(self, cases: Iterator[Case]) -> None:
        """Takes the next case, on a new connection when the last is spent."""
        for case in cases:
            try:
                async with connect(self._url) as (reader, writer):
                    following: Case | None = case
                    while following is not None and await self._try(following, reader, writer):
                        following = next(cases, None)
            except ConnectionError as error:  # nobody listens
                self._tally.cases[case.kind] += 1
                self._tally.blame(case, repr(error))

    async def _try(
        self, case: Case, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection can take another."""
        self._tally.cases[case.kind] += 1
        began = time.monotonic()
        try:
            return await self._send(case, reader, writer)
        except TimeoutError:
            self._tally.blame(case, f"no answer within {self._longest_s:g} s")
        except (NotHTTP, ConnectionError, ValueError) as error:
            self._tally.blame(case, repr(error))
        finally:
            self._tally.longest_s = max(self._tally.longest_s, time.monotonic() - began)
        return False

    async def _send(
        self, case: Case, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        for number, piece in enumerate(case.pieces):
            if number:
                await asyncio.sleep(_PAUSE_S)
            writer.write(piece)
        if case.leaves_after is not None:
            await self._leave(case.leaves_after, reader)
            return False
        if case.outcome == "torn":
            await self._read_torn(case, reader)
            return False
        answer: RawAnswer | None = None
        for _ in range(case.answers):
            answer = await self._read(case, reader)
            if answer is None or not answer.keeps_connection:
                return False
        for step in case.then if answer is not None and answer.status == 200 else ():
            if answer is None or not await self._follow(case, step, answer, reader, writer):
                return False
        return True

    async def _follow(
        self,
        case: Case,
        step: bytes,
        before: RawAnswer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> bool:
        """One more request, about what the answer before it named."""
        following = fill_id(step, before.body)
        if following is None:
            self._tally.blame(case, "no id in the answer", before)
            return False
        writer.write(following)
        answer = await self._read(case, reader, following)
        return answer is not None and answer.keeps_connection

    async def _read(
        self, case: Case, reader: asyncio.StreamReader, sent: bytes = b""
    ) -> RawAnswer | None:
        async with asyncio.timeout(self._longest_s):
            answer = await read_answer(reader, case.method)
        if answer is None:
            self._tally.blame(case, "no answer")
        else:
            self._check(case, answer, sent)
        return answer

    async def _leave(self, after: int, reader: asyncio.StreamReader) -> None:
        """When so much of the answer has come, or all of it."""
        if not after:
            await asyncio.sleep(_PAUSE_S)
            return
        taken = 0
        async with asyncio.timeout(self._longest_s):
            while taken < after and (piece := await reader.read(4096)):
                taken += len(piece)
                if piece.endswith((b"0\r\n\r\n", b"}")):
                    break  # all of it: the connection stays open

    async def _read_torn(self, case: Case, reader: asyncio.StreamReader) -> None:
        """Whatever comes must be whole answers; a silence is the server waiting for the rest."""
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    answer = await read_answer(reader, case.method)
            except TimeoutError:
                return
            if answer is None:
                return
            self._check(case, answer)
            if not answer.keeps_connection:
                return

    def _check(self, case: Case, answer: RawAnswer, sent: bytes = b"") -> None:
        self._tally.statuses[case.kind, answer.status] += 1
        if self._tell is not None:
            self._tell(f"got {answer.status} {dict(answer.headers)}\n{answer.body!r}")
        if answer.status >= 500 and is_engines(answer):
            text = describe_failure(answer)
            self._tally.failures[text] += 1
            self._tally.failed_first.setdefault(text, case.number)
        for fault in check_answer(case, answer, sent):
            self._tally.blame(case, fault, answer)
