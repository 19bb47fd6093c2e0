"""What vLLM's own lines are read as; the lines are real ones."""

from __future__ import annotations

import json

import pytest

from launcher.engine.vllm_log import (
    Killed,
    LostActor,
    Progress,
    SchedulerState,
    find_cause,
    find_killed,
    find_lost_actor,
    is_noise,
    is_request,
    level_of,
    read_progress,
    read_scheduler,
    split_line,
)

STAMP = "(EngineCore pid=86) {} 11-21 09:34:22 [core.py:1] "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00, 38it/s]",
            Progress("loading_weights", 50),
        ),
        (
            "(EngineCore pid=1) INFO 11-21 09:34:22 [kv_cache_utils.py:2327] GPU KV cache size: "
            "262,144 tokens, Maximum concurrency for 1,024 tokens per request: 256.00x",
            Progress("sizing_cache", None, "262,144 tokens"),
        ),
        (
            "Capturing CUDA graphs (decode, FULL):  42%|████▏     | 22/52 [00:01<00:02, 14.5it/s]",
            Progress("capturing_graphs", 42),
        ),
        (
            "(Worker pid=6) INFO 11-21 09:34:22 [monitor.py:53] torch.compile took 15.93 s",
            Progress("compiling", None, "15.93 s"),
        ),
        ("INFO:     Application startup complete.", Progress("listening")),
        ("an unknown line", None),
    ],
)
def test_progress_real_line_is_recognised(line: str, expected: Progress | None) -> None:
    assert read_progress(line) == expected


def test_cause_is_the_error_not_its_echo() -> None:
    lines = [
        STAMP.format("ERROR") + "Traceback (most recent call last):",
        STAMP.format("ERROR") + "torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core",
        "[W1121 ProcessGroupNCCL.cpp] Warning: destroy_process_group() was not called",
    ]
    assert find_cause(lines).startswith("torch.OutOfMemoryError: CUDA out of memory")


def test_cause_of_a_refused_setting_is_its_message() -> None:
    lines = [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig",
        "  Value error, Model architectures ['Qwen9'] are not supported for now. [type=value_e",
        "    For further information visit https://errors.pydantic.dev/2.14/v/value_error",
    ]
    assert find_cause(lines) == "Model architectures ['Qwen9'] are not supported for now."


def test_cause_without_any_error_is_the_last_word() -> None:
    assert find_cause(["one", "two", ""]) == "two"
    assert find_cause([]) == ""


def test_killed_child_is_read_from_its_parents_word() -> None:
    assert find_killed("parent_death: child 12 was killed by SIGKILL") == Killed("SIGKILL", 12)
    assert find_killed("child 12 was killed") is None


EXECUTOR = "(EngineCore pid=7) ERROR 01-01 00:00:00 [multiproc_executor.py:315] "
DIED = "Worker proc VllmWorker-1 died unexpectedly (exit code: {}), shutting down executor."


@pytest.mark.parametrize(
    ("code", "killed"),
    [
        (-4, Killed("SIGILL", name="VllmWorker-1")),
        (-9, Killed("SIGKILL", name="VllmWorker-1")),
        (-63, Killed("signal 63", name="VllmWorker-1")),
        (1, None),
    ],
)
def test_killed_worker_is_read_from_its_cores_word(code: int, killed: Killed | None) -> None:
    said = DIED.format(code)
    assert find_killed(EXECUTOR + said) == killed
    assert find_killed(EXECUTOR.partition(") ")[2] + said) == killed
    assert find_killed(EXECUTOR.replace("[", "[v1/executor/") + said) == killed  # at DEBUG
    assert find_killed(f"\x1b[0;36m(EngineCore pid=7)\x1b[0m{EXECUTOR[18:]}{said}") == killed
    assert find_killed(tell_in_json(said)) == killed


