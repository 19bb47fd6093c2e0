"""HTTP and JSON: right requests in unusual form, and the same ones spoilt in lines, headers,
framing and bodies.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import replace
from typing import Any

from lab.fuzz.cases.case import CHAT, COMPLETIONS, RESPONSES, Case, Draw
from lab.fuzz.cases.odd_values import (
    FIELDS,
    FRAMINGS,
    HEADER_NAMES,
    METHODS,
    PATHS,
    TEXTS,
    VALUES,
    VERSIONS,
)
from lab.fuzz.raw_http import build_request

# Fields by which a prompt does not come back as it was sent.
_PROMPT_FIELDS = frozenset(
    ("prompt", "prompts", "stop", "system", "echo", "truncate_prompt_tokens", "suffix")
)


def build_valid(draw: Draw) -> Case:
    """Right in content, unusual in form."""
    chance, source = draw.chance, draw.body()
    body, headers = draw.dump(source.data), draw.headers()
    form = chance.randrange(6)
    if form == 0:
        body = gzip.compress(body, 1, mtime=0)
        headers.append(("Content-Encoding", "gzip"))
    elif form == 1:
        body = zlib.compress(body)
        headers.append(("Content-Encoding", "deflate"))
    elif form == 2:
        body = chance.choice((b" ", b"\n", b"\t\r\n")) + body + b"  \n"
    if draw.is_one_in(0.2):
        headers.append(("X-Request-Id", f"case-{draw.number}"))
    if draw.is_one_in(0.2):
        headers.append(("X-Priority", chance.choice(("batch", "interactive"))))
    if draw.is_one_in(0.2):
        headers.append(("X-Deadline-Ms", "600000"))
    if draw.is_one_in(0.1):
        headers.append(("Expect", "100-continue"))
    chance.shuffle(headers)
    headers = [(chance.choice((name, name.upper(), name.lower())), text) for name, text in headers]
    if draw.is_one_in(0.3):
        headers.append(("Transfer-Encoding", "chunked"))
        sent = build_request("POST", source.path, _chunk(draw, body), headers, is_sized=False)
    else:
        sent = build_request("POST", source.path, body, headers)
    return Case(draw.number, draw.slice(sent), "served", keeps_prompt=draw.comes_back(source))


def build_odd_value(draw: Draw) -> Case:
    chance, source = draw.chance, draw.body()
    data = dict(source.data)
    touched = set()
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        name = chance.choice((*data, *FIELDS, *data))
        touched.add(name)
        match chance.randrange(8):
            case 0:
                data.pop(name, None)
            case 1 if name in data:
                data[name] = [data[name]]
            case 2 if isinstance(data.get(name), list):
                held = list(data[name])
                held.insert(chance.randint(0, len(held)), chance.choice(VALUES))
                data[name] = held
            case _:
                data[name] = chance.choice(VALUES)
    keeps = source.prompt in data and not touched & {source.prompt, *_PROMPT_FIELDS}
    return replace(draw.answered(source.path, data), keeps_prompt=keeps and draw.comes_back(source))


def build_odd_body(draw: Draw) -> Case:
    """JSON no more, or not in this encoding, or more of it than it seems."""
    source = draw.body()
    path, data = source.path, source.data
    if draw.is_one_in(0.1):
        path, data = draw.chance.choice(_list_quiet_bodies(draw))
    headers = draw.headers()
    if draw.is_one_in(0.25):
        coding, body = _encode(draw, draw.dump(data))
        headers.append(("Content-Encoding", coding))
    else:
        body = _spoil(draw, data)
    return Case(draw.number, (build_request("POST", path, body, headers),), "answered")


def _list_quiet_bodies(draw: Draw) -> tuple[tuple[str, dict[str, Any]], ...]:
    return (
        ("/tokenize", {"prompt": "abc"}),
        ("/detokenize", {"tokens": [5, 6, 7]}),
        ("/v1/embeddings", {"model": draw.target.model, "input": "abc"}),
    )


def _encode(draw: Draw, body: bytes) -> tuple[str, bytes]:
    """A content coding that is unknown, or does not hold what it says, or holds too much."""
    chance = draw.chance
    if draw.is_one_in(0.4):
        return "gzip", gzip.compress(body + b" " * chance.choice((10, 3_000_000)), 1, mtime=0)
    coding = chance.choice(("gzip", "deflate", "br", "zstd", "compress", "x", "gzip, gzip"))
    torn = gzip.compress(body, mtime=0)[:-9]
    return coding, chance.choice((body, torn, zlib.compress(body), b"\x1f\x8b"))


def _spoil(draw: Draw, data: dict[str, Any]) -> bytes:
    chance, body = draw.chance, draw.dump(data)
    match chance.randrange(8):
        case 0:
            body = body[: chance.randrange(len(body))]
        case 1:
            coding = chance.choice(("utf-16", "utf-32", "utf-16-le", "cp500"))
            body = json.dumps(data).encode(coding)
        case 2:
            body = b"\xef\xbb\xbf" + body
        case 3:
            body += chance.choice((b"}", b"{}", b"\0", b",", body, b"//", b"\xff"))
        case 4:
            body = chance.randbytes(chance.choice((1, 10, 1000)))
        case 5:
            whole = (b"", b"null", b"0", b'"a"', b"[]", b"{}", b"NaN", b"{" * 5000, b'{"a":' * 3000)
            body = chance.choice(whole)
        case 6:
            extra = chance.choice((b"prompt", b"model"))
            value = json.dumps(chance.choice((1, None, "a"))).encode()
            body = body[:-1] + b', "%s": %s}' % (extra, value)
        case _:
            body = draw.flip(body)
    return body


def build_odd_header(draw: Draw) -> Case:
    """Headers that mean something to the gateway, with what they should not hold."""
    chance, source, headers = draw.chance, draw.body(), draw.headers()
    for _ in range(chance.choice((1, 1, 2, 5))):
        headers.append((chance.choice(HEADER_NAMES), chance.choice(TEXTS)))
    if draw.is_one_in(0.3):
        chance.shuffle(headers)
    sent = build_request("POST", source.path, draw.dump(source.data), headers)
    return Case(draw.number, (sent,), "answered", keeps_prompt=draw.comes_back(source))


def build_odd_framing(draw: Draw) -> Case:
    source = draw.body()
    framing = draw.chance.choice(FRAMINGS)
    names = {name for name, _ in framing}
    body = draw.dump(source.data)
    is_chunked = "Transfer-Encoding" in names
    if is_chunked and draw.is_one_in(0.8):
        body = draw.flip(_chunk(draw, body))
    is_sized = not is_chunked and "Content-Length" not in names
    headers = [*draw.headers(), *framing]
    sent = build_request("POST", source.path, body, headers, is_sized=is_sized)
    return Case(draw.number, draw.slice(sent), "torn")


def _chunk(draw: Draw, body: bytes) -> bytes:
    chance, pieces = draw.chance, []
    while body:
        size = chance.choice((1, 3, 17, 100, 5000))
        piece, body = body[:size], body[size:]
        extension = chance.choice((b"", b"", b";a=b", b';a="x"'))
        pieces.append(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece))
    return b"".join((*pieces, b"0\r\n", chance.choice((b"", b"", b"X-Trailer: a\r\n")), b"\r\n"))


def build_odd_line(draw: Draw) -> Case:
    chance, source = draw.chance, draw.body()
    method, version, path = "POST", "HTTP/1.1", source.path
    match chance.randrange(4):
        case 0:
            method = chance.choice(METHODS)
        case 1:
            version = chance.choice(VERSIONS)
        case 2:
            path, method = chance.choice(PATHS), chance.choice(("GET", "POST", *METHODS))
        case _:
            path = chance.choice(PATHS)
    body = draw.dump(source.data) if draw.is_one_in(0.7) else b""
    sent = build_request(method, path, body, draw.headers())
    sent = sent.replace(b" HTTP/1.1\r\n", b" " + version.encode() + b"\r\n", 1)
    return Case(draw.number, (sent,), "torn", method=method)


def build_garbled(draw: Draw) -> Case:
    """Any byte of a whole request may be another, missing, or one too many."""
    sent = build_valid(draw).sent
    match draw.chance.randrange(3):
        case 0:
            sent = draw.flip(sent)
        case 1:
            sent = sent[: draw.chance.randrange(1, len(sent))]
        case _:
            sent = draw.chance.choice((b"\x16\x03\x01\x02\0\x01\0", b"\r\n", b"\0", b"")) + sent
    return Case(draw.number, (sent,), "torn")


def build_pipelined(draw: Draw) -> Case:
    """Several requests at once on one connection: answered one by one, in their order."""
    bodies = [draw.body() for _ in range(draw.chance.randint(2, 4))]
    sent = b"".join(draw.post(one.path, one.data) for one in bodies)
    keeps = all(draw.comes_back(one) for one in bodies)
    return Case(draw.number, draw.slice(sent), "served", answers=len(bodies), keeps_prompt=keeps)


def build_hung_up(draw: Draw) -> Case:
    """Gone before an answer can be there."""
    return replace(build_valid(draw), outcome="torn", leaves_after=0)


def build_left_stream(draw: Draw) -> Case:
    """A stream that is left at its first bytes, in its middle, or just before its end."""
    source = draw.body(draw.chance.choice((COMPLETIONS, CHAT, RESPONSES)))
    length = "max_output_tokens" if source.path == RESPONSES else "max_tokens"
    data = {**source.data, "stream": True, length: draw.chance.choice((1, 4, 30))}
    sent = draw.post(source.path, data)
    leaves_after = draw.chance.choice((1, 300, 900, 3000, 9000))
    return Case(draw.number, (sent,), "torn", leaves_after=leaves_after)
