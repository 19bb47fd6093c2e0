"""A run: slices of cases, a look at the service after each, and which case has harmed it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from lab.fuzz.callers import Callers, Finding, Tally
from lab.fuzz.cases.case import Case, Target
from lab.fuzz.cases.kinds import make_case
from lab.fuzz.survival import Survival
from lab.reports.console import ProgressLine

_SILENCE_S = 0.5
_NOBODY = -1
_SERVICE = "service"  # in the place of a kind: it is not known which case did it


class FuzzRun:
    """What was sent to one service, and what came of it."""

    def __init__(
        self, seed: int, target: Target, survival: Survival, progress: ProgressLine
    ) -> None:
        self._seed, self._target, self._progress = seed, target, progress
        self.survival = survival
        self.tally = Tally()
        self.slices = 0
        self._told = 0  # findings
        self.last = 0  # the number of the last case that was sent
        self.took_s = 0.0

    def count_statuses(self, kind: str, hundreds: int) -> int:
        statuses = self.tally.statuses.items()
        return sum(n for (name, one), n in statuses if name == kind and one // 100 == hundreds)

    async def run(
        self, numbers: Iterator[int], count: int, size: int, keep: Callable[[FuzzRun], None]
    ) -> None:
        """Ends early before a service that does not come back. After each slice what it has shown
        is told and kept, for an end may come at any time.
        """
        began = time.monotonic()
        is_well = True
        while is_well and (piece := tuple(itertools.islice(numbers, size))):
            is_well = await self._take_slice(piece)
            self.took_s, self.last = time.monotonic() - began, piece[-1]
            self._show(count)
            self._tell_findings()
            keep(self)

    async def _take_slice(self, numbers: Sequence[int]) -> bool:
        """Whether all is well again."""
        await self._send(numbers, self.tally)
        self.slices += 1
        problems = await self.survival.check()
        is_well = not problems or await self._recover()
        culprit = await self._find_culprit(numbers) if problems and is_well else _NOBODY
        for text in problems if is_well else [*problems, "it did not become well again"]:
            self.tally.findings.append(self._describe(text, culprit, numbers))
        return is_well

    async def _recover(self) -> bool:
        """What it is then is the measure from there on."""
        await self.survival.wait_well()
        await self.survival.check()
        return not await self.survival.check()

    def _describe(self, text: str, culprit: int, numbers: Sequence[int]) -> Finding:
        if culprit == _NOBODY:
            again = f"--first {numbers[0]} --cases {numbers[-1] - numbers[0] + 1}"
            fault = f"{text}, after the cases {numbers[0]} to {numbers[-1]} together"
            return Finding(numbers[0], _SERVICE, fault, again=again)
        case = make_case(self._seed, culprit, self._target)
        return Finding(culprit, case.kind, text, case.sent)

    async def _find_culprit(self, numbers: Sequence[int]) -> int:
        """The case that does it alone, by halves."""
        suspects = tuple(numbers)
        while True:
            self._progress.say(f"looking for the case among {len(suspects)}")
            half = len(suspects) // 2
            for part in (suspects[:half], suspects[half:]) if half else (suspects,):
                if await self._harms(part):
                    suspects = part
                    break
            else:
                return _NOBODY
            if len(suspects) == 1:
                return suspects[0]

    async def _harms(self, numbers: Sequence[int]) -> bool:
        await self._send(numbers, Tally())
        has_harmed = bool(await self.survival.check())
        return has_harmed and await self._recover()

    async def try_alone(self, number: int) -> None:
        """One case, and what was sent and answered is shown."""
        case = make_case(self._seed, number, self._target)
        self._progress.say(f"case {number} ({case.kind}), {len(case.sent)} bytes:\n{case.sent!r}")
        for step in case.then:
            self._progress.say(f"then {step!r}")
        await self._send((number,), self.tally, tell=self._progress.say)
        for text in await self.survival.check():
            self.tally.findings.append(Finding(number, case.kind, text, case.sent))
        self._tell_findings()

    async def _send(
        self, numbers: Sequence[int], tally: Tally, tell: Callable[[str], None] | None = None
    ) -> None:
        cases: Iterator[Case] = (make_case(self._seed, one, self._target) for one in numbers)
        url = self.survival.watched.url
        await Callers(url, tally, silence_s=_SILENCE_S, tell=tell).send(cases)

    def _tell_findings(self) -> None:
        for one in self.tally.findings[self._told :]:
            self._progress.say(f"NOT HELD  {one.describe(self._seed)}")
        self._told = len(self.tally.findings)

    def _show(self, count: int) -> None:
        sent = sum(self.tally.cases.values())
        rate = sent / self.took_s if self.took_s else 0.0
        memory = self.survival.vitals[-1].memory_mb.items()
        told = ", ".join(f"{name} {mb:.0f} MB" for name, mb in memory)
        self._progress.say(
            f"{sent:,} of {count:,} cases, {self.took_s:.0f} s, {rate:.0f} a second, "
            f"{len(self.tally.findings)} findings, {told}"
        )
