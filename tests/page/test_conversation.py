"""Asking: the conversation, what goes along, what is kept, and how answers are shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.fake_engine import MODEL_FOLDER, Behaviour
from tests.gateway.conftest import Served
from tests.page.conftest import Visitor, pick, running_gateway, shoot

pytestmark = pytest.mark.browser

MARKDOWN = """\
and a **bold** word, `warp_size`, a ** b and int **p:

# Why <b>it</b> works

1. First
   - inner with `code`
   - **second** inner
2. Then

```cpp
__syncthreads();  // <script>alert(1)</script>
    int **p;
```
The end, __syncthreads() as it is."""


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator(".turn").last).not_to_have_attribute("aria-busy", "true")


def read_roles(served: Served) -> str:
    """Of the newest call: whose words it had, as letters."""
    return "".join(message["role"][0] for message in served.engine.calls[-1]["messages"])


def test_demo_model_says_all_the_time_what_it_knows(visitor: Visitor) -> None:
    with running_gateway(Behaviour(model="demo")) as served:
        page = visitor.open(served.url)
        note = page.locator("#demo-note")
        expect(note).to_contain_text("It knows one page about CUDA and nothing else")
        expect(page.locator("#follow")).not_to_be_checked()
        shoot(page, "demo")

        page.click(".example >> nth=0")
        expect(page.locator(".turn .figures")).to_contain_text("in all")
        expect(note).to_be_visible()
        expect(page.locator(".example").first).to_be_visible()
        page.click("#tab-batch")
        expect(note).to_be_visible()
        pick(page, language="zh", theme="dark")
        expect(note).to_contain_text("演示模型")
        shoot(page, "demo-zh-dark-batch")


def test_other_model_has_no_hint_of_the_demos(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        expect(page.locator("#follow")).to_be_checked()
        expect(page.locator("#demo-note")).to_be_hidden()
        page.click(".example >> nth=0")
        expect(page.locator(".example").first).to_be_hidden()
        expect(page.locator("#question")).to_be_focused()


def test_conversation_tells_what_goes_along_and_starts_anew(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        context, along = page.locator("#context"), page.locator(".turn.along .mark:visible")
        expect(context).to_have_text("Nothing goes along yet: this begins a conversation.")
        expect(page.locator("#anew")).to_be_hidden()
        ask(page, "one")
        ask(page, "two")
        assert read_roles(served) == "uau"
        expect(page.locator(".turn h3")).to_have_text(["one", "two"])
        expect(page.locator(".turn .figures").last).to_contain_text("1 earlier turn went along")
        expect(along).to_have_text(["goes along"] * 2)
        expect(context).to_have_text("The question takes 2 earlier turns along, marked above.")
        shoot(page, "conversation")

        page.uncheck("#follow")
        expect(along).to_have_count(0)
        expect(context).to_have_text("The question is sent alone.")
        ask(page, "three")
        assert read_roles(served) == "u"
        page.check("#follow")
        expect(along).to_have_count(3)

        page.click("#anew")
        expect(page.locator("#question")).to_be_focused()
        expect(along).to_have_count(0)
        expect(page.locator(".divide")).to_have_count(1)
        ask(page, "four")
        assert read_roles(served) == "u"
        expect(along).to_have_count(1)
        shoot(page, "conversation-anew", whole=True)


def test_turn_that_failed_or_was_stopped_does_not_go_along(visitor: Visitor) -> None:
    visitor.may_fail = True
    engine = Behaviour(stream_cut_after=9)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        ask(page, "cut off")
        expect(page.locator(".turn .error")).to_contain_text("The engine failed on this.")
        engine.stream_cut_after = None
        page.wait_for_selector("#pill[data-state=ready]")
        ask(page, "whole")

        assert read_roles(served) == "u"
        expect(page.locator(".turn.along")).to_have_count(1)


def test_history_outlives_a_reload_until_it_is_cleared(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        for question in ("one", "two\n\n- a\n- b", "three"):
            ask(page, question)
        figures = page.locator(".turn .figures").all_inner_texts()
        page.reload()
        page.wait_for_selector("#pill[data-state=ready]")
        expect(page.locator(".turn h3")).to_have_text(["one", "two\n\n- a\n- b", "three"])
        assert page.locator(".turn .figures").all_inner_texts() == figures
        expect(page.locator(".turn li")).to_have_text(["a", "b"])
        ask(page, "four")
        assert read_roles(served) == "uauauau"

        other = page.context.new_page()
        other.goto(served.url + "/ui")
        expect(other.locator(".turn")).to_have_count(4)
        page.click("#clear")
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#question")).to_be_focused()
        expect(other.locator(".turn")).to_have_count(0)  # which would else write them back
        page.reload()
        expect(page.locator("#examples")).to_be_visible()
        assert page.locator(".turn").count() == 0
        assert page.evaluate("localStorage.getItem('page.history')") is None


def test_history_keeps_the_newest_that_there_is_room_for(visitor: Visitor) -> None:
    refuse = """(most) => {
      const set = Storage.prototype.setItem;
      Storage.prototype.setItem = function (name, value) {
        if (value.length > most) throw new DOMException("full", "QuotaExceededError");
        return set.call(this, name, value);
      };
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.evaluate(refuse, 1500)
        for number in range(6):
            ask(page, f"{number} " + "x" * 200)
        kept = json.loads(page.evaluate("localStorage.getItem('page.history')"))
        assert 1 <= len(kept) < 6
        assert kept[-1]["question"].startswith("5 ")
        page.evaluate(refuse, 0)
        ask(page, "seven")
        expect(page.locator(".turn")).to_have_count(7)
        page.reload()
        page.wait_for_selector("#pill[data-state=ready]")
        assert page.locator(".turn").count() == 0


@pytest.mark.parametrize(
    "kept",
    [
        *("{", "5", '{"a": 1}', '[{"question": 1}, null, {}]'),
        '[{"question": "a", "text": "b", "times": 5}]',
        '[{"question": "a", "text": "b", "failure": "c"}]',
    ],
)
def test_history_that_is_none_is_left_out(visitor: Visitor, kept: str) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.evaluate("(kept) => localStorage.setItem('page.history', kept)", kept)
        page.reload()
        page.wait_for_selector("#pill[data-state=ready]")
        ask(page, "one")
        assert page.locator(".turn").count() == 1


def test_answer_under_way_is_kept_as_far_as_it_came(visitor: Visitor) -> None:
    with running_gateway(Behaviour(stream_gap_s=0.05)) as served:
        page = visitor.open(served.url)
        page.fill("#question", "tell me everything " * 20)
        page.press("#question", "Enter")
        expect(page.locator(".turn > .answer")).to_contain_text("answer:tell")
        page.reload()

        expect(page.locator(".turn > .answer")).to_contain_text("answer:tell")
        expect(page.locator(".turn .buttons >> text=Ask again")).to_be_visible()


def test_answer_in_markdown_is_formed_and_no_markup_runs(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        ask(page, MARKDOWN)
        answer = page.locator(".turn > .answer")

        expect(answer.locator("strong")).to_have_text(["bold", "second"])
        expect(answer.locator("p code")).to_have_text(["warp_size"])
        expect(answer.locator("h4")).to_have_text("Why <b>it</b> works")
        expect(answer.locator("ol > li")).to_have_count(2)
        expect(answer.locator("ol > li > ul > li")).to_have_count(2)
        expect(answer.locator("pre")).to_have_text(
            "__syncthreads();  // <script>alert(1)</script>\n    int **p;"
        )
        expect(answer.locator("p").last).to_have_text("The end, __syncthreads() as it is.")
        assert answer.locator("script, b, img").count() == 0
        shoot(page, "markdown", whole=True)

        page.click(".code .plain")
        copied = page.evaluate("navigator.clipboard.readText()")
        assert copied == answer.locator("pre").inner_text()
        page.click(".turn .buttons >> text=Copy")
        expect(page.locator(".turn .buttons")).to_contain_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == f"answer:{MARKDOWN}"
        page.click("text=As plain text")
        assert answer.text_content() == f"answer:{MARKDOWN}"
        shoot(page, "markdown-plain", whole=True)
        page.click("text=Formatted")
        expect(answer.locator("strong")).to_have_count(2)


def test_answer_that_grows_is_formed_as_if_it_came_at_once(visitor: Visitor) -> None:
    grow = """async (text) => {
      const { showMarkdown } = await import("/ui/common/markdown.js");
      const make = () => document.createElement("div");
      const [grown, whole] = [make(), make()];
      for (let end = 0; end <= text.length; end += 1) showMarkdown(grown, text.slice(0, end));
      showMarkdown(whole, text);
      return [grown.innerHTML, whole.innerHTML];
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        for text in (
            MARKDOWN,
            "~~~\nopen",
            "- a\n\n\n- b\n\nc",
            "`` ` `` and `",
            "**a** b**c** **",
        ):
            grown, whole = page.evaluate(grow, text)
            assert grown == whole


def test_markdown_takes_no_longer_than_its_text(visitor: Visitor) -> None:
    """Each of these would take minutes if marks were looked for to the end of the text."""
    show = """async (text) => {
      const { showMarkdown } = await import("/ui/common/markdown.js");
      const element = document.createElement("div");
      showMarkdown(element, text);
      return element.textContent.length;
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        for piece in ("**a ", "`a ``", "- ", "# ", "```\n", " * a\n  "):
            assert page.evaluate(show, piece * 30_000) > 0
        for text in ("# a" + " " * 300_000 + "b", "~" * 300_000 + "`", "~~~" + "a" * 300_000 + "`"):
            assert page.evaluate(show, text) == len(text) - 2 * text.startswith("#")


def test_heading_is_without_the_marks_that_close_it(visitor: Visitor) -> None:
    show = """async (text) => {
      const { showMarkdown } = await import("/ui/common/markdown.js");
      const element = document.createElement("div");
      showMarkdown(element, text);
      return [...element.querySelectorAll("h4, p, span")].map((one) => one.textContent);
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        texts = "## So ##  \n# C#\n# #\n#\n# \n#no\n~~~ c++ x\n1\n~~~"
        assert page.evaluate(show, texts) == ["So", "C#", "#", "#\n# \n#no", "c++"]


def test_question_that_is_long_is_folded_until_it_is_wanted(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        ask(page, "short")
        ask(page, "a long question " * 60)
        fold, question = page.locator(".turn .fold"), page.locator(".turn h3").last
        expect(fold).to_have_count(1)
        expect(fold).to_have_attribute("aria-expanded", "false")
        low = question.bounding_box()
        shoot(page, "long-question")
        fold.press("Enter")
        expect(fold).to_have_text("Fold")
        expect(fold).to_be_focused()
        high = question.bounding_box()

        assert low is not None
        assert high is not None
        assert low["height"] < 100 < high["height"]
        pick(page, language="zh", theme="light")
        expect(fold).to_have_text("收起")


@pytest.mark.parametrize(
    ("language", "told"),
    [
        ("en", "The question and what went along with it are too long for the model: start anew"),
        ("zh", "问题连同附带的问答超出模型长度：请开始新对话"),
    ],
)
def test_refusal_is_told_in_the_pages_language_beside_its_question(
    visitor: Visitor, language: str, told: str
) -> None:
    visitor.may_fail = True
    with running_gateway() as served:
        page = visitor.open(served.url)
        pick(page, language=language, theme="light")
        ask(page, "one")
        error = {"message": "the maximum context length is 512", "code": 400, "source": "engine"}
        body = json.dumps({"error": error})
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=400, body=body, content_type="application/json"),
        )
        ask(page, "two")

        expect(page.locator(".turn").last.locator(".error")).to_contain_text(told)
        expect(page.locator(".turn .error small")).to_have_attribute("lang", "en")
        page.reload()
        expect(page.locator(".turn").last.locator(".error")).to_contain_text(told)
        shoot(page, f"refused-{language}")


def test_value_that_is_refused_is_named_as_its_field_is(visitor: Visitor) -> None:
    visitor.may_fail = True
    with running_gateway() as served:
        page = visitor.open(served.url, locale="zh-CN")
        page.click("#ask-form summary")
        page.fill("#ask-max-tokens", "1000000000000")
        ask(page, "one")

        expect(page.locator(".turn .error")).to_contain_text("回答最长（词元）")


def test_model_without_a_chat_template_is_asked_as_predict_asks(
    visitor: Visitor, tmp_path: Path
) -> None:
    """Its engine would refuse every conversation."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(MODEL_FOLDER / "tokenizer.json", folder / "tokenizer.json")
    with running_gateway(tokenizer=folder, prompt_style="qa", single_as_list=True) as served:
        page = visitor.open(served.url)
        for question in ("one", "two"):
            ask(page, question)
            expect(page.locator(".turn > .answer").last).to_contain_text(f"answer:Q: {question}")
        expect(page.locator("#announce")).to_have_text("The answer is complete.")
        expect(page.locator("#follow")).to_be_hidden()
        expect(page.locator("#context")).to_contain_text("no chat template")
        expect(page.locator(".turn .figures").last).to_contain_text("in all")
        shoot(page, "ask-without-template", whole=True)
        page.reload()
        expect(page.locator(".turn > .answer").last).to_contain_text("answer:Q: two")

    assert all("messages" not in call for call in served.engine.calls)
