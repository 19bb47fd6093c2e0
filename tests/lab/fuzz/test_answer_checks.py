"""What is called a finding, and what is not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from lab.fuzz.answer_checks import check_answer, describe_failure, is_engines
from lab.fuzz.cases.case import Case, mark
from lab.fuzz.raw_http import RawAnswer

CASE = Case(7, (b"POST /predict say " + mark(7).encode(),), "answered", kind="values")
SERVED = Case(7, CASE.pieces, "served", kind="valid", keeps_prompt=True)
JSON = {"content-type": "application/json", "x-request-id": "a"}


def _answer(status: int, data: Any, **headers: str) -> RawAnswer:
    given = JSON | {name.replace("_", "-"): text for name, text in headers.items()}
    return RawAnswer(status, given, json.dumps(data).encode(), keeps_connection=True)


def _error(code: str = "invalid_value", source: str = "gateway", message: str = "no") -> Any:
    envelope = {"message": message, "type": "x", "code": code, "param": None, "source": source}
    return {"error": envelope}


@pytest.mark.parametrize(
    "answer",
    [
        _answer(200, {"response": "b"}),
        _answer(400, _error()),
        _answer(400, {"error": {"message": "no", "source": "engine"}}),
        _answer(429, _error("overloaded"), retry_after="1"),
        _answer(503, _error("deadline_unreachable"), retry_after="1"),
        _answer(504, _error("deadline_passed")),
        _answer(500, {"error": {"message": "Internal", "source": "engine"}}),
        _answer(502, _error("engine_failed", "engine", "the engine answered 500: x")),
    ],
)
def test_answer_that_the_request_calls_for_is_no_finding(answer: RawAnswer) -> None:
    assert list(check_answer(CASE, answer)) == []


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (_answer(500, _error("internal_error")), "a status that nothing here calls for"),
        (_answer(502, _error("engine_garbled", "engine")), "a status that nothing here calls for"),
        (_answer(502, _error("engine_failed", "engine")), "a status that nothing here calls for"),
        (
            _answer(503, _error("not_ready"), retry_after="1"),
            "a status that nothing here calls for",
        ),
        (_answer(418, _error()), "a status that nothing here calls for"),
        (_answer(429, _error("overloaded")), "no Retry-After"),
        (_answer(200, {"response": mark(8)}), "another's number"),
        (_answer(400, _error(message=mark(123456))), "another's number"),
        (_answer(400, _error(message=mark(1_234_567))), "another's number"),
        (_answer(400, {"detail": "no"}), "no envelope"),
        (_answer(400, {"error": "no"}), "no envelope"),
        (_answer(400, _error(), content_type="text/html"), "no envelope"),
        (RawAnswer(400, JSON, b"400: Bad Request", keeps_connection=True), "no envelope"),
        (
            RawAnswer(200, {"content-type": "text/plain"}, b"", keeps_connection=True),
            "no request id",
        ),
    ],
)
def test_answer_that_must_not_be_is_named(answer: RawAnswer, fault: str) -> None:
    assert list(check_answer(CASE, answer)) == [fault]


def test_good_request_must_be_served_with_its_number() -> None:
    assert list(check_answer(SERVED, _answer(200, {"text": mark(7)}))) == []
    assert list(check_answer(SERVED, _answer(200, {"text": "b"}))) == [
        "its number is not in the answer"
    ]
    assert list(check_answer(SERVED, _answer(400, _error()))) == ["a good request was refused"]


def _say(text: str) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}}]}


def _say_response(text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "delta": text}


def _say_message(text: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}


def _stream(*events: dict[str, Any] | str) -> RawAnswer:
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    body = "".join(f"data: {text}\n\n" for text in texts).encode()
    return RawAnswer(200, JSON | {"content-type": "text/event-stream"}, body, True)


COMPLETED = {"type": "response.completed", "response": {"error": None}}
INCOMPLETE = {"type": "response.incomplete", "response": {"error": None}}
FAILED = {"type": "response.failed", "response": {"error": {"code": "server_error"}}}
STOPPED = {"type": "message_stop"}


@pytest.mark.parametrize(
    ("say", "end"), [(_say, "[DONE]"), (_say_response, COMPLETED), (_say_message, STOPPED)]
)
def test_number_that_comes_in_pieces_of_a_stream_is_read_together(say: Any, end: Any) -> None:
    assert list(check_answer(SERVED, _stream(*map(say, mark(7)), end))) == []
    assert list(check_answer(CASE, _stream(*map(say, mark(8)), end))) == ["another's number"]


@pytest.mark.parametrize(
    "events",
    [
        (_say("a"), "[DONE]"),
        (_say_response("a"), COMPLETED),
        (_say_response("a"), INCOMPLETE),
        (_say_response("a"), COMPLETED, "[DONE]"),
        (_say_message("a"), STOPPED),
        (_say("a"), _error("internal_error"), "[DONE]"),
        (_say_response("a"), FAILED),
        (_say_message("a"), {"type": "error", **_error("internal_error")}),
    ],
)
def test_stream_with_its_end_is_whole(events: tuple[Any, ...]) -> None:
    assert list(check_answer(CASE, _stream(*events))) == []


@pytest.mark.parametrize(
    "events",
    [
        (),
        (_say("a"),),
        (_say_response("a"), "[DONE]"),
        (_say_response("a"),),
        (_say_message("a"),),
        (_say_message("a"), {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
    ],
)
def test_stream_without_its_end_is_named(events: tuple[Any, ...]) -> None:
    assert list(check_answer(CASE, _stream(*events))) == ["a stream without its end"]
    torn = replace(CASE, outcome="torn")
    assert list(check_answer(torn, _stream(*events))) == []


@pytest.mark.parametrize(
    "events",
    [
        (_say(mark(7)), _error("internal_error"), "[DONE]"),
        (_say(mark(7)), {"error": {"message": "boom", "source": "engine"}}, "[DONE]"),
        (_say_response(mark(7)), FAILED),
        (_say_response(mark(7)), {"type": "error", "message": "boom"}),
        (_say_message(mark(7)), {"type": "error", **_error("internal_error")}),
    ],
)
def test_error_in_the_stream_of_a_good_request_is_named(events: tuple[Any, ...]) -> None:
    assert list(check_answer(SERVED, _stream(*events))) == ["a good request was refused"]


def test_failures_of_an_engine_are_counted_alike_whatever_numbers_are_in_them() -> None:
    first, second = (
        _answer(500, {"error": {"message": f"bad id {number}", "source": "engine"}})
        for number in (17, 4_000)
    )

    assert is_engines(first)
    assert describe_failure(first) == describe_failure(second) == "500: bad id 0"
    assert not is_engines(_answer(500, _error("internal_error")))
