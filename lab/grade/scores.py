"""How good an answer is: ROUGE-L in two readings, and whether it is the reference itself.

The course cuts both texts with jieba, joins the pieces with spaces and hands them to `rouge_score`
as it comes. That scorer's own tokenizer keeps Latin letters and digits alone, so Chinese does not
count at all: `rouge_course` is that figure, to the last digit. `rouge_whitespace` is the same score
with every piece counted.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from rouge_score import rouge_scorer


@functools.cache
def _load_jieba() -> Callable[[str], list[str]]:
    """At the first text, because it takes its time and warns of an old API."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jieba  # noqa: PLC0415
    jieba.setLogLevel(logging.WARNING)
    cut_words: Callable[[str], list[str]] = jieba.lcut
    return cut_words


class _WhitespaceTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


_COURSE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
_WHITESPACE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_WhitespaceTokenizer())


@dataclass(frozen=True)
class AnswerScore:
    """What one answer is worth."""

    rouge_course: float
    rouge_whitespace: float
    is_exact: bool


@functools.lru_cache(maxsize=65_536)
def cut(text: str) -> str:
    """jieba's pieces, joined with spaces."""
    return " ".join(_load_jieba()(text))


@functools.lru_cache(maxsize=65_536)
def score(answer: str, reference: str) -> AnswerScore:
    is_exact = answer.strip() == reference.strip()
    ours, theirs = cut(answer), cut(reference)
    if not ours.strip() or not theirs.strip():
        return AnswerScore(0.0, 0.0, is_exact)
    course = _COURSE.score(theirs, ours)["rougeL"].fmeasure
    whitespace = _WHITESPACE.score(theirs, ours)["rougeL"].fmeasure
    return AnswerScore(float(course), float(whitespace), is_exact)


def mark_common(text: str, other: str) -> list[tuple[str, bool]]:
    """A text in jieba's pieces, each with whether the longest common subsequence has it."""
    pieces, others = _load_jieba()(text), _load_jieba()(other)
    kept = set(rouge_scorer.lcs_ind(pieces, others)) if pieces and others else set()
    return [(piece, index in kept) for index, piece in enumerate(pieces)]
