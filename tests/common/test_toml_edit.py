"""Changes in a file that people keep: what they wrote stays, and what cannot be done is said."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from common.errors import SettingsError
from common.toml_edit import replace_table, set_values

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "course.toml"
    file.write_text((ROOT / "course.toml").read_text(encoding="utf-8"), encoding="utf-8")
    return file


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_values_set_keep_their_place_and_all_other_lines(path: Path) -> None:
    before = path.read_text(encoding="utf-8")
    set_values(path, "gateway", {"max_tokens": 96, "system_prompt": 'eins "2"\n三', "top_k": 3})

    found = read(path)
    assert found["gateway"]["max_tokens"] == 96
    assert found["gateway"]["system_prompt"] == 'eins "2"\n三'
    assert found["gateway"]["top_k"] == 3
    assert found["launcher"] == tomllib.loads(before)["launcher"]
    lines = path.read_text(encoding="utf-8").splitlines()
    changed = [line for line in before.splitlines() if line not in lines]
    assert [line.split(" ")[0] for line in changed] == ["system_prompt", "max_tokens"]
    assert lines.index("top_k = 3") < lines.index("[launcher]")


def test_values_set_above_all_tables(path: Path) -> None:
    before = read(path)
    set_values(path, "", {"engines": ["http://a:1"], "port": 8001})
    set_values(path, "", {"port": 8002})
    assert read(path) == {**before, "engines": ["http://a:1"], "port": 8002}


def test_values_set_in_a_table_that_is_not_there_make_it(tmp_path: Path) -> None:
    set_values(tmp_path / "new.toml", "gateway", {"single_line": True})
    assert read(tmp_path / "new.toml") == {"gateway": {"single_line": True}}


def test_table_replaced_twice_stands_once_with_the_tables_below_it(path: Path) -> None:
    before = read(path)
    replace_table(path, "tuned", {"summary": "a", "options": {"max-num-seqs": 7}, "x": "y"})
    replace_table(path, "tuned", {"summary": "b", "options": {"a.b": {"c": [1]}}, "none": {}})
    assert read(path) == {
        **before,
        "tuned": {"summary": "b", "options": {"a.b": {"c": [1]}}, "none": {}},
    }
    set_values(path, "gateway", {"max_tokens": 5})
    assert read(path)["tuned"]["summary"] == "b"


def test_file_written_in_another_way_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "course.toml"
    text = '[gateway]\nsystem_prompt = """\nmax_tokens = 1\n"""\nmax_tokens = 2\n'
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match="by hand"):
        set_values(path, "gateway", {"max_tokens": 3})
    assert path.read_text(encoding="utf-8") == text
