"""docs/troubleshooting.md quotes what programs print; figures of speed say where they come from."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.docs.documents import DOCUMENTS, ROOT, name, read_lines

pytestmark = pytest.mark.slow  # the documents read the same to every Python

PAGE = ROOT / "docs" / "troubleshooting.md"
PROGRAMS = ("common", "gateway", "launcher", "lab")
_ROW = re.compile(r"\| (`[^|]*`) \|")
_FREE = "## Nothing is printed"  # its first column tells what is seen, not what is read
# A figure of speed: a rate, or how much more of one.
_SPEED = re.compile(
    r"\d (?:tokens|chats|chunks|requests|characters)(?:/s| a second)|\d times the tokens"
    r"|\| tokens/s \|[^\n]*\n\|--|unstreamed chats a\s"
)


@cache
def read_texts() -> tuple[str, ...]:
    """Every text that a program holds but its docstrings; `…` where it puts something in."""
    return tuple(
        text
        for folder in PROGRAMS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for text in _read_texts(path)
    )


def _read_texts(path: Path) -> Iterator[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    joined = [node for node in nodes if isinstance(node, ast.JoinedStr)]
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    parts = {id(part) for text in joined for part in ast.walk(text) if part is not text}
    for node in nodes:
        if id(node) in docstrings or id(node) in parts:
            continue
        if isinstance(node, ast.JoinedStr):
            values = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            yield "".join(map(str, values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_printed(message: str) -> bool:
    """A whole text of a program, or its beginning where the quotation ends in `…`."""
    if "…" not in message and " " not in message:
        return message in read_texts()  # an event of the log
    pieces = [re.escape(piece) for piece in message.split("…")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    return any(pattern.fullmatch(text) for text in read_texts())


def read_quotations() -> list[tuple[int, str]]:
    lines = read_lines(PAGE)
    end = lines.index(_FREE)
    return [
        (number, message)
        for number, line in enumerate(lines[:end], start=1)
        if (row := _ROW.match(line))
        for message in re.findall(r"`([^`]+)`", row[1])
    ]


@pytest.mark.parametrize(("line", "message"), read_quotations())
def test_quoted_message_is_printed_by_a_program(line: int, message: str) -> None:
    assert len(message.replace("…", "")) > 8, "it could be any message"
    assert is_printed(message), f"docs/troubleshooting.md:{line}"


def test_each_row_of_troubleshooting_quotes_a_message() -> None:
    lines = read_lines(PAGE)
    rows = [
        line for line in lines[: lines.index(_FREE)] if re.match(r"\| (?!message |event )", line)
    ]

    assert len(rows) > 40
    assert [row for row in rows if not _ROW.match(row)] == []


@pytest.mark.parametrize(
    "message",
    ["the prompt is emtpy", "no engine is redy: …", "warmup_fialed", "no place became free"],
)
def test_message_with_a_slip_is_not_printed(message: str) -> None:
    assert not is_printed(message)


def test_codes_beside_the_messages_are_the_gateways() -> None:
    texts = " ".join(read_lines(PAGE))
    codes = set(re.findall(r"\| [45]\d\d `(\w+)`", texts))
    assert len(codes) > 15
    assert codes - set(read_texts()) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_speed_is_told_with_version_machine_and_record(document: Path) -> None:
    """In the same section, so that who reads the figure has it before their eyes."""
    if name(document) in ("docs/results.md", "docs/comparison.md"):
        return  # each of its figures is a record's; the figures of others, with their source
    sections = "\n".join(read_lines(document)).split("\n#")
    for section in (one for one in sections if _SPEED.search(one)):
        title = section.partition("\n")[0]
        assert re.search(r"vLLM 0\.\d+|no vLLM", section), title
        assert re.search(r"\b(?:H200|5090|cores?|CPU)\b", section), title
        assert re.search(r"\brecords?\b", section), title
