"""LoRA adapters: what an admin sends to load or drop one, and what the gateway answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import EngineError, GatewayError, InvalidRequest
from gateway.schemas.fields import parse_json_object, wrong_type
from gateway.schemas.vllm import parse_engine_error

_NO_ROUTE = "Not Found"  # what FastAPI says where there is no route


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """vLLM's own body, and the model whose engines it is for, which vLLM does not ask."""

    name: str
    model: str | None
    body: bytes


def parse_adapter_order(body: bytes, *, is_load: bool) -> AdapterOrder:
    data = parse_json_object(body)
    for field in ("lora_name", "lora_path") if is_load else ("lora_name",):
        if not isinstance(data.get(field), str) or not data[field].strip():
            raise wrong_type(field, "a text")
    model = data.pop("model", None)
    if model is not None and not isinstance(model, str):
        raise wrong_type("model", "a string")
    return AdapterOrder(data["lora_name"], model, orjson.dumps(data))


def build_adapter_answer(name: str, model: str, engines: Sequence[str]) -> bytes:
    told: dict[str, Any] = {"lora_name": name, "model": model, "engines": list(engines)}
    return orjson.dumps(told)


def explain_adapter_refusal(
    engine: str, status: int, body: bytes, *, is_load: bool
) -> GatewayError | None:
    """`None`: it has not what it should drop, and that is what was wanted."""
    message, _ = parse_engine_error(body)
    if status == 404 and message == _NO_ROUTE:
        return InvalidRequest(
            f"{engine} changes no adapters while it runs: start it with enable-lora and the "
            "variable VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
            code="adapters_not_changed",
        )
    if status == 404 and not is_load:
        return None
    text = f"{engine} answered {status}: {message}"
    if status < 500:
        return InvalidRequest(text, code="engine_refused")
    return EngineError(text)
