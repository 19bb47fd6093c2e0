"""Question files: the course's text form, JSON and JSONL, with their reference answers or without.

What is not here: what a program does with the questions.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_file
from common.json_text import is_whole, parse_json

# The start of a block: `（1. 问题：`, with or without the bracket, the dot and the number's spaces.
_BLOCK = re.compile(r"(?:^|\n)[^\S\n]*+[(（]?\d++\s*+[.．、]?\s*+问题[：:]")
_QUESTION = re.compile(r"问题[：:]")
_ANSWER = re.compile(r"答案[：:]")
_QUESTION_KEYS = ("question", "prompt", "query", "问题")
_SURE_CHARACTERS = 12
_ANSWER_KEYS = ("answer", "reference", "response", "output", "答案")


class BadQuestions(ValueError):
    """A question file that cannot be used; says where and why."""


@dataclass(frozen=True)
class QuestionPair:
    """A question and its reference answer; "" where the file has none and none was asked for."""

    question: str
    reference: str = ""


@dataclass(frozen=True)
class QuestionSet:
    """The pairs in the order in which they are asked, and where they came from."""

    path: str
    pairs: tuple[QuestionPair, ...]
    skipped: tuple[str, ...] = ()

    @property
    def questions(self) -> list[str]:
        return [pair.question for pair in self.pairs]

    @property
    def digest(self) -> str:
        """The same for the same questions and references in the same order."""
        text = json.dumps([[pair.question, pair.reference] for pair in self.pairs])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def take(self, count: int) -> QuestionSet:
        """As many as asked for, begun again from the top when the file is shorter."""
        pairs = tuple(itertools.islice(itertools.cycle(self.pairs), count))
        return QuestionSet(self.path, pairs, self.skipped)

    def repeat(self, times: int) -> QuestionSet:
        return QuestionSet(self.path, self.pairs * times, self.skipped)


def read_questions(path: Path, *, needs_answers: bool = True) -> QuestionSet:
    """Without `needs_answers`, questions alone will do: a JSON list of texts, a block of them."""
    text = _decode(path)
    try:
        pairs, skipped = _Reader(needs_answers).read(path, text)
    except BadQuestions as error:
        raise BadQuestions(f"{path}: {error}") from None
    if not pairs:
        wanted = "question with an answer" if needs_answers else "question"
        raise BadQuestions(
            f"{path}: no {wanted} in it; it should be the course's text "
            "(`（1. 问题：… 答案：…`), a JSON list or one JSON object a line "
            '({"question": …, "answer": …})'
        )
    return QuestionSet(str(path), tuple(pairs), tuple(skipped))


def _decode(path: Path) -> str:
    """UTF-8, or what Windows in China writes."""
    try:
        data = read_file(path)
    except OSError as error:
        raise BadQuestions(f"{path}: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif place := _find_damage(data):
        raise BadQuestions(f"{path}: UTF-8 text with a byte on line {place} that is none")
    else:
        encodings = ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            continue
    raise BadQuestions(f"{path}: neither UTF-8 nor GB18030 text; save it as UTF-8")


def _find_damage(data: bytes) -> int:
    """The line where UTF-8 stops being it; 0 for whole UTF-8 and for another encoding.

    GB18030 would read damaged UTF-8 as nonsense, and be asked. Text in GB18030 looks like UTF-8
    for a character or two, never for many.
    """
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        sound = data[: error.start].decode("utf-8")
        is_utf8 = sum(not one.isascii() for one in sound) >= _SURE_CHARACTERS
        return sound.count("\n") + 1 if is_utf8 else 0
    return 0


def _is_jsonl(text: str) -> bool:
    """JSONL by another name: its first line is an object, and there are more."""
    first, _, rest = text.strip().partition("\n")
    try:
        return isinstance(parse_json(first), dict) and rest.lstrip().startswith("{")
    except ValueError:
        return False


class _Reader:
    """The three forms; `needs_answers` decides what a question without one is."""

    def __init__(self, needs_answers: bool) -> None:
        self._needs_answers = needs_answers

    def read(self, path: Path, text: str) -> tuple[list[QuestionPair], list[str]]:
        """The pairs, and why others were left out."""
        if path.suffix == ".jsonl" or _is_jsonl(text):
            return self._parse_lines(text), []
        if path.suffix == ".json" or text.lstrip().startswith(("[", "{")):
            return self._parse_json(text), []
        return self._parse_text(text)

    def _parse_text(self, text: str) -> tuple[list[QuestionPair], list[str]]:
        starts = [found.start() for found in _BLOCK.finditer(text)]
        if not starts:  # a file without numbers
            starts = [found.start() for found in _QUESTION.finditer(text)]
        pairs, skipped = [], []
        for number, (start, end) in enumerate(itertools.pairwise([*starts, len(text)]), start=1):
            block = text[start:end].strip()
            pair = self._parse_block(block)
            if pair:
                pairs.append(pair)
            else:
                skipped.append(f"block {number} has no question or no answer: {block[:40]}")
        return pairs, skipped

    def _parse_block(self, block: str) -> QuestionPair | None:
        question, answer = _QUESTION.search(block), _ANSWER.search(block)
        if question is None or (answer and answer.start() <= question.start()):
            return None
        if answer is None:
            pair = QuestionPair(block[question.end() :].strip())
        else:
            asked = block[question.end() : answer.start()].strip()
            pair = QuestionPair(asked, block[answer.end() :].strip())
        return pair if pair.question and (pair.reference or not self._needs_answers) else None

    def _parse_lines(self, text: str) -> list[QuestionPair]:
        pairs = []
        # Not splitlines: a string inside JSON may hold U+2028 as it is.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    row = parse_json(line)
                except ValueError as error:
                    raise BadQuestions(f"line {number} is no JSON: {error}") from None
                pairs.append(self._parse_row(row, f"line {number}"))
        return pairs

    def _parse_json(self, text: str) -> list[QuestionPair]:
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BadQuestions(f"no JSON: {error}") from None
        if isinstance(data, dict) and self._is_row(data):
            data = [data]
        if isinstance(data, dict):
            lists = [value for value in data.values() if isinstance(value, list)]
            if len(lists) != 1:
                pairs = data.items()
                return [self._parse_row([key, value], f"key {key!r}") for key, value in pairs]
            data = lists[0]
        if not isinstance(data, list):
            raise BadQuestions("a list of questions is expected")
        rows = enumerate(data, start=1)
        return [self._parse_row(row, f"entry {number}") for number, row in rows]

    def _is_row(self, data: dict[str, Any]) -> bool:
        has_question = bool(_first(data, _QUESTION_KEYS))
        return has_question and bool(_first(data, _ANSWER_KEYS) or not self._needs_answers)

    def _parse_row(self, row: Any, where: str) -> QuestionPair:
        if isinstance(row, list) and len(row) == 2:
            question, answer = row
        elif isinstance(row, dict):
            question, answer = _first(row, _QUESTION_KEYS), _first(row, _ANSWER_KEYS)
        elif isinstance(row, str) and not self._needs_answers:
            question, answer = row, None
        else:
            raise BadQuestions(f"{where} is neither an object nor a pair")
        if not (isinstance(question, str) and question.strip()):
            raise BadQuestions(f"{where} has no text under {' or '.join(_QUESTION_KEYS)}")
        if not (isinstance(answer, str) and answer.strip()):
            answer = ""
        if not answer and self._needs_answers:
            raise BadQuestions(f"{where} has no text under {' or '.join(_ANSWER_KEYS)}")
        if not is_whole(question + answer):
            half = "half a character (a lone surrogate, \\ud800 to \\udfff)"
            raise BadQuestions(f"{where} holds {half}")
        return QuestionPair(question.strip(), answer.strip())


def _first(row: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((row[key] for key in keys if key in row), None)
