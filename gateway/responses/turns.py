"""One call of /v1/responses where responses are stored: what its caller says of that, and the body
that the engine gets for it. A conversation is put together from the bytes of its items as they were
sent and answered, and none of them is parsed for that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import InvalidRequest, PayloadTooLarge
from gateway.schemas.fields import parse_json, read_flag, wrong_type
from gateway.schemas.large_json import SMALL_BYTES, Member, scan_members

RESPONSE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
# Of these the gateway is the master: engines are told to store nothing.
_OWN = frozenset(("input", "store", "background", "previous_response_id"))
_LONGEST_WORD_BYTES = 1024
# What of a call its response repeats, and what stands there where the call says nothing.
_REPEATED: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "reasoning": None,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}


@dataclass(slots=True)
class Turn:
    """One call, and its place in a conversation."""

    id: str
    owner: str
    stores: bool
    is_background: bool
    previous_id: str | None
    body: bytes  # what the engine gets
    input: bytes = b""  # the items that came with it, as a list, until they are stored
    input_bytes: int = field(init=False)
    depth: int = 1  # of the conversation, with this one
    context_bytes: int = 0  # of what goes before
    repeated: dict[str, Any] = field(default_factory=dict)
    is_stream: bool = False  # of the background: its events are kept, too

    def __post_init__(self) -> None:
        self.input_bytes = len(self.input)

    def list_own(self) -> dict[str, Any]:
        own: dict[str, Any] = {"previous_response_id": self.previous_id, "store": self.stores}
        if self.stores:
            own |= {"id": self.id, "background": self.is_background}
        return own


class CallBody:
    """The body of a call by its members, which are read and copied where they lie."""

    def __init__(self, body: bytes, members: Mapping[str, Member]) -> None:
        self._body, self._members = body, members

    def load(self, name: str) -> Any:
        """A member that is a word or a number at most."""
        member = self._members.get(name)
        if member is None:
            return None
        if member.size > _LONGEST_WORD_BYTES:
            raise InvalidRequest(f"{name} is too long", param=name)
        return parse_json(self.raw(name))

    def load_flag(self, name: str, *, usual: bool) -> bool:
        value = self.load(name)
        return usual if value is None else read_flag(value, name)

    def load_previous_id(self) -> str | None:
        name = "previous_response_id"
        value = self.load(name)
        if value is not None and not isinstance(value, str):
            raise wrong_type(name, "a string")
        if value is not None and not RESPONSE_ID.fullmatch(value):
            raise refuse_previous(value)
        return value

    def raw(self, name: str) -> bytes:
        member = self._members.get(name)
        return b"" if member is None else self._body[member.start : member.end]

    def load_repeated(self) -> dict[str, Any]:
        """What is small of it."""
        names = [name for name in _REPEATED if 0 < len(self.raw(name)) <= SMALL_BYTES]
        told = {name: parse_json(self.raw(name)) for name in names}
        return {**_REPEATED, **{name: value for name, value in told.items() if value is not None}}

    @property
    def has_items(self) -> bool:
        return self.raw("input")[:1] in {b'"', b"["}

    def list_items(self, most_bytes: int) -> bytes:
        """The input as a list of items."""
        raw = self.raw("input")
        if not self.has_items:
            raise wrong_type("input", "a text or a list of items")
        if len(raw) > most_bytes:
            raise PayloadTooLarge(
                f"input takes {len(raw)} bytes, and what is stored may take {most_bytes}; say "
                "`store: false` if it need not be",
                param="input",
                code="input_too_large",
            )
        if raw[:1] == b"[":
            return raw
        return b'[{"type":"message","role":"user","content":' + raw + b"}]"

    def build(self, before: Sequence[bytes], items: bytes) -> bytes:
        """The same call with its whole conversation; without one, its input as it is."""
        whole = join_lists((*before, items)) if before else self.raw("input")
        pieces = [b'"store":false,"input":', whole]
        for name in self._members:
            if name not in _OWN:
                pieces += (b",", orjson.dumps(name), b":", self.raw(name))
        return b"".join((b"{", *pieces, b"}"))


async def scan_call(body: bytes, most_items: int) -> CallBody:
    return CallBody(body, await scan_members(body, most_items))


def join_lists(lists: Sequence[bytes]) -> bytes:
    """JSON lists as one."""
    inner = (one.strip()[1:-1].strip() for one in lists)
    return b"[" + b",".join(one for one in inner if one) + b"]"


def refuse_previous(response_id: str, why: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"Previous response with id '{response_id[:200]}' not found.{why and ' '}{why}",
        param="previous_response_id",
        code="previous_response_not_found",
    )
