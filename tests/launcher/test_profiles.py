"""Profiles as data: what each says on each GPU, kept as files that a person can read and compare.

`UPDATE_GOLDEN=1 pytest tests/launcher/test_profiles.py` writes them anew; the diff is the review.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.model import Model, find_model
from launcher.plan.command import EngineCommand, InstalledVllm, build_command
from launcher.plan.engine_plan import NAMES, EnginePlan, build_plan, parse_overrides
from launcher.plan.flags.known_flags import Flags, read_shipped_flags, try_commands
from launcher.plan.hardware import GIB, Device, list_gpus, parse_device

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
PROFILES = Path(inspect.getfile(build_plan)).parent / "profiles"
GPUS = ("A100-80GB", "RTX 4090", "H200", "B200", "RTX 5090")
MODELS = ("qwen3-0.6b", "qwen3-8b")
FLAGS = read_shipped_flags()
VLLM = InstalledVllm("vllm", FLAGS.version, "gpu", "vllm.entrypoints.cli.main", True)
HOST = Device("CPU", "cpu", 64 * GIB, cores=8)


def read_model(name: str) -> Model:
    chosen = LauncherSettings(model=str(HERE / "models" / name))
    return replace(find_model(chosen, config_only=True), path=Path("/models") / name)


def make_plan(
    profile: str, gpu: str, model: str, *pairs: str, monkeypatch: pytest.MonkeyPatch | None = None
) -> EnginePlan:
    if monkeypatch:
        monkeypatch.setattr("launcher.plan.engine_plan.read_cpu", lambda: HOST)
    overrides = parse_overrides(pairs, FLAGS)
    device = HOST if gpu == "cpu" else parse_device(gpu)
    return build_plan(profile, device, read_model(model), FLAGS, overrides=overrides)


def make_command(plan: EnginePlan) -> EngineCommand:
    return build_command(plan, LauncherSettings(cache_dir=Path("/cache")), VLLM, FLAGS)


def render(plan: EnginePlan, command: EngineCommand) -> str:
    """A flag a line, with its values: what a reviewer wants to see changed."""
    joined = "\n".join(command.arguments)
    lines = re.sub(r"\n(?!--)", " ", joined).splitlines()
    environment = [f"{name}={value}" for name, value in sorted(command.environment.items())]
    budget = plan.budget
    memory = (
        f"# weights {budget.weight_bytes / GIB:.1f} GiB, KV cache {budget.kv_bytes / GIB:.1f} GiB "
        f"= {budget.workload_sequences} sequences of {budget.workload.tokens} tokens"
    )
    return "\n".join([f"# {plan.device.title}", memory, *environment, *lines]) + "\n"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("profile", NAMES)
@pytest.mark.parametrize("gpu", GPUS)
def test_plan_of_every_gpu_profile_model_is_as_recorded(
    gpu: str, profile: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(profile, gpu, model, monkeypatch=monkeypatch)
    text = render(plan, make_command(plan))
    file = GOLDEN / gpu.replace(" ", "-").lower() / model / f"{profile}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file.read_text() == text


@pytest.mark.parametrize("profile", NAMES)
@pytest.mark.parametrize("gpu", [*GPUS, "cpu"])
def test_choice_every_option_has_a_reason_and_a_source(gpu: str, profile: str) -> None:
    plan = make_plan(profile, gpu, "qwen3-0.6b")
    for choice in [*plan.options, *plan.environment]:
        assert len(choice.reason) > 10, choice
        assert len(choice.source) > 5, choice


def test_profile_quality_quantises_nothing_anywhere() -> None:
    for gpu, model in itertools.product([row["name"] for row in list_gpus()], MODELS):
        plan = make_plan("quality", gpu, model)
        assert plan.value("quantization") is None
        assert plan.value("kv-cache-dtype") == "auto"


def test_profile_weights_are_quantised_only_by_throughput() -> None:
    for gpu, profile in itertools.product(GPUS, NAMES):
        plan = make_plan(profile, gpu, "qwen3-8b")
        expected = "fp8" if profile == "throughput" and gpu != "A100-80GB" else None
        assert plan.value("quantization") == expected, (gpu, profile)


def test_course_on_rtx_5090_is_triton_with_fp8_and_fits_the_batch() -> None:
    plan = make_plan("course", "RTX 5090", "qwen3-0.6b")
    assert plan.value("attention-backend") == "TRITON_ATTN"
    assert plan.value("kv-cache-dtype") == "fp8"
    assert plan.value("max-num-seqs") >= 358
    assert 358 in plan.value("cudagraph-capture-sizes")


def test_course_on_h200_is_what_was_measured() -> None:
    plan = make_plan("course", "H200", "qwen3-0.6b")
    assert (plan.value("attention-backend"), plan.value("kv-cache-dtype")) == (
        "TRITON_ATTN",
        "auto",
    )


@pytest.mark.parametrize(
    ("cores", "shared_mib", "backend"),
    [(0, 0, "mp"), (16, 1024, "mp"), (2, 1024, None), (16, 64, None)],
)
def test_course_worker_process_needs_cores_and_shared_memory(
    cores: int, shared_mib: int, backend: str | None
) -> None:
    device = replace(parse_device("H200"), cores=cores, shared_bytes=shared_mib * 2**20)
    plan = build_plan("course", device, read_model("qwen3-0.6b"), FLAGS)
    assert plan.value("distributed-executor-backend") == backend


def test_fp8_cache_never_meets_a_backend_that_refuses_it() -> None:
    for gpu, profile in itertools.product([row["name"] for row in list_gpus()], NAMES):
        plan = make_plan(profile, gpu, "qwen3-0.6b")
        if plan.value("kv-cache-dtype") == "fp8" and plan.device.generation != "sm_100":
            assert plan.value("attention-backend") == "TRITON_ATTN"
            assert plan.device.generation != "sm_80"


def test_model_too_large_for_one_gpu_is_spread_or_refused() -> None:
    with pytest.raises(SettingsError, match="does not fit"):
        make_plan("balanced", "RTX 4090", "qwen3-8b", "gpu-memory-utilization=0.6")
    plan = make_plan("balanced", "2x RTX 4090", "qwen3-8b", "gpu-memory-utilization=0.6")
    assert plan.value("tensor-parallel-size") == 2


def test_any_gpu_profile_on_a_cpu_leaves_gpu_options_out() -> None:
    for profile in NAMES:
        plan = make_plan(profile, "cpu", "qwen3-0.6b")
        names = {choice.name for choice in plan.options}
        assert "enforce-eager" in names
        assert not names & {"attention-backend", "kv-cache-dtype", "cudagraph-capture-sizes"}


@pytest.mark.parametrize(
    ("override", "is_one_process"),
    [
        ("seed=1", True),
        ("tensor-parallel-size=2", False),
        ("pipeline-parallel-size=2 enforce-eager=", False),
        ("prefill-context-parallel-size=2", False),
    ],
)
def test_on_a_cpu_the_core_computes_itself_unless_the_model_is_spread(
    override: str, is_one_process: bool
) -> None:
    """By its path: vLLM would read the word `uni` as `mp` there."""
    plan = make_plan("cpu", "cpu", "qwen3-0.6b", *override.split())
    path = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    assert plan.value("distributed-executor-backend") == (path if is_one_process else None)


def limit_cache(tokens: int) -> str:
    """Of Qwen3-0.6B, in bf16: 112 KiB a token."""
    return f"kv-cache-memory-bytes={tokens * 112 * 1024}"


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    [
        (384 * 320, 384),  # all of the longest
        (384 * 220, 384),  # all of the usual length
        (358 * 214 + 100, 358),  # the batch itself, of the usual length
        (300 * 214, 200),  # cut to those of the longest that fit
    ],
)
def test_course_sequences_share_a_cache_that_holds_them_at_their_usual_length(
    tokens: int, sequences: int
) -> None:
    plan = make_plan("course", "H200", "qwen3-0.6b", limit_cache(tokens))

    assert plan.value("max-num-seqs") == sequences
    assert bool(plan.warnings) == (sequences < 358)


def test_rule_that_cuts_a_batch_into_waves_is_warned_of() -> None:
    plan = make_plan("course", "H200", "qwen3-0.6b", limit_cache(200 * 320))

    (warning,) = plan.warnings
    assert "max-num-seqs is 200" in warning
    assert "batch of 358" in warning
    assert "in waves" in warning
    assert "max-num-seqs=358" in warning


def test_number_of_sequences_that_was_asked_for_is_not_warned_of() -> None:
    assert not make_plan("course", "H200", "qwen3-0.6b", "max-num-seqs=3").warnings
    assert not make_plan("latency", "H200", "qwen3-0.6b").warnings


@settings(max_examples=60, deadline=None)
@given(
    memory_gib=st.integers(24, 200),
    generation=st.sampled_from(["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"]),
    profile=st.sampled_from([name for name in NAMES if name != "cpu"]),
    model=st.sampled_from(MODELS),
)
def test_plan_on_any_gpu_fits_into_its_memory(
    memory_gib: int, generation: str, profile: str, model: str
) -> None:
    device = Device("any", generation, memory_gib * GIB)
    try:
        plan = build_plan(profile, device, read_model(model), FLAGS)
    except SettingsError as error:
        assert "does not fit" in str(error)  # noqa: PT017
        return
    budget = plan.budget
    assert budget.weight_bytes + budget.working_bytes + budget.kv_bytes <= device.memory_bytes
    most, workload = plan.value("max-num-seqs"), budget.workload
    assert most * workload.usual_tokens <= budget.kv_tokens
    # Sharing the cache is for the batch that would not fit otherwise.
    assert most * workload.tokens <= budget.kv_tokens or most >= workload.batch
    assert plan.value("max-model-len") <= budget.kv_tokens


@pytest.mark.parametrize(
    ("pair", "name", "value"),
    [
        ("kv_cache_dtype=fp8", "kv-cache-dtype", "fp8"),
        ("enable-prefix-caching=false", "enable-prefix-caching", False),
        ("enable-chunked-prefill=true", "enable-chunked-prefill", True),
        ("compilation-config.mode=3", "compilation-config.mode", 3),
        (
            "compilation-config.inductor_compile_config.max_autotune=true",
            "compilation-config.inductor_compile_config.max_autotune",
            True,
        ),
        ("quantization=awq", "quantization", "awq"),
        (
            'speculative-config={"method":"ngram","num_speculative_tokens":5}',
            "speculative-config",
            {"method": "ngram", "num_speculative_tokens": 5},
        ),
        ("scheduling-policy=priority", "scheduling-policy", "priority"),
        ("lora-modules=a=/a,b=/b", "lora-modules", ["a=/a", "b=/b"]),
        ("gpu-memory-utilization=0.8", "gpu-memory-utilization", 0.8),
    ],
)
def test_set_reaches_every_technique_by_name(pair: str, name: str, value: object) -> None:
    plan = make_plan("course", "H200", "qwen3-0.6b", pair)
    assert plan.value(name) == value


@pytest.mark.parametrize(
    ("pairs", "sequences"),
    [
        (("max-num-seqs=512",), 512),
        (("max-num-seqs=512", "data-parallel-size=2"), 1024),  # vLLM's limit is each copy's
        (("max-num-seqs=",), None),
    ],
)
def test_plan_says_how_many_sequences_the_engine_runs(
    pairs: tuple[str, ...], sequences: int | None
) -> None:
    assert make_plan("course", "4x H200", "qwen3-0.6b", *pairs).sequences == sequences


def test_set_empty_leaves_an_option_out() -> None:
    assert (
        make_plan("course", "H200", "qwen3-0.6b", "attention-backend=").value("attention-backend")
        is None
    )


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("max-num-seq=3", "did you mean max-num-seqs"),
        ("compilation-config.cudagraph_mod=FULL", "did you mean cudagraph_mode"),
        ("compilation-config.pass_config.fuse_norm=true", "did you mean fuse_norm_quant"),
        ("swap_space=4", "kv-offloading-size"),
        ("calculate-kv-scales=true", "removed"),
        ("model=x", "LAUNCHER_MODEL"),
        ("api-key=secret", "gateway's keys"),
        ("enable-prefix-caching=maybe", "neither true nor false"),
        ("compilation-config={mode:3}", "no JSON"),
    ],
)
def test_set_that_cannot_work_is_refused_with_advice(pair: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_plan("course", "H200", "qwen3-0.6b", pair)


def test_older_vllm_gets_the_words_it_knows() -> None:
    kinds = {k: v for k, v in FLAGS.kinds.items() if k != "performance-mode"}
    del kinds["cudagraph-capture-sizes"], kinds["attention-backend"], kinds["shutdown-timeout"]
    del kinds["custom-histogram-buckets"]
    older = Flags("0.13.0", kinds, FLAGS.fields)
    plan = build_plan("course", parse_device("RTX 5090"), read_model("qwen3-0.6b"), older)
    command = build_command(plan, LauncherSettings(), VLLM, older)
    assert command.environment["VLLM_ATTENTION_BACKEND"] == "TRITON_ATTN"
    assert "--shutdown-timeout" not in command.arguments
    assert "--custom-histogram-buckets" not in command.arguments
    nested = command.arguments[command.arguments.index("--compilation-config") + 1]
    assert '"cudagraph_capture_sizes":[1,2,4' in nested


def test_spans_and_request_lines_are_asked_of_the_engine_only_when_wanted() -> None:
    plan = make_plan("course", "H200", "qwen3-0.6b")
    plain = make_command(plan)
    asked = LauncherSettings(otlp_endpoint="http://collector:4318", engine_log="requests")
    command = build_command(plan, asked, VLLM, FLAGS)

    new = set(command.arguments) - set(plain.arguments)
    assert new == {
        "--enable-log-requests",
        "--otlp-traces-endpoint",
        "http://collector:4318/v1/traces",
    }
    variables = command.environment.keys() - plain.environment.keys()
    assert variables == {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_SERVICE_NAME"}


@pytest.mark.engine
@pytest.mark.usefixtures("quick_parser")
def test_installed_parser_accepts_every_recorded_command(monkeypatch: pytest.MonkeyPatch) -> None:
    combinations = list(itertools.product(GPUS, NAMES, MODELS))
    commands = []
    for gpu, profile, model in combinations:
        plan = make_plan(profile, gpu, model, monkeypatch=monkeypatch)
        commands.append(list(make_command(plan).arguments[1:]))
    asked = LauncherSettings(otlp_endpoint="http://collector:4318", engine_log="requests")
    combinations.append(("H200", "spans", "qwen3-0.6b"))
    command = build_command(make_plan("course", "H200", "qwen3-0.6b"), asked, VLLM, FLAGS)
    commands.append(list(command.arguments[1:]))
    refusals = dict(zip(combinations, try_commands(commands), strict=True))
    assert {key: word for key, word in refusals.items() if word} == {}


@pytest.mark.engine
@pytest.mark.usefixtures("quick_parser")
def test_installed_parser_refuses_what_it_does_not_know() -> None:
    good = ["m", "--max-num-seqs", "3"]
    bad = ["m", "--swap-space", "4"], ["m", "--attention-config", '{"use_cudnn_prefill":true}']
    verdicts = try_commands([good, *bad])
    assert verdicts[0] is None
    assert "--swap-space" in (verdicts[1] or "")
    assert "use_cudnn_prefill" in (verdicts[2] or "")


def test_profile_files_say_what_they_are_for() -> None:
    for name in NAMES:
        data = tomllib.loads((PROFILES / f"{name}.toml").read_text())
        assert data["title"]
        assert data["workload"]["sequences"] > 0
        assert data["warmup_prompts"] > 0
