"""Whatever goes wrong on the other side is seen and named, never averaged away."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from lab.grade.comparison import compare, extract_grade
from lab.grade.grade_console import describe_grade
from lab.grade.grade_page import write_report
from lab.grade.run_grade import find_worse
from lab.grade.scores import cut
from lab.readiness import ServerNeverReady
from tests.fake_engine import serve_app
from tests.lab.conftest import Examine, errors_of, grade_at, notes_of, text_of
from tests.lab.judged import MODEL_FOLDER, Judged, build_judged, read_pairs
from tests.plain_http import NO_TLS

DEMO = str(MODEL_FOLDER.parent / "questions.jsonl")
IN_CHUNKS = ("--request_chunk_size", "4")


def spoil(text: str, kept: float) -> str:
    """So many of its words, and others in the place of the rest."""
    chance = random.Random(text)
    words = cut(text).split()
    other = cut(chance.choice(read_pairs()).reference).split()
    return "".join(w if chance.random() < kept else chance.choice(other) for w in words)


async def test_grade_good_server_has_no_faults(examine: Examine) -> None:
    judged = Judged()

    grade = await examine(judged)

    assert errors_of(grade) == []
    assert grade.runs[0].exact == 1.0
    assert grade.runs[0].rouge_whitespace == 1.0
    assert judged.calls == [[pair.question for pair in read_pairs(12)]]


async def test_grade_chunks_send_each_question_once_in_order(examine: Examine) -> None:
    judged = Judged()

    grade = await examine(judged, "--request_chunk_size", "5")

    assert [len(call) for call in judged.calls] == [5, 5, 2]
    sent = [question for call in judged.calls for question in call]
    assert sent == [pair.question for pair in read_pairs(12)]
    assert [(call.first, call.asked) for call in grade.runs[0].calls] == [(0, 5), (5, 5), (10, 2)]


async def test_grade_mode_ok_asks_one_by_one(examine: Examine) -> None:
    judged = Judged(root={"status": "ok"})

    grade = await examine(judged)

    assert judged.calls == [pair.question for pair in read_pairs(12)]
    assert errors_of(grade) == []
    assert len(grade.runs[0].calls) == 12


async def test_grade_concurrent_calls_keep_the_order(examine: Examine) -> None:
    judged = Judged(root={"status": "ok"}, delay_s=lambda call: 0.02 * (12 - call))

    grade = await examine(judged, "--concurrency", "6")

    assert errors_of(grade) == []
    assert grade.runs[0].exact == 1.0


async def test_grade_worse_model_is_named_against_a_baseline(examine: Examine) -> None:
    good = await examine(Judged())
    worse = await examine(Judged(reply=lambda answers, _: [spoil(a, 0.7) for a in answers]))

    comparison = compare(extract_grade("good", good.pack()), extract_grade("worse", worse.pack()))
    found = list(find_worse(comparison, "good"))

    assert {finding.code for finding in found} == {"worse_than_baseline"}
    assert not list(
        find_worse(compare(extract_grade("a", good.pack()), extract_grade("b", good.pack())), "a")
    )


async def test_grade_worse_model_is_named_below_a_floor(examine: Examine) -> None:
    judged = Judged(reply=lambda answers, _: [spoil(a, 0.7) for a in answers])

    assert errors_of(await examine(judged, "--floor", "0.9")) == ["below_floor"]
    assert errors_of(await examine(judged, "--floor", "0.2")) == []


async def test_grade_demo_model_that_forgot_its_page_is_named(examine: Examine) -> None:
    def forget(answers: list[str], _call: int) -> list[str]:
        return [spoil(answer, 0.8) for answer in answers]

    good = await examine(Judged(model="demo"), file=Path(DEMO))
    worse = await examine(Judged(model="demo", reply=forget), file=Path(DEMO))

    assert errors_of(good) == []
    assert errors_of(worse) == ["below_floor"]


async def test_grade_empty_answers_are_named_by_number(examine: Examine) -> None:
    def blank(answers: list[str], _call: int) -> list[str]:
        return [" \n" if place in (2, 7) else text for place, text in enumerate(answers)]

    grade = await examine(Judged(reply=blank))

    assert errors_of(grade) == ["empty_answers"]
    assert grade.findings[0].questions == (3, 8)
    assert grade.runs[0].empty == 2
    assert grade.runs[0].rouge_whitespace == pytest.approx(10 / 12)


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(lambda answers: answers[::-1], id="reversed"),
        pytest.param(lambda answers: [answers[1], answers[0], *answers[2:]], id="two_swapped"),
        pytest.param(lambda answers: [*answers[1:], ""], id="shifted_by_one"),
    ],
)
async def test_grade_shuffled_order_is_named(examine: Examine, order: Any) -> None:
    grade = await examine(Judged(reply=lambda answers, _: order(answers)))

    assert "shuffled_answers" in errors_of(grade)


async def test_grade_shuffled_order_of_a_later_run_is_named(examine: Examine) -> None:
    def shuffle_once(answers: list[str], call: int) -> list[str]:
        return answers[::-1] if call == 1 else answers

    grade = await examine(Judged(reply=shuffle_once), "--runs", "3")

    assert errors_of(grade) == ["shuffled_answers"]
    assert text_of(grade, "shuffled_answers").startswith("run 2: ")


@pytest.mark.parametrize(("kept", "label"), [(2, "runs 1 and 2: "), (3, "12 answers are")])
async def test_grade_order_that_is_wrong_alike_in_several_runs_is_named_once(
    examine: Examine, kept: int, label: str
) -> None:
    def shuffle(answers: list[str], call: int) -> list[str]:
        if call == kept:
            return answers
        return [f"{answer} {call}" for answer in answers[::-1]]

    grade = await examine(Judged(reply=shuffle), "--runs", "3")

    assert errors_of(grade) == ["shuffled_answers"]
    assert text_of(grade, "shuffled_answers").startswith(label)


async def test_grade_shuffled_order_of_a_mediocre_model_is_named(examine: Examine) -> None:
    def shuffle(answers: list[str], _call: int) -> list[str]:
        spoiled = [spoil(answer, 0.45) for answer in answers]
        random.Random(1).shuffle(spoiled)
        return spoiled

    def keep(answers: list[str], _call: int) -> list[str]:
        return [spoil(answer, 0.45) for answer in answers]

    assert errors_of(await examine(Judged(reply=shuffle), file=Path(DEMO))) == ["shuffled_answers"]
    assert errors_of(await examine(Judged(reply=keep), file=Path(DEMO))) == []


async def test_grade_chunks_answered_in_each_others_place_are_named(examine: Examine) -> None:
    """The order is right inside every call, and wrong between them."""
    rows = [pair.reference for pair in read_pairs(12)]

    def swap(_answers: list[str], call: int) -> list[str]:
        return [rows[4:8], rows[:4], rows[8:]][call]

    grade = await examine(Judged(reply=swap), *IN_CHUNKS)

    assert errors_of(grade) == ["shuffled_answers"]
    assert grade.findings[0].questions == (1, 2, 3, 4, 5, 6, 7, 8)


async def test_grade_confused_model_is_not_called_shuffled(examine: Examine) -> None:
    """Two questions with one answer are a weak model, not a wrong order."""

    def confuse(answers: list[str], _call: int) -> list[str]:
        return [answers[1], *answers[1:]]

    assert errors_of(await examine(Judged(reply=confuse))) == []


async def test_grade_unrelated_answers_are_named(examine: Examine) -> None:
    chance = random.Random(3)
    words = cut(" ".join(pair.reference for pair in read_pairs())).split()

    def babble(answers: list[str], _call: int) -> list[str]:
        return ["".join(chance.choices(words, k=80)) for _ in answers]

    grade = await examine(Judged(reply=babble), file=Path(DEMO))

    assert errors_of(grade) == ["unrelated_answers"]


async def test_grade_one_answer_for_all_is_named(examine: Examine) -> None:
    grade = await examine(Judged(reply=lambda answers, _: ["我是一个助手。"] * len(answers)))

    assert "same_answer" in errors_of(grade)


async def test_grade_answers_in_circles_are_noted(examine: Examine) -> None:
    def loop(answers: list[str], _call: int) -> list[str]:
        return [answers[0] + "因此需要同步。" * 12, *answers[1:]]

    grade = await examine(Judged(reply=loop))

    assert "looping_answers" in notes_of(grade)
    assert next(f for f in grade.findings if f.code == "looping_answers").questions == (1,)


@pytest.fixture
async def mortal(questions: Path) -> AsyncIterator[str]:
    """A process that answers two calls and dies in the third."""
    del questions
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.lab.judged", "--port", str(port), "--dies_after", "2"
    )
    yield f"http://127.0.0.1:{port}"
    assert await process.wait() == 1


async def test_grade_server_that_dies_in_the_middle_is_named(mortal: str, questions: Path) -> None:
    grade = await grade_at(mortal, questions, *IN_CHUNKS, "--runs", "3")

    assert errors_of(grade) == ["no_answer", "server_died"]
    assert "questions 9 to 12 of 12" in text_of(grade, "server_died")
    assert "8 of 12 questions had been answered" in text_of(grade, "server_died")
    assert len(grade.runs) == 1
    assert grade.runs[0].missing == 4
    assert grade.runs[0].rouge_whitespace == pytest.approx(8 / 12)


async def test_grade_lost_connection_of_a_living_server_is_told_apart(examine: Examine) -> None:
    grade = await examine(Judged(cuts=lambda call: call == 1), *IN_CHUNKS)

    assert errors_of(grade) == ["connection_lost", "no_answer"]
    assert grade.runs[0].answered == 8
    assert [finding.questions for finding in grade.findings if finding.code == "no_answer"] == [
        (5, 6, 7, 8)
    ]


async def test_grade_too_few_answers_are_named(examine: Examine) -> None:
    grade = await examine(Judged(reply=lambda answers, _: answers[:-2]))

    assert errors_of(grade) == ["no_answer", "too_few"]
    assert text_of(grade, "too_few") == "10 answers to 12 questions"
    assert next(f for f in grade.findings if f.code == "no_answer").questions == (11, 12)


async def test_grade_too_many_answers_are_named(examine: Examine) -> None:
    grade = await examine(Judged(reply=lambda answers, _: [*answers, "more"]))

    assert errors_of(grade) == ["too_many"]


async def test_grade_too_slow_in_one_call_is_named(examine: Examine) -> None:
    grade = await examine(Judged(delay_s=lambda _: 30.0), "--timeout", "0.3")

    assert errors_of(grade) == ["no_answer", "too_slow"]
    assert "limit of 0.3 s; 0 of 12" in text_of(grade, "too_slow")
    assert grade.runs[0].elapsed_s < 2


async def test_grade_limit_is_for_all_calls_together(examine: Examine) -> None:
    """Each call would be within it alone."""
    judged = Judged(delay_s=lambda call: (3.0, 0.0, 3.0)[call])

    grade = await examine(judged, *IN_CHUNKS, "--timeout", "5")

    assert errors_of(grade) == ["no_answer", "too_slow"]
    assert "8 of 12 questions had been answered" in text_of(grade, "too_slow")


async def test_grade_wrong_json_is_named(examine: Examine) -> None:
    grade = await examine(Judged(body=lambda _: b'{"response": ["a", '))

    assert errors_of(grade) == ["no_answer", "not_json"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"response": "one text"}', "no_list"),
        (b'{"response": {"0": "a"}}', "no_list"),
        (b'{"response": null}', "no_list"),
        (b'{"answers": ["a"]}', "no_response"),
        (b'["a"]', "no_response"),
    ],
)
async def test_grade_answer_of_another_shape_is_named(
    examine: Examine, body: bytes, code: str
) -> None:
    assert errors_of(await examine(Judged(body=lambda _: body))) == ["no_answer", code]


async def test_grade_answers_that_are_no_texts_are_named(examine: Examine) -> None:
    grade = await examine(Judged(reply=lambda answers, _: [None, 7, *answers[2:]]))

    assert errors_of(grade) == ["empty_answers", "not_text"]
    assert "2 answers are no texts; the first, null, is number 1" in text_of(grade, "not_text")


@pytest.mark.parametrize(
    ("beside", "code"),
    [
        ({"error": {"message": "CUDA out of memory"}}, "error_beside"),
        ({"errors": ["boom"]}, "odd_errors"),
        ({"errors": {"²": "no number"}}, "odd_errors"),
        ({"errors": {"99": "no place"}}, "odd_errors"),
    ],
)
async def test_grade_complaint_beside_good_answers_is_named(
    examine: Examine, beside: dict[str, Any], code: str
) -> None:
    answers = [pair.reference for pair in read_pairs(12)]
    body = json.dumps({"response": answers, **beside}).encode()

    grade = await examine(Judged(body=lambda _: body))

    assert errors_of(grade) == [code]
    assert grade.runs[0].exact == 1.0


async def test_grade_half_characters_are_named_and_can_be_written(
    examine: Examine, tmp_path: Path
) -> None:
    grade = await examine(Judged(reply=lambda answers, _: [answers[0] + "\ud83d", *answers[1:]]))

    assert errors_of(grade) == ["broken_text"]
    assert "the first is number 1" in text_of(grade, "broken_text")
    grade.write(tmp_path / "details.json")
    write_report(grade, tmp_path / "details.html")


async def test_grade_json_nested_too_deeply_is_named(examine: Examine) -> None:
    body = b'{"response": ' + b"[" * 200_000

    assert errors_of(await examine(Judged(body=lambda _: body))) == ["no_answer", "not_json"]


async def test_grade_redirect_is_named_with_its_goal(examine: Examine) -> None:
    judged = Judged(status=lambda _: 307, body=lambda _: b"", location="/elsewhere")
    grade = await examine(judged)

    assert errors_of(grade) == ["http_error", "no_answer"]
    assert "307 (a redirect to '/elsewhere'" in text_of(grade, "http_error")


async def drip(request: web.Request) -> web.StreamResponse:
    """Always a little more, never the end."""
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(b" ")
        await asyncio.sleep(0.1)


async def nest(_request: web.Request) -> web.Response:
    return web.Response(body=b"[" * 200_000)


async def test_grade_root_that_never_ends_is_never_ready(questions: Path) -> None:
    app = web.Application()
    app.router.add_get("/", drip)
    async with serve_app(app) as url, asyncio.timeout(10):
        with pytest.raises(ServerNeverReady, match="not answered to its end"):
            await grade_at(url, questions, "--ready_timeout", "0.5")


@pytest.mark.parametrize("route", ["/v1/models", "/tokenize"])
@pytest.mark.parametrize("handler", [drip, nest])
async def test_grade_survives_odd_answers_beside_the_contract(
    questions: Path, monkeypatch: pytest.MonkeyPatch, route: str, handler: Any
) -> None:
    monkeypatch.setattr("lab.grade.token_counts._LIMIT_S", 0.5)
    app = build_judged(Judged(), {route: handler})
    async with serve_app(app) as url, asyncio.timeout(20):
        grade = await grade_at(url, questions)

    assert errors_of(grade) == []
    assert "no_tokenizer" in notes_of(grade)


async def test_grade_broken_tokenizer_is_named(examine: Examine, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")

    grade = await examine(Judged(), "--model_path", str(tmp_path))

    assert "tokenizer.json cannot be read" in text_of(grade, "no_tokenizer")


async def test_grade_terminal_obeys_no_stranger(examine: Examine) -> None:
    judged = Judged(status=lambda _: 500, body=lambda _: b"boom\x1b[2J\nverdict: no faults")
    grade = await examine(judged)

    lines = list(describe_grade(grade, coloured=False))
    assert any(line.endswith("500: boom [2J verdict: no faults") for line in lines)


async def test_grade_refused_prompts_are_named_with_their_reason(examine: Examine) -> None:
    def refuse(answers: list[str], _call: int) -> list[str]:
        return ["" if place == 4 else text for place, text in enumerate(answers)]

    judged = Judged(reply=refuse, errors={"4": {"message": "the prompt is too long"}})
    grade = await examine(judged)

    assert errors_of(grade) == ["refused"]
    assert text_of(grade, "refused").endswith("question 5; the first: the prompt is too long")


async def test_grade_error_status_is_named_with_its_words(examine: Examine) -> None:
    judged = Judged(status=lambda _: 500, body=lambda _: b"out of memory")
    grade = await examine(judged)

    assert errors_of(grade) == ["http_error", "no_answer"]
    assert text_of(grade, "http_error") == "POST /predict answered 500: out of memory"


async def test_grade_single_prompt_answered_by_a_list_is_noted(examine: Examine) -> None:
    judged = Judged(root={"status": "ok"}, reply=lambda answers, _: [answers[0] + " "])
    grade = await examine(judged)

    assert errors_of(grade) == []
    assert "list_of_one" in notes_of(grade)


async def test_grade_unknown_mode_is_named(examine: Examine) -> None:
    with pytest.raises(ServerNeverReady) as caught:
        await examine(Judged(root={"status": "turbo"}), "--ready_timeout", "0.4")

    assert caught.value.problem.code == "unknown_mode"
    assert "turbo" in str(caught.value)


@pytest.mark.parametrize(
    "judged",
    [
        Judged(warming_calls=1000),
        Judged(root={"status": "warming"}),
        Judged(root={"status": "batch"}, root_status=503),
    ],
    ids=["503", "word", "batch_but_503"],
)
async def test_grade_server_that_never_warms_up_is_named(examine: Examine, judged: Judged) -> None:
    with pytest.raises(ServerNeverReady) as caught:
        await examine(judged, "--ready_timeout", "0.4")

    assert caught.value.problem.code == "never_ready"


async def test_grade_waits_for_a_server_that_warms_up(examine: Examine) -> None:
    grade = await examine(Judged(warming_calls=2))

    assert errors_of(grade) == []
    assert grade.facts.ready_s > 0.5


async def test_grade_nobody_there_is_never_ready(questions: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, not listening: refused for certain
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ServerNeverReady, match="ConnectError"):
            await grade_at(url, questions, "--ready_timeout", "0.3")


async def test_grade_unstable_answers_are_noted(examine: Examine) -> None:
    def vary(answers: list[str], call: int) -> list[str]:
        return [answers[0], answers[1] + ("。" * call), *answers[2:]]

    grade = await examine(Judged(reply=vary), "--runs", "2")

    assert next(f for f in grade.findings if f.code == "unstable_answers").questions == (2,)
    assert len(grade.runs) == 2


async def test_grade_fault_of_one_run_is_not_lost_among_others(examine: Examine) -> None:
    def blank_once(answers: list[str], call: int) -> list[str]:
        return ["", *answers[1:]] if call == 1 else answers

    grade = await examine(Judged(reply=blank_once), "--runs", "3")

    assert errors_of(grade) == ["empty_answers"]


async def test_grade_repeated_questions_have_their_own_figures(examine: Examine) -> None:
    def blank_first(answers: list[str], _call: int) -> list[str]:
        return ["", *answers[1:]]

    grade = await examine(Judged(reply=blank_first), "--repeat", "3")

    run = grade.runs[0]
    assert grade.facts.questions == 36
    assert grade.facts.unique_questions == 12
    assert "repeated_questions" in notes_of(grade)
    assert run.rouge_whitespace == pytest.approx(35 / 36)
    assert run.unique_rouge_whitespace == pytest.approx(11 / 12)
    assert run.unique_speed.characters < run.speed.characters / 2


async def test_grade_counts_tokens_by_folder_and_by_server_alike(examine: Examine) -> None:
    here = await examine(Judged(), "--model_path", str(MODEL_FOLDER))
    there = await examine(Judged(model="any"))
    nowhere = await examine(Judged())

    assert here.runs[0].speed.tokens == there.runs[0].speed.tokens
    assert (here.runs[0].speed.tokens or 0) > 500
    assert there.facts.tokens_by == "the server's /tokenize"
    assert nowhere.runs[0].speed.tokens is None
    assert "no_tokenizer" in notes_of(nowhere)


async def test_grade_key_is_sent_and_not_written_down(examine: Examine) -> None:
    judged = Judged()

    grade = await examine(judged, "--api_key", "sk-secret")

    assert judged.headers[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(grade.pack())


async def test_grade_server_fixture_is_a_judge_of_itself() -> None:
    """The stand-in answers what it is asked, so that the tests above test the grader."""
    pair = read_pairs(1)[0]
    async with serve_app(build_judged(Judged())) as url, httpx.AsyncClient(verify=NO_TLS) as client:
        one = await client.post(f"{url}/predict", json={"prompt": pair.question})
        many = await client.post(f"{url}/predict", json={"prompt": [pair.question]})

    assert one.json() == {"response": pair.reference}
    assert many.json() == {"response": [pair.reference]}
