"""Whose answer is it? Every answer of a measured call is held against its question.

A relay that mixes its answers up is fast and useless, so figures exist only where none was. What
each question's answer is comes from the questions' file if the model knows it by heart, and else
from the direct target, asked before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lab.bench.bench_figures import BenchFailed

_LEAST_SHARED = 12


class MixedUp(BenchFailed):
    """An answer that belongs to another question, or to none."""

    exit_code = 1


@dataclass
class AnswerBook:
    """The known answer of each question.

    By heart, an answer must be the known one. Otherwise greedy decoding may take another turn in
    another batch: such an answer is counted, unless it is another question's.
    """

    known: dict[str, str]
    is_by_heart: bool
    checked: int = 0
    differing: int = 0
    _by_answer: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._by_answer = {answer: question for question, answer in self.known.items()}

    def check(self, target: str, asked: Sequence[str], answers: Sequence[str], cut: bool) -> None:
        """`cut`: the answers may end early, at a limit of tokens."""
        if len(asked) != len(answers):
            raise MixedUp(f"{target} gave {len(answers)} answers to {len(asked)} prompts")
        for question, answer in zip(asked, answers, strict=True):
            self.checked += 1
            known = self.known[question]
            if answer == known or (cut and answer and known.startswith(answer)):
                continue
            owner = self._find_owner(question, answer, cut)
            if owner is not None or self.is_by_heart or not answer:
                raise MixedUp(self._describe(target, question, answer, owner))
            self.differing += 1

    def _find_owner(self, question: str, answer: str, cut: bool) -> str | None:
        """The other question that this is the answer to."""
        if answer in self._by_answer:
            return self._by_answer[answer]
        if len(answer) < _LEAST_SHARED:
            return None
        if cut:
            return next(
                (q for q, known in self._others(question) if known.startswith(answer)), None
            )
        own = _count_shared(answer, self.known[question])
        likeness = {q: _count_shared(answer, known) for q, known in self._others(question)}
        best = max(likeness, key=likeness.__getitem__, default="")
        is_foreign = bool(best) and likeness[best] >= max(0.8 * len(answer), 2 * own)
        return best if is_foreign else None

    def _others(self, question: str) -> Iterator[tuple[str, str]]:
        return (pair for pair in self.known.items() if pair[0] != question)

    def _describe(self, target: str, question: str, answer: str, owner: str | None) -> str:
        places = {known: place for place, known in enumerate(self.known, start=1)}
        text = f"{target} answered question {places[question]} ({_shorten(question)}) with "
        if owner is not None:
            return f"{text}the answer to question {places[owner]} ({_shorten(owner)})"
        if not answer:
            return f"{text}nothing"
        return f"{text}{_shorten(answer)!r}, which is no known answer"


def build_book(pairs: dict[str, str], learned: dict[str, str]) -> AnswerBook:
    """`learned` is what the direct target answered before anything was measured."""
    empty = [question for question, answer in learned.items() if not answer]
    if empty:
        raise BenchFailed(f"the engine itself answers {_shorten(empty[0])!r} with nothing")
    is_by_heart = all(pairs.get(question) == answer for question, answer in learned.items())
    if not is_by_heart and len(set(learned.values())) < len(learned) / 2:
        raise BenchFailed(
            "the engine gives the same answer to most questions, so nobody could see answers that "
            "are mixed up; use other --questions or more --max-tokens"
        )
    return AnswerBook(learned, is_by_heart)


def _count_shared(one: str, other: str) -> int:
    """Characters that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"
