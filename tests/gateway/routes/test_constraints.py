"""Constraints of an answer's form: who may send which, and which would cost the engine too much."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gateway.admission.keys import make_key
from gateway.schemas.openai import parse_large_openai_request, parse_openai_request
from tests.gateway.conftest import Serve, Served, make_settings

ORDINARY_REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d+)?(Z|[+-]\d{2}:\d{2})",
    r"[a-zA-Z0-9._%+-]+@[a-zA-Z0-9.-]+\.[a-zA-Z]{2,}",
    r"^[^\s@]+@[^\s@]+\.[^\s@]+$",
    r"\w+@\w+\.com\n",
    r"(\+\d{1,3}[- ]?)?\(?\d{3}\)?[- ]?\d{3}[- ]?\d{4}",
    r"(25[0-5]|2[0-4]\d|1?\d?\d)(\.(25[0-5]|2[0-4]\d|1?\d?\d)){3}",
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    r"(positive|negative|neutral)",
    r"(foo|bar|bazz){1,5}",
    r"[A-Z][a-z]{1,20}( [A-Z][a-z]{1,20}){0,3}",
    r"([A-Z][^.!?]{10,200}[.!?] ?){1,5}",
    r"(- .{1,100}\n){3,5}",
    r"(\w+ ){1,10}\w+",
    r"https?://[\w.-]+(/[\w./-]*)?",
    r"-?\d+(\.\d+)?([eE][+-]?\d+)?",
    r".{1,500}",
    r"[\s\S]*",
    r"[\u4e00-\u9fff]{2,4}",
    r"\p{L}{2,30}",
    r".*The answer, after much thought about everything that was said, is: \d+",
    r"(?:[a-z0-9]+-)*[a-z0-9]+",
    r"(\w+\s*)+",
    r"(\w+[,.]? ?)+\d{4}",
    "|".join(f"word number {number}" for number in range(150)),
    r"[[({",
    "",
]
COSTLY_REGEXES = [
    r"([^a]{0,90}[^b]{0,90}){0,90}q",
    r"([^a]{0,10}[^b]{0,10}){0,10}q",
    r"([a-z]{0,30}){0,30}",
    r"(([a-z]{0,10}){0,10}){0,10}",
    r"([a-z]?[b-y]?){0,100}q",
    r"([a-z]*[b-y]*){0,10}q",
    r"([a-z]+[b-y]+){1,10}q",
    r"([a-z][a-z]|[a-z]){0,50}q",
    r"([a-z]{0,10})*q",
    r"(.?)+xyz",
    r"([^a]?[^b]?)*c",
    r".{20,}(abc?|[^b]+.)*[a-c]{2,2}b{3,}",
    r"(" + "[ab]?" * 60 + ")*q",
    r"[^a]{0,90}[^b]{0,90}[^c]{0,90}[^d]{0,90}q",
    r"[^a]{0,90}" * 30 + "q",
    r"a{99999999999}",
    r"(((((a{99}b){99}b){99}b){99}b){99}b){99}",
    "(" * 60 + "a" + ")" * 60,
    "(" * 40 + "a+b?" + ")+" * 40,
    "(" * 40 + "a{999999999}b" + "){999999999}" * 40,
    "|".join(f"[^{chr(97 + number % 26)}]{{1,{number + 2}}}x" for number in range(80)),
    "a" * 5000,
]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 100},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", "c"]},
        "email": {"type": "string", "pattern": ORDINARY_REGEXES[2]},
        "born": {"type": "string", "format": "date"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 50},
        "home": {"$ref": "#/$defs/Address"},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 10},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "$defs": {"Address": {"type": "object", "properties": {"pattern": {"type": "string"}}}},
}
NASTY = {"type": "object", "properties": {"a": {"type": "string", "pattern": COSTLY_REGEXES[0]}}}
NASTY_NAMES = {"type": "object", "patternProperties": {COSTLY_REGEXES[0]: {}}}
WIDE = {
    "type": "object",
    "patternProperties": {"^x": {}},
    "properties": {"a": {"type": "array", "maxItems": 50, "items": {"maxLength": 50}}},
}
HUGE = {"type": "array", "items": {"type": "string"}, "maxItems": 10**12}


def _tool(schema: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": schema}}


def _wrap(schema: object) -> list[tuple[str, dict[str, Any]]]:
    """Every field that takes a schema to the engine, with the path that reads it."""
    chat, responses = "/v1/chat/completions", "/v1/responses"
    named = {"name": "x", "schema": schema}
    flat = {"type": "function", "name": "f", "parameters": schema}
    return [
        (chat, {"structured_outputs": {"json": schema}}),
        ("/v1/completions", {"structured_outputs": {"json": schema}}),
        (chat, {"response_format": {"type": "json_schema", "json_schema": named}}),
        ("/v1/completions", {"response_format": {"type": "json_schema", "json_schema": named}}),
        (chat, {"tools": [_tool(schema)], "tool_choice": "required"}),
        (chat, {"tools": [_tool(schema)], "tool_choice": {"type": "function"}}),
        (chat, {"tools": [{**_tool(schema), "strict": True}]}),
        (responses, {"text": {"format": {"type": "json_schema", **named}}}),
        (responses, {"tools": [flat], "tool_choice": "required"}),
        (responses, {"tools": [{**flat, "strict": True}]}),
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        ),
        (
            "/v1/messages",
            {"tools": [{"name": "f", "input_schema": schema}], "tool_choice": {"type": "any"}},
        ),
        (chat, {"guided_json": schema}),
    ]


async def _post(served: Served, path: str, fields: dict[str, Any], key: str = "") -> Any:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
        "input": "x",
        **fields,
    }
    if path == "/v1/completions":
        del body["messages"]
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return await served.client.post(path, json=body, headers=headers)


async def test_ordinary_constraints_pass(served: Served) -> None:
    regexes = [
        (f"/v1/{path}completions", {"structured_outputs": {"regex": regex}})
        for regex in ORDINARY_REGEXES
        for path in ("", "chat/")
    ]
    others: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"structured_outputs": {"choice": ["yes", "no"]}}),
        ("/v1/chat/completions", {"response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"response_format": {"type": "text"}}),
        ("/v1/chat/completions", {"tools": [_tool(NASTY)]}),  # free to call, so no grammar
        ("/v1/chat/completions", {"tools": [_tool(NASTY)], "tool_choice": "none"}),
        ("/v1/responses", {"text": {"format": {"type": "text"}}}),
        ("/v1/responses", {"text": {"verbosity": "low"}}),
        ("/v1/chat/completions", {"structured_outputs": {"json": "{no json"}}),
        ("/v1/chat/completions", {"structured_outputs": None, "response_format": 7, "tools": 7}),
        ("/v1/chat/completions", {"tools": [7, {"strict": {}}], "tool_choice": {"type": {}}}),
        ("/v1/chat/completions", {"tools": [{"function": {"strict": []}}], "tool_choice": []}),
        ("/v1/chat/completions", {"response_format": {"type": []}, "text": {"format": []}}),
        ("/v1/chat/completions", {"structured_outputs": {"regex": 7, "json": 7, "choice": 7}}),
    ]
    for path, fields in [*regexes, *_wrap(PERSON), *others]:
        answer = await _post(served, path, fields)
        assert answer.status_code == 200, (path, fields, answer.text)


@pytest.mark.parametrize("value", [[1], "x", 0.5, True, []])
async def test_constraints_that_are_no_object_are_refused(served: Served, value: object) -> None:
    """vLLM says 500 to them."""
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        answer = await _post(served, path, {"structured_outputs": value})

        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "structured_outputs"
    assert served.engine.calls == []


@pytest.mark.parametrize("regex", COSTLY_REGEXES, ids=lambda regex: regex[:40])
async def test_costly_regex_is_refused_before_the_engine(served: Served, regex: str) -> None:
    for fields in (
        {"structured_outputs": {"regex": regex}},
        {"guided_regex": regex},
        {"structured_outputs": {"json": {"type": "string", "pattern": regex}}},
    ):
        answer = await _post(served, "/v1/chat/completions", fields)

        error = answer.json()["error"]
        assert (answer.status_code, error["source"]) == (400, "gateway"), answer.text
        assert error["param"].partition(".")[0] in fields
        assert error["code"] == "too_costly"
    assert served.engine.calls == []


@pytest.mark.parametrize(
    "schema", [NASTY, NASTY_NAMES, WIDE, HUGE], ids=["pattern", "names", "wide", "count"]
)
async def test_costly_schema_is_refused_wherever_it_enters(
    served: Served, schema: dict[str, Any]
) -> None:
    for path, fields in _wrap(schema):
        answer = await _post(served, path, fields)
        assert answer.status_code == 400, (path, fields, answer.text)
        assert answer.json()["error"]["param"].partition("[")[0].partition(".")[0] in fields
    assert served.engine.calls == []


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"anyOf": [{"type": "string"}, {"$ref": "#"}]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ],
)
async def test_schema_that_is_nothing_but_itself_is_refused(
    served: Served, schema: dict[str, Any]
) -> None:
    for path, fields in _wrap(schema):
        answer = await _post(served, path, fields)
        assert answer.status_code == 400, (path, fields)
        assert "leads back to itself" in answer.json()["error"]["message"]


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1" + "0" * 30])
@pytest.mark.parametrize(
    "field",
    [
        '"structured_outputs": {"json": {"enum": [%s]}}',
        '"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": %s}}}',
        '"repetition_detection": {"max_pattern_size": %s, "min_count": 2}',
        '"vllm_xargs": {"a": %s}',
    ],
)
def test_number_of_more_than_64_bits_reaches_the_engine_as_one_that_it_can_hand_on(
    field: str, number: str
) -> None:
    """vLLM's processes tell each other whole numbers of 64 bits; at others it says 500."""
    body = '{"model": "fake", "messages": [], %s}' % (field % number)
    call = parse_openai_request("/v1/chat/completions", body.encode(), make_settings())

    assert number.encode() not in call.body
    assert repr(float(number)).encode() in call.body


