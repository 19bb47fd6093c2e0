"""/v1 and the tokenizer routes: what the gateway must know of a request that it passes on, what it
adds to an answer, and the envelope of every error.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.config import Settings
from gateway.errors import EngineError, GatewayError, InvalidRequest, NotFound
from gateway.schemas.constraints.grammars import CONSTRAINING, Constraint, read_constraints
from gateway.schemas.fields import (
    parse_json_object,
    read_flag,
    read_stops,
    read_whole_number,
    wrong_type,
)
from gateway.schemas.large_json import LargeObject, scan_object
from gateway.schemas.media import read_media_hosts, refuse_media_options
from gateway.schemas.sampling import TOKEN_LISTS, check_sampling, renew_great_numbers
from gateway.schemas.vllm import garbled_models, lacks_route, no_route, parse_engine_error

_USAGE = re.compile(rb'"(?:usage|billed_units)":\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_CHUNK_USAGE = re.compile(rb',"usage":\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}')
_EVENT_STARTS = (b"event:", b"data:")
_RESPONSE_END = re.compile(rb'"type":\s*"response\.(?:completed|incomplete|failed)"')
_DONE = b"data: [DONE]"
_STREAM_ENDS: Mapping[str, tuple[bytes, ...]] = {
    "/v1/completions": (),
    "/v1/chat/completions": (),
    "/v1/responses": (
        b"event: response.completed\n",
        b"event: response.incomplete\n",
        b"event: response.failed\n",
        b"event: error\n",
    ),
    "/v1/messages": (b"event: message_stop\n", b"event: error\n"),
}
_ANTHROPIC = frozenset(("/v1/messages", "/v1/messages/count_tokens"))
_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_NO_CHOICES = b'"choices":[]'
CHOICE_END = b'"finish_reason":"'
_FINGERPRINT = b'"system_fingerprint":"'
_SCHEMA_FIELDS = ("response_format", "structured_outputs", "tools", "guided_json", "text")
_LARGEST_TOKEN_LIST_BYTES = 2**19
CHAT_BATCH = "/v1/chat/completions/batch"
# Numbers that are bounded here. The engine reads 500.0 and "500" as one, too, so they become one
# before they are judged, and what was judged is what the engine gets.
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_COPIES = ("n", "best_of")
_SIZED = frozenset((*_LOGPROBS, "stop", *_SCHEMA_FIELDS))
_WHOLE_NUMBERS = frozenset((*_LENGTHS, "top_logprobs", "prompt_logprobs"))
# Where the number of copies means something.
COPYING = frozenset(("/v1/completions", "/v1/chat/completions", CHAT_BATCH))
# Where each route for vectors, classes and scores finds its texts, beside `input` and `prompt`.
_PAIRS = ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2")
_TEXT_LISTS: Mapping[str, tuple[str, ...]] = {
    "/v1/embeddings": ("messages",),
    "/v2/embed": ("texts", "images", "inputs"),
    **dict.fromkeys(("/pooling", "/classify", "/v1/classify"), ("messages",)),
    **dict.fromkeys(("/score", "/v1/score"), _PAIRS),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), ("documents",)),
}
POOLING = tuple(_TEXT_LISTS)
_MANY: Mapping[str, tuple[str, ...]] = {**_TEXT_LISTS, CHAT_BATCH: ("messages",)}
_NUMBERS_OF = {path: _WHOLE_NUMBERS.union(_COPIES) for path in COPYING}
_NUMBERS_OF["/v1/completions"] |= {"logprobs"}  # in a chat it is a flag
_MAX_STOP_CHARACTERS = (
    16_384  # vLLM has no bound; what it looks through for each token is this long
)
_WITH_MEDIA = frozenset(("messages", "input"))
_NOT_TOKENIZED = frozenset(("logit_bias", "allowed_token_ids", "prompt_embeds"))


class NotWritable(InvalidRequest):
    """Read, but what has been read cannot be written again."""

    code = "invalid_json"


@dataclass(slots=True)  # not frozen: that doubles the cost of making one, once a request
class OpenAIRequest:
    """What the gateway must know of a /v1 call it passes on; `body` is what the engine gets."""

    body: bytes
    model: str | None = None
    sequences: int = 1
    copies: int = 1  # of them, for each prompt
    most_new_tokens: int | None = None  # of each, where the caller says
    is_stream: bool = False
    is_greedy: bool = False  # the same answer would come again
    hides_usage: bool = False  # nobody but the gateway has asked for it
    hides_chunk_usage: bool = False
    affinity: str = ""
    content_type: str = ""  # where it is no JSON
    media_hosts: frozenset[str] = frozenset()
    constraints: tuple[Constraint, ...] = ()
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.body)


def parse_openai_request(path: str, body: bytes, settings: Settings) -> OpenAIRequest:
    """Bounds what could harm the engine or other callers; passes every other field on untouched."""
    return _read_openai_request(path, body, parse_json_object(body), orjson.dumps, settings)


async def parse_large_openai_request(
    path: str,
    body: bytes,
    settings: Settings,
    find_context: Callable[[Any], Awaitable[int | None]],
) -> OpenAIRequest:
    """The same of a body that takes long, or whose texts may be more than its model takes; which
    that is, only the body tells.
    """
    # What is judged by what is in it.
    whole = dict.fromkeys(TOKEN_LISTS, _LARGEST_TOKEN_LIST_BYTES)
    whole |= dict.fromkeys((*_SCHEMA_FIELDS, *CONSTRAINING), settings.max_schema_bytes)
    large = await scan_object(body, settings.max_prompts, whole)
    max_model_len = await find_context(large.fields.get("model"))
    if max_model_len is not None:
        await _bound_texts(large, settings, max_model_len)
    return _read_openai_request(path, body, large.fields, large.dump, settings)


async def _bound_texts(large: LargeObject, settings: Settings, max_model_len: int) -> None:
    """By its bytes, escapes and all: a prompt as the engine's tokenizer gets it is shorter."""
    most = max_model_len * settings.max_bytes_per_token
    for name, member in large.members.items():
        size = 0 if name in _NOT_TOKENIZED else large.measure_longest(member)
        if size > most and name in _WITH_MEDIA:
            size -= await large.measure_media(member)
        if size > most:
            raise InvalidRequest(
                f"{name} has a text of {size} bytes; the model takes {max_model_len} tokens, and "
                f"at most {settings.max_bytes_per_token} bytes are read for each. Shorten it",
                param=name,
                code="prompt_too_long",
            )


