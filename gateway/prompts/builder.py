"""Question -> prompt -> token ids, and answer -> clean text: all that knows templates and tokens.

A chat template is rendered once a system prompt, around a marker; the questions are then put where
the marker stood. Rendering Jinja for each question of a batch would cost more than the rest of the
gateway together. A template that changes its question (trims it, say) is rendered each time.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import orjson
from aiohttp import web
from tokenizers import Encoding, Tokenizer

from gateway.config import Settings, SettingsError
from gateway.errors import InvalidRequest, PayloadTooLarge, PromptRefused
from gateway.schemas.fields import MAX_STOPS, is_text
from gateway.schemas.vllm import Prompt, Sampling

# No question contains it; a template that trims, quotes or escapes its question alters it.
_MARKER = " \n\"'\\<&\ue000question\ue001 "
# Below this, handing the batch to a thread costs more than encoding it on the event loop.
_CHARACTERS_WORTH_A_THREAD = 4_000
_LARGEST_SLICE_CHARACTERS = 500_000
_BUILDERS = 2  # slices at once, of all callers
_LARGEST_CACHED_SYSTEM = 20_000
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")
_THINKING = re.compile(r"^\s*(?:<think>)?.*?</think>", re.DOTALL)
_LINE_BREAKS = re.compile(r"\s*[\r\n]+\s*")

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
_STYLE_STOPS = {"chatml": ("<|im_end|>",), "qa": ("\nQ:",)}


class PromptBuilder:
    """Builds prompts in one style for one model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        folder = settings.tokenizer
        self._tokenizer = _load_tokenizer(folder)
        self._longest_token = max(map(len, self._tokenizer.get_vocab())) if self._tokenizer else 0
        self._render = _compile(self._template(folder), settings, _special_texts(folder))
        self._system = settings.read_system_prompt()
        self._builders = asyncio.Semaphore(_BUILDERS)
        self._cached_around = lru_cache(maxsize=64)(self._render_around)
        # A template writes its own begin-of-sequence; the plain styles leave that to the tokenizer.
        self._adds_special = settings.prompt_style in {"qa", "raw"}
        try:
            self._text("?", None)
        except InvalidRequest as error:
            raise SettingsError(error.message) from None

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer in this style."""
        if self._settings.prompt_style == "chatml" and self.stop_token_ids:
            return ()  # ids do the same and cost the engine nothing
        return _STYLE_STOPS.get(self._settings.prompt_style, ())

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a turn, where the vocabulary has them."""
        if self._tokenizer is None:
            return ()
        ids = (self._tokenizer.token_to_id(token) for token in _END_TOKENS)
        return tuple(found for found in ids if found is not None)

    def complete(self, sampling: Sampling) -> Sampling:
        """The sampling with the ends of this style and this model added."""
        stop = (*sampling.stop, *self.stop)
        if len(stop) > MAX_STOPS:
            raise InvalidRequest(
                f"stop takes at most {MAX_STOPS - len(self.stop)} texts with this prompt style",
                param="stop",
            )
        return replace(sampling, stop=stop, stop_token_ids=self.stop_token_ids)

    async def build(
        self, questions: Sequence[str], system: str | None, max_model_len: int | None
    ) -> list[Prompt | PromptRefused]:
        """A prompt for each question, or why there is none; never one for all."""
        most = self._settings.max_body_bytes
        if system and len(system) * len(questions) > most:
            raise PayloadTooLarge(
                f"the system prompt before each of {len(questions)} questions is more than {most} "
                "characters of text; shorten it or send fewer questions a call"
            )
        each = len(self._system if system is None else system)
        if sum(map(len, questions)) + each * len(questions) < _CHARACTERS_WORTH_A_THREAD:
            return self._build(questions, system, max_model_len)
        prompts: list[Prompt | PromptRefused] = []
        for part in _slice(questions, each):
            async with self._builders:
                prompts += await asyncio.to_thread(self._build, part, system, max_model_len)
        return prompts

    def _build(
        self, questions: Sequence[str], system: str | None, max_model_len: int | None
    ) -> list[Prompt | PromptRefused]:
        limit = self._settings.max_input_tokens
        if most := limit * self._longest_token:
            questions = [one[:most] for one in questions]
        around = len(self._system if system is None else system)
        long = {
            place
            for place, one in enumerate(questions)
            if self._is_hopeless(around + (0 if limit else len(one)), max_model_len)
        }
        texts = [
            self._text(one if is_text(one) and place not in long else "", system)
            for place, one in enumerate(questions)
        ]
        if self._tokenizer is None:
            prompts: list[Prompt] = list(texts)
        else:
            encodings = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=self._adds_special
            )
            prompts = [
                self._cut(question, system, encoding, limit)
                if limit and len(encoding) > limit
                else encoding.ids
                for question, encoding in zip(questions, encodings, strict=True)
            ]
        return [
            _too_long(f"{around + len(question)} characters", max_model_len)
            if place in long
            else _refusal(question, prompt, max_model_len) or prompt
            for place, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
        ]

    def _is_hopeless(self, characters: int, max_model_len: int | None) -> bool:
        """Too long even if all its tokens were the longest: megabytes of text would be cut into
        tokens, at a hundred times their size in memory, only to be refused.
        """
        if max_model_len is None or not self._longest_token:
            return False
        return characters > self._longest_token * max_model_len

    def _text(self, question: str, system: str | None) -> str:
        system = self._system if system is None else system
        around = (
            self._cached_around(system)
            if len(system) <= _LARGEST_CACHED_SYSTEM
            else self._render_around(system)
        )
        if around is None:
            return self._render(question, system)
        return f"{around[0]}{question}{around[1]}"

    def _render_around(self, system: str) -> tuple[str, str] | None:
        before, marker, after = self._render(_MARKER, system).partition(_MARKER)
        return (before, after) if marker and _MARKER not in after else None

    def _cut(self, question: str, system: str | None, encoding: Encoding, limit: int) -> list[int]:
        """The prompt of as much of the question as fits: the template around it stays whole."""
        assert self._tokenizer is not None  # noqa: S101 — only called with one
        while question and len(encoding) > limit:
            offsets = self._tokenizer.encode(question, add_special_tokens=False).offsets
            keep = len(offsets) - (len(encoding) - limit)
            question = question[: offsets[keep][0]] if keep > 0 else ""
            encoding = self._tokenizer.encode(
                self._text(question, system), add_special_tokens=self._adds_special
            )
        return encoding.ids

    def clean(self, text: str) -> str:
        """An engine's text as an answer: stripped, without thinking, on one line if so set."""
        if self._settings.strip_thinking and "</think>" in text:
            text = _THINKING.sub("", text, count=1)
        if self._settings.single_line:
            text = _LINE_BREAKS.sub(" ", text)
        return text.strip()

    def _template(self, folder: Path | None) -> str:
        style = self._settings.prompt_style
        if style in _STYLES:
            return _STYLES[style]
        template = _read_chat_template(folder) if folder else None
        if template is None:
            raise SettingsError(
                f"prompt_style chat: {folder} has no chat template; set GATEWAY_PROMPT_STYLE to "
                "chatml, qa or raw"
            )
        return template


