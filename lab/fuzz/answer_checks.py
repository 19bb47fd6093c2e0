"""What may come back, whatever was sent: a status that the request calls for, its id, an error in
the envelope, a stream to its end, and nobody else's number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lab.fuzz.cases.case import Case, mark
from lab.fuzz.raw_http import RawAnswer

_MARK = re.compile(r"#\d{6,}#")
_ENVELOPE = {"message", "type", "code", "param", "source"}
_CALLED_FOR = frozenset((200, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 429, 431))
# The last of events that tell their type, as those of responses and messages do.
_ENDS = frozenset(
    ("response.completed", "response.incomplete", "response.failed", "message_stop", "error")
)
_DONE = "[DONE]"  # after all others
_FAILED = frozenset(("error", "response.failed"))
# Failures that a request itself calls for.
_OWN_FAILURES = frozenset(
    ((503, "deadline_unreachable"), (503, "engine_busy"), (504, "deadline_passed"))
)


def check_answer(case: Case, answer: RawAnswer, sent: bytes = b"") -> Iterator[str]:
    """What is wrong with it. `sent`: beside the case's own bytes, what followed them."""
    text = _read_text(answer)
    own = {*_MARK.findall((case.sent + sent).decode("latin-1")), mark(case.number)}
    if not own.issuperset(_MARK.findall(text)):
        yield "another's number"
    if "x-request-id" not in answer.headers:
        yield "no request id"
    if answer.status not in _CALLED_FOR and not is_called_for(answer):
        yield "a status that nothing here calls for"
    if answer.status < 400:
        if case.keeps_prompt and mark(case.number) not in text:
            yield "its number is not in the answer"
        if _is_stream(answer):
            yield from _check_stream(case, answer)
        return
    if case.outcome == "served":
        yield "a good request was refused"
    if answer.status in {429, 503} and "retry-after" not in answer.headers:
        yield "no Retry-After"
    if case.method != "HEAD" and not _is_envelope(answer):
        yield "no envelope"


def _check_stream(case: Case, answer: RawAnswer) -> Iterator[str]:
    """An engine may fail in the middle of what is only to be answered. A torn request may ask for
    anything, such as the events of a response from behind its last.
    """
    if case.outcome == "torn" or case.method == "HEAD":
        return
    events = _read_events(answer)
    if case.outcome == "served" and any(map(_is_failure, events)):
        yield "a good request was refused"
    kinds = [event.get("type") for event in events]
    is_whole = kinds[-1] in _ENDS if any(kinds) else _DONE in _read_data(answer)
    if not is_whole:
        yield "a stream without its end"


def _is_failure(event: dict[str, Any]) -> bool:
    return bool(event.get("error")) or event.get("type") in _FAILED


def is_called_for(answer: RawAnswer) -> bool:
    """Of a 5xx: a deadline of the request's own, or an engine that fails at it, in its words."""
    return is_engines(answer) or (answer.status, _read_error(answer).get("code")) in _OWN_FAILURES


def is_engines(answer: RawAnswer) -> bool:
    """Whether an engine that is well answered a 5xx to this request alone."""
    error = _read_error(answer)
    if error.get("source") != "engine":
        return False
    # /predict tells it in the gateway's words.
    return answer.status in {500, 501} or (
        answer.status == 502 and "the engine answered 500" in str(error.get("message"))
    )


def describe_failure(answer: RawAnswer) -> str:
    """An engine's 5xx in short, the same for all requests that it fails at alike."""
    message = str(_read_error(answer).get("message", ""))
    return f"{answer.status}: {re.sub(r'[0-9]+', '0', message)[:120]}"


def _is_envelope(answer: RawAnswer) -> bool:
    if not answer.headers.get("content-type", "").startswith("application/json"):
        return False
    error = _read_error(answer)
    # The engine's own refusals come in its own words.
    is_whole = set(error) == _ENVELOPE or error.get("source") == "engine"
    return bool(error.get("message")) and is_whole


def _read_error(answer: RawAnswer) -> dict[str, Any]:
    try:
        error = json.loads(answer.body)["error"]
    except (ValueError, KeyError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _is_stream(answer: RawAnswer) -> bool:
    return answer.headers.get("content-type", "").startswith("text/event-stream")


def _read_text(answer: RawAnswer) -> str:
    """Head and body; a stream's pieces put together, for it comes letter by letter."""
    text = f"{dict(answer.headers)} {answer.body.decode('utf-8', 'replace')}"
    if not _is_stream(answer):
        return text
    return text + "".join(piece for event in _read_events(answer) for piece in _read_pieces(event))


def _read_data(answer: RawAnswer) -> list[str]:
    lines = answer.body.decode("utf-8", "replace").split("\n")
    return [line.removeprefix("data: ").strip() for line in lines]


def _read_events(answer: RawAnswer) -> list[dict[str, Any]]:
    return [json.loads(data) for data in _read_data(answer) if data.startswith('{"')]


def _read_pieces(event: dict[str, Any]) -> Iterator[str]:
    """What was said in an event, in the shape of each route that streams."""
    said = event.get("delta")
    if isinstance(said, str):
        yield said
    elif isinstance(said, dict):
        yield str(said.get("text") or said.get("thinking") or said.get("partial_json") or "")
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        yield str(choice.get("text") or delta.get("content") or "")
