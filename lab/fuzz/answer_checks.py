"""What may come back, whatever was sent: a status that the request calls for, its id, an error in
the envelope, and nobody else's number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from lab.fuzz.cases.case import Case, mark
from lab.fuzz.raw_http import RawAnswer

_MARK = re.compile(r"#\d{6}#")
_ENVELOPE = {"message", "type", "code", "param", "source"}
_CALLED_FOR = frozenset((200, 308, 400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 429, 431))
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
        return
    if case.outcome == "served":
        yield "a good request was refused"
    if answer.status in {429, 503} and "retry-after" not in answer.headers:
        yield "no Retry-After"
    if case.method != "HEAD" and not _is_envelope(answer):
        yield "no envelope"


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


def _read_text(answer: RawAnswer) -> str:
    """Head and body; a stream's pieces put together, for it comes letter by letter."""
    body = answer.body.decode("utf-8", "replace")
    text = f"{dict(answer.headers)} {body}"
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        return text
    lines = (line.removeprefix("data: ") for line in body.split("\n"))
    events = [json.loads(line) for line in lines if line.startswith('{"')]
    choices = (one for event in events for one in event.get("choices", ()))
    return text + "".join(map(_read_piece, choices))


def _read_piece(choice: dict[str, Any]) -> str:
    delta = choice.get("delta") or {}
    return str(choice.get("text") or delta.get("content") or "")
