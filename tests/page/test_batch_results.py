"""A batch's results: their scores, long and refused questions, and what leaving would lose."""

from __future__ import annotations

import json
import random

import pytest
from playwright.sync_api import Page, expect

from lab.grade.scores import score
from tests.fake_engine import MODEL_FOLDER, Behaviour
from tests.page.conftest import Visitor, pick, running_gateway, shoot

pytestmark = pytest.mark.browser

_PIECES = "SM|C|0.5|0.5f|%|盘|大|小|语言|C语言|C++|4S店|江南style|IP地址| |\n|_|K|İ|Ｑ|é|-|1|.|,|**"
_SCORE = """async (pairs) => {
  const { scoreRougeL } = await import("/ui/batch/rouge.js");
  return pairs.map(([answer, reference]) => scoreRougeL(answer, reference));
}"""
FOCUSED = "document.activeElement.id"
_COPYING_IS_REFUSED = """() => {
  navigator.clipboard.writeText = async () => { throw new Error("no"); };
}"""


def run_batch(page: Page, items: list[dict[str, str]]) -> None:
    page.click("#tab-batch")
    page.fill("#paste", "\n".join(json.dumps(item, ensure_ascii=False) for item in items))
    expect(page.locator("#run")).to_be_enabled()
    page.click("#run")


def build_pairs() -> list[tuple[str, str]]:
    """Answers of the demo's questions, as they are, of one another, and with pieces put in."""
    source, pieces = random.Random(5), _PIECES.split("|")
    lines = (MODEL_FOLDER.parent / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["answer"] for line in lines]
    pairs = [("", "a"), ("a", ""), ("甲", "甲"), ("The warp", "the WARP")]
    for text in texts:
        changed = list(text)
        for _ in range(source.randrange(8)):
            changed[source.randrange(len(changed))] = source.choice(pieces)
        pairs += [(text, text), (text, source.choice(texts)), (text, "".join(changed))]
        mixed = ["".join(source.choices(pieces, k=20)) for _ in range(2)]
        pairs.append((mixed[0], mixed[1]))
    return pairs


def test_rouge_is_the_graders_own_figure(visitor: Visitor) -> None:
    pairs = build_pairs()
    with running_gateway() as served:
        page = visitor.open(served.url)
        told = page.evaluate(_SCORE, pairs)

    wrong = [
        (pair, figure, score(*pair).rouge_course)
        for pair, figure in zip(pairs, told, strict=True)
        if figure != score(*pair).rouge_course
    ]
    assert wrong == []
    assert len({figure for figure in told if 0 < figure < 1}) > 100


def test_rouge_stands_beside_references_and_says_what_it_counts(visitor: Visitor) -> None:
    items = [
        {"question": "one two", "answer": "one three"},
        {"question": "甲", "answer": "乙"},
        {"question": "same", "answer": "answer:same"},
        {"question": "none"},
    ]
    with running_gateway() as served:
        page = visitor.open(served.url)
        run_batch(page, items)
        expect(page.locator("#run-title")).to_have_text("4 questions answered")
        rows = page.locator(".result")

        value = score("answer:one two", "one three").rouge_course
        expect(rows.nth(0).locator(".score")).to_have_text(f"ROUGE-L {value:.4f}")
        expect(rows.nth(0).locator(".reference")).to_contain_text("one three")
        expect(rows.nth(1).locator(".score")).to_contain_text("the course counts nothing else")
        expect(rows.nth(2).locator(".score")).to_have_text("same as the referenceROUGE-L 1.0000")
        assert rows.nth(3).locator(".score").count() == 0
        expect(page.locator("#run-facts")).to_contain_text("Latin letters and digits alone")
        expect(page.locator("#run-facts")).to_contain_text(
            f"mean {(value + 1) / 3:.4f} of 3 answers · 0 for 1"
        )
        shoot(page, "batch-scores", whole=True)
        pick(page, language="zh", theme="dark")
        expect(rows.nth(1).locator(".score")).to_contain_text("没有拉丁字母和数字")
        shoot(page, "batch-scores-zh-dark", whole=True)


def test_batch_that_runs_warns_who_would_leave(visitor: Visitor) -> None:
    engine = Behaviour()
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        engine.delay_s = 3600
        run_batch(page, [{"question": "one"}, {"question": "two"}])
        expect(page.locator("#run-detail")).to_contain_text("The engine has 2 questions · running")
        shoot(page, "batch-running")
        with page.expect_event("dialog") as asked:
            page.close(run_before_unload=True)
        assert asked.value.type == "beforeunload"
        asked.value.dismiss()

        page.click("#batch-stop")
        expect(page.locator("#run-title")).to_have_text("Stopped: 0 of 2 answered")
        with page.expect_event("close"):
            page.close(run_before_unload=True)