def test_dead_worker_of_ray_is_read_from_its_cores_word() -> None:
    """What ends the core then is its own server's SIGTERM."""
    said = "RayWorkerProc rank=[1] died unexpectedly, shutting down executor."
    place = EXECUTOR.replace("multiproc_executor.py:315", "ray_executor_v2.py:522")
    killed = Killed("", name="RayWorkerProc rank 1")

    assert find_killed(place + said) == killed
    assert find_killed(tell_in_json(said, name="vllm.v1.executor.ray_executor_v2")) == killed
    assert find_killed(said) is None
    assert find_killed(place + "say " + said) is None
    assert str(killed) == "its worker RayWorkerProc rank 1 died"


def tell_in_json(message: str, **fields: str) -> str:
    place = {"levelname": "ERROR", "name": "vllm.v1.executor.multiproc_executor"}
    return json.dumps({"asctime": "2026-01-01 00:00:00,000", **place, "message": message, **fields})


SAID = DIED.format(-9)


@pytest.mark.parametrize(
    "line",
    [
        SAID,
        STAMP.format("ERROR") + SAID,
        EXECUTOR + "say " + SAID,
        EXECUTOR.replace("ERROR", "INFO") + SAID,
        STAMP.format("INFO") + f"Received request cmpl-a-0: prompt: '{EXECUTOR}{SAID}'",
        tell_in_json(SAID, levelname="INFO"),
        tell_in_json(SAID, name="vllm.entrypoints.logger"),
        tell_in_json(f"prompt: '{SAID}'"),
        tell_in_json(f"prompt: '{EXECUTOR}{SAID}'", name="vllm.entrypoints.logger"),
        "{" + SAID,
        '{"a":' * 100_000 + SAID,
        json.dumps({"message": {"prompt": SAID}}),
    ],
)
def test_killed_worker_of_which_only_a_caller_speaks_is_none(line: str) -> None:
    assert find_killed(line) is None


def test_end_by_an_instruction_that_is_not_allowed_says_what_to_do() -> None:
    told = str(Killed("SIGILL", name="VllmWorker-1"))

    assert told.startswith("its worker VllmWorker-1 was killed by SIGILL: ")
    assert told.endswith("--set dtype=float32 does without AMX")
    assert str(Killed("SIGKILL", 12)) == "its process 12 was killed by SIGKILL"


@pytest.mark.parametrize(
    ("line", "noise"),
    [
        (STAMP.format("INFO") + "Resolved architecture: Qwen3ForCausalLM", True),
        ("INFO:     Started server process [6293]", True),
        ("Triton is installed, but doesn't include CPU backend. Disabling Triton.", True),
        (STAMP.format("WARNING") + "The model's generation config is unusual", False),
        (STAMP.format("ERROR") + "EngineCore encountered a fatal error.", False),
        ("RuntimeError: boom", False),
        ("usage: entry.py [-h] [--headless] [--api-server-count API_SERVER_COUNT]", True),
        ("                [--structured-outputs-config STRUCTURED_OUTPUTS_CONFIG]", True),
        ("entry.py: error: argument --dtype: invalid choice: 'x'", False),
        ("        [one, two] = three()", False),
    ],
)
def test_short_log_keeps_what_matters(line: str, noise: bool) -> None:
    assert is_noise(line) is noise


def test_level_of_lines_with_and_without_one() -> None:
    assert level_of(STAMP.format("WARNING") + "x") == "warning"
    assert level_of("plain") == "info"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            STAMP.format("WARNING") + "The KV cache is full",
            {
                "level": "warning",
                "message": "The KV cache is full",
                "process": "EngineCore",
                "pid": 86,
                "logger": "core.py:1",
            },
        ),
        (
            "INFO:     Started server process [6293]",
            {"level": "info", "message": "Started server process [6293]"},
        ),
        ("RuntimeError: boom", {"level": "info", "message": "RuntimeError: boom"}),
        ("\x1b[1mbold\x1b[0m", {"level": "info", "message": "bold"}),
        ("", {"level": "info", "message": ""}),
        ("two\rparts", {"level": "info", "message": "two\rparts"}),
    ],
)
def test_line_is_split_into_the_keys_of_the_log(line: str, parts: dict[str, object]) -> None:
    assert split_line(line) == parts


