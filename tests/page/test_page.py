"""The page before a stand-in engine that misbehaves: keys, failures, files, words, motion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.fake_engine import Behaviour
from tests.gateway.admission.test_keys import _keys_file
from tests.page.conftest import Visitor, running_gateway, shoot, width_of

pytestmark = pytest.mark.browser
BINARY = b"PK\x03\x04" + bytes(number * 7919 % 251 + 1 for number in range(3000))
STATIC = Path(__file__).parent.parent.parent / "gateway" / "page" / "static"


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def open_batch(page: Page, text: str) -> None:
    page.click("#tab-batch")
    page.fill("#paste", text)
    expect(page.locator("#run")).to_be_enabled()


def test_page_turned_off_is_no_page(visitor: Visitor) -> None:
    visitor.may_fail = True
    with running_gateway(ui=False) as served:
        page = visitor.open(served.url, wait=False)

        assert json.loads(page.inner_text("body"))["error"]["code"] == "not_found"


def test_key_is_asked_for_kept_in_the_tab_and_forgotten(visitor: Visitor, tmp_path: Path) -> None:
    visitor.may_fail = True
    path, keys = _keys_file(tmp_path, alice="")
    with running_gateway(keys_file=path) as served:
        page = visitor.open(served.url, wait=False)
        expect(page.locator("#key-dialog")).to_be_visible()
        expect(page.locator("#key")).to_be_focused()
        page.fill("#key", "vg-wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("This key is not known to the gateway.")
        shoot(page, "key")
        page.fill("#key", "密钥")  # no header can hold it
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_have_text("This key is not known to the gateway.")
        for status, told in ((502, "The gateway answered 502."), (0, "The gateway could not be")):
            act = (lambda to: to.fulfill(status=502)) if status else (lambda to: to.abort())
            page.route("**/ui/status", act)
            page.fill("#key", keys["alice"])
            page.keyboard.press("Enter")
            expect(page.locator("#key-error")).to_contain_text(told)
            page.unroute("**/ui/status")
        page.fill("#key", keys["alice"])
        page.keyboard.press("Enter")
        page.wait_for_selector("#pill[data-state=ready]")
        ask(page, "mine")
        expect(page.locator(".turn > .answer")).to_have_text("answer:mine")

        page.reload()
        page.wait_for_selector("#pill[data-state=ready]")
        other = page.context.new_page()
        other.goto(served.url + "/ui")
        expect(other.locator("#key-dialog")).to_be_visible()
        assert page.evaluate("Object.values(localStorage).join()").count("vg-") == 0

        page.click("#key-button")
        page.click("#key-forget")
        page.wait_for_selector("#pill[data-state=key]")
        expect(page.locator("#engine-body")).to_be_hidden()
        ask(page, "mine")
        expect(page.locator(".turn .error")).to_contain_text("use the button Key above")


def test_answer_is_stopped_by_button_and_by_escape(visitor: Visitor) -> None:
    engine = Behaviour(stream_gap_s=0.05)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        for number, stop in enumerate(("click", "Escape"), start=1):
            ask(page, "tell me everything " * 20)
            expect(page.locator(".turn > .answer").last).to_contain_text("answer:tell")
            if stop == "click":
                page.click("#stop")
            else:
                page.keyboard.press("Escape")
            expect(page.locator(".turn .figures").last).to_contain_text("stopped")
            expect(page.locator("#send")).to_be_enabled()
            assert page.evaluate("document.activeElement.id") == "question"
            text = page.locator(".turn > .answer").last.inner_text()
            assert text.startswith("answer:tell")
            page.wait_for_timeout(200)
            assert engine.cancelled == number


def test_answer_cut_off_says_so_and_can_be_asked_again(visitor: Visitor) -> None:
    engine = Behaviour(stream_cut_after=9)
    visitor.may_fail = True
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        ask(page, "twice")
        expect(page.locator(".turn .error")).to_contain_text("The engine failed on this.")
        expect(page.locator(".turn .error")).to_contain_text("request ")
        assert page.locator(".turn > .answer").inner_text() == "answer:tw"
        shoot(page, "cut-off")

        engine.stream_cut_after = None
        page.wait_for_selector("#pill[data-state=ready]")
        page.click("text=Ask again")
        expect(page.locator(".turn > .answer").last).to_have_text("answer:twice")


def test_answer_that_ends_without_its_end_is_not_taken_for_whole(visitor: Visitor) -> None:
    half = 'data: {"choices": [{"delta": {"content": "half an ans"}}]}\n\n'
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=half, content_type="text/event-stream"),
        )
        ask(page, "whole?")

        expect(page.locator(".turn .error")).to_contain_text("before the answer was complete")
        assert page.locator(".turn > .answer").inner_text() == "half an ans"


def test_answer_keeps_its_white_space_and_no_markup_runs(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        question = "a\n   b <img src=x onerror=alert(1)> </script><script>alert(2)</script>"
        ask(page, question)

        expect(page.locator(".turn .figures")).to_contain_text("in all")
        assert page.locator(".turn > .answer").inner_text() == f"answer:{question}"
        assert page.locator(".turn img, .turn script").count() == 0


def test_number_out_of_range_is_shown_and_one_with_decimals_is_sent(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        options = page.locator("#ask-form details")
        for send in ("#send", ".example"):
            page.evaluate("document.querySelector('#ask-form details').open = true")
            page.fill("#question", "hello")
            page.fill("#ask-temperature", "2.5")
            page.click("#ask-form summary")
            expect(options).not_to_have_attribute("open", "")
            page.click(f"{send} >> nth=0")
            expect(options).to_have_attribute("open", "")
            expect(page.locator("#ask-temperature")).to_be_focused()
            expect(page.locator("#question")).to_have_value("hello")
        assert page.locator(".turn").count() == 0

        page.fill("#ask-temperature", "0.75")
        page.click("#ask-form summary")
        page.click(".example >> nth=0")
        expect(page.locator(".turn .figures")).to_contain_text("in all")
        open_batch(page, "one")
        page.click("#batch-form summary")
        page.fill("#batch-temperature", "-1")
        page.click("#batch-form summary")
        page.click("#run")
        expect(page.locator("#batch-temperature")).to_be_focused()
        expect(page.locator("#batch-run")).to_be_hidden()
        page.fill("#batch-temperature", "0.25")
        page.click("#run")
        expect(page.locator("#run-title")).to_have_text("1 question answered")

        assert [call["temperature"] for call in served.engine.calls[-2:]] == [0.75, 0.25]


def test_enter_that_ends_chinese_input_sends_nothing(visitor: Visitor) -> None:
    """Safari tells of it after the composition's end, by its old number alone."""
    press = """(keyCode) => document.getElementById("question").dispatchEvent(
      new KeyboardEvent("keydown", { key: "Enter", keyCode, bubbles: true, cancelable: true }))"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.fill("#question", "ni hao")

        assert page.evaluate(press, 229) is True  # left to the browser
        expect(page.locator("#question")).to_have_value("ni hao")
        assert page.evaluate(press, 13) is False
        expect(page.locator(".turn h3")).to_have_text("ni hao")
        # The gateway may stop only then: its 503 would be a fault of the page's.
        expect(page.locator(".turn > .answer")).to_have_text("answer:ni hao")


def test_ask_again_waits_for_the_answer_that_runs(visitor: Visitor) -> None:
    engine = Behaviour(stream_cut_after=9)
    visitor.may_fail = True
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        ask(page, "first")
        again = page.locator(".turn button:visible", has_text="Ask again")
        expect(again).to_be_enabled()
        engine.stream_cut_after, engine.stream_gap_s = None, 0.05
        page.wait_for_selector("#pill[data-state=ready]")
        ask(page, "a long one " * 9)
        expect(again).to_be_disabled()

        page.click("#stop")
        expect(again.last).to_be_enabled()
        again.first.press("Enter")
        expect(page.locator("#stop")).to_be_focused()  # not lost with the button
        expect(page.locator(".turn > .answer").last).to_have_text("answer:first")
        expect(page.locator("#question")).to_be_focused()


def test_earlier_turns_are_sent_along(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url)
        ask(page, "one")
        expect(page.locator(".turn .figures").last).to_contain_text("in all")
        page.click("#ask-form summary")
        page.fill("#ask-system", "be brief")
        page.fill("#ask-max-tokens", "7")
        ask(page, "two")
        expect(page.locator(".turn > .answer").last).to_have_text("answer:two")

        call = served.engine.calls[-1]
        assert [message["role"] for message in call["messages"]] == [
            "system",
            "user",
            "assistant",
            "user",
        ]
        assert call["max_tokens"] == 7


def test_batch_failures_are_named_and_run_again(visitor: Visitor) -> None:
    engine = Behaviour(refuses=lambda question: "bad" in question)
    with running_gateway(engine) as served:
        page = visitor.open(served.url)
        open_batch(page, "one\nbad two\nthree\n\nbad four")
        page.click("#run")
        expect(page.locator("#run-title")).to_have_text("2 answered, 2 failed")
        expect(page.locator(".result .error")).to_have_count(2)
        expect(page.locator(".result .error").first).to_contain_text("this is not to my taste")
        shoot(page, "batch-failed")

        engine.refuses = lambda _: False
        engine.calls.clear()
        page.click("#again")
        expect(page.locator("#run-title")).to_have_text("4 questions answered")

        assert sum(len(call["prompt"]) for call in engine.calls) == 2
        texts = page.locator(".result .answer").all_inner_texts()
        assert texts == ["answer:one", "answer:bad two", "answer:three", "answer:bad four"]


def test_batch_waits_for_an_engine_that_is_away(visitor: Visitor) -> None:
    engine = Behaviour(is_healthy=False)
    with running_gateway(engine, wait_ready=False) as served:
        page = visitor.open(served.url, wait=False)
        page.wait_for_selector("#pill[data-state=down]")
        open_batch(page, "one\ntwo")
        page.click("#run")
        expect(page.locator("#run-title")).to_have_text("Waiting for the engine …")

        engine.is_healthy = True
        expect(page.locator("#run-title")).to_have_text("2 questions answered")


def test_gateway_gone_and_back_is_followed_without_a_reload(visitor: Visitor) -> None:
    visitor.may_fail = True
    with running_gateway() as served:
        port = int(served.url.rsplit(":", 1)[1])
        page = visitor.open(served.url)
        page.evaluate("window.isSamePage = true")
    page.wait_for_selector("#pill[data-state=unreachable]")
    expect(page.locator("#notice-title")).to_contain_text("recovers by itself")
    shoot(page, "unreachable")

    with running_gateway(port=port) as served:
        page.wait_for_selector("#pill[data-state=ready]")
        expect(page.locator("#notice")).to_be_hidden()
        assert page.evaluate("window.isSamePage")


def test_several_engines_are_told_apart(visitor: Visitor) -> None:
    well, ill = Behaviour(), Behaviour(is_healthy=False)
    with running_gateway(well, ill, wait_ready=False) as served:
        page = visitor.open(served.url)
        expect(page.locator("#pill-text")).to_have_text("1 of 2 engines ready · fake")
        expect(page.locator(".engines li")).to_have_text(
            ["Engine 1: Ready", "Engine 2: Not answering"]
        )

        ill.is_healthy = True
        expect(page.locator("#pill-text")).to_have_text("Ready · fake")
        expect(page.locator(".engines li").last).to_have_text("Engine 2: Ready")


def test_engines_of_several_models_tell_theirs(visitor: Visitor) -> None:
    with running_gateway(Behaviour(model="small"), Behaviour(model="large")) as served:
        page = visitor.open(served.url)
        expect(page.locator("#pill-text")).to_have_text("Ready · small, large")
        expect(page.locator(".engines li")).to_have_text(
            ["Engine 1: Ready · small", "Engine 2: Ready · large"]
        )


def test_engine_whose_figures_are_missing_once_moves_no_sum(visitor: Visitor) -> None:
    first, second = (Behaviour(metrics=_metrics_of(count)) for count in (1000, 2000))
    with running_gateway(first, second) as served:
        page = visitor.open(served.url)
        first.delay_s = second.delay_s = 3.5
        chart = page.locator("[data-tile=rate] svg")
        expect(chart).to_have_attribute("aria-label", re.compile("highest 0 "))
        open_batch(page, "one\ntwo\nthree")
        page.click("#run")
        second.metrics, seen = "", second.scrapes
        while second.scrapes == seen:
            page.wait_for_timeout(50)
        second.metrics, first.metrics = _metrics_of(2000), _metrics_of(1001)

        expect(page.locator("#run-detail")).to_contain_text("About 1 of 3")
        expect(page.locator("#run-title")).to_have_text("3 questions answered")
        label = chart.get_attribute("aria-label") or ""
        highest = re.search(r"highest ([\d,.]+)", label)
        assert highest
        assert float(highest[1].replace(",", "")) < 500, label


def _metrics_of(count: int) -> str:
    return (
        f"vllm:request_success_total {count}\nvllm:generation_tokens_total {count * 100}\n"
        "vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
    )


def test_growth_is_counted_engine_by_engine(modules: Page) -> None:
    script = """async ([before, after]) => {
      const load = ([finished, completion_tokens]) => (
        { finished, completion_tokens, first_token_sum_s: 0, first_token_count: finished });
      const read = (all) => all.map((one) => one && load(one));
      const told = (await import("/ui/engine/live.js")).compare(read(before), read(after));
      return told && [told.answers, told.tokens, told.isWhole];
    }"""
    for before, after, grown in (
        ([[1, 10], [2, 20]], [[2, 15], [4, 40]], [3, 25, True]),
        ([[1, 10], None], [[2, 15], [4, 40]], [1, 5, False]),
        ([[1, 10], [2, 20]], [[2, 15], None], [1, 5, False]),
        ([[1, 10], [2, 20]], [[2, 15], [0, 0]], [1, 5, False]),  # the second began anew
        ([[1, 10], None], [[2, 15], None], [1, 5, True]),
        ([[1, 10]], [[2, 15], [4, 40]], [1, 5, False]),
        ([None, [2, 20]], [[1, 10], None], None),
    ):
        assert modules.evaluate(script, [before, after]) == grown, (before, after)


def test_batch_preview_follows_every_change(visitor: Visitor) -> None:
    good = '{"question": "a"}'
    with running_gateway() as served:
        page = visitor.open(served.url)
        found = page.locator("#found")
        open_batch(page, "one\ntwo\nthree")
        expect(found.locator("li")).to_have_text(["one", "two", "three"])
        page.fill("#paste", "one\nTWO\none")
        expect(found.locator("li")).to_have_text(["one", "TWO", "one"])
        expect(found).to_contain_text("1 of them repeated")

        page.fill("#paste", f"{good}\n{{bad\n{good}")
        expect(found).to_contain_text("Line 2 is not valid JSON")
        page.fill("#paste", f"{good}\n{good}\n{{bad")
        expect(found).to_contain_text("Line 3 is not valid JSON")


def test_file_read_slowly_does_not_replace_a_later_one(visitor: Visitor) -> None:
    slow = """() => {
      const read = File.prototype.arrayBuffer;
      const gate = new Promise((resolve) => (window.release = resolve));
      File.prototype.arrayBuffer = async function () {
        if (this.name === "slow.txt") await gate;
        return read.call(this);
      };
    }"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.evaluate(slow)
        open_batch(page, "pasted")
        drop(page, "slow.txt", "slow question")
        expect(page.locator("#file-chip")).to_contain_text("slow.txt")
        expect(page.locator("#run")).to_be_disabled()  # what was pasted is not this file's
        drop(page, "quick.txt", "quick question")
        expect(page.locator("#found")).to_contain_text("quick question")
        page.evaluate("window.release()")
        page.wait_for_timeout(100)

        expect(page.locator("#file-chip")).to_contain_text("quick.txt")
        expect(page.locator("#found")).to_contain_text("quick question")
        drop(page, "slow.txt", "slow question")
        page.click("#file-clear")
        expect(page.locator("#found")).to_contain_text("pasted")
        page.fill("#paste", "typed")  # read a moment after the last letter
        drop(page, "quick.txt", "quick question")
        page.wait_for_timeout(250)
        expect(page.locator("#found")).to_contain_text("quick question")


