"""Lists that are read page by page, as OpenAI's SDK asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import InvalidRequest

_LONGEST_ID = 512
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Page:
    """Which part of a list."""

    after: str | None
    limit: int
    ascending: bool


def parse_page(query: Mapping[str, str], usual: int, most: int) -> Page:
    text = query.get("limit", str(usual))
    is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS
    if not is_number or not 1 <= int(text) <= most:
        raise InvalidRequest(f"limit must be 1 to {most}", param="limit")
    order = query.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise InvalidRequest("order is asc or desc", param="order")
    after = query.get("after") or None
    if after is not None and len(after) > _LONGEST_ID:
        raise InvalidRequest("after is the id of the last one seen", param="after")
    return Page(after, int(text), order == "asc")


def build_page(items: Sequence[dict[str, Any]], *, has_more: bool) -> bytes:
    return orjson.dumps(
        {
            "object": "list",
            "data": items,
            "first_id": items[0]["id"] if items else None,
            "last_id": items[-1]["id"] if items else None,
            "has_more": has_more,
        }
    )
