"""The cases themselves: the same ones for the same seed, of every kind, as many as one likes."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest

from lab.fuzz.cases.case import Draw, Target, list_bodies, mark
from lab.fuzz.cases.kinds import KINDS, find_kind, make_case, make_cases
from lab.fuzz.cases.stored_cases import fill_id

REAL = Target("demo", "key", echoes=False, ids={"response": "resp_1", "file": "file-1"})


def test_cases_are_the_same_for_the_same_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(1)  # whatever the time is
    monkeypatch.setattr(gzip, "time", SimpleNamespace(time=lambda: next(seconds)))
    cases = list(make_cases(1, 300, REAL))

    assert cases == list(make_cases(1, 300, REAL))
    assert make_case(1, 250, REAL) == cases[250]
    assert cases != list(make_cases(2, 300, REAL))
    assert [find_kind(1, number) for number in range(300)] == [one.kind for one in cases]


def test_cases_are_of_every_kind_by_its_weight() -> None:
    kinds = Counter(find_kind(1, number) for number in range(20_000))
    total = sum(kind.weight for kind in KINDS.values())

    assert set(kinds) == set(KINDS)
    for name, kind in KINDS.items():
        assert kinds[name] == pytest.approx(20_000 * kind.weight / total, rel=0.3), name


def test_cases_carry_their_own_number_and_no_other() -> None:
    numbered = 0
    for case in make_cases(1, 2000, REAL):
        assert case.pieces
        assert all(case.pieces) or case.kind in {"garbled", "framing"}, case
        marks = set(re.findall(rb"#\d{6,}#", case.sent))
        if case.kind not in {"framing", "garbled"}:  # where bytes are turned
            assert marks <= {mark(case.number).encode()}, case
        numbered += mark(case.number).encode() in case.sent
    assert numbered > 1000


def test_case_for_a_real_engine_expects_its_prompt_back_only_where_it_asks_for_it() -> None:
    for case in make_cases(1, 2000, REAL):
        if case.keeps_prompt and case.kind not in {"valid", "hung-up"}:  # which may be packed
            assert b"echo" in case.sent, case


def test_right_bodies_are_small_for_the_engine() -> None:
    for body in list_bodies("x", "demo"):
        lengths = [value for name, value in body.data.items() if "max" in name]
        assert lengths, body
        assert max(lengths) <= 4, body
        assert body.prompt in body.data


def test_what_follows_has_the_id_that_was_told_and_its_own_length() -> None:
    case = next(one for one in make_cases(1, 20_000, REAL) if one.kind == "batches" and one.then)
    told = json.dumps({"id": "file-" + "7" * 40}).encode()

    following = fill_id(case.then[0], told)

    assert following is not None
    head, _, body = following.partition(b"\r\n\r\n")
    assert json.loads(body)["input_file_id"] == "file-" + "7" * 40
    assert f"Content-Length: {len(body)}\r\n".encode() in head + b"\r\n"
    assert fill_id(case.then[0], b'{"id": 5}') is None
    assert fill_id(case.then[0], b"<html>") is None


def test_ids_of_what_is_stored_stand_in_cases_that_ask_for_them() -> None:
    cases = [one for one in make_cases(1, 20_000, REAL) if one.kind == "ids"]

    assert any(b"/v1/responses/resp_1" in one.sent for one in cases)
    assert any(b"/v1/files/file-1" in one.sent for one in cases)
    assert not any(b"@response@" in one.sent or b"@file@" in one.sent for one in cases)


def test_draw_slices_lose_no_byte() -> None:
    for number in range(200):
        case = make_case(3, number, REAL)
        draw = Draw(random.Random(number), number, REAL)
        assert b"".join(draw.slice(case.sent)) == case.sent
