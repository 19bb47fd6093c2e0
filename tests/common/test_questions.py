"""Question files: the course's text, JSON, JSONL; and what is said of those that are none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from common.questions import BadQuestions, QuestionPair, read_questions

COURSE = """（1. 问题：什么是 warp？
答案：32 个线程，
同时执行。

(2) 问题：什么是 SM？ 答案：流式多处理器。
3、问题：共享内存？
答案：片上内存，见 1. 问题：不是开头。
（4. 问题：没有答案？
"""


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def seed_parse(text: str) -> list[QuestionPair]:
    """How the seed entry's evaluator reads the course's file, said again."""
    found = re.finditer(r"(?:^|\n)\s*[\(（]?\d+\s*[\.、]?\s*问题：", text)
    starts = [match.start() for match in found]
    pairs = []
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        question, separator, answer = text[start:end].strip().partition("答案：")
        question = question.partition("问题：")[2].strip()
        if separator and question and answer.strip():
            pairs.append(QuestionPair(question, answer.strip()))
    return pairs


def test_course_text_is_read_as_the_seed_entry_reads_it(tmp_path: Path) -> None:
    course = COURSE.replace("(2) 问题", "(2. 问题")

    read = read_questions(write(tmp_path, "test.txt", course))

    assert list(read.pairs) == seed_parse(course)
    assert read.pairs[0] == QuestionPair("什么是 warp？", "32 个线程，\n同时执行。")
    assert read.pairs[2] == QuestionPair("共享内存？", "片上内存，见 1. 问题：不是开头。")
    assert len(read.skipped) == 1
    assert "没有答案" in read.skipped[0]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
def test_course_text_is_read_in_every_encoding(tmp_path: Path, encoding: str, ends: str) -> None:
    text = "（1. 问题：什么是 warp？\n答案：32 个线程。\n".replace("\n", ends)

    read = read_questions(write(tmp_path, "test.txt", text.encode(encoding)))

    assert read.pairs == (QuestionPair("什么是 warp？", "32 个线程。"),)


def test_course_text_without_numbers_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "test.txt", "问题：甲？ 答案：乙。\n问题:丙？ 答案:丁。")

    assert read_questions(path).pairs == (
        QuestionPair("甲？", "乙。"),
        QuestionPair("丙？", "丁。"),
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("list.json", [{"question": "甲", "answer": "乙"}]),
        ("named.json", {"questions": [{"prompt": "甲", "reference": "乙"}]}),
        ("pairs.json", [["甲", "乙"]]),
        ("mapping.json", {"甲": "乙"}),
        ("alone.json", {"question": "甲", "answer": "乙"}),
        ("no_suffix", [{"问题": "甲", "答案": "乙"}]),
    ],
)
def test_json_forms_are_read(tmp_path: Path, name: str, data: object) -> None:
    path = write(tmp_path, name, json.dumps(data, ensure_ascii=False))

    assert read_questions(path).pairs == (QuestionPair("甲", "乙"),)


def test_jsonl_is_read_with_separators_inside_texts(tmp_path: Path) -> None:
    rows = [{"question": "甲\u2028甲", "answer": "乙"}, {"query": "丙", "output": "丁"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)

    read = read_questions(write(tmp_path, "q.jsonl", text))

    assert read.pairs == (QuestionPair("甲\u2028甲", "乙"), QuestionPair("丙", "丁"))


@pytest.mark.parametrize("name", ["q.json", "q.txt", "q"])
def test_jsonl_is_read_under_another_name(tmp_path: Path, name: str) -> None:
    text = '{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n'

    assert len(read_questions(write(tmp_path, name, text)).pairs) == 2
    with pytest.raises(BadQuestions, match="line 3 is no JSON"):
        read_questions(write(tmp_path, name, text + '{"question": "e", "ans'))


_DAMAGED = "（1. 问题：什么是 warp 调度器？\n答案：它选择".encode() + b"\xff" + "线程。".encode()


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("q.txt", _DAMAGED, "UTF-8 text with a byte on line 2 that is none"),
        ("q.json", "[" * 200_000, "no JSON: nested too deeply"),
        ("q.json", r'[["a", "b"], ["c \ud800", "d"]]', "entry 2 holds half a character"),
        ("q.jsonl", '{"question": "a", "answer": "b"}\n{broken', "line 2 is no JSON"),
        ("q.jsonl", '{"question": "a"}', "line 1 has no text under answer"),
        ("q.json", '[{"answer": "a"}]', "entry 1 has no text under question"),
        ("q.json", "[3]", "entry 1 is neither an object nor a pair"),
        ("q.json", "[", "no JSON"),
        ("q.txt", "nothing of the kind", "no question with an answer"),
        ("q.txt", b"\xff\xff\xff\x80", "neither UTF-8 nor GB18030"),
    ],
)
def test_unusable_files_say_where_and_why(
    tmp_path: Path, name: str, text: str | bytes, complaint: str
) -> None:
    with pytest.raises(BadQuestions, match=complaint):
        read_questions(write(tmp_path, name, text))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadQuestions, match=r"nowhere\.txt: No such file"):
        read_questions(tmp_path / "nowhere.txt")


def test_count_cuts_or_begins_again(tmp_path: Path) -> None:
    read = read_questions(write(tmp_path, "q.json", '[["a", "b"], ["c", "d"]]'))

    assert [pair.question for pair in read.take(1).pairs] == ["a"]
    assert [pair.question for pair in read.take(5).pairs] == ["a", "c", "a", "c", "a"]
    assert [pair.question for pair in read.repeat(2).pairs] == ["a", "c", "a", "c"]
    assert read.take(2).digest == read.digest != read.take(1).digest


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"question": "one"}\n{"question": "two", "answer": "2"}\n'),
        ("d.jsonl", '{"question": "one", "output": [1]}\n{"question": "two", "answer": "2"}\n'),
        ("e.jsonl", '{"question": "one", "answer": ""}\n{"question": "two", "answer": "2"}\n'),
        ("b.json", '[{"question": "one"}, {"question": "two", "answer": "2"}]'),
        ("c.txt", "（1. 问题：one\n（2. 问题：two 答案：2\n"),
    ],
)
def test_questions_without_answers_are_read_where_none_are_needed(
    tmp_path: Path, name: str, text: str
) -> None:
    path = write(tmp_path, name, text)

    read = read_questions(path, needs_answers=False)

    assert read.pairs == (QuestionPair("one", ""), QuestionPair("two", "2"))


def test_list_of_texts_is_read_where_no_answers_are_needed(tmp_path: Path) -> None:
    path = write(tmp_path, "q.json", '["a", "b"]')

    assert read_questions(path, needs_answers=False).questions == ["a", "b"]


def test_nothing_to_ask_is_refused_where_nobody_needs_answers(tmp_path: Path) -> None:
    for name, content in (("q.json", "[]"), ("q.txt", "答案：c"), ("q.jsonl", '{"answer": "c"}')):
        with pytest.raises(BadQuestions, match=r"no question in it|has no text under question"):
            read_questions(write(tmp_path, name, content), needs_answers=False)
