"""What this gateway serves, as an OpenAPI document: each of its routes with what it is for, and for
those that are passed on what the engine says of them itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gateway.config import Settings

_REF = "#/components/schemas/"
_TEXTS = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class RouteNote(NamedTuple):
    """What a route is for."""

    tag: str
    summary: str
    is_engines: bool = False


_OWN, _HEALTH, _TEXT = "Questions and answers", "Health", "Text"
_VECTORS, _TOKENS, _MODELS = "Vectors, classes, scores", "Tokens", "Models"
_SPEECH, _BATCHES = "Speech", "Batches"
_UPLOADS = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/files"))
NOTES: Mapping[str, RouteNote] = {
    "/predict": RouteNote(_OWN, "Answer one question, or a list of them in its order"),
    "/": RouteNote(_HEALTH, "Held until the engines are warm: what the course's judge polls"),
    "/health": RouteNote(_HEALTH, "The process lives"),
    "/healthz": RouteNote(_HEALTH, "The process lives"),
    "/readyz": RouteNote(_HEALTH, "The next request would be served; 503 and why, if not"),
    "/version": RouteNote(_HEALTH, "The version of the engine, and of the gateway"),
    "/metrics": RouteNote(_HEALTH, "Figures for Prometheus"),
    "/usage": RouteNote(_HEALTH, "What each key has used; needs an admin key, or is of one's own"),
    "/audit": RouteNote(_HEALTH, "Who asked what, where it is kept; needs an admin key"),
    "/openapi.json": RouteNote(_HEALTH, "This document"),
    "/docs": RouteNote(_HEALTH, "This document for people"),
    "/v1/models": RouteNote(_MODELS, "The models, and the further names of them", True),
    "/v1/models/{model}": RouteNote(_MODELS, "One of the models"),
    "/v1/load_lora_adapter": RouteNote(_MODELS, "Load a LoRA adapter; needs an admin key"),
    "/v1/unload_lora_adapter": RouteNote(_MODELS, "Drop a LoRA adapter; needs an admin key"),
    "/v1/completions": RouteNote(_TEXT, "Continue one prompt or several", True),
    "/v1/chat/completions": RouteNote(_TEXT, "Answer a conversation", True),
    "/v1/chat/completions/batch": RouteNote(_TEXT, "Answer several conversations", True),
    "/v1/responses": RouteNote(_TEXT, "Answer by OpenAI's Responses API", True),
    "/v1/responses/{response_id}": RouteNote(_TEXT, "A stored response; DELETE drops it"),
    "/v1/responses/{response_id}/input_items": RouteNote(_TEXT, "What its engine was given"),
    "/v1/responses/{response_id}/cancel": RouteNote(_TEXT, "End one that runs in the background"),
    "/v1/messages": RouteNote(_TEXT, "Answer by Anthropic's Messages API", True),
    "/v1/embeddings": RouteNote(_VECTORS, "A vector for each text", True),
    "/v2/embed": RouteNote(_VECTORS, "A vector for each text, by Cohere's API", True),
    "/pooling": RouteNote(_VECTORS, "What the model makes of each text", True),
    **dict.fromkeys(("/classify", "/v1/classify"), RouteNote(_VECTORS, "A class for each", True)),
    **dict.fromkeys(("/score", "/v1/score"), RouteNote(_VECTORS, "How near texts are", True)),
    **dict.fromkeys(
        ("/rerank", "/v1/rerank", "/v2/rerank"),
        RouteNote(_VECTORS, "Documents in the order of their nearness to a query", True),
    ),
    "/v1/audio/transcriptions": RouteNote(_SPEECH, "The text of a recording", True),
    "/v1/audio/translations": RouteNote(_SPEECH, "The text of a recording, in English", True),
    "/v1/files": RouteNote(_BATCHES, "Files of requests and of answers; POST takes one in"),
    "/v1/files/{file_id}": RouteNote(_BATCHES, "What is known of a file; DELETE drops it"),
    "/v1/files/{file_id}/content": RouteNote(_BATCHES, "What is in a file, as it was sent"),
    "/v1/batches": RouteNote(_BATCHES, "Batches by the caller's key; POST has a file answered"),
    "/v1/batches/{batch_id}": RouteNote(_BATCHES, "How far a batch has come"),
    "/v1/batches/{batch_id}/cancel": RouteNote(_BATCHES, "End a batch; what is done is kept"),
    "/tokenize": RouteNote(_TOKENS, "Cut a text into tokens", True),
    "/detokenize": RouteNote(_TOKENS, "Put tokens together", True),
    "/tokenizer_info": RouteNote(_TOKENS, "The tokenizer's settings", True),
    "/v1/messages/count_tokens": RouteNote(_TOKENS, "How many tokens a message has", True),
}
# Under another name there.
_ENGINES_NAMES = {"/v1/classify": "/classify"}


def build_openapi(
    routes: Iterable[tuple[str, str]],
    version: str,
    settings: Settings,
    engines: Sequence[Mapping[str, Any] | None],
    *,
    needs_key: bool,
) -> dict[str, Any]:
    """Of these routes, those that are in the own document of no model's engine left out; all, with
    less to say of them, as long as one of the models has an engine that has not told its own.
    """
    paths: dict[str, dict[str, Any]] = {}
    schemas: dict[str, Any] = {"Error": _ERROR, "PredictRequest": _describe_predict(settings)}
    for method, path in routes:
        note, engine, told = NOTES[path], None, None
        if note.is_engines:
            engine, told = _find_told(engines, method, path)
            if told is None and None not in engines:
                continue
        operation = _describe(method, path, note, told)
        paths.setdefault(path, {})[method.lower()] = operation
        for name in _find_names(operation):
            _take(name, engine or {}, schemas)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "vllm-gateway", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _find_told(
    engines: Iterable[Mapping[str, Any] | None], method: str, path: str
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """The first that has it, and what it says of it."""
    for engine in engines:
        if engine is not None:
            route = engine["paths"].get(_ENGINES_NAMES.get(path, path), {})
            told: Mapping[str, Any] | None = route.get(method.lower())
            if told is not None:
                return engine, told
    return None, None


def _describe(
    method: str, path: str, note: RouteNote, told: Mapping[str, Any] | None
) -> dict[str, Any]:
    operation: dict[str, Any] = {"tags": [note.tag], "summary": note.summary}
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if told is not None and "requestBody" in told:
        operation["requestBody"] = told["requestBody"]
    elif method == "POST" and not path.endswith("/cancel"):
        schema = {"$ref": _REF + "PredictRequest"} if path == "/predict" else {"type": "object"}
        kind = "multipart/form-data" if path in _UPLOADS else "application/json"
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": schema}}}
    answers = dict((told or {}).get("responses", {}))
    operation["responses"] = {
        "200": answers.get("200", {"description": "OK"}),
        "default": {
            "description": "An error, with who failed",
            "content": {"application/json": {"schema": {"$ref": _REF + "Error"}}},
        },
    }
    return operation


def _find_names(value: Any) -> Iterator[str]:
    """The schemas that a part of a document refers to."""
    if isinstance(value, Mapping):
        ref = value.get("$ref")
        if isinstance(ref, str) and ref.startswith(_REF):
            yield ref.removeprefix(_REF)
        for part in value.values():
            yield from _find_names(part)
    elif isinstance(value, list):
        for part in value:
            yield from _find_names(part)


def _take(name: str, engine: Mapping[str, Any], schemas: dict[str, Any]) -> None:
    """That schema of the engine's, and what it refers to."""
    known = engine.get("components", {}).get("schemas", {})
    waiting = [name]
    while waiting:
        one = waiting.pop()
        if one not in schemas and one in known:
            schemas[one] = known[one]
            waiting.extend(_find_names(known[one]))