def test_batch_keeps_the_keyboards_place(visitor: Visitor) -> None:
    engine = Behaviour(refuses=lambda question: "bad" in question)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        page.click("#tab-batch")
        page.fill("#paste", "one\nbad\nthree " + "long " * 200)
        expect(page.locator("#run")).to_be_enabled()
        page.press("#run", "Enter")
        expect(page.locator("#run-title")).to_have_text("2 answered, 1 failed")
        assert page.evaluate(FOCUSED) == "change"
        fold = page.locator(".result .fold")
        fold.press("Enter")
        engine.refuses = lambda _: False
        engine.delay_s = 3600
        page.press("#again", "Enter")
        expect(page.locator("#batch-stop")).to_be_focused()
        expect(fold).to_have_attribute("aria-expanded", "true")  # not made anew
        page.keyboard.press("Enter")
        expect(page.locator("#run-title")).to_have_text("Stopped: 2 of 3 answered")
        assert page.evaluate(FOCUSED) == "change"
        page.keyboard.press("Enter")
        assert page.evaluate(FOCUSED) == "paste"


@pytest.mark.parametrize(
    ("language", "refused", "too_long"),
    [
        ("en", "The engine refused this question.", "with its answer the model takes 512."),
        ("zh", "引擎拒绝了这个问题。", "模型连同回答最多接受 512 个"),
    ],
)
def test_batch_refusals_stand_beside_their_questions_in_the_pages_language(
    visitor: Visitor, language: str, refused: str, too_long: str
) -> None:
    engine = Behaviour(refuses=lambda question: "bad" in question)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        pick(page, language=language, theme="light")
        run_batch(page, [{"question": text} for text in ("one", "bad", "word " * 900)])
        rows = page.locator(".result")
        expect(rows).to_have_count(3)

        expect(rows.nth(1).locator(".error")).to_contain_text(refused)
        expect(rows.nth(2).locator(".error")).to_contain_text(too_long)
        expect(rows.nth(2).locator(".fold")).to_be_visible()
        shoot(page, f"batch-refused-{language}")


def test_batch_answers_in_markdown_are_formed(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        run_batch(page, [{"question": "a **bold** `code`\n```\nint i;\n```"}])

        expect(page.locator(".result .answer strong")).to_have_text("bold")
        expect(page.locator(".result .answer pre")).to_have_text("int i;")


def test_batch_answer_is_copied_from_the_keyboard_and_said_aloud(visitor: Visitor) -> None:
    engine = Behaviour(refuses=lambda question: "bad" in question)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        run_batch(page, [{"question": text} for text in ("one", "a **bold** word", "bad")])
        expect(page.locator(".result")).to_have_count(3)
        names = [one.get_attribute("aria-label") for one in page.locator(".result .plain").all()]
        first = page.get_by_role("button", name="Copy answer 1")
        first.focus()
        page.keyboard.press("Tab")
        second = page.get_by_role("button", name="Copy answer 2")
        expect(second).to_be_focused()
        page.keyboard.press("Enter")

        assert names == ["Copy answer 1", "Copy answer 2"]  # of a refusal there is nothing to copy
        expect(page.locator("#announce")).to_have_text("Copied answer 2")
        expect(page.locator(".result .plain").nth(1)).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == "answer:a **bold** word"
        expect(second).to_be_focused()  # under its own name again, after a moment
        page.evaluate(_COPYING_IS_REFUSED)
        page.keyboard.press("Enter")
        expect(page.locator("#announce")).to_contain_text("the browser does not allow it")


@pytest.mark.parametrize(
    ("theme", "forced"), [("light", "none"), ("dark", "none"), ("dark", "active")]
)
def test_batch_with_its_copy_buttons_keeps_nobody_out(
    visitor: Visitor, theme: str, forced: str
) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url, forced_colors=forced, color_scheme=theme)
        pick(page, language="en", theme=theme)
        run_batch(page, [{"question": text} for text in ("one", "two")])
        expect(page.get_by_role("button", name="Copy answer 2")).to_be_visible()
        page.get_by_role("button", name="Copy answer 2").focus()
        shoot(page, f"batch-copy-{theme}{'-forced' if forced == 'active' else ''}", whole=True)
