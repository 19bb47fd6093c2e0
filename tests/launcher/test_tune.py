"""`launcher tune`: what it tries, what it keeps, what it refuses; the whole of it over the fake."""

from __future__ import annotations

import itertools
import json
import signal
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.plan.command import build_arguments
from launcher.plan.engine_plan import EngineOption, build_plan
from launcher.plan.flags.known_flags import read_shipped_flags, try_commands
from launcher.plan.hardware import parse_device
from launcher.tuning.candidates import (
    Candidate,
    CandidateResult,
    choose,
    combine,
    list_candidates,
)
from launcher.tuning.rouge import mean_rouge_l, rouge_l
from tests.launcher.programs import Launcher, running, wait_for
from tests.launcher.test_explain import call
from tests.launcher.test_profiles import GPUS, make_plan

pytestmark = pytest.mark.programs

FLAGS = read_shipped_flags()


def result(name: str, axis: str, speed: float, loss: float = 0.0) -> CandidateResult:
    return CandidateResult(Candidate(name, axis, "", {name: 1}), [speed], [1.0], loss)


def test_rouge_l_known_texts_has_known_values() -> None:
    assert rouge_l("", "") == 1
    assert rouge_l("a b c", "a b c") == 1
    assert rouge_l("线程块", "线程网格") == pytest.approx(4 / 7)
    assert rouge_l("the cat sat", "the dog sat down") == pytest.approx(4 / 7)
    assert mean_rouge_l(["a", "b"], ["a", "c"]) == 0.5


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_rouge_l_any_texts_agrees_with_the_table_method(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, j in itertools.product(range(len(a)), range(len(b))):
        same = table[i][j] + 1 if a[i] == b[j] else 0
        table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    expected = 2 * table[-1][-1] / (len(a) + len(b)) if a and b else float(a == b)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_choose_fastest_honest_wins() -> None:
    rows = [result("shipped", "", 100), result("a", "x", 150), result("b", "y", 200, loss=0.5)]
    assert choose(rows, 0.02).candidate.name == "a"


def test_choose_gain_within_noise_keeps_the_shipped() -> None:
    assert choose([result("shipped", "", 100), result("a", "x", 101)], 0.02).speed == 100


def test_combine_takes_the_best_of_every_axis() -> None:
    rows = [
        result("shipped", "", 100),
        result("a", "x", 110),
        result("b", "x", 120),
        result("c", "y", 130),
        result("liar", "z", 900, loss=1),
    ]
    combined = combine(rows, 0.02)
    assert combined is not None
    assert combined.options == {"b": 1, "c": 1}
    assert combine(rows[:3], 0.02) is None
    rows[3].failure = "it crashed in its second round"
    assert combine(rows, 0.02) is None


@pytest.mark.parametrize("gpu", GPUS)
def test_candidates_on_a_gpu_change_something_and_avoid_known_bugs(gpu: str) -> None:
    plan = make_plan("course", gpu, "qwen3-0.6b")
    candidates = list_candidates(plan.device, plan)
    names = {candidate.name for candidate in candidates}
    assert {"as shipped", "four-servers", "large-steps"} <= names
    assert ("flashinfer" in names) == (gpu in ("H200", "B200"))
    assert all(c.changes for c in candidates[1:])


@pytest.mark.engine
@pytest.mark.parametrize("gpu", [*GPUS, "cpu"])
def test_vllms_scheduler_is_a_candidate_where_the_profile_has_the_launchers(gpu: str) -> None:
    plan = make_plan("cpu" if gpu == "cpu" else "course", gpu, "qwen3-0.6b")
    (candidate,) = (c for c in list_candidates(plan.device, plan) if c.axis == "scheduler")
    tried = [EngineOption(name, value) for name, value in candidate.options.items()]

    other = build_plan(plan.profile, plan.device, plan.model, FLAGS, overrides=tried)

    assert plan.value("scheduler-cls")
    assert "scheduler-cls" not in {option.name for option in other.options}
    names = {c.axis for c in list_candidates(plan.device, other)}
    assert "scheduler" not in names


@pytest.mark.engine
@pytest.mark.usefixtures("quick_parser")
def test_installed_parser_accepts_every_candidate() -> None:
    commands = {}
    for gpu in GPUS:
        plan = make_plan("course", gpu, "qwen3-0.6b")
        for candidate in list_candidates(plan.device, plan):
            tried = [EngineOption(k, v, "", "", "tune") for k, v in candidate.options.items()]
            device, model = parse_device(gpu), plan.model
            whole = build_plan("course", device, model, FLAGS, overrides=tried)
            commands[gpu, candidate.name] = ["m", *build_arguments(whole.options, FLAGS)]
    verdicts = dict(zip(commands, try_commands(list(commands.values())), strict=True))
    assert {key: verdict for key, verdict in verdicts.items() if verdict} == {}


@pytest.mark.slow
def test_tune_over_the_fake_keeps_the_fast_refuses_the_wrong(tmp_path: Path) -> None:
    # 4096 is `small-steps`; 192 is `half-batch`, as fast but with other answers.
    launcher = Launcher(tmp_path, fake="fast_with=4096 wrong_with=192")
    code, out, err = call(launcher, "tune", "--tune-rounds", "2", "--tune-prompts", "8")
    assert code == 0, err
    assert out.index("round 1  half-batch") < out.index("round 2  as shipped")
    assert "refused half-batch" in out
    tuned = tomllib.loads((tmp_path / "cache" / "tuned.toml").read_text())
    assert tuned["options"]["max-num-batched-tokens"] == 4096
    assert 192 not in tuned["options"].values()
    rows = json.loads(Path(tuned["measurements"]).read_text())
    # On a noisy machine another one gains its 2 % by chance: both are then tried together, beside
    # the shipped one once more.
    is_combined = rows[-1]["candidate"]["name"] == "together"
    winner = tuned["summary"].partition(",")[0]
    assert winner == "small-steps" or (is_combined and winner == "together")
    assert [len(row["speeds"]) for row in rows] == [6 + 6 * is_combined] + [6] * (len(rows) - 1)
    launcher.fake = ""
    with running(launcher):
        status = launcher.wait_state("ready")
        argv = status["argv"]
        assert argv[argv.index("--max-num-batched-tokens") + 1] == "4096"
        assert winner in launcher.err
    assert launcher.processes() == []


def test_tune_engine_that_dies_under_its_batch_is_left_out(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, fake="fast_with=192 dies_with=4096")
    arguments = ("--tune-rounds", "2", "--tune-prompts", "2", "--tune-repeats", "1")
    code, out, err = call(launcher, "tune", *arguments)
    assert code == 0, err
    (told,) = [line for line in out.splitlines() if " small-steps" in line and "min left" in line]
    assert "the engine crashed" in told
    assert "4096" not in (tmp_path / "cache" / "tuned.toml").read_text()
    assert launcher.processes() == []


def test_tune_engine_that_dies_under_the_reference_is_one_line_and_4(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, fake="dies_with=--port")
    code, _, err = call(launcher, "tune", "--tune-prompts", "2")
    assert code == 4
    (line,) = [line for line in err.splitlines() if line.startswith("launcher: ")]
    assert "the engine crashed" in line
    assert "Traceback" not in err
    assert launcher.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("fake", ["", "hang_loading ignore_term"])
def test_tune_interrupted_leaves_nothing_and_no_traceback(
    tmp_path: Path, number: signal.Signals, fake: str
) -> None:
    """A real engine does not listen to SIGTERM while it loads."""
    launcher = Launcher(tmp_path, command="tune", fake=fake)
    with running(launcher):
        wait_for((launcher.state / "engine.json").exists, "an engine is started")
        if fake:
            wait_for(lambda: len(launcher.processes()) > 3, "it loads")
        launcher.send(number)
        time.sleep(0.02)
        launcher.send(number)  # the impatient do not break off the end of what they began
        assert launcher.wait() == 128 + number
    assert not (launcher.state / "engine.json").exists()
    assert launcher.err == ""
    assert launcher.processes() == []


def test_tune_result_that_cannot_be_written_is_one_line_and_2(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, fake="fast_with=4096")
    (tmp_path / "cache" / "tuned.toml").mkdir(parents=True)
    arguments = ("--tune-rounds", "1", "--tune-prompts", "2", "--tune-repeats", "1")
    code, out, err = call(launcher, "tune", *arguments)
    assert code == 2
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("launcher: ")]
    assert "set LAUNCHER_CACHE_DIR" in line
    assert "max-num-batched-tokens=4096" in line  # found is found
    assert "times the profile as shipped" in out
    assert [path.suffix for path in (tmp_path / "cache").glob("tuned.toml*")] == [".toml"]


