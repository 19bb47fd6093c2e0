"""Rounds: in each, every arm once, in random order; warm-ups dropped; ended by the clock."""

from __future__ import annotations

import operator
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from lab.bench.bench_figures import RoundSeries
from lab.bench.cpu_time import CpuMeter, Neighbours
from lab.bench.targets import BenchClient, Target, read_clock_s
from lab.bench.workloads import BenchWorkload
from lab.intervals import FEWEST_ROUNDS

Say = Callable[[str], None]
# A slow machine gets its six rounds as long as they cost no more than this over the time planned.
_OVERTIME = 1.6
CPU_MEASURE = "CPU of gateway and engine"


@dataclass(frozen=True)
class RoundBudget:
    """How long the rounds of one workload may take, and how many there may be."""

    seconds: float
    most: int
    fewest: int = FEWEST_ROUNDS
    warmups: int = 1

    def allows(self, done: int, elapsed_s: float, longest_s: float) -> bool:
        """Whether another round is begun."""
        if done >= self.most:
            return False
        limit_s = self.seconds * (_OVERTIME if done < self.fewest else 1.0)
        return done < 2 or elapsed_s + longest_s <= limit_s


async def take_rounds(
    arms: Sequence[str],
    measure: Callable[[str], Awaitable[dict[str, float]]],
    budget: RoundBudget,
    chance: random.Random,
    say: Say,
) -> dict[str, dict[str, list[float]]]:
    """By measure and arm. Warm-ups are no rounds and take no time of the budget."""
    taken: dict[str, dict[str, list[float]]] = {}
    longest_s, began = 0.0, read_clock_s()
    number = -budget.warmups
    while number < 0 or budget.allows(number, read_clock_s() - began, longest_s):
        say("warming up" if number < 0 else f"round {number + 1}")
        started = read_clock_s()
        for arm in chance.sample(list(arms), len(arms)):
            values = await measure(arm)
            if number >= 0:
                for name, value in values.items():
                    taken.setdefault(name, {}).setdefault(arm, []).append(value)
        number += 1
        if number <= 0:
            began = read_clock_s()
        else:
            longest_s = max(longest_s, read_clock_s() - started)
    return taken


@dataclass(frozen=True)
class WorkloadRounds:
    """One workload through all arms."""

    title: str
    series: tuple[RoundSeries, ...]
    gateway_cpu_ms: tuple[float, ...]
    neighbours: float | None


@dataclass(frozen=True)
class BenchSetup:
    """Where everything is measured, and with what."""

    targets: tuple[Target, ...]
    client: BenchClient
    meter: CpuMeter | None
    chance: random.Random
    say: Say


async def measure_workload(
    workload: BenchWorkload, site: BenchSetup, budget: RoundBudget
) -> WorkloadRounds:
    calls = {target.name: await workload.prepare(target) for target in site.targets}
    meter = site.meter
    gateway_cpu: list[float] = []

    async def measure(arm: str) -> dict[str, float]:
        if meter is None:
            return await workload.run(site.client, calls[arm])
        before = meter.read()
        values = await workload.run(site.client, calls[arm])
        gateway_s, engine_s = map(operator.sub, meter.read(), before)
        if arm == "gateway":
            gateway_cpu.append(gateway_s * 1e3 / len(workload.questions))
        return {**values, CPU_MEASURE: (gateway_s + engine_s) * 1e3 / len(workload.questions)}

    if meter is not None:
        meter.refresh()
    neighbours = Neighbours(meter.pids()) if meter else None
    taken = await take_rounds(list(calls), measure, budget, site.chance, site.say)
    series = [
        RoundSeries(workload.title, name, "ms", {arm: by_arm[arm] for arm in calls})
        for name, by_arm in taken.items()
    ]
    share = neighbours.share() if neighbours else None
    return WorkloadRounds(
        workload.title, tuple(series), tuple(gateway_cpu[budget.warmups :]), share
    )