def test_file_is_chosen_dropped_and_removed(visitor: Visitor, tmp_path: Path) -> None:
    path = tmp_path / "题目.txt"
    path.write_bytes("什么是 warp？\n什么是线程块？\n".encode("gb18030"))
    with running_gateway() as served:
        page = visitor.open(served.url)
        page.click("#tab-batch")
        page.set_input_files("#file", path)
        expect(page.locator("#file-chip")).to_contain_text("题目.txt")
        expect(page.locator("#found")).to_contain_text("什么是线程块？")
        page.click("#file-clear")
        expect(page.locator("#found")).to_be_empty()

        page.click("#tab-ask")
        drop(page, "dropped.json", '["one", "two", {"prompt": "three"}]')
        expect(page.locator("#panel-batch")).to_be_visible()
        expect(page.locator("#found")).to_contain_text("3 questions found (JSON)")
        drop(page, "bad.json", '["one", ')
        expect(page.locator("#found .error")).to_contain_text("not valid JSON")
        expect(page.locator("#run")).to_be_disabled()

        book = tmp_path / "book.xlsx"
        book.write_bytes(BINARY)
        page.set_input_files("#file", book)
        expect(page.locator("#found .error")).to_contain_text("not a text file")
        expect(page.locator("#run")).to_be_disabled()