@pytest.mark.parametrize(
    "field",
    [
        '"response_format": {"type": "json_schema", "json_schema": {"schema": {"minimum": %s}}}',
        '"vllm_xargs": {"a": %s}',
        '"repetition_detection": %s',
    ],
)
async def test_number_of_more_than_64_bits_in_a_large_body_reaches_the_engine_so_as_well(
    field: str,
) -> None:
    number = "99999999999999999999999"
    text = "a" * 200_000
    body = f'{{"model": "fake", "user": "{text}", "messages": [], {field % number}}}'

    async def find_context(_model: object) -> None: ...

    call = await parse_large_openai_request(
        "/v1/chat/completions", body.encode(), make_settings(), find_context
    )
    assert number.encode() not in call.body
    assert repr(float(number)).encode() in call.body
    assert text.encode() in call.body


def test_numbers_that_any_engine_takes_leave_the_body_as_it_is() -> None:
    fields = '"structured_outputs": {"json": {"enum": [18446744073709551615, 1e3, -1.5]}}'
    body = '{"model": "fake",  "messages": [], %s}' % fields  # noqa: UP031

    assert parse_openai_request("/v1/chat/completions", body.encode(), make_settings()).body == (
        body.encode()
    )


async def test_grammar_is_refused_where_nobody_has_allowed_it(serve: Serve) -> None:
    grammar = {"structured_outputs": {"grammar": 'root ::= root root | "a"'}}
    tag = {"response_format": {"type": "structural_tag", "format": {"type": "any_text"}}}
    async with serve() as served:
        for fields in (grammar, tag, {"guided_grammar": "root ::= root"}):
            answer = await _post(served, "/v1/chat/completions", fields)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (403, "constraint_not_allowed")
            assert "GATEWAY_STRUCTURED_OUTPUTS" in error["message"]
    async with serve(structured_outputs=("grammar",)) as served:
        assert (await _post(served, "/v1/chat/completions", grammar)).status_code == 200
        answer = await _post(served, "/v1/chat/completions", {"guided_choice": ["a"]})
        assert answer.status_code == 403


