"""Ordinary callers beside a hostile one: what the attack costs the others.

Short windows with and without the attack take turns, so that whatever else the machine does falls
on both, and each window under attack is held against the slower of its two neighbours. Where the
attack is no dearer to the engine than honest callers would be (hang-ups, large-batches), these ask
in the neighbours, and a first window has nobody. What does not hold is tried as often again before
it counts. Held is: the callers' p99 at most twice that of the
neighbours and no call of theirs failed, /healthz within 100 ms (on a machine that is busy: at most
twice what it took without the attack), memory of gateway and engine within 200 MB of before.

Exit codes: 0 all held, 1 something did not, 2 bad options or no gateway, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from common import processes
from common.prometheus_text import parse_samples
from lab import options
from lab.failures import NoService
from lab.load.attacks import ATTACKS, Attacker
from lab.load.counter_sums import count_inside
from lab.load.ordinary_callers import Callers, Prober, Window, find_quantile
from lab.records.record import RecordFigure, take_record, write_record
from lab.reports.output_files import ensure_writable
from lab.service import open_http, read_launcher, read_model

_MOST_SLOWER = 2.0
_MOST_HEALTH_S = 0.1
_MOST_GROWTH_MB = 200.0
_SETTLE_S = 180.0
_CALL_TIMEOUT_S = 60.0
_WARM_UP_S = 1.0


@dataclass
class Trial:
    """One attack: a window without it, then by turns one with and one without; first of all one
    with nobody where in those without it honest callers ask.
    """

    name: str
    quiet: list[Window] = field(default_factory=list)
    attacked: list[Window] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    unsettled: int = 0
    alone: Window | None = None

    def ratios(self) -> list[float]:
        neighbours = zip(self.quiet, self.quiet[1:], strict=False)
        return [
            attacked.p99_s / max(before.p99_s, after.p99_s)
            for attacked, (before, after) in zip(self.attacked, neighbours, strict=True)
        ]

    def health_s(self) -> float:
        """The worst of a window, as it is in most of them."""
        return statistics.median(max(one.health_s) for one in self.attacked)

    def quiet_health_s(self) -> float:
        return max(max(one.health_s) for one in self.quiet)

    def growth_mb(self) -> dict[str, float]:
        before = self.quiet[0].memory_mb
        return {
            name: max(one.memory_mb.get(name, 0.0) for one in self.attacked) - before[name]
            for name in before
        }

    def is_in_doubt(self) -> bool:
        """What does not hold may have been the machine's doing, unless nobody was served."""
        is_lost = self.unsettled or any(one.failures for one in self.attacked)
        return not is_lost and any(self.find_problems())

    def find_problems(self) -> Iterator[str]:
        ratio = statistics.median(self.ratios())
        if ratio > _MOST_SLOWER:
            yield f"the callers' p99 is {ratio:.1f} times that without it"
        failures = [text for one in self.attacked for text in one.failures]
        if failures:
            yield f"{len(failures)} calls of the others failed, such as {failures[0]!r}"
        health = self.health_s()
        if health > max(_MOST_HEALTH_S, _MOST_SLOWER * self.quiet_health_s()):
            yield f"/healthz took {health * 1000:.0f} ms"
        for name, growth in self.growth_mb().items():
            if growth > _MOST_GROWTH_MB:
                yield f"the {name} grew by {growth:.0f} MB"
        if self.unsettled:
            yield f"{self.unsettled} times nobody was served for {_SETTLE_S:.0f} s afterwards"


