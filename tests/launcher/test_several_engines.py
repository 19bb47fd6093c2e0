"""`launcher up` with several `[[engine]]` sections: what each gets of the host, one start after the
other, one status, one gateway; and one that is lost does not take the others with it.
"""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import SettingsError
from common.ports import find_free_ports
from launcher.config import LauncherSettings, load_settings
from launcher.plan.hardware import Device, parse_device
from launcher.plan.prepare import cut_share
from launcher.plan.sharing import Place, Wanted, share_out
from launcher.sections import list_engines, meet
from tests.launcher.programs import MODEL, Launcher, running, wait_for
from tests.plain_http import NO_TLS

FOUR = ("0", "1", "2", "3")
NVIDIA_SMI = '#!/bin/sh\nfor gpu in 0 1; do echo "$gpu, NVIDIA H200"; done\n'


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    """Two models, the first of them twice."""
    other = shutil.copytree(MODEL, tmp_path / "models" / "other")
    one = Launcher(tmp_path, command="up")
    second, third = find_free_ports(2)
    config = tmp_path / "launcher.toml"
    config.write_text(
        f"""
        [[engine]]
        set = ["max-num-seqs=32"]
        [[engine]]
        model = "{other}"
        engine_port = {second}
        set = ["max-num-seqs=64"]
        [[engine]]
        engine_port = {third}
        set = ["max-num-seqs=32"]
        """
    )
    one.settings["LAUNCHER_CONFIG"] = str(config)
    one.settings["LAUNCHER_SERVED_MODEL_NAME"] = ""
    return one


def ask(launcher: Launcher, path: str, **body: Any) -> httpx.Response:
    url = f"http://127.0.0.1:{launcher.port}{path}"
    return httpx.post(url, json=body, trust_env=False, verify=NO_TLS, timeout=60)


def wait_ready(launcher: Launcher) -> str:
    return str(wait_for(lambda: launcher.out, f"ready; {launcher.err[-2000:]}"))


@pytest.mark.programs
def test_up_with_sections_serves_all_of_them_until_the_last(launcher: Launcher) -> None:
    """One start for all of it: three engines take their time."""
    launcher.settings |= {"LAUNCHER_ENGINE_LOG": "all", "LAUNCHER_RESTART_LIMIT": "0"}
    with running(launcher):
        assert wait_ready(launcher).startswith("demo, other ready in ")
        check_calls(launcher)
        check_status(launcher)
        check_loss(launcher)
        assert launcher.stop() == 0
    assert launcher.processes() == []
    check_log(launcher)


def check_calls(launcher: Launcher) -> None:
    url = f"http://127.0.0.1:{launcher.port}"
    # What each runs, as the launcher tells, and an eighth; the gateway warms them one by one.
    most = f"\ngateway_max_running_sequences {36 + 36 + 72}.0\n"
    wait_for(lambda: most in httpx.get(f"{url}/metrics", verify=NO_TLS).text, "all of them")
    listed = httpx.get(f"{url}/v1/models", verify=NO_TLS).json()
    answers = [
        ask(launcher, "/v1/completions", model=model, prompt="q") for model in ("demo", "other")
    ]
    none = ask(launcher, "/v1/completions", model="none", prompt="q")
    predicted = ask(launcher, "/predict", prompt=["a", "b"])
    page = httpx.get(f"{url}/ui/status", verify=NO_TLS).json()

    assert [card["id"] for card in listed["data"]] == ["demo", "other"]
    assert [answer.status_code for answer in (*answers, none, predicted)] == [200, 200, 404, 200]
    assert [one["model"] for one in page["launchers"]] == ["demo", "other", "demo"]


def check_status(launcher: Launcher) -> None:
    status, metrics = launcher.status(), launcher.read("/metrics")
    assert metrics is not None
    families = {family.name: family for family in text_string_to_metric_families(metrics.text)}
    told = families["launcher_engine_info"].samples
    ports = [str(one["engine_port"]) for one in status["engines"]]

    assert [one["model"] for one in status["engines"]] == ["demo", "other", "demo"]
    assert [one["engine"]["state"] for one in status["engines"]] == ["ready"] * 3
    assert status["gateway"]["state"] == "ready"
    assert {(one.labels["engine"], one.labels["model"]) for one in told} == set(
        zip(ports, ("demo", "other", "demo"), strict=True)
    )


