"""What the fuzz sends: valid requests, and the same ones spoilt in every way that comes to mind.

Each carries a number of its own in its prompt, `#000123#`, which must come back and no other's.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lab.fuzz.raw_http import build_request

KEY = "fuzz-key"
# served: 200 with its number. answered: one answer. torn: the framing itself is in doubt.
Outcome = Literal["served", "answered", "torn"]


@dataclass(frozen=True, slots=True)
class Case:
    """One connection's worth of bytes and what may come back."""

    number: int
    kind: str
    pieces: tuple[bytes, ...]
    outcome: Outcome
    method: str = "POST"
    answers: int = 1
    keeps_prompt: bool = False
    hangs_up: bool = False

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)


def mark(number: int) -> str:
    return f"#{number:06d}#"


def _valid_bodies(text: str) -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """Path, the field that holds the prompt, body."""
    turn = [{"role": "system", "content": "short"}, {"role": "user", "content": text}]
    return (
        ("/predict", "prompt", {"prompt": text}),
        ("/predict", "prompt", {"prompt": ["什么是 warp？", text, "", "x" * 3000]}),
        ("/predict", "prompts", {"prompts": [text], "system": "Sei kurz.", "max_tokens": 5}),
        (
            "/predict",
            "prompt",
            {
                "prompt": text,
                "temperature": 0.5,
                "top_p": 0.9,
                "top_k": 3,
                "stop": ["x"],
                "seed": 1,
            },
        ),
        ("/v1/completions", "prompt", {"model": "fake", "prompt": text, "max_tokens": 4}),
        ("/v1/completions", "prompt", {"model": "fake", "prompt": ["a", text], "n": 1}),
        ("/v1/completions", "prompt", {"model": "fake", "prompt": text, "stream": True}),
        ("/v1/chat/completions", "messages", {"model": "fake", "messages": turn}),
        (
            "/v1/chat/completions",
            "messages",
            {
                "model": "fake",
                "messages": turn,
                "stream": True,
                "stream_options": {"include_usage": True},
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
                "response_format": {"type": "json_schema", "json_schema": {"name": "a"}},
                "logprobs": True,
                "top_logprobs": 2,
            },
        ),
        ("/v1/responses", "input", {"model": "fake", "input": text}),
        ("/v1/messages", "messages", {"model": "fake", "messages": turn, "max_tokens": 5}),
    )


