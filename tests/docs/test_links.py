"""Every page is in docs/index.md once, and every link leads to a file and a heading there are."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.documents import (
    DOCUMENTS,
    PAST,
    ROOT,
    name,
    read_headings,
    read_lines,
    read_links,
    read_prose,
    read_spans,
)

pytestmark = pytest.mark.slow  # the documents read the same to every Python

INDEX = ROOT / "docs" / "index.md"


def find_fault(document: Path, target: str) -> str:
    """What is wrong with a link; nothing is asked of the network."""
    if re.match(r"[a-z]+:", target):
        return "" if target.startswith(("https://", "http://")) else "no https address"
    place, _, heading = unquote(target).partition("#")
    path = (document.parent / place).resolve() if place else document
    if not path.exists() or not path.is_relative_to(ROOT):
        return f"no file {place}"
    if heading and (path.suffix != ".md" or heading not in read_headings(path)):
        return f"no heading {heading} in {path.name}"
    return ""


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_each_link_leads_somewhere(document: Path) -> None:
    faults = {
        f"{line}: {fault}"
        for line, target in read_links(document)
        if (fault := find_fault(document, target))
    }
    assert faults == set()


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        ("docs/gatway.md", "no file docs/gatway.md"),
        ("docs/gateway.md#key", "no heading key in gateway.md"),
        ("#modles", "no heading modles in README.md"),
        ("../README.md", "no file ../README.md"),
        ("docs/gateway.md#several-models", ""),
        ("#models", ""),
        ("docs/images/page.png", ""),
    ],
)
def test_link_with_a_slip_is_found(target: str, fault: str) -> None:
    assert find_fault(ROOT / "README.md", target) == fault


def test_index_has_each_document_once_and_a_line_for_it() -> None:
    listed = [target for _, target in read_links(INDEX)]
    lines = [text for _, text in read_prose(INDEX) if text.startswith("- ")]
    wanted = {page for page in DOCUMENTS if page != INDEX}

    assert {(INDEX.parent / target).resolve() for target in listed} == wanted
    assert len(listed) == len(wanted)
    assert [
        line for line in lines if not re.fullmatch(r"- \[[\w./]+\]\([\w./]+\): .{15,100}", line)
    ] == []


def test_each_project_that_is_compared_is_told_with_its_source() -> None:
    text = "\n".join(read_lines(ROOT / "docs" / "comparison.md"))
    intro, *sections = text.split("\n## ")
    peers = {one.partition("\n")[0]: one for one in sections if "**Better there**" in one}

    assert re.search(r"as of \w+ 20\d\d", intro)
    assert [name.lower() for name in peers] == [
        *("plain `vllm serve`", "llama-swap", "vllm-router", "litellm", "gpustack"),
    ]
    for title, section in peers.items():
        assert "**Lacking there**" in section, title
        assert re.search(r"Source:\s.*<https://\S+>", section, re.DOTALL), title
        assert re.search(r"commit [0-9a-f]{7}\b|vLLM \d+\.\d+\.\d+", section), title


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if name(one) not in PAST], ids=name)
def test_files_that_a_document_names_are_there(document: Path) -> None:
    """Paths between backticks, of the folders that the project has."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
    made = {"out", "deploy/grades/grade.json", "deploy/keys/keys.toml", "models/my-ft"}
    made |= {f"models/{one}" for one in ("Qwen/Qwen3-0.6B",)}
    missing = set()
    for line, text in read_spans(document):
        path = re.fullmatch(r"((?:[\w.-]+/)+[\w.-]*)", text)
        if path is None or path[1].partition("/")[0] not in folders:
            continue
        found = path[1].rstrip("/")
        known = found in made or found.startswith("out/") or found == "out"
        if not known and not (ROOT / found).exists() and "NAME" not in found:
            missing.add(f"{line}: {found}")
    assert missing == set()


def test_first_screen_of_the_readme_is_one_screen() -> None:
    """Name, what it is, how to start, a first answer: before the picture, in 24 lines."""
    lines = read_lines(ROOT / "README.md")
    first = next(number for number, line in enumerate(lines) if line.startswith("!["))
    assert first <= 24
