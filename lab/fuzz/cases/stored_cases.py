"""What is kept: forms and the files in them, batches of requests, and ids of files, batches and
stored responses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

from lab.fuzz.cases.case import CHAT, COMPLETIONS, ID, RESPONSES, Case, Draw
from lab.fuzz.cases.odd_values import TEXTS, VALUES
from lab.fuzz.raw_http import build_request

_FILES, _BATCHES = "/v1/files", "/v1/batches"
_FORM_PATHS = (_FILES, _FILES, "/v1/audio/transcriptions", "/v1/audio/translations")
_FORM_TYPES: tuple[str | bytes, ...] = (
    *("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x y"),
    *('multipart/form-data; boundary="{}"', "multipart/form-data; charset=utf-16; boundary={}"),
    *("multipart/mixed; boundary={}", "Multipart/Form-Data; BOUNDARY={}"),
    "multipart/form-data; {}",
    *("multipart/form-data; boundary=" + "b" * 71, "multipart/form-data; boundary=" + "b" * 5000),
    *("multipart/form-data; boundary={}; boundary=x", b"multipart/form-data; boundary=\xff"),
    *("application/x-www-form-urlencoded", "application/json", "text/plain"),
)
_PART_NAMES = (
    *("purpose", "file", "file", "model", "language", "prompt", "temperature", "response_format"),
    *("expires_after[anchor]", "expires_after[seconds]", "_charset_", "", "名", "a" * 5000, "n"),
    *("stream", "timestamp_granularities[]", "vllm_xargs", "priority", "to_language", "seed"),
)
_FILE_NAMES = (
    *("a.jsonl", "../../etc/passwd", "a\\b", "名.jsonl", "a" * 5000, "", "a%00b", "CON"),
    "a.jsonl.exe",
)
_ODD_HEADS = (
    *(b"Content-Transfer-Encoding: base64", b"Content-Encoding: gzip", b"X: " + b"y" * 9000),
    *(b"Content-Type: application/json", b"Content-Type: multipart/mixed; boundary=z", b"A\0: b"),
    *(b"Content-Length: 5", b"Content-Disposition: attachment", b"no colon", b"Content-Type: \xff"),
    b"Content-Disposition: form-data; name*=UTF-8''%ff; filename*=utf-8''%e2%82",
)
_LINE_ENDS = (b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b"\0", b"")
_ODD_LINES = (
    *(b"", b" ", b"{", b"null", b"[]", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}", b'"a"', b"\0"),
    *(b'{"custom_id": "a"}', b'{"custom_id": "a", "method": "GET", "url": "/v1/models"}'),
    *(b"x" * 70_000, b'{"a":' * 3000, b"{" + b" " * 20_000 + b"}"),
)
_URLS = (COMPLETIONS, CHAT, RESPONSES, "/v1/embeddings", "/predict", "/v1/batches", "", "http://x/")
_BATCH_VALUES: dict[str, tuple[Any, ...]] = {
    "input_file_id": ("", "file-x", 5, None, "../x", "@file@", "@batch@", "\0", "名", "a" * 9000),
    "endpoint": (*_URLS, None, 5),
    "completion_window": (
        *("24h", "1s", "0s", "30d", "31d", "-1h", "24", 24, None, "9999999d", "１h"),
    ),
    "metadata": (
        *({}, {"a": "b"}, {"a": 5}, "x", None, {"a" * 65: "b"}, {"a": "b" * 600}, {"": "\0"}),
    ),
    "output_expires_after": (
        *({"anchor": "created_at", "seconds": 3600}, {}, "x", {"seconds": -1}, None),
    ),
    "x": VALUES,
}
_ID_PATHS = (
    *("/v1/responses/{}", "/v1/responses/{}/cancel", "/v1/responses/{}/input_items"),
    *("/v1/files/{}", "/v1/files/{}/content", "/v1/batches/{}", "/v1/batches/{}/cancel"),
    *("/v1/files", "/v1/batches", "/v1/responses/{}", "/v1/models/{}", "/v1/responses/{}/x"),
)
_IDS = (
    *("@response@", "@file@", "@batch@", "resp_x", "file-x", "batch_x", "", ".", "..", "%2e%2e"),
    "%00",
    *("a" * 128, "a" * 129, "a" * 5000, "名", "a/b", "a%2fb", "*", "' OR 1=1 --", "\udcff", "%ff"),
    "0",
    *("RESP_X", "resp-x", "%", "%zz", "a b", "a?b", "a#b", "__proto__", "${x}", "{}", "-1"),
)
_QUERIES = (
    *("", "", "stream=true", "stream=true&starting_after=0", "starting_after=-1", "stream=yes"),
    *("stream=true&starting_after=99999999999", "starting_after=x", "limit=1", "limit=0"),
    "limit=-1",
    *("limit=1000000", "limit=x", "after=x", "after=%00", "after=@file@", "order=asc", "order=x"),
    *("purpose=batch", "purpose=%ff", "include=x", "include[]=a&include[]=b", "limit=1&limit=2"),
    "%",
    *("before=@batch@", "limit=１", "after=" + "a" * 4000, "&&&", "=", "limit", "stream"),
)
_EMPTY_SOUND = b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00"


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form; a file has a name of its own."""

    name: str
    data: bytes
    filename: str | None = None
    heads: tuple[bytes, ...] = ()

    def build(self, end: bytes = b"\r\n") -> bytes:
        text = f'Content-Disposition: form-data; name="{self.name}"'
        if self.filename is not None:
            text += f'; filename="{self.filename}"'
        return end.join((text.encode(), *self.heads, b"", self.data))


