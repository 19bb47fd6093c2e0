"""Constraints of an answer's form: JSON schemas, regular expressions, choices, grammars, tools.

Right ones, odd ones, and ones that lead an engine's compiler where nobody has been.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lab.fuzz.cases.case import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Case, Draw
from lab.fuzz.cases.odd_values import VALUES

_DEEPEST = 4
_NAMES = (
    *("a", "b", "", "名", "a b", "$ref", "type", '"', "\\", "\n", "x" * 200, "__proto__", "\ud83d"),
)
_TYPES: tuple[Any, ...] = (
    *("object", "array", "string", "number", "integer", "boolean", "null", "any", "", 7),
    *(["string", "null"], [], ["object", "array", "string"], [None], ["string", "string"]),
)
_FORMATS = (
    *("date", "date-time", "time", "duration", "email", "uuid", "ipv4", "ipv6", "uri", "hostname"),
    *("uri-reference", "json-pointer", "regex", "idn-email", "iri", "x", "", "byte"),
)
_REFS: tuple[Any, ...] = (
    *("#", "#/$defs/a", "#/$defs/b", "#/$defs/missing", "#/properties/a", "#/items", "#/anyOf/0"),
    *("", "#/", "#a", "http://example.com/x", "file:///etc/passwd", "#/$defs/%61", "#/$defs/~0"),
    *("#/definitions/a", 5, None, "#/$defs/a/$ref"),
)
_NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 100, 0.5, -0.1, 1e-9, 1e308, -1e308, 10**6, 2**31, 2**53 + 1, 2**63),
    2**64,
    *(10**30, -(2**63), "1", None, True, 1.0),
)
_COUNTS: tuple[Any, ...] = (
    *(0, 1, 2, 3, 5, 20, 255, 1000, 10**5, 10**6 + 1, -1, 1.5, 2**31, "2", None),
)
_ENUMS: tuple[Any, ...] = (
    *([], ["a"], ["a", "a"], [1, "a", None, True, 0.5], [{}], [[]], [{"a": [1]}], ["\ud800"]),
    *(["é" * 100], list(range(300)), [""], [10**30], [float("nan")], "a", {"a": 1}, [-0.0]),
)
_ATOMS = (
    *("a", "b", "ab", " ", ".", r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", "[a-z]", "[^a]"),
    "[0-9A-F]",
    *(r"[^\s@]", r"\p{L}", r"\p{Han}", r"\P{L}", r"\u4e00", r"[\u4e00-\u9fff]", r"\x41", r"\b"),
    r"\B",
    *("^", "$", r"\A", r"\Z", r"\1", r"\2", "(?=a)", "(?!a)", "(?<=a)", "(?<!a)", "(?i)", "(?:)"),
    *("(?P<n>a)", "(?P=n)", "(?<n>a)", r"\k<n>", "(?#x)", r"\cA", r"\0", r"\777", r"\Q", r"\E"),
    r"\G",
    *("[[:alpha:]]", "[]", "[^]", "[a", "]", "\\", "(", ")", "*", "{", "}", "|", "[z-a]"),
    r"[\d-x]",
    *("é", "名", "😀", "\0", "\n", "\t", "\ud800", r"\.", r"\/", r"\-", "[-]", "[a-]", "{1}", '"'),
    *("[a-z&&[^b]]", "(?>a)", "(?|a)", "(?R)", "(?1)", r"\X", r"\R", r"\h", r"\u{1F600}"),
    r"\x{41}",
)
_QUANTIFIERS = (
    *("*", "+", "?", "{0,1}", "{2}", "{3,}", "{0,20}", "{1,200}", "{0,5000}", "{5,2}", "{,3}"),
    "{0}",
    *("{0,0}", "{99999999999}", "*?", "+?", "??", "**", "*+", "{1,2}?", "{-1}", "{a}", "{1,"),
)
_GRAMMARS = (
    *('root ::= "a"', "root ::= root", 'root ::= "a" root | ""', "root ::=", "", "start: /a+/"),
    "%",
    *('root ::= ("a"? "b"?)*', "root ::= x", 'root ::= [^"]*', "ROOT ::= 'a'"),
    "root ::= " + "(" * 500,
)
_TAGS: tuple[Any, ...] = (
    {"type": "structural_tag", "structures": [], "triggers": []},
    {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]},
    {"type": "structural_tag", "format": {"type": "any_text"}},
    {"type": "structural_tag", "format": {"type": "const_string", "value": ""}},
    '{"type": "structural_tag", "format": {}}',
)
# What stands beside a constraint and may not go with it.
_BESIDE: tuple[dict[str, Any], ...] = (
    *({}, {}, {}, {"stream": True}, {"n": 2}, {"logprobs": True, "top_logprobs": 3}),
    *({"allowed_token_ids": [5]}, {"allowed_token_ids": [0, 1, 2]}, {"min_tokens": 3}),
    *({"stop": ["a", '"']}, {"ignore_eos": True}, {"logit_bias": {"5": 100, "7": -100}}),
    *({"use_beam_search": True, "n": 2}, {"temperature": 2, "top_p": 0.1}),
    {"bad_words": ["{", '"']},
    *({"stop_token_ids": [1, 2, 3]}, {"skip_special_tokens": False}, {"prompt_logprobs": 1}),
    *({"truncate_prompt_tokens": 1}, {"repetition_penalty": 2}, {"min_p": 1.0}, {"seed": 1}),
)
_CHOICES: tuple[Any, ...] = (
    *(["yes", "no"], [], [""], ["a", "a"], ["a"] * 2000, [1, 2], "ab", ["é名😀"], ["a" * 10_000]),
    *(["\ud800"], [None], {"a": 1}, ["a", "ab", "abc"], ['"', "\\", "\n"], ["|", "::=", "#"], [[]]),
)
_TOOL_CHOICES: tuple[Any, ...] = (
    *("auto", "none", "required", "any", "", None, 5, [], {}, {"type": "function"}),
    *({"type": "function", "function": {"name": "f"}}, {"type": "function", "name": "f"}),
    *({"type": "tool", "name": "f"}, {"type": "any"}, {"type": "auto"}, {"type": "none"}),
    *({"type": "function", "function": {"name": "missing"}}, {"type": "tool"}, {"type": 5}),
    *({"type": "allowed_tools", "mode": "required", "tools": []}, {"mode": "required"}),
)
_TOOL_NAMES: tuple[Any, ...] = ("f", "g", "", "a b", "名", "x" * 100, None, 5, "f", "\0", "f.g")
_BUILT_IN: tuple[Any, ...] = (
    *({"type": "web_search"}, {"type": "code_interpreter", "container": {"type": "auto"}}),
    {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:1/"},
    {"type": "file_search"},
    *({"type": "custom", "custom": {"name": "f"}}, {"type": "function"}, {}, None, "f", []),
    {"type": 1},
    *({"type": "computer_use_preview"}, {"type": "image_generation"}, {"type": "local_shell"}),
)


def build_schema_case(draw: Draw) -> Case:
    schema = _build_root(draw)
    if draw.is_one_in(0.05):
        schema = draw.dump(schema).decode("utf-8", "replace")  # as text, which engines take too
    return _place(draw, schema)


def build_regex_case(draw: Draw) -> Case:
    regex = build_regex(draw)
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        (CHAT, {"structured_outputs": {"regex": regex}}),
        (COMPLETIONS, {"structured_outputs": {"regex": regex}}),
        (RESPONSES, {"structured_outputs": {"regex": regex}}),
        (CHAT, {"guided_regex": regex}),
        (CHAT, {"structured_outputs": {"json": {}, "whitespace_pattern": regex}}),
    )
    if draw.is_one_in(0.25):
        named = {"type": "object", "patternProperties": {regex: {"type": "integer"}}}
        return _place(draw, draw.chance.choice(({"type": "string", "pattern": regex}, named)))
    return _call(draw, *draw.chance.choice(ways))


def build_choice_case(draw: Draw) -> Case:
    """Choices, grammars and structural tags, alone or more of them than go together."""
    kinds: dict[str, Sequence[Any]] = {
        "choice": _CHOICES,
        "grammar": _GRAMMARS,
        "structural_tag": _TAGS,
        "json_object": (True, False, None, "yes"),
        "disable_any_whitespace": (True, 5),
        "disable_additional_properties": (True, None),
        "_backend": ("outlines", "guidance", "lm-format-enforcer", "x", None),
    }
    names = draw.chance.choices([*kinds], [10, 4, 4, 3, 1, 1, 1], k=draw.chance.choice((1, 1, 2)))
    fields = {name: draw.chance.choice(kinds[name]) for name in names}
    if draw.is_one_in(0.2):
        old = {f"guided_{name}": value for name, value in fields.items()}
        return _call(draw, CHAT, old)
    tag = fields.get("structural_tag")
    if isinstance(tag, dict) and draw.is_one_in(0.5):
        return _call(draw, CHAT, {"response_format": tag})
    path = draw.chance.choice((CHAT, COMPLETIONS, RESPONSES))
    return _call(draw, path, {"structured_outputs": fields})


def build_tools_case(draw: Draw) -> Case:
    chance = draw.chance
    path = chance.choice((CHAT, CHAT, RESPONSES, MESSAGES))
    tools: Any = [_build_tool(draw, path) for _ in range(chance.choice((0, 1, 1, 2, 5, 130)))]
    if draw.is_one_in(0.05):
        tools = chance.choice(VALUES)
    fields = {"tools": tools, "tool_choice": chance.choice(_TOOL_CHOICES)}
    if draw.is_one_in(0.3):
        del fields["tool_choice"]
    if draw.is_one_in(0.2):
        fields["parallel_tool_calls"] = chance.choice((True, False, None, "no"))
    return _call(draw, path, fields)


def _build_tool(draw: Draw, path: str) -> Any:
    chance = draw.chance
    if draw.is_one_in(0.1):
        return chance.choice(_BUILT_IN)
    schema = _build_root(draw) if draw.is_one_in(0.7) else chance.choice(({}, None, "x", []))
    name = chance.choice(_TOOL_NAMES)
    strict = {"strict": chance.choice((True, False, "yes", None))} if draw.is_one_in(0.4) else {}
    if path == MESSAGES:
        return {"name": name, "input_schema": schema, **strict}
    inner = {"name": name, "description": "名" * chance.choice((0, 1, 500)), "parameters": schema}
    if path == RESPONSES:
        return {"type": "function", **inner, **strict}
    return {"type": chance.choice(("function", "function", "f")), "function": {**inner, **strict}}


def _place(draw: Draw, schema: Any) -> Case:
    """In one of the fields that take a schema to an engine."""
    named = {"name": draw.chance.choice(("x", "", "名", None)), "schema": schema}
    kind = {"type": "json_schema"}
    function = {"type": "function", "function": {"name": "f", "parameters": schema}}
    flat = {"type": "function", "name": "f", "parameters": schema}
    tool = {"name": "f", "input_schema": schema}
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        (CHAT, {"structured_outputs": {"json": schema}}),
        (COMPLETIONS, {"structured_outputs": {"json": schema}}),
        (CHAT, {"response_format": {**kind, "json_schema": named}}),
        (CHAT, {"response_format": {**kind, "json_schema": {**named, "strict": True}}}),
        (COMPLETIONS, {"response_format": {**kind, "json_schema": named}}),
        (CHAT, {"tools": [function], "tool_choice": "required"}),
        (
            CHAT,
            {"tools": [function], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (RESPONSES, {"text": {"format": {**kind, **named}}}),
        (RESPONSES, {"tools": [flat], "tool_choice": "required"}),
        (MESSAGES, {"output_config": {"format": {**kind, "schema": schema}}}),
        (MESSAGES, {"tools": [tool], "tool_choice": {"type": "any"}}),
        (CHAT, {"guided_json": schema}),
    )
    return _call(draw, *draw.chance.choice(ways))


def _call(draw: Draw, path: str, fields: dict[str, Any]) -> Case:
    """As part of a call that is right for the rest, more often than not."""
    beside = draw.chance.choice(_BESIDE)
    data = {**draw.body(path).data, "temperature": 0, **beside, **fields}
    data.pop("echo", None)
    if path == COMPLETIONS and isinstance(data.get("logprobs"), bool):
        data["logprobs"] = 2
    data["max_output_tokens" if path == RESPONSES else "max_tokens"] = draw.chance.choice(
        (1, 3, 12)
    )
    return draw.answered(path, data)


def _build_root(draw: Draw) -> Any:
    schema = build_schema(draw, draw.chance.randint(0, _DEEPEST))
    if isinstance(schema, dict) and draw.is_one_in(0.4):
        for name in draw.some(("$defs", "definitions"), 2):
            schema[name] = {one: build_schema(draw, 1) for one in ("a", "b")}
    return schema


def build_schema(draw: Draw, depth: int) -> Any:
    chance = draw.chance
    if depth == 0:
        return _build_leaf(draw)
    made = chance.choice(_FORMS)(draw, depth - 1)
    if draw.is_one_in(0.08):
        made[chance.choice((*made, "type", "enum", "items", "required"))] = chance.choice(VALUES)
    return made


def _build_leaf(draw: Draw) -> Any:
    chance = draw.chance
    plain = {"type": chance.choice(_TYPES)}
    leaves: tuple[Any, ...] = (
        chance.choice(({}, True, False, None, "string", [], 5)),
        {"enum": chance.choice(_ENUMS)},
        {"const": chance.choice(VALUES)},
        {"$ref": chance.choice(_REFS)},
        {"type": "string", "format": chance.choice(_FORMATS)},
        {"type": "string", "pattern": build_regex(draw)},
        plain,
        plain,
    )
    return chance.choice(leaves)


def _build_object(draw: Draw, depth: int) -> dict[str, Any]:
    chance = draw.chance
    names = draw.some(_NAMES, 3)
    made: dict[str, Any] = {"type": "object"}
    made["properties"] = {name: build_schema(draw, depth) for name in names}
    more: dict[str, Callable[[], Any]] = {
        "required": lambda: [*names, *draw.some(_NAMES, 1)],
        "additionalProperties": lambda: chance.choice((True, False, build_schema(draw, 0))),
        "unevaluatedProperties": lambda: chance.choice((True, False, {"type": "string"})),
        "minProperties": lambda: chance.choice(_COUNTS),
        "maxProperties": lambda: chance.choice(_COUNTS),
        "patternProperties": lambda: {build_regex(draw): build_schema(draw, 0)},
        "propertyNames": lambda: build_schema(draw, 0),
        "dependentRequired": lambda: {"a": draw.some(_NAMES, 2)},
    }
    return made | {name: more[name]() for name in draw.some([*more], 3)}


def _build_array(draw: Draw, depth: int) -> dict[str, Any]:
    chance = draw.chance
    more: dict[str, Callable[[], Any]] = {
        "items": lambda: build_schema(draw, depth),
        "prefixItems": lambda: [build_schema(draw, 0) for _ in range(chance.randint(0, 3))],
        "minItems": lambda: chance.choice(_COUNTS),
        "maxItems": lambda: chance.choice(_COUNTS),
        "uniqueItems": lambda: chance.choice((True, "yes")),
        "contains": lambda: build_schema(draw, 0),
        "unevaluatedItems": lambda: False,
    }
    return {"type": "array"} | {name: more[name]() for name in draw.some([*more], 4)}


def _build_string(draw: Draw, _depth: int) -> dict[str, Any]:
    more = {
        "minLength": draw.chance.choice(_COUNTS),
        "maxLength": draw.chance.choice(_COUNTS),
        "pattern": build_regex(draw),
        "format": draw.chance.choice(_FORMATS),
    }
    return {"type": "string"} | {name: more[name] for name in draw.some([*more], 3)}


def _build_number(draw: Draw, _depth: int) -> dict[str, Any]:
    keywords = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
    made = {name: draw.chance.choice(_NUMBERS) for name in draw.some(keywords, 3)}
    return {"type": draw.chance.choice(("number", "integer", ["integer", "null"])), **made}


def _build_mixture(draw: Draw, depth: int) -> dict[str, Any]:
    """Alternatives, conditions, and references among them."""
    name = draw.chance.choice(("anyOf", "oneOf", "allOf", "not", "if"))
    if name == "not":
        return {"not": build_schema(draw, depth)}
    if name == "if":
        return {one: build_schema(draw, 0) for one in ("if", "then", "else")}
    made: dict[str, Any] = {
        name: [build_schema(draw, depth) for _ in range(draw.chance.randint(0, 3))]
    }
    if draw.is_one_in(0.3):
        made["$ref"] = draw.chance.choice(_REFS)
    return made


_FORMS = (_build_object, _build_object, _build_array, _build_string, _build_number, _build_mixture)


def build_regex(draw: Draw, depth: int = 2) -> str:
    chance, parts = draw.chance, []
    for _ in range(chance.randint(0 if depth == 0 else 1, 4)):
        is_group = depth and draw.is_one_in(0.3)
        # The first of them are no mistakes.
        atom = chance.choice(_ATOMS[:18] if draw.is_one_in(0.7) else _ATOMS)
        part = f"({build_regex(draw, depth - 1)})" if is_group else atom
        if draw.is_one_in(0.35):
            few = _QUANTIFIERS[:8]
            part += chance.choice(few if draw.is_one_in(0.8) else _QUANTIFIERS)
        parts.append(part)
    return chance.choice(("", "", "", "|")).join(parts)
