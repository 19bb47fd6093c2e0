"""What a fault is, what came of one, and whether that is as it should be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from lab.faults.experiment import Experiment
from lab.load.answers import NOT_TRUE

Strike = Callable[[Experiment], Awaitable[None]]
# What may be told to a caller whom a fault met: they may come again, or somebody else failed.
HONEST = frozenset((200, 429, 502, 503, 504, 507))
GONE = ("refused", "cut")


@dataclass(frozen=True)
class Signs:
    """Where the trouble shows: an event of the log (`request_done status=507`: with this field), an
    alert, a section of the runbook, a panel. None of it: nobody needs to know, as nobody is harmed.

    An alert fires when the fault lasts; the runbook's section and the panel are the alert's, unless
    they are named. A panel is named `board: title`.
    """

    log: str = ""
    alert: str = ""
    runbook: str = ""
    panel: str = ""


@dataclass(frozen=True)
class Fault:
    """`site`: shared, the one service of the run; beside, a gateway of its own before that one's
    engine; own, a launcher of its own. `ends_with`: the exit code of what it ends for good.
    """

    name: str
    what: str
    strike: Strike
    signs: Signs
    site: Literal["shared", "beside", "own"] = "shared"
    prepare: Strike | None = None  # before the callers begin
    # Who is connected to what dies is told by their connection alone: `refused`, `cut`.
    allows: tuple[str, ...] = ()
    is_over: Callable[[Experiment], Awaitable[bool]] | None = None
    limit_s: float = 90.0
    ends_with: int | None = None
    needs: tuple[str, ...] = ()


@dataclass
class FaultResult:
    """What came of one fault; a row of the table."""

    name: str
    what: str
    in_flight: dict[str, int] = field(default_factory=dict)
    got: dict[str, dict[str, int]] = field(default_factory=dict)  # by kind of caller
    recovered_s: float | None = None
    exit_code: int | None = None
    left_over: list[str] = field(default_factory=list)
    memory_mb: float | None = None
    grown_mb: float | None = None
    signs: Signs = field(default_factory=Signs)
    fired: list[str] | None = None  # alerts, should it last; None where nobody can say
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_here: str = ""
    run: str = ""  # date and commit, of a row that a later run has put in

    def count(self, word: str) -> int:
        """Of a verdict, with whatever status."""
        return sum(
            number
            for kinds in self.got.values()
            for name, number in kinds.items()
            if name.partition(" ")[0] == word
        )


def judge_result(fault: Fault, result: FaultResult) -> Iterator[str]:
    """What is not as it should be."""
    yield from _judge_answers(fault, result)
    yield from _judge_end(fault, result)
    alert = result.signs.alert
    if alert and result.fired is not None and alert not in result.fired:
        others = ", ".join(result.fired) or "none"
        yield f"{alert} would not fire should it last; these would: {others}"


def _judge_answers(fault: Fault, result: FaultResult) -> Iterator[str]:
    for word in (*NOT_TRUE, "lost"):
        if number := result.count(word):
            yield f"{number} {word}"
    for gone in GONE:
        if gone not in fault.allows and (number := result.count(gone)):
            yield f"{number} {gone}, though nothing died that they were connected to"
    words = (word for got in result.got.values() for word in got if word.startswith("told "))
    told = {int(word.partition(" ")[2]) for word in words}
    if fault.signs == Signs() and any(set(got) - {"right"} for got in result.got.values()):
        yield "it costs callers something, and shows nowhere"
    if odd := sorted(told - HONEST):
        yield f"told {', '.join(map(str, odd))}, which says something else than that it failed"


def _judge_end(fault: Fault, result: FaultResult) -> Iterator[str]:
    if result.left_over:
        yield f"left over: {', '.join(result.left_over)}"
    if fault.ends_with is not None:
        if result.exit_code != fault.ends_with:
            yield f"ended with {result.exit_code} instead of {fault.ends_with}"
        return
    if result.recovered_s is None:
        yield f"not recovered within {fault.limit_s:.0f} s"
    if not result.count("right"):
        yield "nothing was answered right"