class AttackRun:
    """One attack after another on one gateway."""

    def __init__(self, arguments: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._arguments, self._session = arguments, session
        self._url: str = arguments.url
        self._window_s: float = arguments.window
        self._model = ""
        self._prober = Prober(arguments.url)

    def end(self) -> None:
        self._prober.end()

    async def run(self) -> list[Trial]:
        async with open_http() as client:
            self._model = await read_model(self._url, client)
        if not self._model:
            text = f"{self._url} does not name a model; is the gateway running? `make serve`"
            raise NoService(text)
        await self._prober.wait_ready()
        trials = []
        for name in self._arguments.attack or ATTACKS:
            trials.append(await self._try(name))
            print("\n".join(describe_trial(trials[-1])), flush=True)
        return trials

    async def _try(self, name: str) -> Trial:
        trial = Trial(name)
        attacker = Attacker(name, self._url, self._model)
        try:
            await attacker.wait_ready()
            await self._observe(_WARM_UP_S)
            if ATTACKS[name].rival is not None:
                trial.alone = await self._observe(self._window_s)
            await self._take_quiet(trial, attacker)
            while not trial.unsettled and len(trial.attacked) < self._arguments.rounds:
                await self._take_turn(trial, attacker)
            for _ in range(self._arguments.rounds if trial.is_in_doubt() else 0):
                await self._take_turn(trial, attacker)
        finally:
            attacker.end()
        return trial

    async def _take_turn(self, trial: Trial, attacker: Attacker) -> None:
        attacker.begin(time.monotonic() + self._window_s)
        trial.attacked.append(await self._observe(self._window_s))
        trial.statuses += await attacker.read_statuses()
        trial.unsettled += not await self._settle()
        await self._take_quiet(trial, attacker)

    async def _take_quiet(self, trial: Trial, attacker: Attacker) -> None:
        has_rival = ATTACKS[trial.name].rival is not None
        if has_rival:
            attacker.begin(time.monotonic() + self._window_s, is_rival=True)
        trial.quiet.append(await self._observe(self._window_s))
        if has_rival:
            await attacker.read_statuses()
            await self._settle()

    async def _observe(self, duration_s: float) -> Window:
        window = Window()
        callers = Callers(self._session, self._url, self._model, self._arguments.callers)
        async with self._prober.watch(window, await self._find_programs()):
            await callers.ask(time.monotonic() + duration_s, window)
        return window

    async def _find_programs(self) -> dict[str, list[int]]:
        """The processes of this machine that the launcher names; none without a launcher."""
        if not self._arguments.status_url:
            return {}
        async with open_http() as client:
            launcher = await read_launcher(self._arguments.status_url, client)
        pids = {name: launcher.pid(name) for name in ("gateway", "engine")}
        return {
            name: [one.pid for one in processes.find_session(pid)]
            for name, pid in pids.items()
            if pid
        }

    async def _settle(self) -> bool:
        """Whether the attack's leavings are gone and somebody is served again."""
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    async with self._session.get(self._url + "/metrics") as answer:
                        inside = count_inside(parse_samples(await answer.text()))
                    async with self._session.post(
                        self._url + "/predict", json={"prompt": "x", "max_tokens": 1}
                    ) as answer:
                        await answer.read()
                    if not inside and answer.status == 200:
                        return True
            except (aiohttp.ClientError, TimeoutError, ValueError):
                pass
            await asyncio.sleep(0.2)
        return False


def build_figures(trial: Trial) -> list[RecordFigure]:
    name, ratios = trial.name, trial.ratios()
    quiet = [latency for one in trial.quiet for latency in one.latencies_s]
    attacked = [latency for one in trial.attacked for latency in one.latencies_s]
    alone = [trial.alone] if trial.alone else []
    figures = [
        *(
            RecordFigure(f"{name}: p99 of nobody else", round(one.p99_s * 1000), "ms")
            for one in alone
        ),
        RecordFigure(f"{name}: p99 without", round(find_quantile(quiet, 0.99) * 1000), "ms"),
        RecordFigure(
            f"{name}: p99 under attack", round(find_quantile(attacked, 0.99) * 1000), "ms"
        ),
        RecordFigure(
            f"{name}: times slower",
            round(statistics.median(ratios), 2),
            low=round(min(ratios), 2),
            high=round(max(ratios), 2),
        ),
        RecordFigure(f"{name}: /healthz at worst", round(trial.health_s() * 1000, 1), "ms"),
        RecordFigure(
            f"{name}: calls that failed", sum(len(one.failures) for one in trial.attacked)
        ),
        RecordFigure(f"{name}: requests of the attack", sum(trial.statuses.values())),
    ]
    growths = trial.growth_mb().items()
    return figures + [RecordFigure(f"{name}: {p} grew by", round(n, 1), "MB") for p, n in growths]


def describe_trial(trial: Trial) -> list[str]:
    lines = ["", f"{trial.name}: {ATTACKS[trial.name].meaning}"]
    for one in build_figures(trial):
        about = f"  ({one.low:g} to {one.high:g})" if one.low is not None else ""
        lines.append(f"  {one.name.partition(': ')[2]:28}{one.value:>10g} {one.unit}{about}")
    answered = ", ".join(f"{status}: {n}" for status, n in sorted(trial.statuses.items()))
    lines.append(f"  answered {answered or 'nothing'}")
    problems = [f"  NOT HELD  {problem}" for problem in trial.find_problems()]
    return [*lines, *(problems or ["  held"])]


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.record:
        ensure_writable(Path(arguments.record))
    return asyncio.run(run_attacks(arguments))


async def run_attacks(arguments: argparse.Namespace) -> int:
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        attack = AttackRun(arguments, session)
        try:
            trials = await attack.run()
        finally:
            attack.end()
    if arguments.record:
        figures = [figure for trial in trials for figure in build_figures(trial)]
        about = f"{arguments.callers} ordinary callers, windows of {arguments.window:g} s"
        write_record(take_record(arguments.name, figures, about=about), Path(arguments.record))
    return 1 if any(list(trial.find_problems()) for trial in trials) else 0


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("attack", __doc__)
    url = f"http://127.0.0.1:{options.GATEWAY_PORT}"
    add = parser.add_argument
    add("--url", "--server-url", type=options.address, default=url, help=f"default: {url}")
    add(
        "--status",
        "--status-url",
        dest="status_url",
        type=options.address,
        default=options.find_neighbour(url),
        help="the launcher's status; empty: no look at memory",
    )
    known = "; ".join(f"{name}: {one.meaning}" for name, one in ATTACKS.items())
    help_ = f"repeatable (default: all). {known}"
    add("--attack", action="append", choices=sorted(ATTACKS), default=[], help=help_)
    add("--window", type=options.seconds, default=10.0, metavar="S", help="default: 10")
    count = options.whole_number(1)
    add("--rounds", type=count, default=3, metavar="N", help="windows of each (default: 3)")
    add("--callers", type=count, default=20, metavar="N", help="ordinary ones (default: 20)")
    add("--name", default="attack", help="of the record")
    options.add_record(parser, "--json")
    return options.parse_options(parser, words)