def build_form_case(draw: Draw) -> Case:
    """Forms in whatever state; some of them right."""
    chance = draw.chance
    path = chance.choice(_FORM_PATHS)
    parts = [_build_part(draw) for _ in range(chance.choice((0, 1, 2, 3, 5, 70)))]
    if draw.is_one_in(0.6):
        right = [Part("purpose", b"batch"), Part("file", _build_file(draw), "a.jsonl")]
        if path != _FILES:
            right = [Part("model", b"x"), Part("file", _EMPTY_SOUND, "a.wav")]
        parts = [*right, *parts[:1]]
        chance.shuffle(parts)
    boundary = chance.choice(
        ("b", "----WebKitFormBoundary7MA4YWxkTrZu0gW", "b" * 70, "b'()+_,-./:=?")
    )
    body = _join(draw, parts, boundary)
    kind: str | bytes = f'multipart/form-data; boundary="{boundary}"'
    if draw.is_one_in(0.3):
        kind = chance.choice(_FORM_TYPES)
        kind = kind.replace("{}", boundary) if isinstance(kind, str) else kind
    if draw.is_one_in(0.2) and body:
        body = draw.flip(body)
    return Case(draw.number, draw.slice(_post_form(draw, path, body, kind)), "answered")


def _build_part(draw: Draw) -> Part:
    chance = draw.chance
    text = chance.choice(TEXTS)
    data = text if isinstance(text, bytes) else text.encode()
    data = chance.choice((data, b"batch", b"", chance.randbytes(300), b"x" * 5000))
    filename = chance.choice(_FILE_NAMES) if draw.is_one_in(0.4) else None
    heads = tuple(draw.some(_ODD_HEADS, 1)) if draw.is_one_in(0.3) else ()
    return Part(chance.choice(_PART_NAMES), data, filename, heads)


def _join(draw: Draw, parts: Sequence[Part], boundary: str) -> bytes:
    end = b"\n" if draw.is_one_in(0.05) else b"\r\n"
    line = b"--" + boundary.encode()
    pieces = [line + end + one.build(end) + end for one in parts]
    last = line + b"--" + end
    match draw.chance.randrange(10):
        case 0:
            last = b""
        case 1:
            last = line
        case 2:
            pieces.insert(0, b"before" + end)
        case 3:
            last += b"after" * 100
        case _:
            pass
    return b"".join((*pieces, last))


def _post_form(draw: Draw, path: str, body: bytes, kind: str | bytes) -> bytes:
    headers = [("Authorization", f"Bearer {draw.target.key}"), ("Content-Type", kind)]
    return build_request("POST", path, body, headers)


def build_batch_case(draw: Draw) -> Case:
    """A file of requests that becomes a batch, or the request for one with odd fields."""
    if draw.is_one_in(0.3):
        data = {"input_file_id": "@file@", "endpoint": CHAT, "completion_window": "24h"}
        for name in draw.some([*_BATCH_VALUES], 2):
            data[name] = draw.chance.choice(_BATCH_VALUES[name])
        return _know_ids(draw, draw.answered(_BATCHES, data))
    url = draw.chance.choice((COMPLETIONS, CHAT, RESPONSES))
    parts = [Part("purpose", b"batch"), Part("file", _build_file(draw, url), "a.jsonl")]
    body = b"".join(b"--b\r\n" + one.build() + b"\r\n" for one in parts) + b"--b--\r\n"
    sent = _post_form(draw, _FILES, body, "multipart/form-data; boundary=b")
    asked = {"input_file_id": ID, "endpoint": url, "completion_window": "24h"}
    return Case(draw.number, (sent,), "answered", then=(draw.post(_BATCHES, asked),))


