"""Which vLLM the launcher's scheduler may ride on, and what is planned and said on any other."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config import LauncherSettings
from launcher.models.model import find_model
from launcher.plan.command import InstalledVllm
from launcher.plan.engine_plan import EnginePlan, build_plan, parse_overrides
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.hardware import parse_device
from launcher.plan.scheduler import OPTION, OURS, choose_scheduler, find_model_kind
from launcher.plugins.known_vllm import digest_files, find_difference, find_vllm_folder, read_known
from tests.launcher.programs import MODEL

FLAGS = read_shipped_flags()
KNOWN = InstalledVllm("vllm", FLAGS.version, "gpu", "vllm.entrypoints.cli.main", True)


@pytest.fixture
def vllm_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vLLM whose files are those listed, each with its name in it, and known by its digest."""
    data = read_known()
    for name in data["files"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    data["known"] = [{"version": FLAGS.version, "digest": digest_files(tmp_path, data["files"])}]
    monkeypatch.setattr("launcher.plugins.known_vllm.read_known", lambda: data)
    monkeypatch.setattr("launcher.plugins.known_vllm.find_vllm_folder", lambda: tmp_path)
    return tmp_path


def plan_for(*pairs: str, profile: str = "course", vllm: InstalledVllm = KNOWN) -> EnginePlan:
    model = find_model(LauncherSettings(model=str(MODEL)), config_only=True)
    overrides = parse_overrides(pairs, FLAGS)
    plan = build_plan(profile, parse_device("2x H200"), model, FLAGS, overrides=overrides)
    return choose_scheduler(plan, vllm)


@pytest.mark.engine
def test_installed_vllm_is_one_of_those_known() -> None:
    assert find_vllm_folder() is not None
    assert find_difference(FLAGS.version) == ""


def test_vllm_as_released_is_known(vllm_copy: Path) -> None:
    assert find_difference(FLAGS.version) == ""


def test_vllm_of_another_version_is_not_known(vllm_copy: Path) -> None:
    said = find_difference("0.99.0")
    assert "0.99.0" in said
    assert FLAGS.version in said


@pytest.mark.parametrize("name", read_known()["files"])
def test_vllm_with_a_changed_or_missing_file_is_not_known(vllm_copy: Path, name: str) -> None:
    file = vllm_copy / name
    kept = file.read_text()
    file.write_text(f"{kept}\n")
    assert "another scheduler" in find_difference(FLAGS.version)
    file.unlink()
    assert "another scheduler" in find_difference(FLAGS.version)
    file.write_text(kept)
    assert find_difference(FLAGS.version) == ""


def test_vllm_that_is_only_planned_for_is_judged_by_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launcher.plugins.known_vllm.find_vllm_folder", lambda: None)
    assert find_difference(FLAGS.version) == ""
    assert find_difference("0.1.0")


@pytest.mark.parametrize("profile", ["course", "throughput", "balanced", "cpu"])
def test_profile_for_many_sequences_has_the_launchers_scheduler(
    vllm_copy: Path, profile: str
) -> None:
    plan = plan_for(profile=profile)
    assert plan.value(OPTION) == OURS
    assert plan.scheduler.startswith("the launcher's")


@pytest.mark.parametrize("profile", ["latency", "quality", "development"])
def test_profile_for_few_or_for_comparison_has_vllms_own(vllm_copy: Path, profile: str) -> None:
    plan = plan_for(profile=profile)
    assert plan.value(OPTION) is None
    assert plan.scheduler.startswith("vLLM's own")


def test_scheduler_left_out_by_hand_is_vllms_own(vllm_copy: Path) -> None:
    plan = plan_for("scheduler-cls=")
    assert plan.value(OPTION) is None
    assert plan.scheduler == "vLLM's own: no other is asked for"


def test_scheduler_of_somebody_elses_is_left_to_them(vllm_copy: Path) -> None:
    plan = plan_for("scheduler-cls=mine.Scheduler")
    assert plan.value(OPTION) == "mine.Scheduler"
    assert plan.scheduler == "mine.Scheduler, as asked for"


@pytest.mark.parametrize(
    ("pair", "word"),
    [
        ('speculative-config={"method":"ngram","num_speculative_tokens":3}', "speculation"),
        ("enable-lora=true", "LoRA"),
        ('kv-transfer-config={"kv_connector":"X"}', "connector"),
        ("pipeline-parallel-size=2", "pipeline-parallel-size"),
        ("decode-context-parallel-size=2", "decode-context-parallel-size"),
    ],
)
def test_option_that_the_short_way_does_not_know_leaves_it_out(
    vllm_copy: Path, pair: str, word: str
) -> None:
    plan = plan_for(pair)
    assert plan.value(OPTION) is None
    assert plan.scheduler.startswith("vLLM's own: ")
    assert word in plan.scheduler


def test_option_switched_off_changes_nothing(vllm_copy: Path) -> None:
    assert plan_for("enable-lora=false", "pipeline-parallel-size=1").value(OPTION) == OURS


def test_unknown_vllm_is_planned_with_its_own_scheduler(vllm_copy: Path) -> None:
    plan = plan_for(vllm=replace(KNOWN, version="0.99.0"))
    assert plan.value(OPTION) is None
    assert plan.scheduler.startswith("vLLM's own: vLLM 0.99.0 is not among")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ""),
        ({"sliding_window": 4096, "use_sliding_window": False}, ""),
        ({"sliding_window": 4096, "use_sliding_window": None}, "sliding window"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"vision_config": {"depth": 2}}, "vision_config"),
        ({"is_encoder_decoder": True}, "encoder"),
    ],
)
def test_model_of_another_kind_is_named(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    model = find_model(LauncherSettings(model=str(tmp_path / "model")))
    said = find_model_kind(model)
    assert word in said
    assert bool(word) == bool(said)
