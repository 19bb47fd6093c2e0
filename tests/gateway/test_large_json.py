"""What is passed over is understood as a parser understands it, wherever the pieces are cut."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.schemas import large_json
from gateway.schemas.large_json import scan_object

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ['"', "\\", '\\"', "{[,:]}", "😀" * 9, "é" * 9, "\\u0041", "data:a", "\n" * 9]
)
NUMBERS = st.lists(st.integers(-(2**31), 2**31) | st.floats(-1e9, 1e9), min_size=1, max_size=20)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
LISTS = NUMBERS | st.lists(TEXTS, max_size=9) | st.lists(NUMBERS, max_size=4)
OBJECTS = st.dictionaries(
    TEXTS, LISTS | TEXTS | st.dictionaries(TEXTS, VALUES, max_size=3), max_size=5
)
PLAN = hypothesis_settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _small_pieces() -> Iterator[None]:
    """Every bound small, so that short bodies are cut everywhere."""
    bounds = {
        "_WINDOW_BYTES": 16,
        "_SMALL_MEMBER_BYTES": 24,
        "_PIECE_BYTES": 20,
        "_TEXT_PIECE_BYTES": 14,
        "_WORK_BYTES": 400,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bounds.items():
            patch.setattr(large_json, name, value)
        yield


@PLAN
@given(data=OBJECTS, is_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
async def test_every_member_is_found_where_it_lies(
    data: dict[str, Any], is_ascii: bool, indent: int | None
) -> None:
    body = json.dumps(data, ensure_ascii=is_ascii, indent=indent).encode()

    large = await scan_object(body, 1000)

    assert list(large.members) == list(data)
    for name, member in large.members.items():
        assert orjson.loads(body[member.start : member.end]) == data[name]
        if isinstance(data[name], list):
            assert len(large.fields[name]) == len(data[name]) or large.fields[name] == [0]
        elif not isinstance(data[name], str):
            assert large.fields[name] == data[name]


@PLAN
@given(texts=st.lists(TEXTS, max_size=9), text=TEXTS, is_ascii=st.booleans(), space=st.booleans())
async def test_texts_are_loaded_as_they_are(
    texts: list[str], text: str, is_ascii: bool, space: bool
) -> None:
    separators = (", ", ": ") if space else (",", ":")
    data = {"many": texts, "one": text * 3}
    body = json.dumps(data, ensure_ascii=is_ascii, separators=separators).encode()

    large = await scan_object(body, 1000)

    assert {name: await large.load(name) for name in data} == data


@PLAN
@given(data=OBJECTS)
async def test_body_with_another_field_keeps_all_others(data: dict[str, Any]) -> None:
    large = await scan_object(orjson.dumps(data), 1000)
    fields = {**large.fields, "stream": True}

    assert orjson.loads(large.dump(fields)) == {**data, "stream": True}


@PLAN
@given(data=OBJECTS, end=st.integers(0, 200))
async def test_body_that_breaks_off_is_refused(data: dict[str, Any], end: int) -> None:
    body = orjson.dumps(data)
    if end >= len(body):
        return
    with pytest.raises(InvalidRequest):
        await scan_object(body[:end], 1000)


@PLAN
@given(data=OBJECTS, place=st.integers(0, 300), byte=st.integers(0, 255))
async def test_body_with_a_wrong_byte_is_read_like_a_parser_or_not_at_all(
    data: dict[str, Any], place: int, byte: int
) -> None:
    body = bytearray(orjson.dumps(data))
    body[place % len(body)] = byte
    try:
        expected = json.loads(bytes(body))
    except (ValueError, RecursionError):
        expected = None
    try:
        large = await scan_object(bytes(body), 1000)
    except InvalidRequest:
        return
    if isinstance(expected, dict) and body[:1] == b"{":
        assert list(large.members) == list(expected)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"[]", b'"a"', b"null", b"{", b"}", b'{"a"', b'{"a":', b'{"a":}', b'{"a":1'),
        *(
            b'{"a":1,',
            b'{"a":[',
            b'{"a":["b"',
            b'{"a":["b" "c"]}',
            b'{"a":"b}',
            b'{"a":"\\',
            b"{a:1}",
        ),
        *(
            b'{"a":1}x',
            b'{"a":"\\u12"}' + b" " * 30,
            b'{"a":[1,"b"]}',
            b'{"a":["b",1]}',
            b"\xff\xfe{",
        ),
        *(
            b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}",
            b"\xef\xbb\xbf{}",
            b'{"a":{"b":"c"',
            b'{"a":-',
        ),
        *(b'{"' + b"a" * 2000 + b'":1}', b'{"a":"' + b"b" * 99, b'{"a":[' + b"1," * 99),
    ],
)
async def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        await scan_object(body, 1000)


async def test_list_of_too_many_texts_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="more than 10 items"):
        await scan_object(b'{"a":["b"' + b',"b"' * 10 + b"]}", 10)


async def test_half_a_surrogate_is_loaded_where_it_may_be() -> None:
    body = b'{"a":["' + b"x" * 50 + b'\\ud800","\\ud83d\\ude00' + b"\\ud83d\\ude00" * 20 + b'"]}'
    large = await scan_object(body, 10)

    assert await large.load("a", takes_surrogates=True) == json.loads(body)["a"]
    with pytest.raises(InvalidRequest):
        await large.load("a")
