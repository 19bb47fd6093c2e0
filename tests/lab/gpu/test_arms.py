"""From the words of the command line to engines: flags, cards, memory, who starts together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab.failures import BadOptions
from lab.gpu.arms import (
    ArmPlanner,
    AskedBatch,
    PlannedArm,
    group_arms,
    list_default_arms,
    parse_arm,
)
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.hardware import GIB, Device, parse_device

# They ask what the installed vLLM is, which the other Pythons' environments have not.
pytestmark = pytest.mark.slow
MODEL = Path(__file__).parents[2] / "launcher" / "models" / "qwen3-0.6b"
BATCH = AskedBatch(358, 90, 256)


def plan(
    words: Sequence[str], monkeypatch: pytest.MonkeyPatch, gpu: str = "H200"
) -> list[PlannedArm]:
    monkeypatch.setenv("LAUNCHER_GPU", gpu)
    planner = ArmPlanner(MODEL, "dummy")
    return [planner.plan(parse_arm(word), BATCH) for word in words]


def read_flag(one: PlannedArm, name: str) -> str:
    words = one.command.arguments
    return words[words.index(f"--{name}") + 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cours", "no arm 'cours'; did you mean course"),
        ("2x*course", "no arm '2x*course'"),
        ("course max-num-seqs", "'max-num-seqs' is not key=value"),
        ("default-stock", "default has vLLM's own scheduler anyway"),
    ],
)
def test_arm_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(BadOptions, match=re.escape(said)):
        parse_arm(text)


def test_every_default_arm_is_told_flags_that_vllm_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = read_shipped_flags().kinds

    for one in plan(list_default_arms(parse_device("H200")), monkeypatch):
        flags = [word[2:] for word in one.command.arguments if word.startswith("--")]
        assert not [flag for flag in flags if flag.removeprefix("no-") not in {*known, "model"}]
        assert read_flag(one, "load-format") == "dummy"
        assert "--port" not in one.command.arguments


def test_profile_in_a_share_of_a_card_takes_as_many_sequences_as_on_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = plan(["course", "throughput", "latency"], monkeypatch)

    assert [read_flag(one, "max-num-seqs") for one in found] == ["384", "1024", "32"]
    cache = int(read_flag(found[0], "kv-cache-memory-bytes"))
    per_token = 28 * 2 * 8 * 128 * 2
    assert cache >= 358 * 352 * per_token
    assert found[0].need_bytes < 24 * GIB
    assert found[2].need_bytes < found[0].need_bytes


def test_stock_arm_names_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = plan(["course scheduler-cls=a.B", "course-stock"], monkeypatch)

    assert ours.scheduler == "a.B"
    assert stock.scheduler == "vLLM's"


def test_several_engines_of_an_arm_share_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = plan(["course", "2*course"], monkeypatch, "2x H200")

    assert (one.cards, two.cards) == (1, 2)
    assert two.need_bytes < one.need_bytes
    assert list(two.arm.list_relatives()) == ["2*course-stock", "course"]


def test_changed_arm_is_held_against_the_unchanged_one() -> None:
    assert parse_arm("default max-num-seqs=8").is_kin(parse_arm("default"))
    assert not parse_arm("course").is_kin(parse_arm("default"))


def test_tensor_parallel_arm_takes_so_many_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = plan(["latency tensor-parallel-size=2"], monkeypatch, "2x H200")

    assert one.cards == 2
    with pytest.raises(BadOptions, match="takes 2 cards, of 1"):
        group_arms([one], Device("H200", "sm_90", 141 * GIB), 1)


def test_groups_fit_the_card_and_keep_together_what_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = parse_device("H100")
    planned = plan(list_default_arms(device), monkeypatch, "H100")

    groups = group_arms(planned, device, 1)

    words = [[one.arm.word for one in group] for group in groups]
    assert all(sum(one.need_bytes for one in group) < device.memory_bytes for group in groups)
    assert all(group[0] == "default" for group in words)
    assert sorted({w for group in words for w in group}) == sorted(one.arm.word for one in planned)
    for group in words:
        for word in group:
            stock = f"{word}-stock"
            assert stock in group or not any(stock in other for other in words)
