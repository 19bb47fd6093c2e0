"""README.zh.md says what README.md says: the same commands, links and figures in each section."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.docs.documents import (
    ROOT,
    read_blocks,
    read_commands,
    read_lines,
    read_links,
    read_prose,
    read_spans,
)
from tests.docs.test_commands import find_kind

pytestmark = pytest.mark.slow  # the documents read the same to every Python

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
# Only what both write with digits: words for numbers are each language's own.
_FIGURE = re.compile(r"(?<![\w.])\d[\d,.]*\d|(?<![\w.])\d")
_CODE = re.compile(r"`[^`]*`")


def read_sections(path: Path) -> list[range]:
    """From one heading to the next, as numbers of lines."""
    starts = [line for line, text in read_prose(path) if text.startswith("#")]
    return [range(*pair) for pair in pairwise([*starts, len(read_lines(path)) + 1])]


def list_commands(path: Path) -> list[list[str]]:
    """Of each section, without what their comments say."""
    return [
        [
            command.text
            for block in read_blocks(path)
            if block.line in section and find_kind(block.text) == "shell"
            for command in read_commands(path, block.line, block.text)
        ]
        for section in read_sections(path)
    ]


def list_links(path: Path) -> list[list[str]]:
    other = {"README.md": "the other language", "README.zh.md": "the other language"}
    links = read_links(path)
    return [
        [other.get(target, target) for line, target in links if line in section]
        for section in read_sections(path)
    ]


def list_figures(path: Path) -> list[list[str]]:
    """Of the texts, sorted: a sentence of another language has another order."""
    return [
        sorted(
            figure
            for line, text in read_prose(path)
            if line in section
            for figure in _FIGURE.findall(_CODE.sub("", re.sub(r"\]\([^)]*\)", "]", text)))
        )
        for section in read_sections(path)
    ]


def list_code(path: Path) -> list[list[str]]:
    """What stands between backticks, sorted."""
    spans = read_spans(path)
    return [sorted(text for line, text in spans if line in one) for one in read_sections(path)]


def test_chinese_readme_has_the_same_headings() -> None:
    levels = [
        [text.partition(" ")[0] for _, text in read_prose(path) if text.startswith("#")]
        for path in (ENGLISH, CHINESE)
    ]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("read", [list_commands, list_links, list_figures, list_code])
def test_chinese_readme_has_the_same(read: object) -> None:
    assert callable(read)
    assert read(ENGLISH) == read(CHINESE)


def test_chinese_readme_shows_the_same_answers_and_programs() -> None:
    shown = [
        [block.text for block in read_blocks(path) if find_kind(block.text) in ("shown", "python")]
        for path in (ENGLISH, CHINESE)
    ]
    english, chinese = ([text for text in one if not text.startswith("gateway/")] for one in shown)
    assert english == chinese
    trees = [
        [line.split()[0] for line in text.splitlines()]
        for texts in shown
        for text in texts
        if text.startswith("gateway/")
    ]
    assert trees[0] == trees[1]


def test_tables_of_the_chinese_readme_have_the_same_rows() -> None:
    rows = [[text for _, text in read_prose(p) if text[:1] == "|"] for p in (ENGLISH, CHINESE)]
    assert len(rows[0]) == len(rows[1]) > 8
    assert [one.count(" | ") for one in rows[0]] == [one.count(" | ") for one in rows[1]]


def test_grade_of_the_readme_is_the_records() -> None:
    record = json.loads((ROOT / "docs/results/grade-demo.json").read_text(encoding="utf-8"))
    values = {figure["name"]: figure["value"] for figure in record["figures"]}
    (shown,) = (one.text for one in read_blocks(ENGLISH) if one.text.startswith("samples"))

    for start, name, digits in (
        ("avg ROUGE-L (F1)", "ROUGE-L, course reading", 6),
        ("elapsed (s)", "time for all answers", 3),
        ("tokens/s", "tokens/s", 1),
        ("characters/s", "characters/s", 1),
    ):
        assert re.search(rf"{re.escape(start)} +{values[name]:,.{digits}f}\b", shown), name
