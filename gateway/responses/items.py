"""The items of a conversation as they are listed, page by page: found and copied where they lie.
None is parsed, for one may have megabytes, and whoever reads a page of a few pays for all others.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from gateway.errors import InvalidRequest
from gateway.schemas.fields import parse_json
from gateway.schemas.large_json import scan_members
from gateway.schemas.pages import Page

_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
_PLAIN_ID = re.compile(r"[\w.:-]+", re.ASCII)  # which JSON has no other way to write
_LONGEST_WORD_BYTES = 1024
_ITEMS_AT_ONCE = 32  # between two looks at the event loop


@dataclass(frozen=True, slots=True)
class _Item:
    """One item by its members."""

    id: str
    kind: str
    members: Mapping[str, bytes]

    def build(self) -> bytes:
        """Each has an id, and messages a list of their parts."""
        told = {**self.members, "type": orjson.dumps(self.kind), "id": orjson.dumps(self.id)}
        if self.kind == "message":
            told["content"] = self._list_parts()
            if told.get("status") in {None, b"null", b'""'}:
                told["status"] = b'"completed"'
        return (
            b"{" + b",".join(orjson.dumps(name) + b":" + raw for name, raw in told.items()) + b"}"
        )

    def _list_parts(self) -> bytes:
        content = self.members.get("content", b"null")
        if content[:1] != b'"':
            return content
        if _read_word(self.members, "role") == "assistant":
            return b'[{"type":"output_text","text":' + content + b',"annotations":[]}]'
        return b'[{"type":"input_text","text":' + content + b"}]"


async def list_page(lists: Sequence[tuple[str, bytes]], page: Page) -> bytes:
    """Of lists of items, each with the name of the response that it is of."""
    found: list[_Item] = []
    after = page.after
    sought = after.encode() if after is not None and _PLAIN_ID.fullmatch(after) else b""
    for name, items in lists if page.ascending else reversed(lists):
        places = list(enumerate(await _find_items(items)))
        for place, (start, end) in places if page.ascending else reversed(places):
            if place % _ITEMS_AT_ONCE == 0:
                await asyncio.sleep(0)
            own = f"{name.removeprefix('resp_')}_{place}"
            is_passed = after is not None and not after.endswith(own)
            if is_passed and sought and items.find(sought, start, end) < 0:
                continue  # it cannot be the one: there is no need to read it
            item = await _read_item(own, items[start:end])
            if item is None:
                continue
            if after is not None:
                after = None if item.id == after else after
            elif len(found) == page.limit:
                return _build_page(found, has_more=True)
            else:
                found.append(item)
    if after is not None:
        raise InvalidRequest(f"after: there is no item {after[:100]!r}", param="after")
    return _build_page(found, has_more=False)


async def _find_items(items: bytes) -> list[tuple[int, int]]:
    """Where they lie in their list."""
    head = b'{"items":'
    members = await scan_members(head + items + b"}", len(items))
    return [(start - len(head), end - len(head)) for start, end in members["items"].items]


async def _read_item(name: str, item: bytes) -> _Item | None:
    if item[:1] != b"{":
        return None
    found = await scan_members(item, len(item))
    members = {name: item[one.start : one.end] for name, one in found.items()}
    kind = _read_word(members, "type") or "message"  # an engine may take what is no word
    own = f"{_PREFIXES.get(kind, 'item')}_{name}"
    return _Item(_read_word(members, "id") or own, kind, members)


def _read_word(members: Mapping[str, bytes], name: str) -> str:
    raw = members.get(name, b"")
    if raw[:1] != b'"' or len(raw) > _LONGEST_WORD_BYTES:
        return ""
    return str(parse_json(raw))


def _build_page(items: Sequence[_Item], *, has_more: bool) -> bytes:
    ends = {
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
        "has_more": has_more,
    }
    data = b",".join(item.build() for item in items)
    return b'{"object":"list","data":[' + data + b"]," + orjson.dumps(ends)[1:]
