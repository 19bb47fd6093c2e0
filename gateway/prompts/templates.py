"""How a question becomes text: the styles, and the chat template that a model brings."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

import jinja2
import jinja2.sandbox

from common.chat_templates import DEFAULT, read_chat_templates, read_special_tokens
from gateway.config import Settings, SettingsError
from gateway.errors import InvalidRequest

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
QA_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content + '\n\n' }}"
    "{% else %}{{ 'Q: ' + message.content + '\nA:' }}{% endif %}{% endfor %}"
)
RAW_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
_STYLES = {"chatml": CHATML_TEMPLATE, "qa": QA_TEMPLATE, "raw": RAW_TEMPLATE}
STYLE_STOPS = {"chatml": ("<|im_end|>",), "qa": ("\nQ:",)}


def compile_template(settings: Settings) -> Callable[[str, str], str]:
    """Question and system prompt -> text. A model's template is a stranger's code: sandboxed."""
    specials = read_special_tokens(settings.tokenizer) if settings.tokenizer else {}
    try:
        template = _read_template(_find_template(settings))
    except jinja2.TemplateError as error:
        raise SettingsError(f"the chat template cannot be read: {error}") from None

    def render(question: str, system: str) -> str:
        messages = [{"role": "user", "content": question}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        try:
            return template.render(
                messages=messages,
                add_generation_prompt=True,
                enable_thinking=settings.enable_thinking,
                tools=None,
                **specials,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InvalidRequest(f"the chat template refuses this: {error}") from None

    return render


@lru_cache(maxsize=32)
def _read_template(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)


def _refuse(message: str) -> None:
    raise jinja2.TemplateRuntimeError(message)


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.globals["raise_exception"] = _refuse
_ENVIRONMENT.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)


def _find_template(settings: Settings) -> str:
    if settings.prompt_style in _STYLES:
        return _STYLES[settings.prompt_style]
    folder = settings.tokenizer
    template = read_chat_templates(folder).get(DEFAULT) if folder else None
    if template is None:
        raise SettingsError(
            f"prompt_style chat: {folder} has no chat template; set GATEWAY_PROMPT_STYLE to "
            "chatml, qa or raw"
        )
    return template
