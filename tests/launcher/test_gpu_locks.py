"""Launchers that share a host (LAUNCHER_GPU_LOCKS): each as people start it, on GPUs of its own."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.launcher.programs import Launcher, members_of, running, wait_for
from tests.launcher.test_explain import call

pytestmark = pytest.mark.programs

# Asked for what is planned with, for what there is, and for what each does now.
NVIDIA_SMI = """#!/bin/sh
for gpu in 0 1; do
    case "$1" in
    *compute_cap*) echo "NVIDIA H200, 143771, 0, 9.0, 580.1" ;;
    *utilization*) echo "$gpu, NVIDIA H200, 50, 1000, 143771, 300.5, 45, 1980" ;;
    *) echo "$gpu, NVIDIA H200" ;;
    esac
done
"""


class Host:
    """Two GPUs; its launchers have all their folders in common."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.locks = folder / "locks"
        self._stack = stack
        self._made = 0
        self.add_gpus(NVIDIA_SMI)
        # The fake vLLM as one that is built for them.
        self._build = folder / "build" / "vllm-0.32.0.dist-info"
        self._build.mkdir(parents=True)
        (self._build / "METADATA").write_text("Name: vllm\nVersion: 0.32.0\n")

    def add_gpus(self, text: str) -> None:
        program = self.folder / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)

    def make(self, **settings: str) -> Launcher:
        self._made += 1
        one = Launcher(self.folder / str(self._made))
        one.state = self.folder / "state"
        one.path = f"{self._build.parent}:"
        one.settings = {
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "LAUNCHER_GPU_LOCKS": str(self.locks),
            "LAUNCHER_CACHE_DIR": str(self.folder / "cache"),
            **settings,
        }
        return one

    def start(self, **settings: str) -> Launcher:
        return self._stack.enter_context(running(self.make(**settings)))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(tmp_path, stack)


def read_engine(launcher: Launcher) -> dict[str, str]:
    """The environment of its engine, once that is ready."""
    pid = launcher.wait_state("ready")["engine"]["pid"]
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(pair.partition("=")[::2] for pair in pairs)


def test_launchers_of_a_host_have_a_gpu_each_and_a_killed_one_frees_its(host: Host) -> None:
    both = [host.start(), host.start()]
    engines = [read_engine(one) for one in both]
    by_gpu = {
        engine["CUDA_VISIBLE_DEVICES"]: one for engine, one in zip(engines, both, strict=True)
    }
    assert sorted(by_gpu) == ["0", "1"]
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        assert len({engine[name] for engine in engines}) == 2, name
    metrics = by_gpu["1"].read("/metrics")
    assert metrics is not None
    assert 'launcher_gpu_power_watts{gpu="1",' in metrics.text
    assert 'gpu="0"' not in metrics.text

    third = host.start()
    assert third.wait() == 5
    assert "no free GPU: the engine needs 1, and 0 of those that it may have" in third.err

    killed = by_gpu["0"]
    left = killed.status()["engine"]["pid"]
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    engine = read_engine(heir := host.start())
    assert engine["CUDA_VISIBLE_DEVICES"] == "0"
    assert engine["VLLM_CACHE_ROOT"] == f"{host.folder}/cache/gpu-0/vllm"
    assert members_of(left) == []  # so that the GPU's memory is free, too
    assert [one.stop() for one in (heir, by_gpu["1"])] == [0, 0]


def test_engine_on_two_gpus_has_both_or_none(host: Host) -> None:
    one = host.start()
    read_engine(one)

    wide = host.start(LAUNCHER_SET="tensor-parallel-size=2")
    assert wide.wait() == 5
    assert "the engine needs 2, and 1 of those that it may have are no other" in wide.err
    other = host.start()
    assert read_engine(other)["CUDA_VISIBLE_DEVICES"] == "1"
    assert [each.stop() for each in (one, other)] == [0, 0]

    again = host.start(LAUNCHER_SET="tensor-parallel-size=2")
    assert read_engine(again)["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_launcher_takes_of_the_gpus_that_it_may_use(host: Host) -> None:
    first = host.start(LAUNCHER_GPUS="1")
    assert read_engine(first)["CUDA_VISIBLE_DEVICES"] == "1"

    assert host.start(LAUNCHER_GPUS="1").wait() == 5


def test_launchers_without_a_gpu_have_folders_of_their_own(host: Host) -> None:
    host.add_gpus("#!/bin/sh\nexit 9\n")
    roots = {read_engine(host.start())["VLLM_CACHE_ROOT"] for _ in range(2)}

    assert roots == {f"{host.folder}/cache/cpu-{number}/vllm" for number in range(2)}


def test_launcher_waits_while_another_looks_for_its_gpus(host: Host) -> None:
    """Which may take as long as a model's download."""
    host.locks.mkdir()
    with (host.locks / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        launcher = host.start()
        wait_for(lambda: "launcher_waiting" in launcher.err, "it says so")
        assert launcher.read("/status") is None
    launcher.wait_state("ready")


def test_launcher_of_several_engines_is_refused_gpu_locks(host: Host) -> None:
    launcher = host.make()
    for words in (("up", "--copies", "2"), ("explain", "--nodes", "2"), ("serve", "--join", "a")):
        code, _, err = call(launcher, *words)
        assert (code, err.count("\n")) == (2, 1)
        assert "LAUNCHER_GPU_LOCKS is for launchers of one engine on one host" in err


def test_explain_plans_for_one_of_the_gpus_and_takes_none(host: Host) -> None:
    code, out, _ = call(host.make(), "explain", "--json")
    facts = json.loads(out)

    assert code == 0
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert facts["device"].startswith("H200")
    assert facts["notes"] == []
    assert not host.locks.exists()


def test_tune_measures_on_a_gpu_that_nobody_has(host: Host) -> None:
    code, out, _ = call(host.make(), "tune", "--dry-run")
    assert code == 0
    assert " on H200 (" in out  # not on both

    read_engine(host.start())
    read_engine(host.start())
    code, _, err = call(host.make(), "tune", "--dry-run")
    assert code == 5
    assert "no free GPU" in err