def parse_engine_openapi(status: int, body: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An engine's own document; None where it gives none (`--disable-fastapi-docs`)."""
    if status != 200 or not isinstance(body, dict) or not isinstance(body.get("paths"), dict):
        return None
    return body


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string", "description": "What is wrong, and what to do."},
                "type": {"type": "string"},
                "code": {"description": "The gateway's word for it, or the engine's status."},
                "param": {"description": "The field that is wrong.", "type": ["string", "null"]},
                "source": {"type": "string", "enum": ["gateway", "engine"]},
            },
        }
    },
}


def _describe_predict(settings: Settings) -> dict[str, Any]:
    whole: dict[str, Any] = {"type": "integer"}
    return {
        "type": "object",
        "properties": {
            "prompt": {**_TEXTS, "description": "One question, or a list of them."},
            "prompts": {**_TEXTS, "description": "The same by another name."},
            "system": {"type": "string", "description": "A system prompt in place of the usual."},
            "max_tokens": {**whole, "minimum": 1, "default": settings.max_tokens},
            "temperature": {
                "type": "number",
                "minimum": 0,
                "maximum": 2,
                "default": settings.temperature,
            },
            "top_p": {"type": "number", "maximum": 1, "default": settings.top_p},
            "top_k": {**whole, "minimum": -1, "default": settings.top_k},
            "stop": {**_TEXTS, "description": "Texts that end an answer."},
            "seed": whole,
        },
        "anyOf": [{"required": ["prompt"]}, {"required": ["prompts"]}],
    }
