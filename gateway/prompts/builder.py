"""Question -> prompt -> token ids, and answer -> clean text: all that knows templates and tokens.

A chat template is rendered once a system prompt, around a marker; the questions are then put where
the marker stood. Rendering Jinja for each question of a batch would cost more than the rest of the
gateway together. A template that changes its question (trims it, say) is rendered each time.
"""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.config import Settings, SettingsError
from gateway.errors import InvalidRequest, PayloadTooLarge, PromptRefused
from gateway.prompts.templates import STYLE_STOPS, compile_template
from gateway.schemas.fields import MAX_STOPS, is_text
from gateway.schemas.vllm import ID_TYPE, Prompt, Sampling

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# No question contains it; a template that trims, quotes or escapes its question alters it.
_MARKER = " \n\"'\\<&\ue000question\ue001 "
# Below this, handing the batch to a thread costs more than encoding it on the event loop.
_CHARACTERS_WORTH_A_THREAD = 4_000
_LARGEST_SLICE_CHARACTERS = 500_000
_BUILDERS = 2  # slices at once, of all callers
_LARGEST_CACHED_SYSTEM = 20_000
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")


class PromptBuilder:
    """Builds prompts in one style for one model."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        folder = settings.tokenizer
        self._tokenizer, self._longest_token = _load_tokenizer(folder)
        self._render = compile_template(settings)
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
        return STYLE_STOPS.get(self._settings.prompt_style, ())

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
        few = _CHARACTERS_WORTH_A_THREAD
        if self._tokenizer is None and self._find_around(system) is not None:
            few = _LARGEST_SLICE_CHARACTERS  # only put together
        if sum(map(len, questions)) + each * len(questions) < few:
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
        longest = max(map(len, questions), default=0)
        long: set[int] = set()
        if self._is_hopeless(around + (0 if limit else longest), max_model_len):
            long = {
                place
                for place, one in enumerate(questions)
                if self._is_hopeless(around + (0 if limit else len(one)), max_model_len)
            }
        are_good = not long and is_text("".join(questions)) and all(map(str.strip, questions))
        asked = questions
        if not are_good:
            asked = [
                one if place not in long and is_text(one) else ""
                for place, one in enumerate(questions)
            ]
        texts = self._put_around(asked, system)
        if self._tokenizer is None:
            prompts: list[Prompt] = list(texts)
        else:
            encodings = self._tokenizer.encode_batch_fast(
                texts, add_special_tokens=self._adds_special
            )
            prompts = [
                array(
                    ID_TYPE,
                    self._cut(question, system, encoding, limit)
                    if limit and len(encoding) > limit
                    else encoding.ids,
                )
                for question, encoding in zip(asked, encodings, strict=True)
            ]
        bound = math.inf if self._tokenizer is None or max_model_len is None else max_model_len
        if are_good and max(map(len, prompts), default=0) < bound:
            return [*prompts]  # nearly always: nothing to be said of any of them
        return [
            _too_long(f"{around + len(question)} characters", max_model_len)
            if place in long
            else _refusal(question, prompt, max_model_len) or prompt
            for place, (question, prompt) in enumerate(zip(questions, prompts, strict=True))
        ]

    def _is_hopeless(self, characters: int, max_model_len: int | None) -> bool:
        """Too long for any tokens that a text has: megabytes of it would be cut into tokens, at a
        hundred times their size in memory, only to be refused.
        """
        if max_model_len is None or not self._longest_token:
            return False
        most = min(self._longest_token, self._settings.max_bytes_per_token)
        return characters > most * max_model_len

    def _text(self, question: str, system: str | None) -> str:
        return self._put_around([question], system)[0]

    def _put_around(self, questions: Sequence[str], system: str | None) -> list[str]:
        around = self._find_around(system)
        if around is None:
            system = self._system if system is None else system
            return [self._render(question, system) for question in questions]
        before, after = around
        return [f"{before}{question}{after}" for question in questions]

    def _find_around(self, system: str | None) -> tuple[str, str] | None:
        """`None` where each question has to be rendered by itself."""
        system = self._system if system is None else system
        if len(system) > _LARGEST_CACHED_SYSTEM:
            return self._render_around(system)
        return self._cached_around(system)

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

    def clean(self, texts: Iterable[str]) -> list[str]:
        """Engines' texts as answers: stripped, without thinking, on one line if so set."""
        if self._settings.strip_thinking:
            mark = "</think>"
            texts = [one.partition(mark)[2] if mark in one else one for one in texts]
        if self._settings.single_line:
            texts = map(_fold, texts)
        return list(map(str.strip, texts))


def _fold(text: str) -> str:
    """Its lines as one. Not by a pattern: what folds a break with the spaces around it tries each
    space anew.
    """
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return " ".join(line for line in lines if line)


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


def _load_tokenizer(folder: Path | None) -> tuple[Tokenizer | None, int]:
    """And the length of its longest token."""
    if folder is None or not (file := folder / "tokenizer.json").is_file():
        return None, 0
    about = file.stat()
    return _read_tokenizer(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=4)
def _read_tokenizer(file: Path, _mtime_ns: int, _size: int) -> tuple[Tokenizer, int]:
    """Once for each state of the file: a reload of settings would read megabytes anew."""
    from tokenizers import Tokenizer  # noqa: PLC0415 — 4 MB, and who has no tokenizer needs none

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 — the library raises bare Exception
        raise SettingsError(f"tokenizer: cannot read {file}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, max(map(len, tokenizer.get_vocab()), default=0)
