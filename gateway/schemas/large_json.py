"""Large JSON objects, read without turning them into values: where each member lies.

A parser holds the interpreter's lock from the first byte to the last, in a thread as well: ten
megabytes of token ids stop everything for a tenth of a second, and take six times their size. Here
they are passed over by regular expressions, a piece at a time, and only what is needed is parsed.
What JSON forbids inside a member that is only passed on, whoever gets it will refuse.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import InvalidRequest
from gateway.schemas.fields import parse_json

SMALL_BYTES = 2**18  # what is not larger is parsed at once: a few milliseconds, whatever it holds
_SMALL_MEMBER_BYTES = 2**16
_LARGEST_OBJECT_BYTES = 2**19  # of a field; nobody has reason to send a larger one
_WINDOW_BYTES = 2**16  # what one match may pass over
_PIECE_BYTES = 2**17  # what is parsed at once of a list
_TEXT_PIECE_BYTES = 2**20  # and of one text, which is cheaper
# Between two looks at the event loop: bytes passed over, and what a step in Python costs in bytes.
_WORK_BYTES = 2**19
_STEP_BYTES = 300
_PARSED_BYTES = 8  # parsing one costs as much as passing over so many
_MOST_MEMBERS = 1000
_MOST_DEPTH = 1000
_MOST_VALUES_OF_ITEM = 400_000
_LONGEST_NAME_BYTES = 1024

_SPACE = re.compile(rb"[ \t\r\n]*+")
_IN_TEXT = re.compile(rb'(?:[^"\\]++|\\u[0-9A-Fa-f]{4}|\\[^u])*+', re.DOTALL)
_OUTSIDE_LISTS = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)
_PLAIN = re.compile(rb'[^"\[\]{}]*+')  # numbers with their commas
_WORD = re.compile(rb"[-+.\w]++")  # one number, true, false or null
_LOW_SURROGATE = re.compile(rb"\\u[dD][c-fC-F][0-9A-Fa-f]{2}")
# Where pictures and sounds travel; no tokenizer sees them.
_MEDIA = re.compile(
    rb'"(?:url|image_url|audio_url|video_url|file_data|data)"\s{0,99}:\s{0,99}"(?=[\w+/-])'
)
_LONGEST_MEDIA_START = 256


@dataclass(slots=True)
class Member:
    """Where a member's value lies; of a list also where its texts, lists and objects do."""

    start: int
    end: int
    items: list[tuple[int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.end - self.start


class LargeObject:
    """The members of a large body. `fields` has objects, lists with objects and all that is small
    as they are, and of a large text or list of texts what is needed to count and to tell kinds
    apart: the text's beginning, a list of as many items of which the first are true. What must be
    seen whole has to be loaded.
    """

    def __init__(self, body: bytes, members: Mapping[str, Member]) -> None:
        self._body, self.members = body, members
        self.fields: dict[str, Any] = {}
        self._first: dict[str, Any] = {}

    async def load_small(self, whole: Mapping[str, int]) -> None:
        pace = Pace()
        for name, member in self.members.items():
            is_object = self._kind(member.start) == b"{"
            most = whole.get(name, _LARGEST_OBJECT_BYTES if is_object else None)
            if most is not None and member.size > most:
                raise InvalidRequest(f"{name} is larger than {most} bytes", param=name)
            if most is not None or member.size <= _SMALL_MEMBER_BYTES:
                await pace.count(member.size * _PARSED_BYTES)
                self.fields[name] = parse_json(self._body[member.start : member.end])
            elif member.items and self._body.find(b"{", member.start, member.end) >= 0:
                # Messages, which others look into.
                self.fields[name] = await self._load_items(member, takes_surrogates=False)
            else:
                self.fields[name] = self._stand_in(member)
        self._first = dict(self.fields)

    def dump(self, fields: Mapping[str, Any]) -> bytes:
        """The body with other fields: those that are still the same object are copied."""
        body = memoryview(self._body)  # megabytes are copied once
        pieces: list[bytes | memoryview] = []
        for name, value in fields.items():
            pieces += (b"," if pieces else b"{", orjson.dumps(name), b":")
            if name in self._first and value is self._first[name]:
                pieces.append(body[self.members[name].start : self.members[name].end])
            else:
                pieces.append(orjson.dumps(value))
        return b"".join((*pieces, b"}") if pieces else (b"{}",))

    async def load(self, name: str, *, takes_surrogates: bool = False) -> Any:
        """All of a member that is a text or a list of items, piece by piece."""
        member = self.members[name]
        if member.size <= _SMALL_MEMBER_BYTES:
            return parse_json(self._body[member.start : member.end], takes_surrogates)
        if self._kind(member.start) == b'"':
            return await self._load_text(member.start, member.end, takes_surrogates)
        if not member.items:
            return self.fields[name]
        return await self._load_items(member, takes_surrogates)

    def measure_longest(self, member: Member) -> int:
        """Bytes of the longest text in it: each of a list of texts, or all that it holds."""
        if member.items and self._kind(member.items[0][0]) != b"{":
            return max(end - start for start, end in member.items)
        return member.size

    async def measure_media(self, member: Member) -> int:
        """Bytes of a member that are no text but a picture or a sound."""
        size, at, pace = 0, member.start, Pace()
        while at < member.end:
            window = min(at + _WINDOW_BYTES, member.end)
            found = _MEDIA.search(self._body, at, window)
            if found is None:
                if window == member.end:
                    break
                end = window - _LONGEST_MEDIA_START  # one may begin before the window's end
            else:
                end = self._body.find(b'"', found.end(), member.end)
                end = member.end if end < 0 else end
                size += end - found.end()
            await pace.count(end - at)
            at = end
        return size

    async def _load_items(self, member: Member, takes_surrogates: bool) -> list[Any]:
        body, pace = self._body, Pace()
        values: list[Any] = []
        first = last = 0
        while first < len(member.items):
            start, end = member.items[first]
            last = first + 1
            if end - start > _PIECE_BYTES:
                values.append(await self._load_large_item(start, end, takes_surrogates))
            else:
                while last < len(member.items) and member.items[last][1] - start <= _PIECE_BYTES:
                    end, last = member.items[last][1], last + 1
                values += parse_json(b"[" + body[start:end] + b"]", takes_surrogates)
            await pace.count((end - start) * _PARSED_BYTES)
            first = last
        return values

    async def _load_large_item(self, start: int, end: int, takes_surrogates: bool) -> Any:
        if self._kind(start) == b'"':
            return await self._load_text(start, end, takes_surrogates)
        if self._body.count(b",", start, end) > _MOST_VALUES_OF_ITEM:
            raise InvalidRequest(
                f"an item of a list has more than {_MOST_VALUES_OF_ITEM} values",
                code="too_many_values",
            )
        return parse_json(self._body[start:end])  # one picture, mostly

    async def _load_text(self, start: int, end: int, takes_surrogates: bool) -> str:
        at, last, pieces = start + 1, end - 1, []
        while at < last:
            cut = self._find_cut(at, last)
            pieces.append(parse_json(b'"' + self._body[at:cut] + b'"', takes_surrogates))
            at = cut
            await asyncio.sleep(0)
        return "".join(pieces)

    def _find_cut(self, at: int, last: int) -> int:
        """A place in a text where no character is cut in two, however it is written."""
        body, limit = self._body, min(at + _TEXT_PIECE_BYTES, last)
        cut = _end_of(_IN_TEXT, body, at, limit)
        if cut == last:
            return last
        while body[cut] & 0xC0 == 0x80:  # inside a character's bytes
            cut -= 1
        # The second half of one that is written as two.
        return cut + 6 if _LOW_SURROGATE.match(body, cut, last) else cut

    def _stand_in(self, member: Member) -> Any:
        kind = self._kind(member.start)
        if kind == b'"':
            return self._begin(member.start)
        if not member.items:
            return [0]
        values: list[Any] = []
        for start, end in member.items:
            if end - member.start > _SMALL_MEMBER_BYTES:
                break
            values.append(parse_json(self._body[start:end]))
        filler = {b'"': "", b"[": [], b"{": {}}[self._kind(member.items[0][0])]
        if not values and filler == "":
            values.append(self._begin(member.items[0][0]))
        return values + [filler] * (len(member.items) - len(values))

    def _begin(self, start: int) -> str:
        return self._body[start + 1 : start + _WINDOW_BYTES].decode("utf-8", "ignore")

    def _kind(self, start: int) -> bytes:
        return self._body[start : start + 1]


async def scan_members(body: bytes, most_items: int) -> dict[str, Member]:
    """Where the members of an object lie, and nothing of what is in them."""
    return await _Scanner(body, most_items).scan()


async def cut_items(body: bytes, member: Member) -> list[bytes]:
    """Each item of a list as it stands there."""
    pace, items = Pace(), []
    for start, end in member.items:
        items.append(body[start:end])
        await pace.count(end - start)
    return items


async def scan_object(
    body: bytes, most_items: int, whole: Mapping[str, int] | None = None
) -> LargeObject:
    """`InvalidRequest` for what is no JSON object, or has more in it than anybody sends. Members
    that are named in `whole`, with the most bytes that they may have, are parsed in any case.
    """
    found = LargeObject(body, await _Scanner(body, most_items).scan())
    await found.load_small(whole or {})
    return found


class Pace:
    """Lets others have the event loop after every piece of work."""

    __slots__ = ("_done",)

    def __init__(self) -> None:
        self._done = 0

    async def count(self, size: int) -> None:
        self._done += size + _STEP_BYTES
        if self._done > _WORK_BYTES:
            self._done = 0
            await asyncio.sleep(0)


class _Scanner:
    """Goes through a body once; each method takes a place in it and returns one further on."""

    def __init__(self, body: bytes, most_items: int) -> None:
        self._body, self._most_items = body, most_items
        self._count = Pace().count

    async def scan(self) -> dict[str, Member]:
        members: dict[str, Member] = {}
        at = await self._skip_space(0)
        if self._mark(at) != b"{":
            raise InvalidRequest("the body must be a JSON object", code="invalid_type")
        at = await self._skip_space(at + 1)
        is_last = self._mark(at) == b"}"
        while not is_last:
            name, at = await self._read_name(at)
            members[name], at = await self._read_member(name, at)
            if len(members) > _MOST_MEMBERS:
                raise InvalidRequest(f"the body has more than {_MOST_MEMBERS} fields")
            at = await self._skip_space(at)
            is_last = self._mark(at) == b"}"
            if not is_last:
                at = await self._skip_space(self._expect(b",", at))
        if await self._skip_space(at + 1) != len(self._body):
            raise _broken(at + 1)
        return members

    async def _read_name(self, at: int) -> tuple[str, int]:
        end = await self._skip_text(self._expect(b'"', at))
        if end - at > _LONGEST_NAME_BYTES:
            raise InvalidRequest("the body has a field with a very long name")
        name = parse_json(self._body[at:end])
        after = self._expect(b":", await self._skip_space(end))
        return name, await self._skip_space(after)

    async def _read_member(self, name: str, at: int) -> tuple[Member, int]:
        member = Member(at, at)
        match self._mark(at):
            case b"[":
                member.end = await self._skip_list(at, name, member.items)
            case b'"' | b"{":
                member.end = await self._skip_value(at)
            case _:
                member.end = _end_of(_WORD, self._body, at, at + _LONGEST_NAME_BYTES)
                if member.end == at:
                    raise _broken(at)
        return member, member.end

    async def _skip_list(self, at: int, name: str, items: list[tuple[int, int]]) -> int:
        at = await self._skip_space(at + 1)
        has_plain = False
        while (mark := self._mark(at)) != b"]":
            if mark and mark in b'"[{':
                end = await self._skip_value(at)
                items.append((at, end))
                if len(items) > self._most_items:
                    raise InvalidRequest(
                        f"{name} has more than {self._most_items} items",
                        param=name,
                        code="too_many_prompts",
                    )
                at = await self._skip_space(end)
                if self._mark(at) != b"]":
                    at = await self._skip_space(self._expect(b",", at))
            else:
                end = _end_of(_PLAIN, self._body, at, at + _WINDOW_BYTES)
                if end == at:
                    raise _broken(at)
                has_plain = True
                await self._count(end - at)
                at = end
            if has_plain and items:
                raise InvalidRequest(
                    f"the items of {name} must be of one kind", param=name, code="invalid_type"
                )
        return at + 1

    async def _skip_value(self, at: int) -> int:
        """A text, a list or an object, whatever is in it."""
        if self._mark(at) == b'"':
            return await self._skip_text(at + 1)
        body, depth = self._body, 1
        at += 1
        while depth:
            end = _end_of(_OUTSIDE_LISTS, body, at, at + _WINDOW_BYTES)
            mark = body[end : end + 1]
            if mark == b'"':  # a text that is longer than the window
                end = await self._skip_text(end + 1)
            elif mark in {b"[", b"{"}:
                depth, end = depth + 1, end + 1
            elif mark in {b"]", b"}"}:
                depth, end = depth - 1, end + 1
            elif end == at:
                raise _broken(at)
            if depth > _MOST_DEPTH:
                raise InvalidRequest("the body is nested too deeply", code="invalid_json")
            await self._count(end - at)
            at = end
        return at

    async def _skip_text(self, at: int) -> int:
        """From behind its first quote to behind its last."""
        body = self._body
        while True:
            end = _end_of(_IN_TEXT, body, at, at + _WINDOW_BYTES)
            await self._count(end - at)
            if body[end : end + 1] == b'"':
                return end + 1
            if end == at:
                raise _broken(at)
            at = end

    async def _skip_space(self, at: int) -> int:
        while (end := _end_of(_SPACE, self._body, at, at + _WINDOW_BYTES)) == at + _WINDOW_BYTES:
            await self._count(end - at)
            at = end
        return end

    def _expect(self, mark: bytes, at: int) -> int:
        if self._mark(at) != mark:
            raise _broken(at)
        return at + 1

    def _mark(self, at: int) -> bytes:
        return self._body[at : at + 1]


def _end_of(pattern: re.Pattern[bytes], body: bytes, at: int, limit: int) -> int:
    """How far it goes from there; nowhere if it does not fit."""
    found = pattern.match(body, at, limit)
    return at if found is None else found.end()


def _broken(at: int) -> InvalidRequest:
    return InvalidRequest(f"the body is not JSON: at byte {at}", code="invalid_json")
