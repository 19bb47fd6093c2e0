"""How good an answer is: ROUGE-L in two readings, and whether it is the reference itself.

The course cuts both texts with jieba, joins the pieces with spaces and hands them to `rouge_score`
as it comes. That scorer's own tokenizer keeps Latin letters and digits alone, so Chinese does not
count at all: `rouge_course` is that figure, to the last digit. `rouge_whitespace` is the same score
with every piece counted.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jieba's, at its import: an old API, old escapes
    import jieba
from rouge_score import rouge_scorer

jieba.setLogLevel(logging.WARNING)


class _WhitespaceTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return text.split()


_COURSE = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
_WHITESPACE = rouge_scorer.RougeScorer(["rougeL"], tokenizer=_WhitespaceTokenizer())


@dataclass(frozen=True)
class Score:
    """What one answer is worth."""

    rouge_course: float
    rouge_whitespace: float
    is_exact: bool


@functools.lru_cache(maxsize=65_536)
def cut(text: str) -> str:
    """jieba's pieces, joined with spaces."""
    return " ".join(jieba.lcut(text))


@functools.lru_cache(maxsize=65_536)
def score(answer: str, reference: str) -> Score:
    is_exact = answer.strip() == reference.strip()
    ours, theirs = cut(answer), cut(reference)
    if not ours.strip() or not theirs.strip():
        return Score(0.0, 0.0, is_exact)
    course = _COURSE.score(theirs, ours)["rougeL"].fmeasure
    whitespace = _WHITESPACE.score(theirs, ours)["rougeL"].fmeasure
    return Score(float(course), float(whitespace), is_exact)


def mark_common(answer: str, reference: str) -> tuple[list[tuple[str, bool]], ...]:
    """Both texts in jieba's pieces, each with whether the longest common subsequence has it."""
    ours, theirs = jieba.lcut(answer), jieba.lcut(reference)
    return _mark(ours, theirs), _mark(theirs, ours)


def _mark(pieces: list[str], others: list[str]) -> list[tuple[str, bool]]:
    kept = set(rouge_scorer.lcs_ind(pieces, others)) if pieces and others else set()
    return [(piece, index in kept) for index, piece in enumerate(pieces)]


def mean(values: Sequence[float]) -> float:
    """As the course takes it: the sum in the answers' order, divided."""
    return sum(values) / len(values) if values else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between neighbours; 0 for no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = share * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
