"""The figures of a run as a record keeps them, and of several runs together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lab.fuzz.cases.kinds import KINDS
from lab.fuzz.fuzz_run import FuzzRun
from lab.records.record import RecordFigure

_MOST_OF_ALL = ("MB", "ms")  # units of what is not summed up over runs


def build_figures(run: FuzzRun) -> list[RecordFigure]:
    return list(_list_figures(run))


def _list_figures(run: FuzzRun) -> Iterator[RecordFigure]:
    tally, survival = run.tally, run.survival
    yield RecordFigure("cases", sum(tally.cases.values()))
    for name, kind in KINDS.items():
        if tally.cases[name]:
            yield RecordFigure(f"cases of {name}", tally.cases[name], note=kind.meaning)
    yield RecordFigure("answers", sum(tally.statuses.values()))
    yield RecordFigure("served (2xx)", tally.count_statuses(200, 299))
    yield RecordFigure("refused (4xx)", tally.count_statuses(400, 499))
    yield RecordFigure("failed (5xx)", tally.count_statuses(500, 599))
    own = "of those: calls that the engine fails at, and at no other"
    yield RecordFigure("failed in the engine", sum(tally.failures.values()), note=own)
    yield RecordFigure("findings", len(tally.findings))
    yield RecordFigure("times that the service was looked at", run.slices)
    yield RecordFigure("honest calls answered rightly", survival.right)
    first, last = survival.vitals[0], survival.vitals[-1]
    if first.pids:  # else nobody has named any
        changed = sum(last.pids.get(name) != pid for name, pid in first.pids.items())
        restarts = last.restarts - first.restarts
        yield RecordFigure("processes that were replaced", max(changed, restarts))
    for name, growth in survival.growth_mb().items():
        yield RecordFigure(f"growth of the {name}", round(growth, 1), "MB")
    if survival.watched.blocks:
        longest = round(survival.longest_block_s * 1000, 1)
        note = "of CPU, without a pause; those under 10 ms are not looked at"
        yield RecordFigure("longest step of the event loop", longest, "ms", note=note)
    yield RecordFigure("longest answer", round(tally.longest_s * 1000), "ms")
    yield RecordFigure("time", round(run.took_s, 1), "s")


def add_figures(
    before: Sequence[RecordFigure], after: Sequence[RecordFigure]
) -> list[RecordFigure]:
    """Counts and times together, of all else the most."""
    known = {one.name: one for one in before}
    merged = []
    for one in after:
        earlier = known.pop(one.name, None)
        if earlier is not None:
            both = (earlier.value, one.value)
            value = max(both) if one.unit in _MOST_OF_ALL else round(sum(both), 1)
            merged.append(replace(one, value=value))
        else:
            merged.append(one)
    return [*merged, *known.values()]
