"""What a regular expression may cost the engine that has to follow it, told from its text alone.

vLLM's backends count repeats while they follow the answer. As long as each character can belong to
one place of the expression only, that is one count. Where it is open which place a character
belongs to, all that are possible are followed side by side, and where a counted part is itself of
uncertain end, their number multiplies with every round: 120 bytes then take minutes for a token
(measured with xgrammar 0.2.8; the compilation is not what takes them, and nothing can be stopped
once it runs inside the engine). So this rule refuses a count over what ends uncertainly, and bounds
the counts of an expression that is uncertain anywhere.

One pass, no matching: sets of characters are integers, a bit a character, the last one for all that
are not ASCII. It errs on the side of refusal. What is no expression at all is the engine's to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_

_OTHERS = 1 << 128
_ALL = (1 << 129) - 1
_DEEPEST = 50
_PLAIN = re.compile(r"[^\\^$.|?*+()\[\]{}]+(?![*+?{])")
_QUANTIFIER = re.compile(r"\{[ ]*+(\d*+)[ ]*+(?:(,)[ ]*+(\d*+)[ ]*+)?\}")
_GROUP_START = re.compile(r"\?(?:P?<[A-Za-z_]\w*>|<?[=!]|[a-zA-Z-]*:|>)")
_CODE_POINT = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|[xu]\{([0-9a-fA-F]+)\}")
_LONGEST_COUNT = 9  # digits
_UNTHINKABLE = 10**12  # more states than anybody would allow; the number itself must not explode
_ZERO_WIDTH = "bBAZzG"


def _set_of(text: str) -> int:
    return reduce(or_, (1 << min(ord(one), 128) for one in text), 0)


_DIGITS = _set_of("0123456789")
_WORD = _set_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_") | _DIGITS | _OTHERS
_SPACE = _set_of(" \t\n\r\f\v") | _OTHERS
_CLASSES = {
    "d": _DIGITS,
    "w": _WORD,
    "s": _SPACE,
    "D": _ALL ^ _DIGITS,
    "W": (_ALL ^ _WORD) | _OTHERS,
    "S": (_ALL ^ _SPACE) | _OTHERS,
    "h": _set_of(" \t") | _OTHERS,
    "p": _ALL,
    "P": _ALL,
    "n": _set_of("\n"),
    "t": _set_of("\t"),
    "r": _set_of("\r"),
    "f": _set_of("\f"),
    "v": _set_of("\v"),
}
_DOT = _ALL ^ _set_of("\n\r")


class TooCostly(Exception):
    """The expression may take an engine too long; the message says where and what to do."""


@dataclass(slots=True)
class _Part:
    """What must be known of a part of an expression."""

    first: int = 0  # characters that it can begin with
    tail: int = 0  # characters that can go on with it where it could be over already
    chars: int = 0
    is_empty: bool = True  # whether it matches nothing at all
    length: int | None = 0  # of what it matches, where that is always the same
    states: int = 0  # its parts, counts multiplied out
    has_counts: bool = False
    rivals: int = 1  # alternatives that begin alike, followed side by side until they differ
    is_uncertain: bool = False  # somewhere it is open to which place a character belongs
    word: str | None = ""  # where it is nothing but this


def check_regex(pattern: str, *, most_certain: int, most_uncertain: int) -> int:
    """Its parts, counts multiplied out; `TooCostly` if an engine cannot be asked to follow it."""
    parser = _Parser(pattern)
    part = parser.parse_alternatives(0)
    while parser.place < len(pattern):  # a bracket too many
        parser.place += 1
        part = _join(part, parser.parse_alternatives(0))
    if part.states > most_certain:
        raise TooCostly(f"its counts multiply to {part.states}; at most {most_certain} are taken")
    if part.rivals > most_uncertain:
        raise TooCostly(
            f"{part.rivals} of its alternatives begin alike; at most {most_uncertain} are taken: "
            "put their common beginning before them, or send plain words as a choice"
        )
    if part.is_uncertain and part.states > most_uncertain:
        raise TooCostly(
            f"its parts and counts multiply to {part.states}, and it is not certain where one part "
            f"ends and the next begins, so that at most {most_uncertain} are taken: say * or + "
            "instead of counts, use smaller ones, or let each part end in a character that it "
            "cannot contain"
        )
    return part.states


class _Parser:
    """Reads an expression from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self.place = 0

    def parse_alternatives(self, depth: int) -> _Part:
        if depth > _DEEPEST:
            raise TooCostly(f"its groups are nested more than {_DEEPEST} deep")
        parts = [self._parse_sequence(depth)]
        while self._peek() == "|":
            self.place += 1
            parts.append(self._parse_sequence(depth))
        return parts[0] if len(parts) == 1 else _choose(parts)

    def _peek(self) -> str:
        return self._pattern[self.place : self.place + 1]

    def _parse_sequence(self, depth: int) -> _Part:
        whole = _Part()
        while (char := self._peek()) and char not in "|)":
            start = self.place
            part = self._parse_word() or self._parse_one(char, depth)
            counts = self._parse_quantifier()
            while counts is not None:
                part = self._repeat(part, *counts, start)
                counts = self._parse_quantifier()
            whole = _join(whole, part)
        return whole

    def _parse_word(self) -> _Part | None:
        """As many plain characters as no quantifier is meant for, in one go."""
        found = _PLAIN.match(self._pattern, self.place)
        if found is None:
            return None
        self.place = found.end()
        word = found[0]
        return _Part(
            first=_set_of(word[0]),
            chars=_set_of(word),
            is_empty=False,
            length=len(word),
            states=1,
            word=word,
        )

    def _parse_one(self, char: str, depth: int) -> _Part:
        self.place += 1
        if char == "(":
            started = _GROUP_START.match(self._pattern, self.place)
            self.place = started.end() if started else self.place
            part = self.parse_alternatives(depth + 1)
            self.place += 1  # its bracket
            return part
        if char in "^$":
            return _Part()
        if char == "\\":
            if self._peek() in _ZERO_WIDTH:
                self.place += 1
                return _Part()
            return _single(self._parse_escape())
        if char == "[":
            return _single(self._parse_class())
        return _single(_DOT) if char == "." else _single(_set_of(char), char)

    def _parse_escape(self) -> int:
        char = self._peek()
        self.place += 1
        if char in {"p", "P"} and self._peek() == "{":
            end = self._pattern.find("}", self.place)
            self.place = end + 1 if end >= 0 else len(self._pattern)
            return _ALL
        if char in {"x", "u"}:
            found = _CODE_POINT.match(self._pattern, self.place - 1)
            if found is not None:
                self.place = found.end()
                digits = found[1] or found[2] or found[3]
                return 1 << min(int(digits[-6:], 16), 128)
        if char.isdigit():
            return _ALL  # a reference, or a code
        return _CLASSES.get(char, _set_of(char))

    def _parse_class(self) -> int:
        is_negated = self._peek() == "^"
        self.place += is_negated
        found, start = 0, self.place
        while (char := self._peek()) and (char != "]" or self.place == start):
            low = self._parse_member()
            has_range = self._peek() == "-" and self._pattern[self.place + 1 : self.place + 2]
            if has_range and has_range != "]":
                self.place += 1
                high = self._parse_member()
                if low & (low - 1) == 0 and high & (high - 1) == 0:
                    low = (high << 1) - low if high >= low else low | high
                else:
                    low |= high | _set_of("-")
            found |= low
        self.place += 1
        # Of those that are not ASCII only some are left out.
        return (_ALL ^ found) | _OTHERS if is_negated else found

    def _parse_member(self) -> int:
        char = self._peek()
        self.place += 1
        return self._parse_escape() if char == "\\" else _set_of(char)

    def _parse_quantifier(self) -> tuple[int, int | None] | None:
        char = self._peek()
        counts: tuple[int, int | None]
        if char and char in "*+?":
            self.place += 1
            counts = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        else:
            found = _QUANTIFIER.match(self._pattern, self.place) if char == "{" else None
            if found is None or not (found[1] or found[3]):
                return None
            self.place = found.end()
            counts = _read_counts(found[1], found[2], found[3] or "")
        if self._peek() in {"?", "+"}:  # lazy, possessive: the same texts
            self.place += 1
        return counts

    def _repeat(self, part: _Part, least: int, most: int | None, start: int) -> _Part:
        count = most if most is not None else least
        if most == 0:
            return _Part()
        if most == 1:
            return replace(part, is_empty=True, length=None, word=None) if least == 0 else part
        text = self._pattern[start : self.place]
        text = text if len(text) <= 40 else f"{text[:37]}…"
        if part.is_empty and part.chars:
            raise TooCostly(
                f"the repeated part of {text!r} may match nothing, so that its rounds cannot be "
                "counted: let it match at least one character, as in (a|b)* for (a?b?)*"
            )
        is_certain = part.length is not None or not part.tail & part.first
        is_counted = count > 1
        if not is_certain and (is_counted or part.has_counts):
            raise TooCostly(
                f"in {text!r} it is not certain where one round of the repeat ends and the next "
                "begins, and there are counts to be kept for each possibility: let the repeated "
                "part end in a character that it cannot contain, as in (\\w+ ){1,9}, or say * or + "
                "instead of all counts in it"
            )
        is_exact = least == most
        return _Part(
            first=part.first,
            tail=(part.tail | (0 if is_exact else part.first)) if is_certain else part.chars,
            chars=part.chars,
            is_empty=part.is_empty or least == 0,
            length=part.length * least if is_exact and part.length is not None else None,
            # Rounds of uncertain end begin at every place, and end at every other: by measurement.
            states=min(part.states * max(count, 1) if is_certain else part.states**3, _UNTHINKABLE),
            has_counts=part.has_counts or is_counted,
            rivals=part.rivals,
            is_uncertain=part.is_uncertain or not is_certain,
            word=None,
        )