def drop(page: Page, name: str, text: str) -> None:
    page.evaluate(
        """([name, text]) => {
          const data = new DataTransfer();
          data.items.add(new File([text], name));
          for (const kind of ["dragover", "drop"]) {
            const how = { dataTransfer: data, bubbles: true, cancelable: true };
            document.body.dispatchEvent(new DragEvent(kind, how));
          }
        }""",
        [name, text],
    )


@pytest.fixture(scope="module")
def modules(chromium: Browser) -> Any:
    """A page whose modules can be called one by one."""
    with running_gateway() as served:
        visitor = Visitor(chromium)
        page = visitor.open(served.url)
        yield page
        visitor.leave()


PARSED = "async (text) => (await import('/ui/batch/questions.js')).parseQuestions(text)"


@pytest.mark.parametrize(
    ("text", "format_", "questions"),
    [
        ("a\r\n\n  b  \n", "lines", [("a", None), ("b", None)]),
        ("\ufeffa", "lines", [("a", None)]),
        ('["a", "b"]', "json", [("a", None), ("b", None)]),
        ('{"prompt": ["a", "b"]}', "json", [("a", None), ("b", None)]),
        ('[{"question": "a", "answer": "x"}]', "json", [("a", "x")]),
        (
            '{"question": "a", "answer": "x"}\n{"问题": "b", "答案": "y"}',
            "jsonl",
            [("a", "x"), ("b", "y")],
        ),
        ('"a"\n"b"\n', "jsonl", [("a", None), ("b", None)]),
        (
            '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}',
            "jsonl",
            [("a", None)],
        ),
        (
            "（1. 问题：甲是什么？\n答案：甲\n是甲（第一）。\n（2. 问题：乙？ 答案：乙。",
            "course",
            [("甲是什么？", "甲\n是甲（第一）。"), ("乙？", "乙。")],
        ),
        (
            "(1、问题: 甲？ 答案: 甲。)\n(2、问题: 乙？ 答案: 乙。)",
            "course",
            [("甲？", "甲。"), ("乙？", "乙。")],
        ),
        ("1. 问题：甲？\n2. 问题：乙？", "course", [("甲？", None), ("乙？", None)]),
        *(
            (f"{line}\nb", "lines", [(line, None), ("b", None)])
            for line in (
                "[单选] 什么是 warp？",
                "[1] What is a[i]",
                "[CUDA][单选] a",
                "{a} what is this?",
                "{ 是什么意思？",
                '"__syncthreads()" 的作用是什么？',
                '"warp"',
            )
        ),
    ],
)
def test_questions_are_read_in_every_form(
    modules: Page, text: str, format_: str, questions: list[tuple[str, str | None]]
) -> None:
    read = modules.evaluate(PARSED, text)

    assert read["format"] == format_
    assert [(one["question"], one.get("reference")) for one in read["items"]] == questions


