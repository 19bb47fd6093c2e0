"""Whether the answers belong to their questions, told from the texts alone.

Each answer is compared with every reference, by the words they share, rare ones counting more. An
answer that resembles another question's reference far more than its own is displaced if that
question's place is not held by its own answer: a model that confuses two questions gives one
answer twice, a server that mixes up its answers moves them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lab.grade.scores import cut

_LEAST_LIKENESS = 0.2
_LEAST_ADVANTAGE = 1.5
_FEWEST_DISPLACED = 2
_FEWEST_SURE = 4
_DISPLACED_SHARE = 0.1
# Enough answers for chance to be told from sense, and how unlikely chance must be.
_LEAST_ANSWERS = 8
_CHANCE_Z = 2.33


@dataclass(frozen=True)
class AnswerOrder:
    """`displaced` names for an answer's place the place it seems to belong to."""

    displaced: Mapping[int, int]
    is_unrelated: bool


def check_order(answers: Sequence[str], references: Sequence[str]) -> AnswerOrder:
    # Repeated questions share a home, so do questions with the same reference.
    numbers = {reference: number for number, reference in enumerate(dict.fromkeys(references))}
    homes = [numbers[reference] for reference in references]
    space = _ReferenceSpace(list(numbers))
    rows = [space.compare(answer) for answer in answers]
    displaced = _find_displaced(rows, homes, answers)
    moved = {place: homes.index(target) for place, target in displaced.items()}
    return AnswerOrder(moved, not moved and _is_chance(rows, homes, answers))


class _ReferenceSpace:
    """The references as weighted sets of words, searched through an index of the words."""

    def __init__(self, references: Sequence[str]) -> None:
        words = [_words(reference) for reference in references]
        self._holders: dict[str, list[int]] = {}
        for number, row in enumerate(words):
            for word in row:
                self._holders.setdefault(word, []).append(number)
        self._total = len(references)
        self._norms = [self._norm(row) for row in words]

    def _weigh(self, word: str) -> float:
        return math.log(1 + self._total / len(self._holders.get(word, (0,)))) ** 2

    def _norm(self, words: set[str]) -> float:
        return math.sqrt(sum(map(self._weigh, words)))

    def compare(self, answer: str) -> list[float]:
        """The cosine to every reference."""
        words = _words(answer)
        shared = [0.0] * self._total
        norm = self._norm(words)
        for word in words & self._holders.keys():
            weight = self._weigh(word)
            for number in self._holders[word]:
                shared[number] += weight
        pairs = zip(shared, self._norms, strict=True)
        return [value / (norm * other) if value else 0.0 for value, other in pairs]


def _words(text: str) -> set[str]:
    return set(cut(text.lower()).split())


def _find_displaced(
    rows: Sequence[Sequence[float]], homes: Sequence[int], answers: Sequence[str]
) -> dict[int, int]:
    wanted = {
        place: target
        for place, row in enumerate(rows)
        if (target := _find_better(row, homes[place])) is not None
    }
    said = {place for place, answer in enumerate(answers) if answer.strip()}
    # An answer that resembles nothing does not hold its place: weak answers would hide disorder.
    at_home = {place for place in said if _is_at_home(rows[place], homes[place])}
    loose = _drop_confusions(wanted, homes, at_home)
    if len(loose) >= max(_FEWEST_SURE, _DISPLACED_SHARE * len(said)):
        return loose
    # Few of them are believed only if they have changed places among themselves.
    closed = _drop_confusions(wanted, homes, said)
    return closed if len(closed) >= _FEWEST_DISPLACED else {}


def _find_better(row: Sequence[float], home: int) -> int | None:
    target = max(range(len(row)), key=row.__getitem__)
    is_better = row[target] >= max(_LEAST_LIKENESS, _LEAST_ADVANTAGE * row[home])
    return target if target != home and is_better else None


def _is_at_home(row: Sequence[float], home: int) -> bool:
    return 0 < row[home] == max(row)


def _drop_confusions(
    wanted: Mapping[int, int], homes: Sequence[int], holders: set[int]
) -> dict[int, int]:
    """Without those whose target is held by an answer of its own, until none is left."""
    moved = dict(wanted)
    while True:
        held = {homes[place] for place in holders if place not in moved}
        kept = {place: target for place, target in moved.items() if target not in held}
        if len(kept) == len(moved):
            return kept
        moved = kept


def _is_chance(
    rows: Sequence[Sequence[float]], homes: Sequence[int], answers: Sequence[str]
) -> bool:
    """A sign test: do answers resemble their own reference more than the middle of the others?"""
    wins = tries = 0.0
    for row, home, answer in zip(rows, homes, answers, strict=True):
        if answer.strip() and len(row) > 1:
            others = [value for number, value in enumerate(row) if number != home]
            above = sum(row[home] > value for value in others)
            equal = sum(row[home] == value for value in others)
            tries += 1
            wins += (above + equal / 2) / len(others)
    if tries < _LEAST_ANSWERS:
        return False
    # The share of others that are beaten is even between 0 and 1 if there is no relation.
    return (wins / tries - 0.5) / math.sqrt(1 / 12 / tries) < _CHANCE_Z
