"""`python -m lab grade` as people start it: command lines, exit codes, files, its own server."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.ports import find_free_row
from lab.__main__ import run_command
from lab.grade import grade_options, run_grade
from lab.launched_server import LaunchCommand, launch
from lab.reports.console import ProgressLine
from tests.lab.judged import read_pairs
from tests.launcher.programs import FAKE_VLLM, MODEL, ROOT, wait_for
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.slow  # programs, files and signals; what they do is tested on every Python

GRADE = [sys.executable, "-m", "lab", "grade"]


def environment(folder: Path, **settings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LAUNCHER_", "GATEWAY_"))}
    own = {
        "PYTHONPATH": f"{FAKE_VLLM}:{ROOT}",
        "FAKE_VLLM": "",
        "LAUNCHER_STATE_DIR": str(folder / "state"),
        "LAUNCHER_CACHE_DIR": str(folder / "cache"),
        "LAUNCHER_MODEL": str(MODEL),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {**kept, **own, **settings}


def run(folder: Path, *options: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GRADE, "--details_out", str(folder / "details.json"), *options],
        cwd=ROOT,
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=PROGRAM_S,
        check=False,
    )


def read(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "details.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A judged server in a process of its own, which is the same after every grade."""
    port = find_free_row(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.judged", "--port", str(port)], cwd=ROOT
    )

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, verify=NO_TLS).is_success
        return False

    try:
        wait_for(answers, "the judged server")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(PROGRAM_S)