def test_tuned_on_another_host_is_ignored_with_a_line(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    text = 'host_key = "other"\nprofile = "cpu"\nsummary = "s"\n[options]\nmax-num-seqs = 7\n'
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tuned.toml").write_text(text + "[environment]\n")
    code, out, _ = call(launcher, "explain", "--all")
    assert code == 0
    assert "measured for another host, model or vLLM: not used" in out
    assert "max-num-seqs = 384" in out


def test_tuned_carried_in_a_settings_file_is_used_where_the_same_runs(tmp_path: Path) -> None:
    """Measured on one host; on another, which has no cache of it, the file alone is there."""
    carried = tmp_path / "course.toml"
    carried.write_text("[gateway]\nmax_tokens = 9  # kept\n")
    launcher = Launcher(tmp_path, fake="fast_with=4096")
    arguments = ("--tune-rounds", "1", "--tune-prompts", "2", "--tune-repeats", "1")
    only = ("--tune-only", "small-steps", "--tune-into", str(carried))
    code, out, err = call(launcher, "tune", *arguments, *only)
    assert code == 0, err
    assert f"{carried}: small-steps" in out
    assert "max_tokens = 9  # kept" in carried.read_text()
    table = tomllib.loads(carried.read_text())["tuned"]
    assert table["options"] == {"max-num-batched-tokens": 4096}

    here = tmp_path / "cache" / "tuned.toml"
    here.write_text(here.read_text().replace('"max-num-batched-tokens" = 4096', ""))
    out = call(launcher, "explain", "--all", "--config", str(carried))[1]
    assert "max-num-batched-tokens = 4096" not in out  # the profile as shipped was fastest here
    here.unlink()
    code, out, err = call(launcher, "explain", "--all", "--config", str(carried))
    assert (code, "max-num-batched-tokens = 4096" in out) == (0, True), err
    assert f"[tuned] of {carried}: small-steps" in out
    assert "max-num-batched-tokens = 4096" not in call(launcher, "explain", "--all")[1]

    carried.write_text(carried.read_text().replace(table["model"], "another"))
    out = call(launcher, "explain", "--all", "--config", str(carried))[1]
    assert f"was measured for model another, not {table['model']}: not used" in out
    carried.write_text("[tuned")
    code, _, err = call(launcher, "tune", *arguments, *only)
    assert (code, f"cannot read the settings file {carried}" in err) == (2, True)
    carried.write_text("[tuned]\nprofile = 'cpu'\n")
    code, _, err = call(launcher, "explain", "--all", "--config", str(carried))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot be read (KeyError('options'))" in err


def test_tuned_file_that_is_broken_is_one_line_and_2(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tuned.toml").write_text("host_key =")
    code, _, err = call(launcher, "serve")
    assert code == 2
    assert "tuned.toml cannot be read" in err
    assert len(err.splitlines()) == 1


def test_tune_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    code, out, err = call(launcher, "tune", "--tune-minutes", "0.01", "--tune-prompts", "2")
    assert code == 3
    assert "left out: the time is used up" in out
    assert "0.01 minutes are too short for it (LAUNCHER_TUNE_MINUTES)" in err


def test_tune_only_tries_those_named_and_knows_their_names(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    code, out, _ = call(launcher, "tune", "--dry-run", "--tune-only", "half-batch small-steps")
    assert code == 0
    named = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert named == ["as", "small-steps", "half-batch"]
    code, _, err = call(launcher, "tune", "--tune-only", "half-bach")
    assert code == 2
    assert "half-bach is no candidate here; did you mean half-batch?" in err


def test_tune_dry_run_starts_nothing(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    code, out, _ = call(launcher, "tune", "--dry-run")
    assert code == 0
    assert "small-steps" in out
    assert not (tmp_path / "state").exists()


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_tune_on_the_cpu_result_is_used_by_the_next_start(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path, fake=None)
    arguments = ("--tune-rounds", "1", "--tune-repeats", "1", "--tune-only", "small-steps")
    few = ("--tune-prompts", "16")
    code, out, err = call(launcher, "tune", *arguments, *few, timeout_s=580)
    assert code == 0, err
    told = [line for line in out.splitlines() if "tokens/s, ROUGE-L loss 0.0" in line]
    assert [line.split("  ")[1] for line in told] == ["as shipped", "small-steps"]
    tuned = tomllib.loads((tmp_path / "cache" / "tuned.toml").read_text())
    explained = call(launcher, "explain", "--all")[1]
    assert tuned["summary"] in explained
    assert launcher.processes() == []


@pytest.mark.parametrize(("gpu", "sizes"), [("H200", []), ("2x H200", [2]), ("3x H200", [])])
def test_all_gpus_are_a_candidate_where_they_divide_the_model(gpu: str, sizes: list[int]) -> None:
    plan = make_plan("latency", gpu, "qwen3-0.6b")
    found = [one.options for one in list_candidates(plan.device, plan) if one.name == "all-gpus"]
    assert [options["tensor-parallel-size"] for options in found] == sizes
