"""Which alerts a fault fires should it last, by Prometheus's own reading of the rules.

What gateways, launcher and engine tell is scraped while callers ask, before the fault and in it.
A fault is over in seconds, and an alert waits for minutes; so promtool is given a past of half an
hour that goes on as before the fault, and twenty minutes that go on as in it.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import aiohttp

from common.prometheus_text import parse_samples
from lab.paths import ROOT

_RULES = ROOT / "deploy" / "prometheus" / "rules"
_SCRAPE_EVERY_S = 0.5
_TIMEOUT = aiohttp.ClientTimeout(total=1.0)
_EARLY_S = 1.0
_LEAST_SHARE = 0.75  # of the scrapes
_STEP_S = 15
_PAST_STEPS, _FAULT_STEPS = 120, 80
_NAME = re.compile(r"\b(?:up|(?:gateway|launcher)_\w+|vllm:\w+)\b")
_COUNTER = re.compile(r"_(total|bucket|count|sum)$")

Scrape = dict[str, float]  # by series, as Prometheus writes one


@dataclass(frozen=True)
class Target:
    job: str
    instance: str
    url: str


class Scraper:
    """Of these targets, until it is cancelled."""

    def __init__(self, session: aiohttp.ClientSession, targets: Sequence[Target]) -> None:
        self._session, self._targets = session, targets
        self._wanted = find_names()
        self.scrapes: list[tuple[float, Scrape]] = []

    async def run(self) -> None:
        while True:
            at = time.monotonic()
            read = await asyncio.gather(*map(self._read, self._targets))
            self.scrapes.append((at, {key: value for one in read for key, value in one.items()}))
            await asyncio.sleep(max(0.0, at + _SCRAPE_EVERY_S - time.monotonic()))

    async def _read(self, target: Target) -> Scrape:
        own = {"job": target.job, "instance": target.instance}
        try:
            async with self._session.get(f"{target.url}/metrics", timeout=_TIMEOUT) as answer:
                answer.raise_for_status()
                samples = parse_samples(await answer.text())
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return {_write_series("up", own): 0.0}
        told = {
            _write_series(name, {**labels, **own}): value
            for name, rows in samples.items()
            if name in self._wanted
            for labels, value in rows
        }
        return {**told, _write_series("up", own): 1.0}


def find_names() -> set[str]:
    """Of all metrics that a rule reads."""
    texts = (path.read_text(encoding="utf-8") for path in _RULES.glob("*.yml"))
    return {name for text in texts for name in _NAME.findall(text)}


async def find_fired(
    scrapes: Sequence[tuple[float, Scrape]], began_at: float, ended_at: float
) -> list[str] | None:
    """Alerts by name; None where nobody can say."""
    program = shutil.which("promtool")
    past = [one for one in scrapes if one[0] < began_at]
    # What was under way when it struck still comes in.
    first_at = began_at + (_EARLY_S if ended_at - began_at > 3 * _EARLY_S else 0.0)
    during = [one for one in scrapes if first_at <= one[0] < ended_at]
    if program is None or not past or not during:
        return None
    series = _lengthen(past, during)
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.json"  # JSON is YAML, too
        case.write_text(json.dumps(_build_case(series)), encoding="utf-8")
        process = await asyncio.create_subprocess_exec(
            *(program, "test", "rules", str(case)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
    names = set(re.findall(r'alertname=\\*"(\w+)', said.decode(errors="replace")))
    return sorted(names - {"Watchdog"})


def _lengthen(
    past: Sequence[tuple[float, Scrape]], during: Sequence[tuple[float, Scrape]]
) -> Iterator[dict[str, str]]:
    """promtool's short form: where it begins, by what it grows, how often."""
    for name in sorted({key for _, one in (*past, *during) for key in one}):
        start, pace = _measure(name, past)
        then, later_pace = _measure(name, during)
        parts = []
        last = 0.0
        if start is None:
            parts.append(f"_x{_PAST_STEPS}")
        else:
            parts.append(_count_up(start, pace, _PAST_STEPS))
            last = start + pace * _PAST_STEPS
        if then is None:
            parts.append(f"stale _x{_FAULT_STEPS}")
        else:
            first = last if _is_counter(name) and start is not None else then
            parts.append(_count_up(first, later_pace, _FAULT_STEPS))
        yield {"series": name, "values": " ".join(parts)}


def _measure(name: str, scrapes: Sequence[tuple[float, Scrape]]) -> tuple[float | None, float]:
    """What it mostly is; by what a counter grows in a step. A target away for a while is away."""
    rows = [(at, one[name]) for at, one in scrapes if name in one]
    if len(rows) < _LEAST_SHARE * len(scrapes):
        return None, 0.0
    values = [value for _, value in rows]
    if name.startswith("up{"):
        return float(sum(values) >= _LEAST_SHARE * len(values)), 0.0
    if not _is_counter(name):
        return statistics.median_low(values), 0.0
    grown = sum(max(0.0, after - before) for before, after in pairwise(values))
    took_s = rows[-1][0] - rows[0][0]
    return values[0], grown / took_s * _STEP_S if took_s else 0.0


def _is_counter(series: str) -> bool:
    return bool(_COUNTER.search(series.partition("{")[0]))


def _count_up(first: float, pace: float, steps: int) -> str:
    return f"{first:f}+{pace:f}x{steps - 1}"


def _write_series(name: str, labels: Mapping[str, str]) -> str:
    told = ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(labels.items()))
    return f"{name}{{{told}}}"


def _build_case(series: Iterator[dict[str, str]]) -> dict[str, object]:
    minutes = range(_PAST_STEPS * _STEP_S // 60 + 1, (_PAST_STEPS + _FAULT_STEPS) * _STEP_S // 60)
    looks = [
        {"expr": 'ALERTS{alertstate="firing"}', "eval_time": f"{minute}m", "exp_samples": []}
        for minute in minutes
    ]
    test = {"interval": f"{_STEP_S}s", "input_series": list(series), "promql_expr_test": looks}
    files = [str(path) for path in sorted(_RULES.glob("*.yml"), reverse=True)]
    return {"rule_files": files, "evaluation_interval": f"{_STEP_S}s", "tests": [test]}
