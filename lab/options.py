"""What the programs here are told of a server: its address, and the key to it."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx


def is_address(url: str) -> bool:
    """Whether paths can be put behind it."""
    try:
        parsed = httpx.URL(url)
        where = urlsplit(url)
        port = where.port
    except (ValueError, httpx.InvalidURL):
        return False
    is_plain = not (where.query or where.fragment or " " in url.strip())
    return parsed.scheme in ("http", "https") and bool(where.hostname) and port != 0 and is_plain


def is_key(text: str) -> bool:
    """Whether an HTTP header can carry it."""
    return text.isascii() and text.isprintable()
