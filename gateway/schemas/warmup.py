"""Models that make no text: the calls by which an engine shows that it can make vectors, classes or
scores of one, or a text of a sound. What callers ask of such an engine is passed on (`openai.py`,
`transcription.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.schemas.transcription import build_silence
from gateway.schemas.vllm import explain_refusal, garbled_answer

_SPEECH = "/v1/audio/transcriptions"
# Where the texts stand in each route's call.
_TEXTS: Mapping[str, str] = {
    "/v1/embeddings": "input",
    "/classify": "input",
    "/score": "text_2",
    "/pooling": "input",
}
# In the order in which they are tried: an engine has all that its model is for, and one of them
# warms it.
WARMUP_ROUTES = (*_TEXTS, _SPEECH)


def build_warmup_call(path: str, model: str, texts: Sequence[str]) -> tuple[bytes, str]:
    """The body and its type."""
    if path == _SPEECH:
        return build_silence(model)
    body: dict[str, Any] = {"model": model, _TEXTS[path]: list(texts)}
    if path == "/score":
        body["text_1"] = texts[0]
    # What is too long for the model is cut to the longest that it takes.
    return orjson.dumps({**body, "truncate_prompt_tokens": -1}), "application/json"


def parse_warmup_answer(status: int, body: bytes, *, path: str, n_texts: int) -> int:
    """The tokens that were read."""
    if status != 200:
        raise explain_refusal(path, status, body)
    if path == _SPEECH:
        return 0
    try:
        answer = orjson.loads(body)
        n_answers, tokens = len(answer["data"]), answer["usage"]["prompt_tokens"]
    except (orjson.JSONDecodeError, LookupError, TypeError) as error:
        raise garbled_answer(error) from error
    if n_answers != n_texts:
        raise EngineError(
            f"the engine answered {n_answers} of {n_texts} texts", code="engine_garbled"
        )
    return int(tokens)
