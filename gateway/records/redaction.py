"""What is taken out of texts before they are kept: patterns, each of bounded cost.

Python's `re` tries one possibility after the other and holds up all threads meanwhile, so a pattern
is taken only if the steps of an attempt at one place are bounded: nothing repeats without an end,
and the ways to match, multiplied out, are few. Over a text that is in proportion to its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from re import _parser as parser  # type: ignore[attr-defined]  # the one that `re.compile` uses
from typing import Any

from common.errors import SettingsError

# These begin where a run of their characters begins, or are short: none looks at a text twice.
BUILT_IN = {
    "emails": re.compile(r"[\w.+%-]{1,64}+@[\w-]{1,63}+(?:\.[\w-]{1,63}+){1,4}"),
    "keys": re.compile(
        r"(?<![\w-])(?:(?:sk|pk|rk|vg|hf|gh[opsu]|github_pat|glpat|xox[abprs])[-_][\w-]{16,}+"
        r"|AKIA[0-9A-Z]{16}(?!\w)"
        r"|eyJ[\w-]{8,}+\.[\w-]{8,}+(?:\.[\w-]++)?)"
    ),
    "phones": re.compile(
        r"(?<![\w.+-])\+\d{1,3}+(?:[ .-]?+\(?+\d{1,4}+\)?+){2,5}"
        r"|(?<![\w.-])\(?+\d{2,4}+\)?+(?:[ -]\d{2,4}+){1,2}[ -]\d{3,4}+(?![\w-])"
        r"|(?<!\w)\d{10,15}+(?!\w)"
    ),
}
REPLACEMENT = "[redacted]"
LONGEST_MATCH = 512
_MOST_STEPS = 1000  # some 10 ms over a text of 8,192 characters, in which nothing else runs
_MOST_PATTERNS = 32
_LONGEST_PATTERN = 512


class Redactor:
    """Takes out what any of its patterns finds."""

    def __init__(self, entries: Sequence[str], most_characters: int) -> None:
        """Each entry is the name of one that is built in, or a regular expression."""
        if len(entries) > _MOST_PATTERNS:
            raise SettingsError(f"GATEWAY_AUDIT_REDACT: at most {_MOST_PATTERNS} patterns")
        self._patterns = [BUILT_IN.get(one) or compile_bounded(one) for one in entries]
        self._most = most_characters

    def clean(self, text: str, *, is_cut: bool = False) -> str:
        """What is cut off may leave a half that no pattern knows, so the end goes with it."""
        longest = self._most + LONGEST_MATCH
        is_cut |= len(text) > longest
        text = text[:longest]
        for pattern in self._patterns:
            text = pattern.sub(REPLACEMENT, text)
        if is_cut:
            text = text[: max(0, len(text) - LONGEST_MATCH)]
        return text[: self._most]


def compile_bounded(text: str) -> re.Pattern[str]:
    """`SettingsError` says what the pattern must not have."""
    shown = f"GATEWAY_AUDIT_REDACT: {text[:60]!r}"
    if len(text) > _LONGEST_PATTERN:
        raise SettingsError(f"{shown}…: a pattern has at most {_LONGEST_PATTERN} characters")
    try:
        pattern = re.compile(text)
        parsed = parser.parse(text)
        _, steps = _count_steps(parsed)
    except (re.error, RecursionError, OverflowError) as error:
        names = ", ".join(BUILT_IN)
        raise SettingsError(f"{shown} is no pattern ({error}), nor one of {names}") from None
    except _Unbounded as error:
        raise SettingsError(f"{shown} {error}") from None
    least, most = parsed.getwidth()
    if least == 0 or most > LONGEST_MATCH:
        raise SettingsError(f"{shown} must match 1 to {LONGEST_MATCH} characters")
    if steps > _MOST_STEPS:
        raise SettingsError(
            f"{shown} may take too many steps at one place of a text; bound its counts, or make "
            "them possessive: [a-z]{1,64}+"
        )
    return pattern


class _Unbounded(Exception):
    pass


_ONE = frozenset(("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY", "RANGE", "AT"))
_FAR_TOO_MANY = 10**9


def _count_steps(items: Any) -> tuple[int, int]:
    """In how many ways the parts may match at one place, and the most steps to try all of them."""
    ways, steps = 1, 0
    for name, argument in items:
        own_ways, own_steps = _count_one(str(name), argument)
        steps += ways * own_steps
        ways *= own_ways
        if steps > _FAR_TOO_MANY or ways > _FAR_TOO_MANY:
            return _FAR_TOO_MANY, _FAR_TOO_MANY
    return ways, steps


def _count_one(name: str, argument: Any) -> tuple[int, int]:
    if name in _ONE:
        return 1, 1
    if name == "SUBPATTERN":
        return _count_steps(argument[3])
    if name in {"ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"}:
        return 1, _count_steps(argument if name == "ATOMIC_GROUP" else argument[1])[1]
    if name == "BRANCH":
        branches = [_count_steps(one) for one in argument[1]]
        return sum(ways for ways, _ in branches), sum(steps for _, steps in branches)
    if name in {"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"}:
        return _count_repeat(*argument, is_possessive=name == "POSSESSIVE_REPEAT")
    raise _Unbounded("refers to a part of itself, whose cost nobody can tell")


def _count_repeat(least: int, most: int, item: Any, *, is_possessive: bool) -> tuple[int, int]:
    if most > LONGEST_MATCH:
        raise _Unbounded("repeats without an end: say how often at most, as in {1,64}")
    ways, steps = _count_steps(item)
    rounds = 1 if ways == 1 else min(_FAR_TOO_MANY, ways**most)  # in how many ways all of them
    ends = 1 if is_possessive else rounds * (most - least + 1)
    return min(_FAR_TOO_MANY, ends), min(_FAR_TOO_MANY, rounds * most * steps)
