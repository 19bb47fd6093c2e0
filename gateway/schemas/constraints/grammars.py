"""Constraints of an answer's form: every way in which one enters a call, which kind it is, and
whether its cost can be borne. The engine builds a grammar of each, and follows it token by token in
the one process that serves everybody.

JSON schemas are followed by their brackets and commas, which leave nothing uncertain; what they
hold of regular expressions is judged by `regex_cost.py`. The cost of a grammar in EBNF or Lark and
of a structural tag cannot be told from outside, so only who is trusted with them may send them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

import orjson

from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.schemas.constraints.regex_cost import TooCostly, check_regex
from gateway.schemas.fields import wrong_type

Kind = Literal["json", "choice", "regex", "grammar", "structural_tag", "tools"]

CONSTRAINING = frozenset(
    (
        "structured_outputs",
        "response_format",
        "text",
        "output_config",
        "output_format",
        "tools",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "guided_whitespace_pattern",
    )
)
_KINDS: Mapping[str, Kind] = {
    "json": "json",
    "json_object": "json",
    "json_schema": "json",
    "choice": "choice",
    "regex": "regex",
    "whitespace_pattern": "regex",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
}
_DEEPEST = 64  # vLLM's own limit
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_LARGEST_COUNT = 1_000_000
# vLLM gives some schemas with patternProperties to outlines, which multiplies counts out and keeps
# a row for each state, as long as the vocabulary.
_LARGEST_BESIDE_NAMES = 256
_IN_ITS_PLACE = ("anyOf", "oneOf", "allOf")  # what stands where the schema stands


@dataclass(frozen=True, slots=True)
class Constraint:
    """One constraint of a call."""

    kind: Kind
    param: str
    value: Any


def read_constraints(data: Mapping[str, Any], settings: Settings) -> tuple[Constraint, ...]:
    """Those of a call, each of bearable cost; `InvalidRequest` names the field that is not."""
    if CONSTRAINING.isdisjoint(data):
        return ()
    found = tuple(_find_constraints(data))
    budget = _Budget(settings)
    for one in found:
        if one.kind == "regex":
            budget.check_regex(one.value, one.param)
        elif one.kind in {"json", "tools", "structural_tag"}:
            _check_schema(_read_text(one.value), one.param, budget)
    return found


def _find_constraints(data: Mapping[str, Any]) -> Iterator[Constraint]:
    given = data.get("structured_outputs")
    if given is not None:
        if not isinstance(given, dict):
            raise wrong_type("structured_outputs", "an object")
        for name, value in given.items():
            if name in _KINDS and value is not None:
                yield Constraint(_KINDS[name], f"structured_outputs.{name}", value)
    for name, kind in _KINDS.items():  # as engines before 0.12 call them
        if data.get(f"guided_{name}") is not None:
            yield Constraint(kind, f"guided_{name}", data[f"guided_{name}"])
    for param in ("response_format", "output_format"):
        yield from _find_format(data.get(param), param)
    for param in ("text", "output_config"):
        around = data.get(param)
        if isinstance(around, dict):
            yield from _find_format(around.get("format"), f"{param}.format")
    yield from _find_tools(data)


def _find_format(value: Any, param: str) -> Iterator[Constraint]:
    kind = _KINDS.get(str(value.get("type"))) if isinstance(value, dict) else None
    if kind is not None:
        yield Constraint(kind, param, value)


def _find_tools(data: Mapping[str, Any]) -> Iterator[Constraint]:
    """The schemas of tools become grammars where a call is forced, or a tool is strict."""
    tools, choice = data.get("tools"), data.get("tool_choice")
    if not isinstance(tools, list) or choice == "none":
        return
    mode = (choice.get("type") or choice.get("mode")) if isinstance(choice, dict) else choice
    is_forced = mode not in (None, "auto", "none")
    for number, tool in enumerate(tools):
        if is_forced or _is_strict(tool):
            yield Constraint("tools", f"tools[{number}]", tool)


def _is_strict(tool: Any) -> bool:
    if not isinstance(tool, dict):
        return False
    function = tool.get("function")
    inner = function.get("strict") if isinstance(function, dict) else None
    return bool(tool.get("strict") or inner)  # the engine reads "yes" as true


class _Budget:
    """What all regular expressions of one call may be together."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._characters_left = settings.max_regex_characters

    def check_regex(self, pattern: Any, param: str, where: str = "") -> int:
        """The states that it has, where it is one at all."""
        if not isinstance(pattern, str):
            return 1  # the engine's to refuse
        most = self._settings.max_regex_characters
        self._characters_left -= len(pattern)
        if self._characters_left < 0:
            raise InvalidRequest(
                f"{param}: the regular expressions of one call may have {most} characters together",
                param=param,
                code="too_costly",
            )
        try:
            return check_regex(
                pattern,
                most_certain=self._settings.max_regex_states,
                most_uncertain=self._settings.max_uncertain_states,
            )
        except TooCostly as error:
            raise InvalidRequest(
                f"{param}{where}: this regular expression may cost the engine too much: {error}",
                param=param,
                code="too_costly",
            ) from None


