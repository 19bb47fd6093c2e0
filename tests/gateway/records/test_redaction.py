"""What is taken out of texts, which patterns are taken, and where texts are found."""

from __future__ import annotations

import orjson
import pytest

from common.errors import SettingsError
from gateway.records.redaction import BUILT_IN, REPLACEMENT, Redactor, compile_bounded
from gateway.records.texts import read_stream, read_texts


@pytest.mark.parametrize(
    "secret",
    [
        "alice@example.com",
        "first.last+tag@mail.example.co.uk",
        "sk-proj-abcdefghijklmnop1234",
        "vg-" + "A1b2_-" * 8,
        "ghp_" + "x" * 36,
        "AKIAABCDEFGHIJKLMNOP",
        "eyJhbGciOiJIUzI1NiJ9." + "a" * 700 + ".c2ln",
        "+49 151 2345 6789",
        "+1 (555) 123-4567",
        "555-123-4567",
        "(020) 7946 0958",
        "13912345678",
    ],
)
def test_built_in_patterns_take_out_what_is_personal(secret: str) -> None:
    cleaned = Redactor(tuple(BUILT_IN), 8192).clean(f"write to {secret}, please")

    assert cleaned == f"write to {REPLACEMENT}, please"


@pytest.mark.parametrize(
    "text",
    [
        *("on 2026-11-29 at 10:20", "192.168.10.200", "a @ b", "1 2 3 4", "3.14159", "ask-me-this"),
        "版本 1.2.3，端口 8000",
    ],
)
def test_built_in_patterns_leave_other_texts_alone(text: str) -> None:
    assert Redactor(tuple(BUILT_IN), 8192).clean(text) == text


def test_own_pattern_takes_out_what_it_finds() -> None:
    redactor = Redactor((r"case [0-9]{4,8}+", "emails"), 100)

    assert redactor.clean("case 12345 of a@b.de") == f"{REPLACEMENT} of {REPLACEMENT}"


@pytest.mark.parametrize(
    "pattern",
    [
        *("a+", "a*b", r"(\w+ )+", r"(?:a{1,20}){1,20}", r"\d{1,9}\d{1,9}\d{1,9}\d{1,9}\d{1,9}x"),
        *("[a-z]{1,70}[a-z]{1,70}X", "(?:a{1,8}b){1,4}"),
        *(r"(a)\1", "(", "a{1,600}", "", "a?", "x" * 600, r"(?:a|b|ab){1,40}c", r"(a?){60}b"),
    ],
)
def test_pattern_whose_cost_is_not_bounded_is_refused(pattern: str) -> None:
    with pytest.raises(SettingsError, match="GATEWAY_AUDIT_REDACT"):
        compile_bounded(pattern)


def test_too_many_patterns_are_refused() -> None:
    with pytest.raises(SettingsError, match="at most 32"):
        Redactor(("emails",) * 33, 100)


def test_text_is_cut_and_no_half_of_a_secret_is_left_at_its_end() -> None:
    redactor = Redactor(("emails",), 1000)
    for before in range(950, 1600, 7):
        cleaned = redactor.clean("x" * before + " alice@example.com" + " y" * 2000)
        assert len(cleaned) <= 1000
        assert "alice" not in cleaned
    short = redactor.clean("a" * 600 + " alice@exa", is_cut=True)  # the rest never came
    assert "alice" not in short


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"model": "m", "messages": [{"role": "user", "content": "hi"}]}, "hi"),
        ({"prompt": ["a", "b"], "system": "s"}, "a\nb\ns"),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "t"}]}]}, "t"),
        (
            {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]},
            "",
        ),
        ({"response": ["one", "two"]}, "one\ntwo"),
        ({"choices": [{"message": {"role": "assistant", "content": "yes"}}]}, "yes"),
        ({"error": {"message": "no"}}, ""),
    ],
)
def test_texts_are_read_out_of_bodies(body: object, text: str) -> None:
    assert read_texts(orjson.dumps(body)) == text


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (
            [
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "he"}}]},
                {"choices": [{"index": 1, "delta": {"content": "other"}}]},
                {"choices": [{"index": 0, "delta": {"content": "llo"}}]},
                {"choices": [], "usage": {}},
            ],
            "hello\nother",
        ),
        (
            [{"choices": [{"index": 0, "text": "a"}]}, {"choices": [{"index": 0, "text": "b"}]}],
            "ab",
        ),
        (
            [
                {"type": "content_block_start", "index": 0, "content_block": {"text": ""}},
                {"type": "content_block_delta", "index": 0, "delta": {"text": "an"}},
                {"type": "content_block_delta", "index": 0, "delta": {"text": "swer"}},
                {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
            ],
            "answer",
        ),
        (
            [
                {"type": "response.output_text.delta", "output_index": 0, "delta": "an"},
                {"type": "response.output_text.delta", "output_index": 0, "delta": "swer"},
                {"type": "response.output_text.done", "text": "answer"},
            ],
            "answer",
        ),
    ],
)
def test_pieces_of_a_stream_are_put_together(events: list[object], text: str) -> None:
    stream = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events)

    assert read_stream(stream + b'data: [DONE]\n\ndata: {"cut o') == text


def test_nested_texts_end_where_nobody_reads_them() -> None:
    assert read_texts(b'{"a":' * 200 + b'{"text":"deep"}' + b"}" * 200) == ""