def check_loss(launcher: Launcher) -> None:
    """One that is given up leaves the others serving."""
    port = launcher.status()["engines"][1]["engine_port"]
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{port}/fake", json={"exit": 1}, verify=NO_TLS)
    wait_for(lambda: "engine_given_up" in launcher.err, "the loss")
    status, card = launcher.status(), launcher.read(f"/crash?engine_port={port}")

    assert ask(launcher, "/predict", prompt="q").status_code == 200
    assert [one["engine"]["state"] for one in status["engines"]] == ["ready", "stopped", "ready"]
    assert card is not None
    assert card.json()["exit_code"] == 1


def check_log(launcher: Launcher) -> None:
    """Who says what, and that those of one device start one after the other."""
    heads = {line.split("|")[0].strip() for line in launcher.err.splitlines()}
    first = f"demo:{launcher.engine_port}"
    assert {"launcher", "gateway", "other", first} < heads
    steps = re.findall(r"engine_(starting|ready)\b.*engine=(\S+)", launcher.err)
    assert [step for step, _ in steps] == ["starting", "ready"] * 3
    assert [name for _, name in steps][:4:2] == [first, "other"]


@pytest.mark.programs
def test_engines_that_take_turns_serve_whoever_is_waited_for(tmp_path: Path) -> None:
    """One runs at a time; callers of the other wait for its start, and nobody's call is lost."""
    launcher = make_turns(tmp_path)
    with running(launcher):
        assert wait_ready(launcher).startswith("demo, other ready in ")
        first = launcher.status()["engines"]
        is_over = threading.Event()
        with ThreadPoolExecutor() as threads:

            def ask_demo() -> list[int]:
                statuses = []
                while not is_over.is_set():
                    answer = ask(launcher, "/v1/completions", model="demo", prompt="q")
                    statuses.append(answer.status_code)
                return statuses

            caller = threads.submit(ask_demo)
            try:
                answers = [
                    ask(launcher, "/v1/completions", model=model, prompt="q")
                    for model in ("other", "demo")
                ]
            finally:
                is_over.set()
        turns = re.findall(r"engine_turn engine=(\S+) instead_of=(\S+)", launcher.err)
        listed = httpx.get(f"http://127.0.0.1:{launcher.port}/v1/models", verify=NO_TLS).json()
        unknown = ask(launcher, "/v1/completions", model="none", prompt="q")
        assert launcher.stop() == 0
    assert launcher.processes() == []

    assert [one["engine"]["state"] for one in first] == ["ready", "parked"]
    assert [one["engine"]["pid"] is None for one in first] == [False, True]
    assert [answer.status_code for answer in answers] == [200] * 2
    assert set(caller.result()) == {200}
    assert turns[:2] == [("other", "demo"), ("demo", "other")]
    assert [card["id"] for card in listed["data"]] == ["demo", "other"]
    assert unknown.status_code == 404
    assert "engine_crashed" not in launcher.err


@pytest.mark.programs
def test_engine_whose_first_turn_fails_is_given_up_alone(tmp_path: Path) -> None:
    """Its callers wait in vain; the other is not stopped for it again."""
    launcher = make_turns(tmp_path)
    launcher.fake = "never_with=other"
    launcher.settings["GATEWAY_RESTART_HOLD_S"] = "2"

    def ask_for(model: str) -> int:
        return ask(launcher, "/v1/completions", model=model, prompt="q").status_code

    with running(launcher):
        wait_ready(launcher)
        in_vain = ask_for("other")
        wait_for(lambda: "engine_given_up" in launcher.err, "the loss")
        wait_for(lambda: ask_for("demo") == 200, f"the other's turn; {launcher.err[-2000:]}")
        again, served = ask_for("other"), ask_for("demo")
        turns = re.findall(r"engine_turn +engine=(\S+)", launcher.err)
        states = [one["engine"]["state"] for one in launcher.status()["engines"]]
        assert launcher.stop() == 0
    assert launcher.processes() == []

    assert (in_vain, again, served) == (503, 503, 200)
    assert turns == ["other", "demo"]
    assert states == ["ready", "stopped"]


def make_turns(folder: Path) -> Launcher:
    other = shutil.copytree(MODEL, folder / "models" / "other")
    launcher = Launcher(folder, command="up")
    config = folder / "launcher.toml"
    port = find_free_ports(1)[0]
    config.write_text(
        f"""
        takes_turns = true
        shortest_turn_s = 0
        [[engine]]
        [[engine]]
        model = "{other}"
        engine_port = {port}
        """
    )
    launcher.settings["LAUNCHER_CONFIG"] = str(config)
    return launcher


@pytest.mark.programs
def test_gateways_own_settings_file_and_turns_exclude_each_other(tmp_path: Path) -> None:
    launcher = make_turns(tmp_path)
    launcher.settings["GATEWAY_CONFIG"] = "/somewhere"
    with running(launcher):
        assert launcher.wait() == 2
    assert "where engines take turns GATEWAY_CONFIG is the launcher's" in launcher.err