def test_command_line_of_the_seed_evaluator_works(
    url: str, questions: Path, tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        *("--no_start_server", "--server_url", url, "--model_path", str(MODEL)),
        *("--official_test", str(questions), "--repeat", "3", "--request_chunk_size", "10"),
        *("--timeout", "360.0"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    samples = r"^samples +36, 12 different, in 4 calls of up to 10$"
    assert re.search(samples, done.stdout, re.MULTILINE)
    assert re.search(r"^avg ROUGE-L \(F1\) +1\.000000", done.stdout, re.MULTILINE)
    assert re.search(r"^tokens/s +[\d,.]+ ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-2] == "no faults"
    answer = read(tmp_path)["answers"][0]
    assert {"question", "reference", "prediction", "rougeL_f1"} <= answer.keys()


def test_grade_leaves_details_report_and_record(url: str, questions: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"

    done = run(
        tmp_path,
        *("--no-start-server", f"--server-url={url}", "--questions", str(questions)),
        *("--runs", "2", "--record", str(record)),
    )

    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path)["runs"]) == 2
    assert "<!doctype html>" in (tmp_path / "details.html").read_text(encoding="utf-8")
    kept = json.loads(record.read_text(encoding="utf-8"))
    assert kept["figures"][0]["name"] == "ROUGE-L, course reading"
    assert kept["command"].startswith("python -m lab grade")


def test_baseline_decides_the_exit_code(url: str, questions: Path, tmp_path: Path) -> None:
    options = ("--no_start_server", "--server_url", url, "--questions", str(questions))
    assert run(tmp_path, *options).returncode == 0
    better = read(tmp_path)
    for answer in better["answers"]:
        answer["rougeL_f1"], answer["rougeL_f1_whitespace"] = 2.0, 2.0
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(better))

    done = run(tmp_path, *options, "--baseline", str(baseline))

    assert done.returncode == 1
    assert "FAULT worse_than_baseline: ROUGE-L, course: 1, but 2 in" in done.stdout
    compared = subprocess.run(
        [*GRADE, "--compare", str(baseline), str(tmp_path / "details.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert compared.returncode == 1
    assert "really worse" in compared.stdout


def test_grade_starts_its_own_server_and_stops_it(questions: Path, tmp_path: Path) -> None:
    """The stand-in engine answers with what it was asked, so the grade is bad; it is one."""
    port = find_free_row(3)

    done = run(
        tmp_path, "--port", str(port), "--questions", str(questions), "--max_new_tokens", "64"
    )

    assert done.returncode == 1, done.stderr
    details = read(tmp_path)
    assert details["facts"]["model"] == "demo"
    assert details["facts"]["engine"]["profile"] == "cpu"
    assert details["runs"][0]["answered"] == 12
    assert f"--port {port} --engine-port {port + 1} --status-port {port + 2}" in done.stderr
    for number in range(3):
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port + number)) != 0
    assert "launcher_stopped" in (tmp_path / "grade-server.log").read_text()


def test_grade_interrupted_stops_its_server(questions: Path, tmp_path: Path) -> None:
    port = find_free_row(3)
    process = subprocess.Popen(
        [
            *GRADE,
            *("--port", str(port), "--questions", str(questions)),
            *("--details_out", str(tmp_path / "details.json")),
        ],
        cwd=ROOT,
        env=environment(tmp_path, FAKE_VLLM="hang_loading"),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "grade-server.log"
    wait_for(lambda: log.exists() and "launcher_started" in log.read_text(), "the launcher")

    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 130
    assert said.endswith("grade: interrupted\n")
    assert "launcher_stopped" in log.read_text()


def test_grade_killed_takes_its_server_with_it(questions: Path, tmp_path: Path) -> None:
    """SIGKILL leaves it no last word; the engine's core ignores SIGTERM."""
    port = find_free_row(3)
    command = [*GRADE, "--port", str(port), "--questions", str(questions)]
    command += ["--details_out", str(tmp_path / "details.json"), "--ready_timeout", "60"]
    # Its server never gets ready, so that the grader is still waiting when it is killed.
    settings = environment(tmp_path, FAKE_VLLM="hang_loading", LAUNCHER_KILL_TIMEOUT_S="1")
    process = subprocess.Popen(command, cwd=ROOT, env=settings, stderr=subprocess.DEVNULL)
    log = tmp_path / "grade-server.log"
    try:
        wait_for(lambda: len(find_processes(tmp_path)) > 4, "grader, launcher, engine, watchers")
        wait_for(lambda: "launcher_started" in log.read_text(), "the launcher's handlers")
    finally:
        process.kill()
        process.wait(PROGRAM_S)

    try:
        wait_for(lambda: not find_processes(tmp_path), "nothing is left")
    finally:
        for pid in find_processes(tmp_path):
            os.kill(pid, signal.SIGKILL)
    assert "launcher_stopped" in log.read_text()


def find_processes(folder: Path) -> dict[int, str]:
    """Names of those with a file of this folder in their environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"={folder}/".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "comm").read_text().strip()
    return found


def test_grade_leaves_no_watcher_behind(tmp_path: Path) -> None:
    """The watcher waits for this process, which lives on."""
    command = LaunchCommand("127.0.0.1", find_free_row(3), environment=environment(tmp_path))
    with launch(command, tmp_path / "log", ProgressLine()) as started:
        wait_for(lambda: "launcher_started" in started.log_path.read_text(), "the launcher")
        assert "parent_death" in find_processes(tmp_path).values()

    wait_for(lambda: not find_processes(tmp_path), "nothing is left")


def test_server_that_does_not_start_is_named(questions: Path, tmp_path: Path) -> None:
    port = find_free_row(3)
    (tmp_path / "details.html").write_text("an earlier one")

    done = run(
        tmp_path, "--port", str(port), "--questions", str(questions), "--", "--profile", "none"
    )

    assert done.returncode == 3
    assert "never_started: the launcher ended with 2" in done.stderr
    assert "there is no profile 'none'" in done.stderr
    assert read(tmp_path)["findings"][0]["code"] == "never_started"
    assert not (tmp_path / "details.html").exists()


def test_running_server_is_graded_as_it_is(url: str, questions: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "--server_url", url, "--questions", str(questions), "--batch_size", "7")

    assert done.returncode == 0, done.stderr
    assert "answers at" in done.stderr
    assert "no effect on one that is running" in done.stderr
    assert not (tmp_path / "grade-server.log").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--questions", "/nowhere.txt"), "grade: /nowhere.txt: No such file"),
        (("--runs", "0"), "0 is no whole number from 1 on"),
        (("--timeout", "soon"), "soon is no time in seconds"),
        (("--server_url", "ftp://x"), "--server-url/--url: ftp://x is no http address"),
        (("--compare", "/no.json", "/no.json"), "grade: /no.json: "),
        (("--baseline", "/no.json"), "grade: /no.json: "),
        (("--server_url", "https://127.0.0.1:9/x"), "cannot start a server at https://"),
        (("--server_url", "http://127.0.0.1:99999"), "is no http address"),
        (("--server_url", "http://[::1"), "is no http address"),
        (("--server_url", "http://a b"), "is no http address"),
        (("--port", "99999"), "99999 is no port"),
        (("--timeout", "inf"), "inf is no time in seconds"),
        (("--floor", "nan"), "nan is no score from 0 to 1"),
        (("--api_key", "a\nb"), "--api-key: it holds characters"),
        (("--count", "99999999999"), "99,999,999,999 questions are too many"),
        (("--details_out", "/proc/x/y.json"), "cannot write /proc/x/y.json: "),
        (("--details_out", str(ROOT)), "it is a folder"),
        (("--details_out", "x.json", "--report_out", "./x.json"), "are the same file"),
        (("--questions", "x.txt", "--record", "x.txt"), "are the same file"),
        (("--questions", "~nobody_here/x"), "No such file"),
    ],
)
def test_bad_options_say_what_is_wrong(
    tmp_path: Path, options: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--details_out", str(tmp_path / "details.json"), *options]

    try:
        code: object = run_command("grade", run_grade.main, words)
    except SystemExit as error:  # argparse's own
        code = error.code

    assert code == 2
    said = capsys.readouterr()
    assert complaint in said.err
    assert said.out == ""


def test_program_that_is_told_nonsense_ends_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--questions", "/nowhere.txt")

    assert done.returncode == 2
    assert done.stderr == "grade: /nowhere.txt: No such file or directory\n"


def test_baseline_of_other_questions_is_remarked(url: str, questions: Path, tmp_path: Path) -> None:
    first = run(tmp_path, "--server_url", url, "--questions", str(questions), "--count", "5")
    earlier = (tmp_path / "details.json").rename(tmp_path / "earlier.json")
    options = ("--server_url", url, "--questions", str(questions), "--baseline", str(earlier))

    done = run(tmp_path, *options)

    assert (first.returncode, done.returncode) == (0, 0), done.stderr
    assert "baseline_remark: 7 questions are in one of the two alone" in done.stdout
    assert "baseline_remark: ROUGE-L, course: cannot be told: 5 questions" in done.stdout


@pytest.mark.parametrize("option", ["--details_out", "--report_out", "--record"])
def test_full_disk_is_said_after_the_figures(
    url: str, questions: Path, tmp_path: Path, option: str
) -> None:
    full = tmp_path / "full.json"
    full.symlink_to("/dev/full")

    done = run(tmp_path, "--server_url", url, "--questions", str(questions), option, str(full))

    assert done.returncode == 2
    assert "avg ROUGE-L" in done.stdout
    assert done.stderr.splitlines()[-1] == f"grade: cannot write {full}: No space left on device"
    assert full.is_symlink()


def test_output_that_cannot_be_written_is_one_line(
    url: str, questions: Path, tmp_path: Path
) -> None:
    command = [*GRADE, "--no_start_server", "--server_url", url, "--questions", str(questions)]
    command += ["--details_out", str(tmp_path / "details.json")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )

    assert (done.returncode, done.stderr) == (
        2,
        "grade: cannot write standard output: No space left on device\n",
    )
    assert (tmp_path / "details.json").exists()


def test_reader_who_leaves_is_no_fault(url: str, questions: Path, tmp_path: Path) -> None:
    command = [*GRADE, "--no_start_server", "--server_url", url, "--questions", str(questions)]
    command += ["--details_out", str(tmp_path / "details.json")]
    outside, inside = os.pipe()
    os.close(outside)
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=inside, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(inside)

    assert (done.returncode, done.stderr) == (0, "")


def test_terminal_without_chinese_gets_escapes(url: str, tmp_path: Path) -> None:
    """What is shown of a skipped block is Chinese."""
    path = tmp_path / "questions.txt"
    pairs = "".join(f"（1. 问题：{one.question}\n答案：{one.reference}\n" for one in read_pairs(3))
    path.write_text(f"{pairs}（2. 问题：没有\n", encoding="utf-8")

    done = run(tmp_path, "--server_url", url, "--questions", str(path), PYTHONIOENCODING="ascii")

    assert done.returncode == 0, done.stderr
    assert "\\u6ca1\\u6709" in done.stdout


def choose(url: str, questions: Path, folder: Path) -> list[str]:
    command = [*GRADE, "--no_start_server", "--server_url", url, "--questions", str(questions)]
    return [*command, "--details_out", str(folder / "details.json")]


def start_on_terminal(command: list[str], folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """The program, and what its terminal shows."""
    outside, inside = pty.openpty()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(folder), stdout=subprocess.DEVNULL, stderr=inside
    )
    os.close(inside)
    return process, outside


def read_rest(terminal: int) -> bytes:
    shown = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(terminal, 65536):
            shown += chunk
    os.close(terminal)
    return shown


def test_interrupted_while_scoring_ends_at_once(url: str, tmp_path: Path) -> None:
    """Many long references take long to score, without a wait in between."""
    rows = [{"question": f"question {n}", "answer": f"{n} " + "word " * 400} for n in range(900)]
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    process, terminal = start_on_terminal(choose(url, path, tmp_path), tmp_path)
    shown = b""
    while b"scoring" not in shown:
        shown += os.read(terminal, 65536)

    process.send_signal(signal.SIGINT)
    assert process.wait(PROGRAM_S) == 130
    shown = read_rest(terminal)
    assert shown.endswith(b"grade: interrupted\r\n")
    assert b"Traceback" not in shown


def test_terminal_sees_a_bar_and_others_lines(url: str, questions: Path, tmp_path: Path) -> None:
    command = choose(url, questions, tmp_path)
    process, terminal = start_on_terminal(command, tmp_path)
    shown = read_rest(terminal)

    assert process.wait(PROGRAM_S) == 0
    assert "█" * 28 in shown.decode()
    assert "12/12" in shown.decode()
    plain = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert plain.stderr == ""
    assert "\x1b" not in plain.stdout


def test_options_of_the_seed_evaluator_become_settings() -> None:
    words = ["--max_new_tokens", "99", "--vllm_max_num_seqs", "32", "--vllm_disable_warmup"]
    words += ["--model_path", "some/model", "--port", "9100", "--", "--profile", "cpu"]

    launched = grade_options.build_launch_command(grade_options.parse_arguments(words))

    assert launched.environment == {"GATEWAY_MAX_TOKENS": "99", "GATEWAY_WARMUP_PROMPTS": "1"}
    command = launched.describe()
    assert "--port 9100 --engine-port 9101 --status-port 9102 --model some/model" in command
    assert command.endswith("--profile cpu --set max-num-seqs=32")
