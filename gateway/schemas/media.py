"""Media of a call: those that it names by URL, which the engine would fetch with its own place in
the network, and what it wants made of them.

URLs are found wherever an engine may look for them, on whichever route. Which hosts may be named is
the matter of `admission/media_hosts.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from gateway.errors import InvalidRequest

_KEYS = frozenset(("image_url", "audio_url", "video_url", "file_url"))
_OPTIONS = frozenset(("media_io_kwargs", "mm_processor_kwargs"))
# Written so plainly that every reader of URLs takes the same host out of it: no user, no percent
# signs, no backslash, nothing but ASCII.
_PLAIN = re.compile(
    r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?(?:[/?#][!-~]*)?", re.IGNORECASE
)
# Fields in which no engine looks for media: texts, numbers, and names that are the caller's own.
_PLAIN_FIELDS = frozenset(("prompt", "stop", "stream_options", "logit_bias", "text")) | frozenset(
    ("tools", "tool_choice", "functions", "metadata", "response_format", "structured_outputs")
)
_CONTAINERS = (list, dict)
_ESCAPES = b"\\u"
_DEEPEST = 8  # a picture in a tool's result in a message lies six deep


def refuse_media_options(data: Mapping[str, Any]) -> None:
    """Frames, pixels and sizes of the caller's choice; `null` and `{}` are none."""
    for name in _OPTIONS & data.keys():
        if data[name]:
            raise InvalidRequest(
                f"{name} may not be set by callers: nobody bounds what it makes of a small file. "
                "The operator can allow it with GATEWAY_MEDIA_OPTIONS, or set it for the engine",
                param=name,
                code="media_refused",
            )


def read_media_hosts(data: Mapping[str, Any], body: bytes) -> frozenset[str]:
    """The hosts that the media's URLs name; `InvalidRequest` for a URL that is none to fetch."""
    places = [
        value
        for name, value in data.items()
        if isinstance(value, _CONTAINERS) and name not in _PLAIN_FIELDS
    ]
    if len(places) == 1 and _is_plain_chat(places[0]):
        return frozenset()
    if not places or (b"url" not in body and _ESCAPES not in body and b"images" not in body):
        return frozenset()  # nearly always
    hosts = (_read_host(name, url) for name, url in _find_urls(data, places))
    return frozenset(host for host in hosts if host)


def _is_plain_chat(value: Any) -> bool:
    """Messages of text alone, without parts."""
    if not isinstance(value, list):
        return False
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("content"), str):
            return False
    return True


def _find_urls(data: Mapping[str, Any], places: list[Any]) -> Iterator[tuple[str, str]]:
    """Each with the name of its field."""
    images = data.get("images")  # of /v2/embed
    for image in images if isinstance(images, list) else ():
        if isinstance(image, str):
            yield "images", image
    found = places
    for _ in range(_DEEPEST):
        found, above = [], found
        for one in above:
            if isinstance(one, list):
                found += [part for part in one if isinstance(part, _CONTAINERS)]
                continue
            yield from _read_part(one)
            if one.get("type") != "tool_use":  # what a tool was told is not fetched
                found += [part for part in one.values() if isinstance(part, _CONTAINERS)]


def _read_part(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _KEYS & part.keys():
        value = part[name]
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str) and url:
            yield name, url
    source = part.get("source")
    if isinstance(source, dict) and source.get("type") == "url":
        url = source.get("url")
        if isinstance(url, str) and url:
            yield "source", url


def _read_host(name: str, url: str) -> str:
    if url[:5].lower() == "data:":
        return ""
    plain = _PLAIN.fullmatch(url)
    if plain is None:
        raise InvalidRequest(
            f"{name} {url[:100]!r} is neither a data: URL nor a plain http:// or https:// one",
            param=name,
            code="media_refused",
        )
    return plain[1].strip("[]").rstrip(".").lower()