def _build_file(draw: Draw, url: str = CHAT) -> bytes:
    lines = []
    is_right = draw.is_one_in(0.5)
    for place in range(draw.chance.choice((1, 1, 2, 4))):
        lines.append(_build_line(draw, url, place))
        if not is_right and draw.is_one_in(0.5):
            lines.append(draw.chance.choice(_ODD_LINES))
    end = b"\n" if is_right else draw.chance.choice(_LINE_ENDS)
    return end.join(lines) + (end if draw.is_one_in(0.5) else b"")


def _build_line(draw: Draw, url: str, place: int) -> bytes:
    chance = draw.chance
    body = {name: value for name, value in draw.body(url).data.items() if name != "stream"}
    if draw.is_one_in(0.3):
        body[chance.choice((*body, "stream", "n", "max_tokens", "tools"))] = chance.choice(VALUES)
    line: dict[str, Any] = {"custom_id": str(place), "method": "POST", "url": url, "body": body}
    if draw.is_one_in(0.15):
        line[chance.choice((*line, "x"))] = chance.choice((*VALUES, *_URLS))
    if draw.is_one_in(0.05):
        line.pop(chance.choice([*line]))
    return draw.dump(line)


def build_id_case(draw: Draw) -> Case:
    """Ids that are nobody's, or no ids; and what is stored, asked for and continued."""
    if draw.is_one_in(0.3):
        return _build_stored(draw)
    chance = draw.chance
    name = chance.choice(_IDS[:3] if draw.is_one_in(0.4) else _IDS)  # those that there are
    path = chance.choice(_ID_PATHS).replace("{}", name)
    query = chance.choice(_QUERIES)
    method = chance.choice(("GET", "GET", "POST", "DELETE", "PUT", "HEAD"))
    body = draw.dump(chance.choice(VALUES)) if draw.is_one_in(0.2) else b""
    sent = build_request(method, path + ("?" + query if query else ""), body, draw.headers())
    # Some of these paths hold what no request line may.
    return _know_ids(draw, Case(draw.number, (sent,), "torn", method=method))


def _build_stored(draw: Draw) -> Case:
    chance = draw.chance
    data = {**draw.body(RESPONSES).data, "store": chance.choice((True, True, False, None, "no", 5))}
    if draw.is_one_in(0.3):
        data["background"] = chance.choice((True, True, "x"))
        data["stream"] = chance.choice((False, False, True, None))
    if draw.is_one_in(0.3):
        data["previous_response_id"] = chance.choice((*_IDS, *VALUES))
    if draw.is_one_in(0.2):
        data[chance.choice(("metadata", "include", "conversation", "prompt", "reasoning"))] = (
            chance.choice(VALUES)
        )
    case = _know_ids(draw, draw.answered(RESPONSES, data))
    if data.get("stream"):
        return case
    one, headers = f"{RESPONSES}/{ID}", draw.headers()
    steps = (
        build_request("GET", one, b"", headers),
        build_request("GET", f"{one}/input_items?limit=1", b"", headers),
        build_request("POST", f"{one}/cancel", b"{}", headers),
        build_request("DELETE", one, b"", headers),
        draw.post(RESPONSES, {**draw.body(RESPONSES).data, "previous_response_id": ID}),
    )
    return replace(case, then=tuple(draw.some(steps, 3)))


def _know_ids(draw: Draw, case: Case) -> Case:
    """With the ids of what the target has; as long as those that stand there till then."""
    sent = case.sent
    head, separator, body = sent.partition(b"\r\n\r\n")
    for kind in ("response", "file", "batch"):
        known = draw.target.ids.get(kind, f"{kind}-missing").encode()
        head = head.replace(f"@{kind}@".encode(), quote(known).encode())
        body = body.replace(f"@{kind}@".encode(), known)
    length = b"Content-Length: %d" % len(body)
    old = b"Content-Length: %d" % len(sent.partition(b"\r\n\r\n")[2])
    return replace(case, pieces=(head.replace(old, length) + separator + body,))


def fill_id(step: bytes, answer: bytes) -> bytes | None:
    """The next request, with the id that the answer tells; None where it tells none."""
    try:
        name = json.loads(answer)["id"]
    except (ValueError, LookupError, TypeError):
        return None
    if not isinstance(name, str):
        return None
    head, separator, body = step.replace(ID.encode(), name.encode()).partition(b"\r\n\r\n")
    before = len(step.partition(b"\r\n\r\n")[2])
    old, new = b"Content-Length: %d" % before, b"Content-Length: %d" % len(body)
    return head.replace(old, new) + separator + body
