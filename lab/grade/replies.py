"""Reads what POST /predict answered, as the contract says it, and names what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from common.json_text import is_whole, mend, parse_json
from lab.readiness import Mode, Problem

_TYPES = {
    str: "a text",
    dict: "an object",
    list: "a list",
    bool: "a truth value",
    type(None): "null",
}


@dataclass(frozen=True)
class Reply:
    """The answers in an answer, and what was wrong with it."""

    answers: list[str]
    problems: tuple[Problem, ...]
    refusals: dict[int, str] = field(default_factory=dict)


def refuse_reply(code: str, text: str) -> Reply:
    return Reply([], (Problem(code, text),))


def read_reply(status: int, body: bytes, asked: int, mode: Mode) -> Reply:
    shown = body[:200].decode(errors="replace")
    if status != httpx.codes.OK:
        return refuse_reply("http_error", f"POST /predict answered {status}: {shown}")
    try:
        data = parse_json(body)
    except ValueError as error:
        return refuse_reply("not_json", f"the answer is no JSON ({error}): {shown!r}")
    if not isinstance(data, dict) or "response" not in data:
        return refuse_reply("no_response", f"the answer has no `response`: {shown}")
    response = data["response"]
    if mode == "ok":
        reply = _read_single(response)
    elif not isinstance(response, list):
        kind = _name_type(response)
        return refuse_reply("no_list", f"`response` is {kind}, not a list of {asked}: {shown}")
    else:
        reply = _read_list(response, data.get("errors"), asked)
    if beside := data.get("error"):
        text = f"the answer has an `error` beside its `response`: {str(beside)[:200]}"
        reply = replace(reply, problems=(*reply.problems, Problem("error_beside", text)))
    return _mend_texts(reply)


def _mend_texts(reply: Reply) -> Reply:
    broken = [place for place, text in enumerate(reply.answers) if not is_whole(text)]
    refusals = {place: mend(why) for place, why in reply.refusals.items()}
    problems = [Problem(one.code, mend(one.text)) for one in reply.problems]
    if broken:
        text = (
            f"{len(broken)} answers hold half a character (a lone surrogate), which no file can "
            f"hold; the first is number {broken[0] + 1}"
        )
        problems.append(Problem("broken_text", text))
    return Reply([mend(text) for text in reply.answers], tuple(problems), refusals)


def _read_single(response: Any) -> Reply:
    if isinstance(response, str):
        return Reply([response], ())
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], str):
        note = "a single prompt is answered with a list of one, as one entry of the course does"
        return Reply(list(response), (Problem("list_of_one", note),))
    text = f"`response` to a single prompt is {_name_type(response)}, not a text"
    return refuse_reply("not_text", text)


def _read_list(response: list[Any], errors: Any, asked: int) -> Reply:
    problems = []
    if len(response) != asked:
        code = "too_few" if len(response) < asked else "too_many"
        problems.append(Problem(code, f"{len(response)} answers to {asked} questions"))
    response = response[:asked]
    odd = [place for place, one in enumerate(response) if not isinstance(one, str)]
    if odd:
        kind = _name_type(response[odd[0]])
        text = f"{len(odd)} answers are no texts; the first, {kind}, is number {odd[0] + 1}"
        problems.append(Problem("not_text", text))
    # What is no text counts as the seed entry's evaluator counts it.
    answers = ["" if one is None else str(one) for one in response]
    refusals = _read_refusals(errors, asked)
    if errors and not (isinstance(errors, dict) and len(refusals) == len(errors)):
        text = f"`errors` names something else than places in the list: {str(errors)[:200]}"
        problems.append(Problem("odd_errors", text))
    return Reply(answers, tuple(problems), refusals)


def _read_refusals(errors: Any, asked: int) -> dict[int, str]:
    """By place in the list; others would be blamed on another call's questions."""
    if not isinstance(errors, dict):
        return {}
    places = {str(place): place for place in range(asked)}
    return {
        places[key]: str(why.get("message") or why) if isinstance(why, dict) else str(why)
        for key, why in errors.items()
        if key in places
    }


def _name_type(value: object) -> str:
    return _TYPES.get(type(value), "a number")
