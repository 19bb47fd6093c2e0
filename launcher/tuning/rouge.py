"""ROUGE-L: the share of one text's tokens that another has in the same order; compares answers.

Tokens are Latin words and single characters of anything else, so Chinese needs no dictionary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"[A-Za-z0-9_]+|\S")


def rouge_l(text: str, reference: str) -> float:
    """The F-measure; two empty texts are equal."""
    ours, theirs = _TOKEN.findall(text.lower()), _TOKEN.findall(reference.lower())
    if not ours or not theirs:
        return float(ours == theirs)
    common = _longest_common(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def mean_rouge_l(texts: Sequence[str], references: Sequence[str]) -> float:
    scores = [rouge_l(text, ref) for text, ref in zip(texts, references, strict=True)]
    return sum(scores) / len(scores) if scores else 1.0


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Hyyrö's bit-parallel method: one big-integer step a token instead of a table."""
    places: dict[str, int] = {}
    for index, token in enumerate(first):
        places[token] = places.get(token, 0) | 1 << index
    mask = (1 << len(first)) - 1
    row = mask
    for token in second:
        match = row & places.get(token, 0)
        row = ((row + match) | (row - match)) & mask
    return len(first) - row.bit_count()