@pytest.mark.programs
def test_up_told_to_stop_while_they_start_leaves_nothing(launcher: Launcher) -> None:
    launcher.fake = "hang_loading"
    with running(launcher):
        wait_for(lambda: "engine_starting" in launcher.err, "the first one's start")
        assert launcher.stop() == 0
    assert launcher.err.count("engine_starting") == 1
    assert launcher.processes() == []


@pytest.mark.programs
def test_serve_takes_one_engine(launcher: Launcher) -> None:
    launcher.command = "serve"
    with running(launcher):
        assert launcher.wait() == 2
    assert "[[engine]] sections are for up, doctor and explain; serve takes one" in launcher.err


@pytest.mark.parametrize(
    ("wanted", "gpus", "places"),
    [
        ([Wanted(), Wanted()], FOUR, [Place(("0",), 1), Place(("1",), 1)]),
        ([Wanted(n_gpus=2), Wanted(n_gpus=2)], FOUR, [Place(("0", "1"), 1), Place(("2", "3"), 1)]),
        ([Wanted(), Wanted()], ("0",), [Place(("0",), 0.5)] * 2),
        ([Wanted(share=0.7), Wanted()], ("0",), [Place(("0",), 0.7), Place(("0",), 0.3)]),
        ([Wanted(("1",)), Wanted()], ("0", "1"), [Place(("1",), 1), Place(("0",), 1)]),
        ([Wanted(n_gpus=2), Wanted()], ("0", "1"), [Place(("0", "1"), 0.5), Place(("0",), 0.5)]),
        ([Wanted()] * 4, (), [Place((), 0.25)] * 4),
        ([Wanted(takes_turns=True)] * 3, ("0",), [Place(("0",), 1)] * 3),
        (
            [Wanted(share=0.4), Wanted(takes_turns=True), Wanted(takes_turns=True)],
            (),
            [Place((), 0.4), Place((), 0.6), Place((), 0.6)],
        ),
    ],
)
def test_devices_are_shared_out(
    wanted: Sequence[Wanted], gpus: Sequence[str], places: Sequence[Place]
) -> None:
    found = share_out(wanted, gpus)

    assert [one.gpus for one in found] == [one.gpus for one in places]
    assert [one.share for one in found] == pytest.approx([one.share for one in places])


@pytest.mark.parametrize(
    ("wanted", "gpus", "told"),
    [
        ([Wanted(share=0.7), Wanted(share=0.7)], ("0",), "on GPU 0 claim 140%"),
        ([Wanted(share=1.0), Wanted()], (), "on the CPU claim 100% of it, and 1 more"),
        ([Wanted(("5",))], FOUR, "there is no GPU 5 here"),
        ([Wanted(n_gpus=8)], FOUR, "wants 8 GPUs; here are 4"),
    ],
)
def test_claims_that_do_not_fit_are_refused(
    wanted: Sequence[Wanted], gpus: Sequence[str], told: str
) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        share_out(wanted, gpus)


def read_sections(folder: Path, text: str) -> list[LauncherSettings]:
    path = folder / "launcher.toml"
    path.write_text(text)
    return list_engines(load_settings(LauncherSettings, ["--config", str(path)]))


def test_section_has_what_stands_above_unless_it_says_otherwise(tmp_path: Path) -> None:
    first, second = read_sections(
        tmp_path,
        f"""
        profile = "cpu"
        drain_timeout_s = 7
        state_dir = "{tmp_path}/state"
        [[engine]]
        model = "a/b"
        share = 0.75
        [[engine]]
        model = "c/d"
        drain_timeout_s = 8
        """,
    )

    assert (first.model, first.profile, first.drain_timeout_s) == ("a/b", "cpu", 7)
    assert (second.model, second.profile, second.drain_timeout_s) == ("c/d", "cpu", 8)
    assert (first.engine_port, second.engine_port) == (8001, 8011)
    assert first.state_path != second.state_path
    assert (first.share, second.share) == (0.75, 0.25)
    assert meet(first, second)


def test_sections_are_spread_over_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("launcher.sections.find_vllm", lambda: type("", (), {"build": "gpu"}))

    first, second = read_sections(tmp_path, '[[engine]]\nmodel = "a/b"\n[[engine]]\nmodel = "c/d"')

    assert (first.gpus, second.gpus) == (("0",), ("1",))
    assert not meet(first, second)