def test_questions_left_out_are_counted(modules: Page) -> None:
    read = modules.evaluate(PARSED, '{"question": "a"}\n{"no": 1}\n{"question": " "}')

    assert (len(read["items"]), read["skipped"]) == (1, 2)


def test_questions_bad_line_is_named(modules: Page) -> None:
    script = f"async (text) => ({PARSED})(text).catch((error) => error.values)"

    assert modules.evaluate(script, '{"question": "a"}\n{"question": ')["line"] == 2


@pytest.mark.parametrize(
    "text",
    [
        '["one", ',
        '[\n  {"question": "a"},\n  {"ques',
        '[{"question": "a",}]',
        '{"question": "a",}\n{"question": "b"}',
        "{question: 'a'}\n{question: 'b'}",
        "['a', 'b']",
    ],
)
def test_questions_json_that_is_none_is_not_taken_for_lines(modules: Page, text: str) -> None:
    script = f"async (text) => ({PARSED})(text).catch((error) => error.key)"

    assert modules.evaluate(script, text) == "batch.badJson"


def test_file_is_read_in_its_encoding_or_refused(modules: Page) -> None:
    read = """async (data) => (await import("/ui/batch/questions.js"))
      .readFile(new Blob([new Uint8Array(data)])).catch((error) => error.key)"""
    text = "什么是 warp？\nWhat?"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "gb18030"):
        assert modules.evaluate(read, list(text.encode(encoding))).endswith(text), encoding
    assert (
        modules.evaluate(read, list("甲".encode("gb18030") * 50 + b"\xff")) == "甲" * 50 + "\ufffd"
    )
    for data in (text.encode("utf-16-le"), b"a\0b", BINARY):
        assert modules.evaluate(read, list(data)) == "batch.notText", data[:9]


