"""Forms of /v1/audio: what the gateway must know of one, and the same form as the engine gets it.

It is written anew, not passed on: two readers of one form need not find the same fields in it.
"""

from __future__ import annotations

import io
import re
import secrets
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gateway.config import Settings
from gateway.errors import InvalidRequest
from gateway.schemas.fields import read_flag, read_whole_number
from gateway.schemas.openai import OpenAIRequest

FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations")
_LONGEST_TEXT_BYTES = 65_536
_WHOLE_NUMBERS = ("n", "max_completion_tokens")
_FLAGS = ("stream", "use_beam_search")
# How engines hand work to each other, and what callers may not say on other routes either.
_REFUSED = ("vllm_xargs", "priority")
_CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
_SILENCE_HZ = 16_000


@dataclass(slots=True)
class FormField:
    """As it came; a file has a name of its own."""

    name: str
    filename: str | None
    content_type: str
    data: bytes | bytearray


def parse_form(fields: Sequence[FormField], settings: Settings) -> OpenAIRequest:
    """Bounds what could harm the engine or other callers, as in a call with JSON."""
    texts = _read_texts(fields)
    numbers = {
        name: read_whole_number(texts[name], name) for name in _WHOLE_NUMBERS if texts.get(name)
    }
    flags = {name: read_flag(texts[name], name) for name in _FLAGS if texts.get(name)}
    copies, most = numbers.get("n", 1), numbers.get("max_completion_tokens")
    if copies > settings.max_n:
        raise InvalidRequest(f"n must be at most {settings.max_n}", param="n")
    if most is not None and most > settings.max_new_tokens:
        raise InvalidRequest(
            f"max_completion_tokens must be at most {settings.max_new_tokens}",
            param="max_completion_tokens",
        )
    model = texts.get("model") or None
    model = settings.alias_map.get(model or "", model)
    plain = {name: str(value).lower() for name, value in (numbers | flags).items()}
    asked = model or settings.alias_map.get(settings.default_model, settings.default_model)
    if asked:
        plain["model"] = asked
        if "model" not in texts:  # the engine would take its base model, as of a call with JSON
            fields = [*fields, FormField("model", None, "", b"")]
    body, kind = build_form(fields, plain)
    return OpenAIRequest(
        body=body,
        model=model,
        sequences=max(1, copies),
        most_new_tokens=most,
        is_stream=flags.get("stream", False),
        content_type=kind,
    )


def _read_texts(fields: Sequence[FormField]) -> dict[str, str]:
    """The fields that are no files. Of one that came twice nobody knows which an engine takes."""
    texts: dict[str, str] = {}
    files = [field.name for field in fields if field.filename is not None]
    if files != ["file"]:
        raise InvalidRequest(
            "send one file, as the form's field `file`", param="file", code="missing_field"
        )
    for field in fields:
        if field.name in _REFUSED:
            raise InvalidRequest(
                f"{field.name} is no field for callers; leave it out", param=field.name
            )
        if field.filename is not None:
            continue
        if field.name in texts and not field.name.endswith("[]"):
            raise InvalidRequest(f"{field.name} is there twice", param=field.name)
        if len(field.data) > _LONGEST_TEXT_BYTES:
            raise InvalidRequest(
                f"{field.name} is longer than {_LONGEST_TEXT_BYTES} bytes", param=field.name
            )
        texts[field.name] = field.data.decode("utf-8", "replace")
    return texts


def build_form(fields: Sequence[FormField], changed: Mapping[str, str]) -> tuple[bytes, str]:
    """The form and its type, some fields with another value."""
    boundary = secrets.token_hex(16)
    pieces: list[bytes | bytearray] = []
    for field in fields:
        head = f'Content-Disposition: form-data; name="{_quote(field.name)}"'
        if field.filename is not None:
            head += f'; filename="{_quote(field.filename)}"'
            known = _CONTENT_TYPE.fullmatch(field.content_type)
            head += f"\r\nContent-Type: {known[0] if known else 'application/octet-stream'}"
        is_changed = field.filename is None and field.name in changed
        data = changed[field.name].encode() if is_changed else field.data
        pieces += (f"--{boundary}\r\n{head}\r\n\r\n".encode(), data, b"\r\n")
    body = b"".join((*pieces, f"--{boundary}--\r\n".encode()))
    return body, f"multipart/form-data; boundary={boundary}"


def _quote(name: str) -> str:
    """As browsers do."""
    return name.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def build_silence(model: str) -> tuple[bytes, str]:
    """A form with a second of silence, by which an engine for speech is warmed."""
    sound = io.BytesIO()
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_SILENCE_HZ)
        file.writeframes(bytes(2 * _SILENCE_HZ))
    fields = [
        FormField("file", "silence.wav", "audio/wav", sound.getvalue()),
        FormField("model", None, "", model.encode()),
    ]
    return build_form(fields, {})