def test_sections_are_planned_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    sections = '[[engine]]\nset = ["tensor-parallel-size=2"]\n[[engine]]\n[[engine]]\n'

    found = read_sections(tmp_path, f'gpu = "3x H200"\n{sections}')

    assert [(one.gpus, one.gpu, one.share) for one in found] == [
        (("0", "1"), "2x H200", 0.5),
        (("2",), "1x H200", 1.0),
        (("0",), "1x H200", 0.5),
    ]


def test_sections_keep_the_users_words_for_a_gpu(tmp_path: Path) -> None:
    found = read_sections(tmp_path, 'gpu = "2 x 24GiB sm_89"\n[[engine]]\n[[engine]]\n')

    assert [(one.gpus, one.gpu) for one in found] == [
        (("0",), "1x 24GiB sm_89"),
        (("1",), "1x 24GiB sm_89"),
    ]
    assert parse_device(found[0].gpu).memory_bytes == 24 * 2**30


def test_sections_are_read_where_vllm_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none() -> None:
        raise SettingsError("no vLLM is installed")

    monkeypatch.setattr("launcher.sections.find_vllm", find_none)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")

    found = read_sections(tmp_path, "[[engine]]\n[[engine]]\n")

    assert [one.gpus for one in found] == [("4",), ("5",)]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ("modell = 'a'", "[[engine]] 1: unknown setting modell; did you mean model?"),
        ("port = 1", "[[engine]] 1: port is for all engines: put it above the sections"),
        ("share = 2", "[[engine]] 1: share: Input should be less than or equal to 1"),
        ("set = ['x']", "[[engine]] 1: set: 'x' is not key=value"),
    ],
)
def test_section_that_cannot_be_is_named(tmp_path: Path, section: str, told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        read_sections(tmp_path, f"[[engine]]\n{section}\n")


def test_share_cuts_what_is_planned_for() -> None:
    cpu = Device("CPU", "cpu", 64 * 2**30, cores=8)
    part, options = cut_share(cpu, 0.25)
    assert (part.memory_bytes, part.cores, options) == (16 * 2**30, 2, [])

    (option,) = cut_share(parse_device("H200"), 0.5)[1]
    assert (option.name, option.value) == ("gpu-memory-utilization", 0.45)
    assert cut_share(cpu, 1.0) == (cpu, [])


def test_copies_are_engines_of_their_own_on_gpus_of_their_own(tmp_path: Path) -> None:
    first, second, third = read_sections(
        tmp_path,
        f"""
        gpu = "4x H200"
        engine_port = 9000
        state_dir = "{tmp_path}/state"
        [[engine]]
        copies = 2
        profile = "throughput"
        [[engine]]
        """,
    )

    assert [one.engine_port for one in (first, second, third)] == [9000, 9010, 9020]
    assert [one.gpus for one in (first, second, third)] == [("0",), ("1",), ("2",)]
    assert [one.share for one in (first, second, third)] == [1, 1, 1]
    assert [one.profile for one in (first, second, third)] == ["throughput", "throughput", "auto"]
    assert len({one.state_path for one in (first, second, third)}) == 3
    assert {one.copies for one in (first, second)} == {1}


def test_copies_need_no_section(tmp_path: Path) -> None:
    words = ["--gpu", "H200", "--copies", "2"]
    first, second = list_engines(load_settings(LauncherSettings, words))

    assert (first.gpus, first.share, second.gpus, second.share) == (("0",), 0.5, ("0",), 0.5)
    assert second.engine_port == first.engine_port + 10


@pytest.mark.parametrize(
    ("words", "gpus", "shares"),
    [
        ("--copies 2 --gpus 2,3", [("2",), ("3",)], [1, 1]),
        ("--copies 2 --gpus 0,1,2,3", [("0", "1"), ("2", "3")], [1, 1]),
        ("--copies 2 --gpus 0,1,2", [("0",), ("1", "2")], [1, 1]),
        (
            "--copies 2 --gpus 0,1,2,3 --set tensor-parallel-size=2",
            [("0", "1"), ("2", "3")],
            [1, 1],
        ),
        ("--copies 3 --gpus 0,1", [("0",), ("1",), ("0",)], [0.5, 1, 0.5]),
        (
            "--copies 2 --gpus 0,1 --set tensor-parallel-size=2",
            [("0", "1"), ("0", "1")],
            [0.5, 0.5],
        ),
        ("--copies 1 --gpus 0,1", [("0", "1")], [1]),
    ],
)
def test_named_gpus_are_dealt_out_to_copies(
    words: str, gpus: list[tuple[str, ...]], shares: list[float]
) -> None:
    found = list_engines(load_settings(LauncherSettings, ["--gpu", "4x H200", *words.split()]))

    assert [one.gpus for one in found] == gpus
    assert [one.share for one in found] == shares