def test_pieces_respect_number_and_bytes(modules: Page) -> None:
    cut = """async ([texts, most, bytes]) => {
      const { cutPieces } = await import('/ui/batch/questions.js');
      const pieces = cutPieces(texts.map((question) => ({ question })), most, bytes);
      return pieces.map((piece) => piece.map((item) => item.question));
    }"""

    assert modules.evaluate(cut, [["a", "b", "c"], 2, 1000]) == [["a", "b"], ["c"]]
    assert modules.evaluate(cut, [["aaaa", "bbbb", "c"], 9, 15]) == [["aaaa", "bbbb"], ["c"]]


def test_csv_runs_nothing_in_a_spreadsheet(modules: Page) -> None:
    write = """async (rows) => (await import('/ui/batch/results.js'))
      .write("csv", { rows, started: new Date(), seconds: 1, options: {}, model: "m" })"""
    rows = [{"question": '=HYPERLINK("x")', "answer": "a,\nb", "reference": None, "error": None}]

    text = modules.evaluate(write, rows)

    head, row = (
        "\ufeffindex,question,answer,reference,error",
        """0,"'=HYPERLINK(""x"")","a,\nb",,""",
    )
    assert text == f"{head}\r\n{row}\r\n"


def test_words_are_there_in_both_languages_and_all_of_them_used(modules: Page) -> None:
    words: dict[str, list[str]] = modules.evaluate(
        "async () => (await import('/ui/common/translations.js')).allWords()"
    )
    files = [path for path in STATIC.rglob("*.*") if path.name != "translations.js"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    asked = set(re.findall(r'data-t(?:-label|-placeholder)?="([\w.]+)"', source))
    asked |= set(re.findall(r'say\(\s*"([\w.]+)"', source))

    assert asked <= words.keys()
    for key, pair in words.items():
        assert len(pair) == 2, key
        assert all(pair), key
        values = [set(re.findall(r"\{\w+\}", text)) for text in pair]
        assert values[0] - {"{s}"} == values[1], key  # {s} is the English plural's
        family = key.partition(".")[0]
        assert f'"{key}"' in source or f"`{family}.$" in source, f"{key} is said nowhere"


@pytest.mark.parametrize(
    ("locale", "language"), [("zh-CN", "zh-CN"), ("zh-TW", "zh-CN"), ("de-DE", "en")]
)
def test_language_follows_the_browser(visitor: Visitor, locale: str, language: str) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url, locale=locale, color_scheme="dark")

        assert page.get_attribute("html", "lang") == language
        assert page.get_attribute("html", "data-theme") == "dark"
        page.select_option("#language", "zh")
        page.select_option("#theme", "light")
        page.reload()
        assert page.get_attribute("html", "lang") == "zh-CN"
        assert page.get_attribute("html", "data-theme") == "light"