def _read_openai_request(
    path: str,
    body: bytes,
    data: dict[str, Any],
    dump: Callable[[dict[str, Any]], bytes],
    settings: Settings,
) -> OpenAIRequest:
    try:
        return _parse_openai_request(path, body, data, dump, settings)
    except orjson.JSONEncodeError as error:
        # Read but not writable again: nested too deep, or half a surrogate pair.
        raise NotWritable(f"the body cannot be passed on: {error}") from None


def _parse_openai_request(
    path: str,
    body: bytes,
    data: dict[str, Any],
    dump: Callable[[dict[str, Any]], bytes],
    settings: Settings,
) -> OpenAIRequest:
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise wrong_type("model", "a string")
    changed = False
    if model is not None and model in settings.alias_map:
        model = data["model"] = settings.alias_map[model]
        changed = True
    if model is None and settings.default_model:
        # An engine that is told none takes its base model, and the default may be an adapter.
        data["model"] = settings.alias_map.get(settings.default_model, settings.default_model)
        changed = True
    if data.pop("priority", None) is not None:
        changed = True  # who goes first is the queue's business
    if _name_plainly(path, data):
        changed = True
    if path == "/v1/responses" and data.get("background"):
        _refuse_background(data)
    sequences, copies = _bound_sequences(path, data, settings)
    _bound_sizes(data, settings)
    most_new_tokens = _bound_lengths(data, settings)
    check_sampling(data)
    if renew_great_numbers(data):
        changed = True  # as a float it can be handed on
    if not settings.media_options:
        refuse_media_options(data)
    is_stream = bool(data.get("stream"))
    hides_usage = hides_chunk_usage = False
    if is_stream and path in {"/v1/completions", "/v1/chat/completions"}:
        hides_usage, hides_chunk_usage = _ask_for_usage(data)
        changed = changed or hides_usage or hides_chunk_usage
    return OpenAIRequest(
        body=dump(data) if changed else body,
        model=model,
        sequences=sequences,
        copies=copies,
        most_new_tokens=most_new_tokens,
        is_stream=is_stream,
        is_greedy=path in _TEXT_LISTS or data.get("temperature") == 0,
        hides_usage=hides_usage,
        hides_chunk_usage=hides_chunk_usage,
        affinity=_affinity(data, settings),
        media_hosts=read_media_hosts(data, body),
        constraints=read_constraints(data, settings),
    )