@pytest.mark.parametrize(
    ("message", "request_id"),
    [
        ("Added request cmpl-from-me-12-a5311c2f.", "from-me"),
        ("Added request chatcmpl-from-me-958685e0.", "from-me"),
        ("Received request cmpl-from-me-0: params: SamplingParams(n=1).", "from-me"),
        ("Received request chatcmpl-3f2a9c1e-958685e0: params: x", "3f2a9c1e-958685e0"),
        ("Request cmpl-from-me.2-7 failed (bad request): too long.", "from-me.2"),
        ("Request chatcmpl-from-me aborted.", "from-me"),
    ],
)
def test_line_of_a_request_names_the_id_that_the_caller_knows(
    message: str, request_id: str
) -> None:
    row = split_line(STAMP.format("INFO") + message)

    assert row["request_id"] == request_id
    assert request_id in str(row["engine_request_id"])
    assert is_request(STAMP.format("INFO") + message) is not message.startswith("Received")


def test_line_of_no_request_is_none() -> None:
    for message in ("Requests are queued", "GPU KV cache size: 4 tokens", "Added a route"):
        assert "request_id" not in split_line(STAMP.format("INFO") + message)
        assert not is_request(STAMP.format("INFO") + message)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            STAMP.format("INFO") + "Decode scheduler: on, bundles of 16 tokens",
            SchedulerState("on"),
        ),
        (
            STAMP.format("INFO") + "Decode scheduler: off, vLLM's own runs: it speculates",
            SchedulerState("off", "it speculates"),
        ),
        (
            STAMP.format("WARNING")
            + "Decode scheduler: gave up, vLLM's own runs from here on: Contradiction: a: b",
            SchedulerState("gave up", "Contradiction: a: b"),
        ),
        (STAMP.format("WARNING") + "Using custom scheduler class launcher.plugins.x", None),
    ],
)
def test_scheduler_line_is_read(line: str, expected: SchedulerState | None) -> None:
    assert read_scheduler(line) == expected


def test_scheduler_that_gives_up_is_shown_and_vllms_warning_is_not() -> None:
    assert not is_noise(STAMP.format("WARNING") + "Decode scheduler: gave up, vLLM's own runs: x")
    assert is_noise(STAMP.format("WARNING") + "Using custom scheduler class a.b. This scheduler")


def tell_of_ray(*lines: str) -> list[str]:
    return [STAMP.format("ERROR") + line for line in lines]


# As Ray tells it of an actor that was killed, and of one whose node was taken away.
NODE_DIED = (
    "The actor died because its node has died. Node Id: 6771fd6fc2ce767620b9306490b2b9bfdb1373"
)
WORKER_DIED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
)
ACTOR = (
    "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
    "\tclass_name: RayWorkerWrapper",
    "\tactor_id: fd344a8f46661c985487049401000000",
    "\tpid: 6845",
    "\tnamespace: 0f51af2c-da72-4bcc-84fd-68d88dc7f595",
    "\tip: 192.0.2.2",
)


@pytest.mark.parametrize(("why", "has_lost_host"), [(NODE_DIED, True), (WORKER_DIED, False)])
def test_worker_that_ray_lost_is_named_with_its_host(why: str, *, has_lost_host: bool) -> None:
    lines = tell_of_ray("Traceback (most recent call last):", *ACTOR, why, "another line")

    found = find_lost_actor(lines)

    assert found == LostActor("192.0.2.2", 6845, "RayWorkerWrapper", why, has_lost_host)


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("RuntimeError: something else",),
        (ACTOR[0], "and no more of it"),  # where it was, Ray does not say
        ACTOR,  # why, it does not say
    ],
)
def test_worker_of_which_ray_says_too_little_is_not_named(lines: tuple[str, ...]) -> None:
    assert find_lost_actor(tell_of_ray(*lines)) is None
