"""The events of a response's stream: signed with what the engine does not know of the response,
and numbered anew where they are kept. They are copied where they lie, for one that tells a whole
response with the chances of its tokens has megabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import InvalidRequest
from gateway.responses.shapes import Told, copy_members, dump_members, join_members, tell
from gateway.responses.turns import Turn

CREATED, QUEUED = "response.created", "response.queued"
_ENDS = ("response.completed", "response.incomplete", "response.failed")


async def sign_events(turn: Turn, events: bytes) -> tuple[bytes, bytes, Told | None]:
    """What may be passed on of a stream's events, and what waits until the response is stored: from
    the event that ends it. And what it has ended with.
    """
    pieces = cut_events(events)
    for place, event in enumerate(pieces):
        if b'"response":' not in event:
            continue
        head, mark, data = event.partition(b"data:")
        try:
            members = await copy_members(data.strip())
            told = await sign_event(members, turn.list_own())
        except InvalidRequest:
            continue  # whatever it is, it passes as it came
        pieces[place] = head + mark + b" " + join_members(members)
        if told is not None and turn.stores:
            end = b"\n\n".join(pieces[place:])
            return b"".join(one + b"\n\n" for one in pieces[:place]), end, told
    return b"\n\n".join(pieces), b"", None


async def sign_event(members: dict[str, bytes], own: Mapping[str, Any]) -> Told | None:
    """Changes the response that an event tells of; returns it if it has ended with that."""
    response = await copy_members(members.get("response", b"")) | dump_members(own)
    members["response"] = join_members(response)
    return tell(response) if read_kind(members) in _ENDS else None


def read_kind(members: Mapping[str, bytes]) -> str:
    return members.get("type", b"").strip(b'"').decode("utf-8", "replace")


def build_event(kind: str, number: int, members: Mapping[str, bytes]) -> bytes:
    numbered = {**members, "sequence_number": b"%d" % number}
    return b"event: " + kind.encode() + b"\ndata: " + join_members(numbered) + b"\n\n"


def cut_events(events: bytes) -> list[bytes]:
    """Each without its end; after the last there is nothing."""
    return events.replace(b"\r\n", b"\n").split(b"\n\n")