def _name_plainly(path: str, data: dict[str, Any]) -> bool:
    """Numbers and flags as what they are to the engine; whether any was something else."""
    changed = False
    for name in _NUMBERS_OF.get(path, _WHOLE_NUMBERS) & data.keys():
        value = data[name]
        if isinstance(value, str | float):
            data[name] = read_whole_number(value, name)
            changed = True
    stream = data.get("stream")
    if stream is not None and not isinstance(stream, bool):
        data["stream"] = read_flag(stream, "stream")
        changed = True
    return changed


def _refuse_background(data: Mapping[str, Any]) -> None:
    """It would run on after its answer, past the queue and past the limits of its key."""
    if read_flag(data["background"], "background"):
        raise InvalidRequest(
            "background responses are not served here: the operator can turn them on with "
            "GATEWAY_RESPONSES_DATABASE; ask without `background`, as a stream if the answer takes "
            "long",
            param="background",
            code="background_not_served",
        )


def _bound_sequences(path: str, data: Mapping[str, Any], settings: Settings) -> tuple[int, int]:
    """All of them, and how many are those of one prompt."""
    # Which of the two a route reads is the engine's affair; the other is no way around the bound.
    prompts, param = max(_count_prompts(data.get("prompt")), _count_prompts(data.get("input"))), ""
    for name in _MANY.get(path, ()):
        if name in data and (count := _count_texts(name, data[name])) > prompts:
            prompts, param = count, name
    if prompts > settings.max_prompts_per_call:
        raise InvalidRequest(
            f"{prompts} prompts in one call; at most {settings.max_prompts_per_call} are taken",
            param=param or "prompt",
            code="too_many_prompts",
        )
    copies = 1
    if path in COPYING:
        for name in _COPIES:
            if name in data:
                copies = max(copies, _count(data, name, settings.max_n))
    sequences = max(1, prompts) * copies
    if sequences > settings.max_prompts_per_call:
        raise InvalidRequest(
            f"{prompts} prompts with {copies} answers each; at most "
            f"{settings.max_prompts_per_call} sequences are taken in one call",
            param="n",
            code="too_many_prompts",
        )
    return sequences, copies


def _count_prompts(prompt: Any) -> int:
    """The ids of one prompt are one, and so are the turns of a conversation."""
    is_many = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
    return len(prompt) if is_many else 1


def _count_texts(name: str, value: Any) -> int:
    if name == "messages":  # one conversation is a list, too
        return _count_prompts(value)
    return len(value) if isinstance(value, list) else 1


def _count(data: Mapping[str, Any], name: str, most: int) -> int:
    value = data.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(name, "a whole number")
    if value > most:
        raise InvalidRequest(f"{name} must be at most {most}", param=name)
    return max(1, value)


def _bound_sizes(data: Mapping[str, Any], settings: Settings) -> None:
    if _SIZED.isdisjoint(data):
        return
    most = settings.max_logprobs
    for name in _LOGPROBS:
        value = data.get(name)
        # The engine takes -1 for the whole vocabulary.
        if most >= 0 and isinstance(value, int) and not 0 <= value <= most:
            raise InvalidRequest(f"{name} must be 0 to {most}", param=name)
    stop = data.get("stop")
    if isinstance(stop, str | list):
        read_stops(stop, (), _MAX_STOP_CHARACTERS) if stop else None
    for name in _SCHEMA_FIELDS:
        if name in data and len(orjson.dumps(data[name])) > settings.max_schema_bytes:
            raise InvalidRequest(
                f"{name} is larger than {settings.max_schema_bytes} bytes", param=name
            )


def _bound_lengths(data: Mapping[str, Any], settings: Settings) -> int | None:
    """The longest that is asked for. What is no number is the engine's to refuse."""
    longest = None
    for name in _LENGTHS:
        value = data.get(name)
        if not isinstance(value, int):
            continue
        if value > settings.max_new_tokens:
            raise InvalidRequest(f"{name} must be at most {settings.max_new_tokens}", param=name)
        longest = value if longest is None else max(longest, value)
    return longest