async def test_key_sends_the_constraints_that_its_entry_lists(serve: Serve, tmp_path: Path) -> None:
    (usual, own, none), entries = zip(*(make_key(name) for name in "abc"), strict=True)
    path = tmp_path / "keys.toml"
    path.write_text(
        f'{entries[0]}\n{entries[1]}structured_outputs = ["json", "grammar"]\n'
        f"{entries[2]}structured_outputs = []\n"
    )
    wanted: dict[str, dict[str, Any]] = {
        "json": {"structured_outputs": {"json": PERSON}},
        "regex": {"structured_outputs": {"regex": "a+"}},
        "grammar": {"structured_outputs": {"grammar": 'root ::= "a"'}},
        "tools": {"tools": [_tool(PERSON)], "tool_choice": "required"},
        "free": {"tools": [_tool(PERSON)]},
    }
    async with serve(keys_file=path) as served:
        taken = {
            key: [
                name
                for name, fields in wanted.items()
                if (await _post(served, "/v1/chat/completions", fields, key)).status_code == 200
            ]
            for key in (usual, own, none)
        }

    assert taken[usual] == ["json", "regex", "tools", "free"]
    assert taken[own] == ["json", "grammar", "free"]
    assert taken[none] == ["free"]


async def test_limits_of_regexes_are_settings(serve: Serve) -> None:
    regex = {"structured_outputs": {"regex": r".{0,50}foo.{0,50}"}}
    async with serve() as served:
        assert (await _post(served, "/v1/completions", regex)).status_code == 400
    async with serve(max_uncertain_states=200) as served:
        assert (await _post(served, "/v1/completions", regex)).status_code == 200
    async with serve(max_uncertain_states=200, max_regex_characters=10) as served:
        answer = await _post(served, "/v1/completions", regex)
        assert "10 characters" in answer.json()["error"]["message"]
    async with serve(max_regex_states=10) as served:
        answer = await _post(served, "/v1/completions", {"structured_outputs": {"regex": "a{11}"}})
        assert "at most 10" in answer.json()["error"]["message"]