def _read_counts(least: str, comma: str | None, most: str) -> tuple[int, int | None]:
    if max(len(least), len(most)) > _LONGEST_COUNT:
        raise TooCostly(f"it counts to a number of more than {_LONGEST_COUNT} digits")
    low = int(least or 0)
    if comma is None:
        return low, low
    return low, int(most) if most else None


def _single(chars: int, word: str | None = None) -> _Part:
    return _Part(first=chars, chars=chars, is_empty=False, length=1, states=1, word=word)


def _join(left: _Part, right: _Part) -> _Part:
    if not right.chars and right.is_empty:
        return left
    if not left.chars and left.is_empty:
        return right
    is_open = bool(left.tail & right.first)
    tail = right.tail
    if right.is_empty:
        tail |= left.tail | right.first
    if is_open:
        tail |= left.chars | right.chars
    lengths = left.length, right.length
    return _Part(
        first=left.first | (right.first if left.is_empty else 0),
        tail=tail,
        chars=left.chars | right.chars,
        is_empty=left.is_empty and right.is_empty,
        length=None if None in lengths else sum(lengths),  # type: ignore[arg-type]
        states=left.states + right.states,
        has_counts=left.has_counts or right.has_counts,
        rivals=max(left.rivals, right.rivals),
        is_uncertain=left.is_uncertain or right.is_uncertain or is_open,
        word=None if left.word is None or right.word is None else left.word + right.word,
    )


def _choose(parts: list[_Part]) -> _Part:
    chars = first = tail = 0
    overlap = False
    for part in parts:
        overlap = overlap or bool(first & part.first)
        first |= part.first
        tail |= part.tail
        chars |= part.chars
    lengths = {part.length for part in parts}
    is_fixed = len(lengths) == 1 and None not in lengths
    if overlap and not is_fixed and not _are_separate(parts):
        tail |= chars  # one may be over while another goes on
    rivals = sum(part.rivals for part in parts if part.word is None)
    return _Part(
        first=first,
        tail=tail,
        chars=chars,
        is_empty=any(part.is_empty for part in parts),
        length=lengths.pop() if is_fixed else None,
        states=sum(part.states for part in parts),
        has_counts=any(part.has_counts for part in parts),
        rivals=max(1, rivals) if overlap else max(part.rivals for part in parts),
        is_uncertain=any(part.is_uncertain for part in parts),
        word=None,
    )


def _are_separate(parts: list[_Part]) -> bool:
    """Words of which none begins with another."""
    words = sorted(part.word or "" for part in parts)
    return all(words) and not any(map(str.startswith, words[1:], words))