def _ask_for_usage(data: dict[str, Any]) -> tuple[bool, bool]:
    """Has the engine end a stream with its token counts, and tell them with each chunk where a
    chunk is not a token: of what is left in the middle nothing else would be known. True for what
    nobody else had asked for.
    """
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return False, False
    options = options or {}
    is_asked = _is_set(options, "include_usage")
    # Without the first the second is nothing to the engine.
    in_chunks = is_asked and _is_set(options, "continuous_usage_stats")
    adds_chunks = data.get("stream_interval") is not None and not in_chunks
    if not is_asked or adds_chunks:
        more = {"include_usage": True}
        if adds_chunks or "continuous_usage_stats" in options:
            more["continuous_usage_stats"] = adds_chunks
        data["stream_options"] = {**options, **more}
    return not is_asked, adds_chunks


def _is_set(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name)
    return value is not None and read_flag(value, f"stream_options.{name}")


def _affinity(data: Mapping[str, Any], settings: Settings) -> str:
    if settings.routing == "session":
        session = data.get("prompt_cache_key") or data.get("user")
        return session if isinstance(session, str) else ""
    if settings.routing == "prefix":
        start = data.get("messages") or data.get("prompt") or data.get("input") or ""
        text = start if isinstance(start, str) else orjson.dumps(start).decode()
        return text[: settings.prefix_characters]
    return ""


def parse_usage(body: bytes) -> tuple[int, int] | None:
    """Tokens in and out from the last usage object in a body or in the events of a stream.

    A caller's text cannot pass for one: inside a JSON string its quotes are escaped. What a caller
    sent and a response repeats, such as tools, stands before it.
    """
    is_event = body.startswith(_EVENT_STARTS) and b'"object":"response"' in body
    if is_event and not _RESPONSE_END.search(body):
        return None
    objects = _USAGE.findall(body)
    if not objects:
        return None
    try:
        usage = orjson.loads(objects[-1])
    except orjson.JSONDecodeError:
        return None
    taken = usage.get("prompt_tokens", usage.get("input_tokens")) or 0
    given = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    if not isinstance(taken, int) or not isinstance(given, int):
        return None
    if taken < 0 or given < 0:  # it would credit the caller
        raise EngineError("the engine counted less than no tokens", code="engine_garbled")
    return taken, given


def has_stream_end(path: str, events: bytes) -> bool:
    """Whether the last events of a stream are how one of this route ends; an error is, too."""
    if path not in _STREAM_ENDS or events.rstrip().endswith(_DONE):
        return True
    return any(end in events for end in _STREAM_ENDS[path])


def drop_usage_events(events: bytes) -> bytes:
    """The events of a stream without those that only tell the usage, which nobody asked for."""
    kept = [event for event in events.split(b"\n\n") if _NO_CHOICES not in event]
    return b"\n\n".join(kept)


def read_chunk_usage(events: bytes) -> Iterator[tuple[int, int]]:
    """What each chunk tells of its own choice: which one, and its tokens so far."""
    for event in events.split(b"\n\n"):
        if b'"usage":{' not in event or _NO_CHOICES in event:
            continue
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            data = orjson.loads(event.removeprefix(b"data: "))
            tokens = data["usage"]["completion_tokens"]
            if isinstance(tokens, int) and tokens >= 0:
                yield data["choices"][0]["index"], tokens


def drop_chunk_usage(events: bytes) -> bytes:
    """The same events, but for those that tell the usage alone, without it."""
    kept = [
        event if _NO_CHOICES in event else _CHUNK_USAGE.sub(b"", event)
        for event in events.split(b"\n\n")
    ]
    return b"\n\n".join(kept)


def stamp_last_chunks(events: bytes, fingerprint: str) -> bytes:
    """The events with the engine's fingerprint on those that end a choice: there it stands, unless
    an event with the usage comes after them, as it does for the gateway alone.
    """
    stamp = b',"system_fingerprint":' + orjson.dumps(fingerprint) + b"}"
    stamped = [
        event[:-1] + stamp
        if CHOICE_END in event and _FINGERPRINT not in event and event.endswith(b"}")
        else event
        for event in events.split(b"\n\n")
    ]
    return b"\n\n".join(stamped)