async def test_judging_the_largest_constraints_does_not_hold_the_loop(served: Served) -> None:
    """By the process's own clock of work done, which a busy machine does not move."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "array", "items": deep}
    loop = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(1400)}
    texts: list[dict[str, Any]] = [
        {"structured_outputs": {"regex": "(a|b)?[a-z]" * 370}},
        {"structured_outputs": {"regex": "{" * 4000}},
        {"structured_outputs": {"json": {"anyOf": [deep] * 20}}},
        {"structured_outputs": {"json": {"$defs": loop, "$ref": "#/$defs/d0"}}},
        {"structured_outputs": {"json": {"anyOf": [{"$ref": "#/x"}] * 3000}}},
        {"structured_outputs": {"json": {"anyOf": [{}] * 20_000}}},
        {"structured_outputs": {"json": {"anyOf": [{"a": 1}] * 7000}}},
    ]
    for fields in texts:
        started = time.process_time()
        await _post(served, "/v1/chat/completions", fields)
        assert time.process_time() - started < 0.25, str(fields)[:80]


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 2**70},
        {"top_k": 2**31},
        {"length_penalty": -1e308, "use_beam_search": True},
        {"repetition_penalty": 1e300},
        {"truncate_prompt_tokens": 2**40},
        {"stream_interval": 2**70},
        {"stop_token_ids": [1, 2**40]},
        {"allowed_token_ids": [-1]},
        {"logprob_token_ids": [2**64]},
        {"logit_bias": {"99999999999": 1}},
        {"logit_bias": {"5": "much"}},
        {"vllm_xargs": {"kv_transfer_params": "text"}},
        {"vllm_xargs": {"ec_transfer_params": "text"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_sampling_that_no_engine_can_take_is_refused(
    served: Served, fields: dict[str, Any]
) -> None:
    answer = await _post(served, "/v1/chat/completions", fields)

    error = answer.json()["error"]
    assert (answer.status_code, error["source"]) == (400, "gateway")
    assert error["param"].startswith(next(iter(fields)))
    assert served.engine.calls == []


async def test_ordinary_sampling_passes(served: Served) -> None:
    fields = {
        "temperature": 2,
        "top_p": 0.1,
        "top_k": -1,
        "min_p": 0.5,
        "presence_penalty": -2,
        "frequency_penalty": 1.5,
        "repetition_penalty": 1.1,
        "length_penalty": 0.8,
        "seed": -1,
        "stop_token_ids": [0, 151643],
        "logit_bias": {"50256": -100},
        "vllm_xargs": {"mine": 1},
    }
    assert (await _post(served, "/v1/chat/completions", fields)).status_code == 200
    nothing = dict.fromkeys(fields)
    assert (await _post(served, "/v1/chat/completions", nothing)).status_code == 200
