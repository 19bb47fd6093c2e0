"""GPUs by name, and plans that cannot work on them."""

from __future__ import annotations

import pytest

from common.errors import SettingsError
from launcher.plan.engine_plan import build_plan, parse_overrides
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.hardware import GIB, parse_device
from tests.launcher.test_profiles import read_model

FLAGS = read_shipped_flags()


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("nvidia geforce rtx 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("rtx4090", "RTX 4090"),
    ],
)
def test_gpu_is_known_by_the_name_that_nvidia_smi_prints(printed: str, name: str) -> None:
    assert parse_device(printed) == parse_device(name)
    assert parse_device(f"4x {printed}").count == 4


@pytest.mark.parametrize(
    ("text", "gib", "generation"),
    [
        ("24GiB sm_89", 24, "sm_89"),
        ("16 gib SM_86", 16, "sm_80"),
        ("94GiB sm_90a", 94, "sm_90"),
        ("31.5GiB, sm120", 31.5, "sm_120"),
    ],
)
def test_any_other_card_is_planned_for_by_memory_and_capability(
    text: str, gib: float, generation: str
) -> None:
    device = parse_device(f"2x {text}")

    assert (device.memory_bytes, device.generation, device.count) == (
        int(gib * GIB),
        generation,
        2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("NVIDIA H20", "did you mean H200?"),
        ("NVIDIA GeForce RTX 5080", "did you mean RTX 5090?"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "as `24GiB sm_89`"),
        ("NVIDIA H100 NVL", "as `24GiB sm_89`"),
        ("NVIDIA H100 94GB", "as `24GiB sm_89`"),
        ("24GiB", "as `24GiB sm_89`"),
        ("0x H200", "name one or more"),
    ],
)
def test_gpu_that_is_not_known_is_refused_with_advice(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        parse_device(text)

    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("gpu", "pair", "message"),
    [
        ("H200", "gpu-memory-utilization=1.2", "must be above 0 and at most 1"),
        ("H200", "gpu-memory-utilization=0", "must be above 0 and at most 1"),
        ("2x H200", "tensor-parallel-size=4", "needs 4 GPUs and there are 2"),
        ("H200", "pipeline-parallel-size=2", "LAUNCHER_GPU='2x H200'"),
        ("8x H200", "tensor-parallel-size=3", "cannot be divided by it; possible are 1, 2, 4, 8"),
        ("8x H200", "tensor-parallel-size=0", "it must be 1 or more"),
        ("H200", "max-model-len=1000000", "is beyond"),
        ("H200", "max-model-len=1M", "was made for 40960 tokens"),
        ("H200", "kv-cache-dtype=fp9", "has no 'fp9'; did you mean fp8?"),
        ("H200", "performance-mode=fastest", "it knows balanced, interactivity, throughput"),
        ("H200", "dtype=float17", "has no 'float17'; did you mean float16?"),
    ],
)
def test_plan_that_cannot_work_is_refused_with_what_would(
    gpu: str, pair: str, message: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        _plan("course", gpu, pair)

    assert message in str(refusal.value)


def _plan(profile: str, gpu: str, *pairs: str) -> None:
    overrides = parse_overrides(pairs, FLAGS)
    build_plan(profile, parse_device(gpu), read_model("qwen3-0.6b"), FLAGS, overrides=overrides)


@pytest.mark.parametrize(
    ("gpu", "pairs"),
    [
        ("H200", ["gpu-memory-utilization=1"]),
        ("2x H200", ["tensor-parallel-size=2", "max-model-len=40960"]),
        ("H200", ["tensor-parallel-size=2", "nnodes=2"]),
        ("H200", ["max-model-len=131072", 'hf-overrides={"rope_scaling": {}}']),
        ("cpu", ["tensor-parallel-size=2"]),
    ],
)
def test_plan_that_can_work_is_none_of_those(gpu: str, pairs: list[str]) -> None:
    _plan("cpu" if gpu == "cpu" else "course", gpu, *pairs)


def test_plan_of_a_longer_context_is_made_where_vllm_is_told_to_take_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    _plan("course", "H200", "max-model-len=131072")