_QUIET_BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/tokenize", {"prompt": "abc"}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/embeddings", {"model": "fake", "input": "abc"}),
)
_DEEP, _HUGE = "@deep@", "@huge@"
_SPLICES = {
    f'"{_DEEP}"'.encode(): b"[" * 1500 + b"]" * 1500,
    f'"{_HUGE}"'.encode(): b"9" * 5000,
}
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30),
    *(0.5, -0.5, 2.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), _HUGE, _DEEP),
    *("", " ", "\0", "\x1b[31m", "é" * 500, "a" * 50_000, "\ud800", "\udfff\ud800", "名", "0", "5"),
    *("<|im_start|>system", "{{ 7*7 }}", "%s%n", "../../etc/passwd", "\r\nX-Evil: 1", "\u2028"),
    *([], [[]], [None], [""], ["a", 1], [1, 2, 3], [-1], [2**40], [[5], [6]], [True], ["a"] * 1100),
    *({}, {"a": {}}, {"": None}, {"role": "user"}, [{"role": "user"}], {"type": "json_object"}),
    *({"include_usage": "yes"}, {"include_usage": True, "x": 1}, [{"type": "text", "text": "a"}]),
)
_FIELDS = (
    *("prompt", "prompts", "system", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed"),
    *("model", "messages", "input", "stream", "stream_options", "n", "best_of", "logprobs", "echo"),
    *("top_logprobs", "prompt_logprobs", "response_format", "structured_outputs", "tools", "text"),
    *("guided_json", "priority", "user", "prompt_cache_key", "tool_choice", "request_id", "suffix"),
    *("max_completion_tokens", "ignore_eos", "min_tokens", "logit_bias", "truncate_prompt_tokens"),
    *("__proto__", "", "\0", "x\r\ny", "名", "a" * 300),
)
_ODD_TEXTS: tuple[str | bytes, ...] = (
    *("", " ", "0", "1", "-1", "+5", "1e3", "0x10", "60000", "9" * 9, "9" * 30, "１２", "true"),
    *("a b", "x" * 128, "x" * 129, "x" * 7000, "ünïcode", "日本", "a,b", "a;b=c", '"quoted"', "*"),
    *("interactive", "batch", "highest", "gzip", "identity", "close", "*/*", "text/html", "\t"),
    *(b"\xff\xfe", b"\x80", b"caf\xe9", b"\xed\xa0\x80", b"a\x7fb", b"%00", b"%0d%0aX: 1"),
    *("Bearer", "Bearer ", "bearer x", "Basic dTpw", b"Bearer \xff", f"Bearer {KEY}x", "null"),
    *("application/json", "application/json; charset=utf-16", "multipart/form-data", "text/plain"),
    *("multipart/form-data; boundary=", "application/x-www-form-urlencoded", "a/b; c=\xff"),
    *("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "vendor=1,other=2"),
)
_ODD_NAMES = (
    *("X-Request-Id", "X-Deadline-Ms", "X-Priority", "X-Session-Id", "Accept", "anthropic-version"),
    *("traceparent", "tracestate", "Content-Type", "Authorization", "x-api-key", "Cookie", "Range"),
    *("Accept-Encoding", "User-Agent", "Referer", "Origin", "If-None-Match", "X-Forwarded-For"),
    *(
        "TE",
        "Trailer",
        "Via",
        "Date",
        "Forwarded",
        "X-Vllm-Priority",
        "Keep-Alive",
        "Cache-Control",
    ),
    *("Proxy-Connection", "Max-Forwards", "Content-Language", "Content-Location", "Warning", "A"),
)
_FRAMINGS: tuple[tuple[tuple[str, str | bytes], ...], ...] = (
    (("Content-Length", "5"),),
    (("Content-Length", "99999"),),
    (("Content-Length", "999999999999999999999999"),),
    (("Content-Length", "-1"),),
    (("Content-Length", "+5"),),
    (("Content-Length", "0x10"),),
    (("Content-Length", "1e3"),),
    (("Content-Length", ""),),
    (("Content-Length", "5, 5"),),
    (("Content-Length", "5"), ("Content-Length", "6")),
    (("Content-Length", "5"), ("Content-Length", "5")),
    (("Content-Length", "5"), ("Transfer-Encoding", "chunked")),
    (("Transfer-Encoding", "chunked"), ("Content-Length", "5")),
    (("Transfer-Encoding", "chunked"),),
    (("Transfer-Encoding", "Chunked"),),
    (("Transfer-Encoding", "chunked, chunked"),),
    (("Transfer-Encoding", "gzip, chunked"),),
    (("Transfer-Encoding", "chunked, identity"),),
    (("Transfer-Encoding", "identity"),),
    (("Transfer-Encoding", "xchunked"),),
    (("Transfer-Encoding", b"\x0bchunked"),),
    (("Transfer-Encoding", "chunked"), ("Transfer-Encoding", "identity")),
    (("Upgrade", "websocket"), ("Connection", "Upgrade"), ("Sec-WebSocket-Version", "13")),
    (("Upgrade", "h2c"), ("Connection", "Upgrade, HTTP2-Settings"), ("HTTP2-Settings", "AAMA")),
    (("Connection", "close"),),
    (("Connection", "keep-alive, close"),),
    (("Expect", "200-ok"),),
    (("Expect", ""),),
    (("Expect", "100-continue, x"),),
    (("Host", "other"),),
    (("Host", b"\xff"),),
    (("Host", ""),),
    (("X" * 9000, "a"),),
    (("A", "b" * 9000),),
    tuple(("A", "b") for _ in range(300)),
    (("A b", "c"),),
    (("A\0", "c"),),
    (("A", b"b\0c"),),
    (("A", b"b\nc"),),
    (("A", b"b\r\n folded"),),
    (("A", b"b\rc"),),
    ((" A", "b"),),
    (("", "b"),),
    (("Content-Length ", "5"),),
)
_METHODS = (
    *("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "POSTS"),
    *("M-SEARCH", "X" * 100, "PRI", "", "P\0ST", "GÉT"),
)
_PATHS = (
    *("/", "/healthz", "/readyz", "/metrics", "/usage", "/v1/models", "/v1", "/v1/", "//predict"),
    *("/predict/", "/PREDICT", "/predict?x=1", "/predict?%ff=%", "/predict#a", "/predict;a", "*"),
    *(
        "/v1/../collective_rpc",
        "/v1/%2e%2e/collective_rpc",
        "/health",
        "/v1/models/x",
        "/%",
        "/%zz",
    ),
    *(
        "/v1/completions%00",
        "/v1/completions?a=\udcff",
        "/\udcff\udcfe",
        "/名",
        "/a b",
        "",
        "predict",
    ),
    *(
        "http://gateway/predict",
        "http://other:1/v1/models",
        "http://[::1/predict",
        "http://",
        "a:80",
    ),
    *(
        "/v1/completions?" + "q" * 4000,
        "/" + "p" * 9000,
        "/" * 200,
        "/v1/chat/completions/../models",
    ),
    *("/ui", "/ui/", "/ui/page.js", "/ui/status", "/ui/x", "/ui/..%2f..%2fconfig.py", "/ui/%00"),
    *("//[", "//[::1]/predict", "//other/predict", "http://a:b/", "http://a:99999/", "//a:99999/"),
)
_VERSIONS = (
    *("HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/0.9", "HTTP/9", "HTTP/", "http/1.1", "", "X"),
    *("HTTP/1.1 x", "HTTP/11"),
)

Spoil = Callable[[random.Random, int], Case]


def make_cases(seed: int, count: int) -> Iterator[Case]:
    """The same ones for the same seed."""
    for number in range(count):
        # Each case from its own seed: one can be made again without those before it.
        chance = random.Random(seed * 1_000_003 + number)
        spoil = chance.choices(_SPOILS, _WEIGHTS)[0]
        yield spoil(chance, number)


def _dump(chance: random.Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=chance.random() < 0.7)
    data = text.encode("utf-8", "surrogatepass")
    for place, splice in _SPLICES.items():
        data = data.replace(place, splice)
    return data


def _pick(chance: random.Random, number: int) -> tuple[str, str, dict[str, Any]]:
    return chance.choice(_valid_bodies(f"say {mark(number)}"))


def _headers(chance: random.Random) -> list[tuple[str, str | bytes]]:
    headers: list[tuple[str, str | bytes]] = [("Authorization", f"Bearer {KEY}")]
    if chance.random() < 0.5:
        headers.append(("Content-Type", "application/json"))
    return headers


def _chunked(chance: random.Random, body: bytes) -> bytes:
    pieces = []
    while body:
        size = chance.choice((1, 3, 17, 100, 5000))
        piece, body = body[:size], body[size:]
        extension = chance.choice((b"", b"", b";a=b", b';a="x"'))
        pieces.append(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece))
    return b"".join((*pieces, b"0\r\n", chance.choice((b"", b"", b"X-Trailer: a\r\n")), b"\r\n"))


def _slice(chance: random.Random, data: bytes) -> tuple[bytes, ...]:
    if chance.random() < 0.7:
        return (data,)
    cuts = sorted(chance.randrange(len(data)) for _ in range(chance.randint(1, 3)))
    pieces = (data[start:end] for start, end in itertools.pairwise((0, *cuts, len(data))))
    return tuple(filter(None, pieces))


def _valid(chance: random.Random, number: int) -> Case:
    """Right in content, unusual in form."""
    path, _, data = _pick(chance, number)
    body, headers = _dump(chance, data), _headers(chance)
    form = chance.randrange(6)
    if form == 0:
        body = gzip.compress(body, 1)
        headers.append(("Content-Encoding", "gzip"))
    elif form == 1:
        body = zlib.compress(body)
        headers.append(("Content-Encoding", "deflate"))
    elif form == 2:
        body = chance.choice((b" ", b"\n", b"\t\r\n")) + body + b"  \n"
    if chance.random() < 0.2:
        headers.append(("X-Request-Id", f"case-{number}"))
    if chance.random() < 0.2:
        headers.append(("X-Priority", chance.choice(("batch", "interactive"))))
    if chance.random() < 0.2:
        headers.append(("X-Deadline-Ms", "600000"))
    if chance.random() < 0.1:
        headers.append(("Expect", "100-continue"))
    chance.shuffle(headers)
    headers = [(chance.choice((name, name.upper(), name.lower())), text) for name, text in headers]
    if chance.random() < 0.3:
        headers.append(("Transfer-Encoding", "chunked"))
        sent = build_request("POST", path, _chunked(chance, body), headers, is_sized=False)
    else:
        sent = build_request("POST", path, body, headers)
    return Case(number, "valid", _slice(chance, sent), "served", keeps_prompt=True)


def _odd_value(chance: random.Random, number: int) -> Case:
    path, prompt, data = _pick(chance, number)
    touched = set()
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        name = chance.choice((*data, *_FIELDS, *data))
        touched.add(name)
        match chance.randrange(8):
            case 0:
                data.pop(name, None)
            case 1 if name in data:
                data[name] = [data[name]]
            case 2 if isinstance(data.get(name), list):
                held = list(data[name])
                held.insert(chance.randint(0, len(held)), chance.choice(_VALUES))
                data[name] = held
            case _:
                data[name] = chance.choice(_VALUES)
    sent = build_request("POST", path, _dump(chance, data), _headers(chance))
    keeps = prompt in data and not touched & {prompt, "prompt", "prompts", "stop", "system"}
    return Case(number, "odd value", (sent,), "answered", keeps_prompt=keeps)


def _odd_body(chance: random.Random, number: int) -> Case:
    """JSON no more, or not in this encoding, or more of it than it seems."""
    path, _, data = _pick(chance, number)
    if chance.random() < 0.1:
        path, data = chance.choice(_QUIET_BODIES)
    headers = _headers(chance)
    if chance.random() < 0.25:
        coding, body = _encode(chance, _dump(chance, data))
        headers.append(("Content-Encoding", coding))
    else:
        body = _spoil(chance, data)
    return Case(number, "odd body", (build_request("POST", path, body, headers),), "answered")


def _encode(chance: random.Random, body: bytes) -> tuple[str, bytes]:
    """A content coding that is unknown, or does not hold what it says, or holds too much."""
    if chance.random() < 0.4:
        return "gzip", gzip.compress(body + b" " * chance.choice((10, 3_000_000)), 1)
    coding = chance.choice(("gzip", "deflate", "br", "zstd", "compress", "x", "gzip, gzip"))
    torn = gzip.compress(body)[:-9]
    return coding, chance.choice((body, torn, zlib.compress(body), b"\x1f\x8b"))


def _spoil(chance: random.Random, data: dict[str, Any]) -> bytes:
    body = _dump(chance, data)
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
            body = _flip(chance, body)
    return body


def _flip(chance: random.Random, data: bytes) -> bytes:
    spoilt = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(len(spoilt))
        match chance.randrange(3):
            case 0 if spoilt[place] not in b"0123456789":  # not one number into another
                spoilt[place] ^= 1 << chance.randrange(8)
            case 1:
                spoilt.insert(place, chance.randrange(256))
            case _ if len(spoilt) > 1:
                del spoilt[place]
    return bytes(spoilt)


def _odd_header(chance: random.Random, number: int) -> Case:
    """Headers that mean something to the gateway, with what they should not hold."""
    path, _, data = _pick(chance, number)
    headers = _headers(chance)
    for _ in range(chance.choice((1, 1, 2, 5))):
        headers.append((chance.choice(_ODD_NAMES), chance.choice(_ODD_TEXTS)))
    if chance.random() < 0.3:
        chance.shuffle(headers)
    sent = build_request("POST", path, _dump(chance, data), headers)
    return Case(number, "odd header", (sent,), "answered", keeps_prompt=True)


def _odd_framing(chance: random.Random, number: int) -> Case:
    path, _, data = _pick(chance, number)
    framing = chance.choice(_FRAMINGS)
    names = {name for name, _ in framing}
    body = _dump(chance, data)
    is_chunked = "Transfer-Encoding" in names
    if is_chunked and chance.random() < 0.8:
        body = _flip(chance, _chunked(chance, body))
    is_sized = not is_chunked and "Content-Length" not in names
    headers = [*_headers(chance), *framing]
    sent = build_request("POST", path, body, headers, is_sized=is_sized)
    return Case(number, "odd framing", _slice(chance, sent), "torn")


def _odd_line(chance: random.Random, number: int) -> Case:
    path, _, data = _pick(chance, number)
    method, version, body = "POST", "HTTP/1.1", _dump(chance, data)
    match chance.randrange(4):
        case 0:
            method = chance.choice(_METHODS)
        case 1:
            version = chance.choice(_VERSIONS)
        case 2:
            path, method = chance.choice(_PATHS), chance.choice(("GET", "POST", *_METHODS))
        case _:
            path = chance.choice(_PATHS)
    sent = build_request(method, path, body if chance.random() < 0.7 else b"", _headers(chance))
    sent = sent.replace(b" HTTP/1.1\r\n", b" " + version.encode() + b"\r\n", 1)
    return Case(number, "odd line", (sent,), "torn", method=method)


def _garbled(chance: random.Random, number: int) -> Case:
    """Any byte of a whole request may be another, missing, or one too many."""
    case = _valid(chance, number)
    match chance.randrange(3):
        case 0:
            sent = _flip(chance, case.sent)
        case 1:
            sent = case.sent[: chance.randrange(1, len(case.sent))]
        case _:
            sent = chance.choice((b"\x16\x03\x01\x02\0\x01\0", b"\r\n", b"\0", b"")) + case.sent
    return replace(case, kind="garbled", pieces=(sent,), outcome="torn", keeps_prompt=False)


def _pipelined(chance: random.Random, number: int) -> Case:
    """Several requests at once on one connection: answered one by one, in their order."""
    count = chance.randint(2, 4)
    sent = b""
    for _ in range(count):
        path, _, data = _pick(chance, number)
        sent += build_request("POST", path, _dump(chance, data), _headers(chance))
    return Case(
        number, "pipelined", _slice(chance, sent), "served", answers=count, keeps_prompt=True
    )


def _hung_up(chance: random.Random, number: int) -> Case:
    return replace(_valid(chance, number), kind="hung up", outcome="torn", hangs_up=True)


_SPOILS: tuple[Spoil, ...] = (
    _valid,
    _odd_value,
    _odd_body,
    _odd_header,
    _odd_framing,
    _odd_line,
    _garbled,
    _pipelined,
    _hung_up,
)
_WEIGHTS = (18, 28, 16, 14, 8, 6, 5, 2, 3)
