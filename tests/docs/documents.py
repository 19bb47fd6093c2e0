"""The project's documents as data: their code, headings and links; and commands of a shell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "demo" / "README.md",
    ROOT / "models" / "README.md",
    *PAGES,
]
# What it holds are commands as they were typed then, and older entries of a changelog are history.
PAST = frozenset(("docs/results.md", "CHANGELOG.md"))
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=")
_SEPARATORS = frozenset((";", "&&", "||", "|", "&"))
_REDIRECTIONS = frozenset((">", ">>", "<"))
_KEYWORDS = frozenset(("do", "done", "then", "fi"))
_LINK = re.compile(r"(?<!\\)\[[^\]\n]*\]\(<?([^)\s>]+)>?\)")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


class Block(NamedTuple):
    """Lines of code that stand together, without their indentation."""

    line: int
    text: str


class Link(NamedTuple):
    line: int
    target: str


@dataclass(frozen=True)
class Command:
    """One simple command of a document."""

    document: str
    line: int
    variables: tuple[tuple[str, str], ...]
    words: tuple[str, ...]
    text: str
    into: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line} {self.text}"


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def read_lines(path: Path) -> tuple[str, ...]:
    return tuple(path.read_text(encoding="utf-8").splitlines())


@cache
def read_blocks(path: Path) -> tuple[Block, ...]:
    """Fenced ones, and those indented by four after a blank line: no list here goes as deep."""
    return tuple(Block(line, text) for line, text, is_code in _cut(path) if is_code)


def _cut(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Every line belongs to one piece; blanks inside an indented block belong to it."""
    lines, at = read_lines(path), 0
    while at < len(lines):
        start, line = at, lines[at]
        at += 1
        if fence := re.match(r" *(```+|~~~+)", line):
            while at < len(lines) and not lines[at].strip().startswith(fence[1]):
                at += 1
            yield start + 2, "\n".join(lines[start + 1 : at]), True
            at += 1
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip()):
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            yield start + 1, "\n".join(one[4:] for one in lines[start:at]), True
        else:
            yield start + 1, line, False


@cache
def read_prose(path: Path) -> tuple[Block, ...]:
    """The lines that are no code."""
    return tuple(Block(line, text) for line, text, is_code in _cut(path) if not is_code)


@cache
def read_spans(path: Path) -> tuple[Block, ...]:
    """Code in the middle of a text, each paragraph or line of a table for itself."""
    found, paragraph, start = [], list[str](), 0
    for line, text in [*read_prose(path), Block(0, "")]:
        if not text.strip() or text.startswith("|"):
            joined = "\n".join([*paragraph, text])
            first = start if paragraph else line
            found += [
                Block(first + joined[: span.start()].count("\n"), " ".join(span[2].split()))
                for span in _SPAN.finditer(joined)
            ]
            paragraph = []
            continue
        start = start if paragraph else line
        paragraph.append(text)
    return tuple(found)


@cache
def read_headings(path: Path) -> tuple[str, ...]:
    """As GitHub names them in addresses; a second one of a name gets `-1`."""
    seen: dict[str, int] = {}
    names = []
    for _, text in read_prose(path):
        if heading := re.match(r"#{1,6} +(.+?) *#*$", text):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "")
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            count = seen.get(slug, 0)
            seen[slug] = count + 1
            names.append(f"{slug}-{count}" if count else slug)
    return tuple(names)


@cache
def read_links(path: Path) -> tuple[Link, ...]:
    return tuple(
        Link(line, target)
        for line, text in read_prose(path)
        for target in _LINK.findall(re.sub(_SPAN, "", text))
    )


def read_commands(path: Path, line: int, text: str) -> list[Command]:
    """The simple commands of a piece of shell. `ValueError` where it is none."""
    found = []
    for start, joined in _join_lines(line, text):
        lexer = shlex.shlex(joined, posix=True, punctuation_chars=";&|<>")
        lexer.whitespace_split = True
        found += [_build(path, start, joined, words) for words in _split(list(lexer))]
    return found


def _join_lines(line: int, text: str) -> Iterator[tuple[int, str]]:
    """Lines that go on: after a backslash, or in the middle of a quotation."""
    pending, start = "", line
    for number, one in enumerate(text.splitlines(), start=line):
        start = start if pending else number
        pending += one
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        if pending.strip():
            yield start, pending
        pending = ""
    if pending:
        raise ValueError(f"a quotation that does not end: {pending}")


def _split(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if word not in _SEPARATORS:
            command += [] if not command and word in _KEYWORDS else [word]
            continue
        if command and command[0] != "for":
            yield command
        command = []


def _build(path: Path, line: int, text: str, words: list[str]) -> Command:
    into, plain, variables = "", list[str](), list[tuple[str, str]]()
    rest = iter(words)
    for word in rest:
        if word in _REDIRECTIONS:
            into = next(rest, "")
        elif not plain and _ASSIGNMENT.match(word):
            key, _, value = word.partition("=")
            variables.append((key, value))
        else:
            plain.append(word)
    shown = " ".join([*(f"{key}={value}" for key, value in variables), *plain])
    return Command(name(path), line, tuple(variables), tuple(plain), shown, into)
