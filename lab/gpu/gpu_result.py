"""What a run found: figures round by round, who is how much faster than whom, and the record.

Written after every round, so that a run that is cut off has lost nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lab.gpu.arms import PlannedArm
from lab.gpu.calls import AGAIN, IDS, PREDICT, TEXTS, AnswerCount, ArmClient, AskedLoads
from lab.intervals import Interval, find_interval
from lab.records.record import RecordFigure, take_facts, take_record, write_record
from lab.records.results_page import describe_span, format_number
from lab.reports.output_files import write_json

Taken = Mapping[str, Mapping[str, Mapping[str, float]]]  # arm, measure, figure
_MS = ("first token", "between tokens")
RATE = "rate"
_NAME = 58


@dataclass(frozen=True)
class Pair:
    """One arm's way over another's, taken round by round: `over` and `under` are arm and way."""

    load: str
    over: tuple[str, str]
    under: tuple[str, str]

    @property
    def name(self) -> str:
        return f"{' '.join(self.over)} / {' '.join(self.under)}, {self.load}"


@dataclass
class GpuResult:
    """One run."""

    arguments: argparse.Namespace
    loads: AskedLoads
    planned: tuple[PlannedArm, ...]
    names: Mapping[str, str]
    rounds: list[Taken] = field(default_factory=list)
    told: dict[str, dict[str, AnswerCount]] = field(default_factory=dict)
    known: dict[str, dict[str, str]] = field(default_factory=dict)

    def add_round(self, taken: Taken, arms: Sequence[ArmClient]) -> None:
        self.rounds.append(taken)
        for arm in arms:
            self.told[arm.running.arm.word] = arm.told
            self.known[arm.running.arm.word] = arm.book.known
        self.write()

    def write(self) -> None:
        facts = {**take_facts(), **self.names}
        arms = {
            one.arm.word: {"command": one.command.arguments, "environment": one.command.environment}
            for one in self.planned
        }
        told = {w: {way: asdict(n) for way, n in by.items()} for w, by in self.told.items()}
        packed = {"facts": facts, "arms": arms, "rounds": self.rounds, "answers": told}
        write_json(Path(self.arguments.out), packed)
        if self.arguments.record:
            weights = "random weights" if self.loads.is_endless else "its own weights"
            about = (
                f"{self.names['model']} ({weights}), {self.names['vllm']}: engines side by side, "
                "all but the measured one stopped; medians and their 95 % intervals, ratios taken "
                "round by round."
            )
            name = f"GPU, {self.names['model']}"
            record = take_record(name, self.figures(), about=about)
            write_record(record, Path(self.arguments.record))

    def series(self, arm: str, measure: str, figure: str = RATE) -> list[float]:
        rows = (taken.get(arm, {}).get(measure, {}) for taken in self.rounds)
        return [row[figure] for row in rows if figure in row]

    def relate(self, pair: Pair, figure: str = RATE) -> Interval | None:
        """In the rounds that have both."""
        ratios = []
        for taken in self.rounds:
            above, below = (
                taken.get(arm, {}).get(f"{way}, {pair.load}", {}).get(figure)
                for arm, way in (pair.over, pair.under)
            )
            if above and below:
                ratios.append(above / below)
        return find_interval(ratios) if ratios else None

    def list_measures(self) -> Iterator[tuple[str, str]]:
        """Arm and measure, in the order of the arms."""
        for one in self.planned:
            word = one.arm.word
            found = {(word, name) for taken in self.rounds for name in taken.get(word, {})}
            yield from sorted(found)

    def list_pairs(self) -> Iterator[Pair]:
        """Each batch over the first arm and over others' flags as they are called, and over what
        differs from it in one thing; by the gateway over the engine itself.
        """
        arms = {one.arm.word: one.arm for one in self.planned}
        first, *rest = arms.values()
        bases = [(first.word, TEXTS if first.options is not None else IDS)]
        bases += [(arm.word, TEXTS) for arm in rest if arm.options is not None]
        for word, measure in self.list_measures():
            way, _, load = measure.partition(", ")
            under = [(word, IDS)] if way in (PREDICT, AGAIN) else []
            if way != AGAIN:
                under += [base for base in bases if base[0] != word and "stream" not in load]
                under += [(relative, way) for relative in arms[word].list_relatives()]
            for one in dict.fromkeys(under):
                yield Pair(load, (word, way), one)

    def figures(self) -> list[RecordFigure]:
        found = []
        for word, measure in self.list_measures():
            if rates := self.series(word, measure):
                note = f"cores: {self.describe_cores(word, measure)}"
                found.append(_build(f"{word}, {measure}", "tokens/s", find_interval(rates), note))
            for figure in _MS:
                if values := self.series(word, measure, figure):
                    name = f"{word}, {measure}: {figure}"
                    found.append(_build(name, "ms", find_interval(values)))
        for pair in self.list_pairs():
            for figure in (RATE, *_MS):
                if span := self.relate(pair, figure):
                    name = pair.name if figure == RATE else f"{pair.name}: {figure}"
                    found.append(_build(name, "×", span))
        for name, equal, asked, note in self.list_answers():
            found.append(RecordFigure(name, equal, f"of {asked:,}", note=note))
        return found

    def list_answers(self) -> Iterator[tuple[str, int, int, str]]:
        for word, by_way in self.told.items():
            for way, told in by_way.items():
                note = f"{told.mixed_up} were another question's" if told.mixed_up else ""
                yield f"{word}, {way}: answers as the first", told.equal, told.asked, note
        for word, answers in self.known.items():
            yield f"{word}: different answers", len(set(answers.values())), len(answers), ""
        first = self.planned[0].arm.word
        for one in self.planned:
            for other in dict.fromkeys((first, *one.arm.list_relatives())):
                mine, its = self.known.get(one.arm.word), self.known.get(other)
                if other == one.arm.word:
                    continue
                if mine and its:
                    own = [q for q in mine if q in self.loads.own]
                    equal = sum(mine[question] == its.get(question) for question in own)
                    yield f"{one.arm.word}: answers as {other}'s", equal, len(own), ""

    def describe_cores(self, word: str, measure: str) -> str:
        roles = dict.fromkeys(
            role for taken in self.rounds for role in taken.get(word, {}).get(measure, {})
        )
        cores = {
            role: statistics.median(self.series(word, measure, role))
            for role in roles
            if role not in (RATE, *_MS)
        }
        return ", ".join(f"{role} {value:.2f}" for role, value in cores.items() if value >= 0.005)

    def describe_round(self, taken: Taken) -> str:
        cells = (
            f"{word} {measure} {row[RATE]:,.0f}"
            for word, measures in taken.items()
            for measure, row in measures.items()
            if RATE in row
        )
        return "; ".join(cells)

    def describe(self) -> Iterator[str]:
        for one in self.figures():
            value = f"{format_number(one.value):>12} {one.unit:9}"
            yield f"{one.name:{_NAME}} {value} {describe_span(one):24} {one.note}".rstrip()
        yield f"{len(self.rounds)} rounds"

    @property
    def is_good(self) -> bool:
        """Real weights say the same by every way and with either scheduler. Random ones are too
        near to each other for that, but no way may mix up what the other does not.
        """
        if not self.loads.is_endless:
            is_same = all(
                equal == asked
                for name, equal, asked, _ in self.list_answers()
                if ": answers as" in name
            )
            return is_same and not any(n.mixed_up for by in self.told.values() for n in by.values())
        none = AnswerCount()
        return not any(
            by.get(PREDICT, none).mixed_up and not by.get(IDS, none).mixed_up
            for by in self.told.values()
        )


def _build(name: str, unit: str, span: Interval, note: str = "") -> RecordFigure:
    low, high = (span.low, span.high) if span.rounds > 1 else (None, None)
    return RecordFigure(name, span.value, unit, low, high, note)