def _read_text(value: Any) -> Any:
    """A schema may be sent as text; one that is no JSON is the engine's to refuse."""
    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return None


def _check_schema(root: Any, param: str, budget: _Budget) -> None:
    """Everything in it that is, or might be, a schema; each keyword wherever it stands."""
    pending: list[tuple[Any, int, int]] = [(root, 0, 1)]
    references: list[dict[str, Any]] = []
    largest, has_names = 1, False
    while pending:
        value, depth, count = pending.pop()
        if depth > 2 * _DEEPEST:
            raise InvalidRequest(f"{param} is nested too deeply", param=param)
        if isinstance(value, dict) and value:
            count *= _check_keywords(value, param, budget)
            largest = max(largest, count)
            has_names = has_names or "patternProperties" in value
            if isinstance(value.get("$ref"), str):
                references.append(value)
            pending += [(inner, depth + 1, count) for inner in value.values()]
        elif isinstance(value, list):
            pending += [(inner, depth + 1, count) for inner in value]
    if has_names and largest > _LARGEST_BESIDE_NAMES:
        raise InvalidRequest(
            f"{param}: the counts within each other multiply to {largest}; beside "
            f"patternProperties at most {_LARGEST_BESIDE_NAMES} are taken",
            param=param,
            code="too_costly",
        )
    for schema in _list_schemas(root):
        if (loop := _find_loop(references, schema)) is not None:
            raise InvalidRequest(
                f"{param}: the reference {loop!r} leads back to itself with nothing between; put "
                "what refers to itself into a property or an array",
                param=param,
                code="too_costly",
            )


def _check_keywords(schema: dict[str, Any], param: str, budget: _Budget) -> int:
    """The largest count among them."""
    largest = 1
    pattern, names = schema.get("pattern"), schema.get("patternProperties")
    if isinstance(pattern, str):
        largest = budget.check_regex(pattern, param, f": pattern {pattern[:40]!r}")
    if isinstance(names, dict):
        for name in names:
            states = budget.check_regex(name, param, f": patternProperties {name[:40]!r}")
            largest = max(largest, states)
    for keyword in _COUNTS:
        count = schema.get(keyword)
        if not isinstance(count, int | float):
            continue
        if count > _LARGEST_COUNT:
            raise InvalidRequest(
                f"{param}: {keyword} must be at most {_LARGEST_COUNT}",
                param=param,
                code="too_costly",
            )
        largest = max(largest, int(count))
    return largest


def _list_schemas(value: Any) -> Iterator[Any]:
    """What references may count from: the whole, or the schema that it carries."""
    yield value
    for outer in ("json_schema", "function", "schema", "parameters", "input_schema"):
        inner = value.get(outer) if isinstance(value, dict) else None
        if isinstance(inner, dict):
            yield from _list_schemas(inner)


def _find_loop(references: list[dict[str, Any]], root: Any) -> str | None:
    """A reference by which a schema would stand in its own place: no grammar comes of that."""
    open_ids: set[int] = set()
    done_ids: set[int] = set()
    for reference in references:
        pending = [(reference, False)]
        while pending:
            schema, is_over = pending.pop()
            if is_over:
                open_ids.discard(id(schema))
                done_ids.add(id(schema))
            elif id(schema) in open_ids:
                return str(reference["$ref"])
            elif id(schema) not in done_ids:
                open_ids.add(id(schema))
                pending.append((schema, True))
                pending += [(one, False) for one in _list_alternatives(schema, root)]
    return None


def _list_alternatives(schema: dict[str, Any], root: Any) -> Iterator[dict[str, Any]]:
    found = [_resolve(schema["$ref"], root)] if isinstance(schema.get("$ref"), str) else []
    for name in _IN_ITS_PLACE:
        members = schema.get(name)
        found += members if isinstance(members, list) else []
    return (one for one in found if isinstance(one, dict))


def _resolve(pointer: str, root: Any) -> Any:
    if not pointer.startswith("#"):
        return None
    value = root
    for name in unquote(pointer[1:]).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value