PROMPTS = web.AppKey("prompts", PromptBuilder)


def _slice(questions: Sequence[str], each: int) -> Iterator[Sequence[str]]:
    """Parts of about a size: the tokenizer takes a hundred times a text's size for a moment, and a
    caller who hangs up ends the work after one of them.
    """
    start, size = 0, 0
    for place, question in enumerate(questions):
        size += len(question) + each
        if size >= _LARGEST_SLICE_CHARACTERS:
            yield questions[start : place + 1]
            start, size = place + 1, 0
    if start < len(questions):
        yield questions[start:]


def _refusal(question: str, prompt: Prompt, max_model_len: int | None) -> PromptRefused | None:
    if not is_text(question):
        return PromptRefused(
            "the prompt has half a surrogate pair, which is no text",
            param="prompt",
            code="not_text",
        )
    if not question.strip():
        return PromptRefused("the prompt is empty", param="prompt", code="empty_prompt")
    if max_model_len is not None and not isinstance(prompt, str) and len(prompt) >= max_model_len:
        return _too_long(f"{len(prompt)} tokens", max_model_len)
    return None


def _too_long(size: str, max_model_len: int | None) -> PromptRefused:
    return PromptRefused(
        f"the prompt has {size}; the model takes {max_model_len} tokens with its answer. "
        "Shorten it, or set GATEWAY_MAX_INPUT_TOKENS to have questions cut",
        param="prompt",
        code="prompt_too_long",
    )


def _load_tokenizer(folder: Path | None) -> Tokenizer | None:
    if folder is None or not (folder / "tokenizer.json").is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # noqa: BLE001 — the library raises bare Exception
        raise SettingsError(
            f"tokenizer: cannot read {folder / 'tokenizer.json'}: {error}"
        ) from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _read_chat_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name, as some models ship
        named = {entry.get("name"): entry.get("template") for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_texts(folder: Path | None) -> dict[str, str]:
    """bos_token and its like: templates write them by these names."""
    config = _read_json(folder / "tokenizer_config.json") if folder else {}
    texts = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        texts[name] = text if isinstance(text, str) else ""
    return texts


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _compile(
    source: str, settings: Settings, specials: dict[str, str]
) -> Callable[[str, str], str]:
    """Question and system prompt -> text. A model's template is a stranger's code: sandboxed."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateRuntimeError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        template = environment.from_string(source)
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