def build_stream_error(error: GatewayError, path: str, number: int) -> bytes:
    """The event that ends a stream whose engine failed, in the dialect of the route; where events
    are numbered, this one comes after all others.
    """
    if path == "/v1/messages":
        return b"event: error\ndata: " + build_error(error, path) + b"\n\n"
    if path.startswith("/v1/responses"):
        data = orjson.dumps({**describe_error(error), "type": "error", "sequence_number": number})
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + build_error(error) + b"\n\ndata: [DONE]\n\n"


def build_models(body: bytes, aliases: Mapping[str, str], wanted: str | None) -> bytes:
    """The engine's model list with the names that also stand for its models, or one of them."""
    if not aliases and wanted is None:
        return body
    try:
        data = orjson.loads(body)
        cards = {card["id"]: card for card in data["data"]}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise garbled_models() from error
    for alias, target in aliases.items():
        if target in cards:
            cards[alias] = {**cards[target], "id": alias}
    if wanted is None:
        return orjson.dumps({**data, "data": list(cards.values())})
    return _dump_card(cards, wanted)


def build_model_list(cards: Sequence[Mapping[str, Any]], wanted: str | None) -> bytes:
    """The same from the cards of several engines."""
    if wanted is None:
        return orjson.dumps({"object": "list", "data": cards})
    return _dump_card({card["id"]: card for card in cards}, wanted)


def _dump_card(cards: Mapping[str, Mapping[str, Any]], wanted: str) -> bytes:
    if wanted not in cards:
        raise NotFound(
            f"there is no model {wanted!r}; GET /v1/models lists what there is",
            param="model",
            code="model_not_found",
        )
    return orjson.dumps(cards[wanted])


def describe_error(error: GatewayError, path: str = "") -> dict[str, Any]:
    kind = error.kind
    if path in _ANTHROPIC:
        kind = _ANTHROPIC_KINDS.get(error.status, "api_error")
    return {
        "message": error.message,
        "type": kind,
        "code": error.error_code,
        "param": error.param,
        "source": error.source,
    }


def build_error(error: GatewayError, path: str = "") -> bytes:
    """In the dialect of the route."""
    envelope: dict[str, Any] = {"error": describe_error(error, path)}
    return orjson.dumps({"type": "error", **envelope} if path in _ANTHROPIC else envelope)


def name_stream_errors(events: bytes) -> tuple[bytes, bool]:
    """The engine's own error events, with who failed; and whether it was the engine's fault.

    vLLM checks some of what a caller sent only after its 200: that is their mistake all the same.
    """
    is_fault = False
    lines = events.split(b"\n")
    for place, line in enumerate(lines):
        if line.startswith(b'data: {"error"'):
            with contextlib.suppress(orjson.JSONDecodeError, AttributeError):
                data = orjson.loads(line[6:])
                error = data["error"]
                error.setdefault("source", EngineError.source)
                status = error.get("code")
                is_fault |= not (isinstance(status, int) and 400 <= status < 500)
                lines[place] = b"data: " + orjson.dumps(data)
    return b"\n".join(lines), is_fault


def lacks_previous_response(path: str, status: int, body: bytes) -> bool:
    """Whether an engine has not kept what a call goes on from: most keep nothing."""
    return path == "/v1/responses" and status == 404 and b"Response with id" in body


def build_no_previous_response() -> bytes:
    return build_error(
        InvalidRequest(
            "the engine has not kept this response, and this gateway stores none: its operator can "
            "turn that on with GATEWAY_RESPONSES_DATABASE; send the whole conversation instead",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    )


def name_engine_error(status: int, body: bytes, path: str) -> bytes:
    """An engine's refusal as it is, with who refused; what is no error object becomes one."""
    if status == 404 and lacks_route(status, body):
        return build_error(no_route(path, status, body), path)
    try:
        data = orjson.loads(body)
        error = data["error"]
        error.setdefault("source", EngineError.source)
        error["message"] = error.get("message") or f"the engine answered {status} and said nothing"
        return orjson.dumps(data)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, param = parse_engine_error(body)
        text = f"the engine answered {status}: {message}".rstrip(": ")
        return build_error(EngineError(text, param=param), path)