def test_every_control_has_a_name(visitor: Visitor) -> None:
    nameless = """() => [...document.querySelectorAll("button, input, select, textarea, a, svg")]
      .filter((one) => !one.closest("[hidden]") && one.type !== "file")
      .filter((one) => !(one.labels?.length || one.ariaLabel || one.getAttribute("aria-labelledby")
        || one.textContent.trim()))
      .map((one) => one.outerHTML.slice(0, 120))"""
    with running_gateway() as served:
        page = visitor.open(served.url)
        ask(page, "one")
        expect(page.locator(".turn .figures").last).to_contain_text("in all")
        page.wait_for_selector("[data-tile=running] svg[aria-label]")
        found = page.evaluate(nameless)
        open_batch(page, "one")
        page.click("#run")
        expect(page.locator("#downloads")).to_be_visible()

        assert found == []
        assert page.evaluate(nameless) == []


def test_motion_is_left_out_for_who_wants_none(visitor: Visitor) -> None:
    moving = "() => document.getAnimations().filter((one) => one.playState === 'running').length"
    with running_gateway(Behaviour(is_healthy=False), wait_ready=False) as served:
        lively = visitor.open(served.url, wait=False)
        lively.wait_for_selector("#notice-bar.endless")
        assert lively.evaluate(moving) > 0

        calm = visitor.open(served.url, wait=False, reduced_motion="reduce")
        calm.wait_for_selector("#notice-bar.endless")
        assert calm.evaluate(moving) == 0


SMALLEST_FIELD = """() => Math.min(
  ...[...document.querySelectorAll("select, textarea, input")]
    .map((one) => parseFloat(getComputedStyle(one).fontSize)))"""


def test_page_at_phone_width_and_large_type_does_not_scroll_sideways(visitor: Visitor) -> None:
    with running_gateway() as served:
        page = visitor.open(served.url, viewport={"width": 360, "height": 740})
        assert page.evaluate(SMALLEST_FIELD) >= 16  # below it, a phone zooms in on a touch
        page.evaluate("document.documentElement.style.fontSize = '22px'")
        ask(page, "averyveryverylongwordwithoutanyspace" * 6)
        expect(page.locator(".turn .figures")).to_contain_text("in all")
        assert width_of(page) <= 360
        open_batch(page, "averyveryverylongwordwithoutanyspace" * 6)
        page.click("#run")
        expect(page.locator("#run-title")).to_have_text("1 question answered")
        assert width_of(page) <= 360
        shoot(page, "phone-large-type", whole=True)
