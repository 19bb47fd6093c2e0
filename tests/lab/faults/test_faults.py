"""What makes a row of the fault table red, and what every row must name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lab.__main__ import run_command
from lab.failures import BadOptions
from lab.faults import run_faults
from lab.faults.experiment import Experiment
from lab.faults.fault import GONE, Fault, FaultResult, Signs, judge_result
from lab.faults.signs import Signboard, is_event
from lab.faults.table import list_faults


async def _nothing(_: Experiment) -> None: ...


FAULT = Fault("nothing", "nothing happens", _nothing, Signs(alert="EngineDown"))


def _judge(got: Mapping[str, int], fault: Fault = FAULT, **facts: object) -> list[str]:
    row = {"chat": {"right": 3, **got}}
    result = FaultResult("nothing", "", got=row, recovered_s=1.0, signs=fault.signs)
    return list(judge_result(fault, replace(result, **facts)))  # type: ignore[arg-type]


def test_row_of_right_answers_and_honest_errors_holds() -> None:
    assert _judge({"told 502": 2, "told 503": 1, "told 200": 1}) == []


@pytest.mark.parametrize("word", ["wrong", "doubled", "swapped", "lost"])
def test_row_with_an_answer_that_is_none_does_not_hold(word: str) -> None:
    assert _judge({word: 1}) == [f"1 {word}"]


@pytest.mark.parametrize("word", ["cut", "refused"])
def test_row_with_cut_connections_holds_only_where_their_end_died(word: str) -> None:
    assert _judge({word: 2}) == [f"2 {word}, though nothing died that they were connected to"]
    assert _judge({word: 2}, replace(FAULT, allows=(word,))) == []


def test_row_whose_callers_are_told_that_it_was_their_fault_does_not_hold() -> None:
    assert _judge({"told 400": 1, "told 500": 1}) == [
        "told 400, 500, which says something else than that it failed"
    ]


def test_row_of_a_fault_that_shows_nowhere_must_harm_nobody() -> None:
    hidden = replace(FAULT, signs=Signs())
    assert _judge({}, hidden) == []
    assert _judge({"told 503": 1}, hidden) == ["it costs callers something, and shows nowhere"]


def test_row_whose_alert_would_not_fire_does_not_hold() -> None:
    assert _judge({}, fired=["EngineDown", "TargetDown"]) == []
    assert _judge({}, fired=["TargetDown"]) == [
        "EngineDown would not fire should it last; these would: TargetDown"
    ]


def test_row_without_a_recovery_does_not_hold() -> None:
    assert _judge({}, recovered_s=None) == ["not recovered within 90 s"]


def test_row_that_leaves_processes_does_not_hold() -> None:
    assert _judge({}, left_over=["vllm"]) == ["left over: vllm"]


def test_row_that_answers_nothing_does_not_hold() -> None:
    result = FaultResult("nothing", "", got={"chat": {"told 503": 9}}, recovered_s=1.0)
    assert list(judge_result(FAULT, result)) == ["nothing was answered right"]


def test_row_of_an_end_holds_with_its_documented_exit_code_alone() -> None:
    ends = replace(FAULT, ends_with=4, allows=GONE)
    assert _judge({}, ends, exit_code=4, recovered_s=None) == []
    assert _judge({}, ends, exit_code=0, recovered_s=None) == ["ended with 0 instead of 4"]


def test_signs_that_are_nowhere_are_named() -> None:
    signs = Signs("engine_crashed", "NobodyAwake", "Naps", "overview: Pillows")
    assert list(Signboard().find_missing(signs, [])) == [
        "there is no alert NobodyAwake",
        "the runbook has no section Naps",
        "there is no panel overview: Pillows",
        "engine_crashed was not logged",
    ]


def test_sign_in_the_log_may_name_fields() -> None:
    line = {"event": "request_done", "status": 507, "route": "/v1/files"}
    assert is_event("request_done status=507", line)
    assert is_event("request_done", line)
    assert not is_event("request_done status=200", line)
    assert not is_event("batch_waits", line)


def test_signs_take_section_and_panel_from_their_alert() -> None:
    signs = Signboard().complete(Signs(alert="RedisAway"))
    assert (signs.runbook, signs.panel) == ("RedisAway", "overview: Redis away")


@pytest.mark.parametrize("fault", list_faults(), ids=lambda fault: str(fault.name))
def test_fault_names_signs_that_there_are(fault: Fault) -> None:
    board = Signboard()
    signs = replace(board.complete(fault.signs), log="")

    assert list(board.find_missing(signs, [])) == []


def test_faults_have_names_of_their_own() -> None:
    names = Counter(fault.name for fault in list_faults())
    assert names.most_common(1)[0][1] == 1


def test_list_names_all_faults(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_faults.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        fault.name for fault in list_faults()
    ]


def test_only_with_an_unknown_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--only", "kill-core,kill-bill", "--record", str(tmp_path / "faults.json")]
    assert run_command("faults", run_faults.main, words) == BadOptions.exit_code
    assert capsys.readouterr().err == (
        "faults: there is no fault kill-bill; --list names them all\n"
    )
