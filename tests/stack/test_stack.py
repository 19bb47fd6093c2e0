"""compose.yaml as users get it, in real containers with the real vLLM, from start to stop."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.project import read_version
from gateway.admission.keys import make_key
from lab.records.record import read_record, write_record
from tests.deploy.check_live import check_live, make_traffic
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS
from tests.stack.conftest import GATEWAY, OWN_IMAGE, OWN_MODEL, Step, answers, wait_until
from tests.stack.docker import (
    ROOT,
    TWO_ENGINES,
    TWO_GATEWAYS,
    Docker,
    DockerError,
    kill_container,
    kill_process,
)

COURSE = "http://127.0.0.1:8010"
SERVICES = ("engine", "gateway", "prometheus")
# What Dockerfile.gateway may add to its base image.
LARGEST_GATEWAY_BYTES = 150 * 2**20

# In the first test's time images are built, beside whatever else the machine does.
pytestmark = [pytest.mark.stack, pytest.mark.timeout(1500)]


def predict(questions: list[str], *, url: str = GATEWAY, key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"prompt": questions}
    return httpx.post(
        f"{url}/predict", json=body, headers=headers, timeout=120, trust_env=False, verify=NO_TLS
    )


def read_pairs(count: int) -> tuple[list[str], list[str]]:
    """As many of the demo's questions as the course's judge asks, and what the model knows."""
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    asked = [pairs[number % len(pairs)] for number in range(count)]
    return [pair["question"] for pair in asked], [pair["answer"] for pair in asked]


def name_of(service: str) -> str:
    return f"vllm-gateway-{service}-1"


def when(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def first_healthy(container: dict[str, Any]) -> float:
    checks = container["State"]["Health"]["Log"]
    return min(when(check["End"]) for check in checks if check["ExitCode"] == 0)


def address_of(docker: Docker, container: str) -> str:
    """On the network between the services, which this machine's side of the bridge is part of."""
    networks = docker.inspect(container)["NetworkSettings"]["Networks"]
    return str(networks["vllm-gateway_inside"]["IPAddress"])


def prometheus_of(docker: Docker) -> str:
    return f"http://{address_of(docker, name_of('prometheus'))}:9090"


def ask_prometheus(docker: Docker, path: str, **parameters: str) -> Any:
    url = f"{prometheus_of(docker)}/api/v1/{path}"
    response = httpx.get(url, params=parameters, timeout=10, trust_env=False, verify=NO_TLS)
    assert response.status_code == 200, response.text
    return response.json()["data"]


def value_of(docker: Docker, expression: str) -> float:
    rows = ask_prometheus(docker, "query", query=expression)["result"]
    return float(rows[0]["value"][1]) if rows else 0.0


# --- the images ---


def test_gateway_image_is_small_and_not_root(docker: Docker) -> None:
    image = docker.inspect("vllm-gateway")
    base = docker.inspect("python:3.12-slim")
    config = image["Config"]
    assert image["Size"] - base["Size"] < LARGEST_GATEWAY_BYTES
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"]


@pytest.mark.parametrize("name", ["vllm-gateway", "vllm-gateway-engine", "vllm-gateway-course"])
def test_image_holds_what_it_needs_and_nothing_of_the_rest(docker: Docker, name: str) -> None:
    """Nothing that .dockerignore should have kept out, no test, no secret, no cache of pip's."""
    listed = docker.run("run", "--rm", "--entrypoint", "find", name, "/app", "-type", "f")
    found = {line.removeprefix("/app/") for line in listed.split()}
    of_engine = {"__init__.py", "fetch_model.py", "health.py", "image_packages.py", "locked.py"}
    scripts = {"health.py"} if name == "vllm-gateway" else of_engine
    settings = {"course.toml"} if name == "vllm-gateway-course" else set()
    files = settings | {f"scripts/{one}" for one in scripts}
    assert {path for path in found if not path.endswith(".pyc")} == files


@pytest.mark.parametrize("name", ["vllm-gateway", "vllm-gateway-engine", "vllm-gateway-course"])
def test_image_holds_the_wheel_compiled(docker: Docker, name: str) -> None:
    code = (
        "import gateway, launcher, importlib.metadata as m, os;"
        "print(m.version('vllm-gateway'), os.path.exists(gateway.__cached__), gateway.__file__)"
    )
    said = docker.run("run", "--rm", "--entrypoint", "python3", name, "-I", "-c", code)
    version, is_compiled, file = said.split()
    assert (version, is_compiled) == (read_version(), "True")
    assert "/site-packages/" in file


# --- from nothing to healthy ---


def test_services_became_healthy_in_order(stack: Docker) -> None:
    model, engine, gateway = (stack.inspect(name_of(one)) for one in ("model", "engine", "gateway"))
    assert model["State"]["ExitCode"] == 0
    assert when(model["State"]["FinishedAt"]) <= when(engine["State"]["StartedAt"])
    assert first_healthy(engine) <= when(gateway["State"]["StartedAt"]) + 1
    for service in SERVICES:
        assert stack.inspect(name_of(service))["State"]["Health"]["Status"] == "healthy", service


def test_only_the_gateway_is_published_and_only_on_the_loopback(stack: Docker) -> None:
    published = {
        service: stack.inspect(name_of(service))["HostConfig"]["PortBindings"] or {}
        for service in SERVICES
    }
    assert published == {
        "engine": {},
        "gateway": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]},
        "prometheus": {},
    }
    networks = stack.inspect(name_of("engine"))["NetworkSettings"]["Networks"]
    assert [stack.inspect(network)["Internal"] for network in networks] == [True]


@pytest.mark.parametrize("service", SERVICES)
def test_container_has_no_rights_to_lose(stack: Docker, service: str) -> None:
    status = stack.run("exec", name_of(service), "cat", "/proc/1/status")
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert int(facts["CapEff"], 16) == 0
    assert int(facts["CapBnd"], 16) == 0
    assert facts["NoNewPrivs"] == "1"
    assert facts["Uid"].split()[0] != "0"
    assert facts["Name"] in ("docker-init", "tini")


@pytest.mark.parametrize("service", ["gateway", "prometheus"])
def test_root_file_system_cannot_be_written(stack: Docker, service: str) -> None:
    config = stack.inspect(name_of(service))["HostConfig"]
    assert config["ReadonlyRootfs"]
    with pytest.raises(DockerError, match="Read-only file system"):
        stack.run("exec", "--user", "0", name_of(service), "touch", "/etc/here")


def test_engine_is_the_real_vllm(stack: Docker) -> None:
    """Not a stand-in: it says its version, and it is a program below the launcher."""
    listed = stack.run("exec", name_of("engine"), "cat", "/proc/1/cmdline")
    assert "launcher" in listed
    code = "import vllm; print(vllm.__version__)"
    assert stack.run("exec", name_of("engine"), "python3", "-c", code).startswith("0.32.")


# --- through the door ---


def test_root_says_batch(stack: Docker) -> None:
    response = httpx.get(GATEWAY, timeout=15, trust_env=False, verify=NO_TLS)
    assert (response.status_code, response.json()) == (200, {"status": "batch"})


def test_predict_batch_of_the_judges_size_is_answered_in_order(stack: Docker, step: Step) -> None:
    questions, known = read_pairs(358)
    with step("/predict with 358 questions"):
        response = predict(questions)
    assert response.status_code == 200, response.text
    answers_given = response.json()["response"]
    assert len(answers_given) == 358
    right = sum(given == want for given, want in zip(answers_given, known, strict=True))
    # The model knows the page by heart; a wrong order would match nearly nothing.
    assert right > 300


def test_stream_comes_through_the_published_port(stack: Docker) -> None:
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": read_pairs(1)[0][0]}],
        "stream": True,
    }
    url = f"{GATEWAY}/v1/chat/completions"
    with httpx.stream(
        "POST", url, json=body, timeout=60, trust_env=False, verify=NO_TLS
    ) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: ")]
    assert len(events) > 10
    assert events[-1] == "data: [DONE]"


# --- Prometheus ---


def test_prometheus_scrapes_every_target(stack: Docker) -> None:
    wanted = {
        ("gateway", "gateway"),
        ("engine", "engine"),
        ("launcher", "engine"),
        ("prometheus", "127.0.0.1"),
    }

    def all_up() -> bool:
        targets = ask_prometheus(stack, "targets")["activeTargets"]
        up = {
            (target["labels"]["job"], target["labels"]["instance"])
            for target in targets
            if target["health"] == "up"
        }
        return up == wanted and len(targets) == len(wanted)

    wait_until(f"every target is up: {wanted}", all_up, within_s=120)


def test_prometheus_saw_the_batch_at_the_gateway_and_in_the_engine(stack: Docker) -> None:
    """What came in at the door is what the engine did: more than one batch of 358."""

    def counted() -> bool:
        finished = value_of(stack, 'sum(vllm:request_success_total{job="engine"})')
        up = value_of(stack, 'launcher_engine_up{job="launcher"}')
        tokens = value_of(stack, 'sum({__name__=~"gateway_.*tokens.*_total",job="gateway"})')
        return finished > 183 and up == 1 and tokens > 0

    wait_until("the batch shows in the figures of all three", counted, within_s=120)


def test_prometheus_evaluates_every_rule(stack: Docker) -> None:
    def evaluated() -> bool:
        groups = ask_prometheus(stack, "rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        bad = [rule["name"] for rule in rules if rule["health"] == "err"]
        assert not bad, bad
        return len(rules) > 10 and all(rule["health"] == "ok" for rule in rules)

    wait_until("all rules are evaluated without an error", evaluated, within_s=PROGRAM_S)
    firing = ask_prometheus(stack, "alerts")["alerts"]
    names = [one["labels"]["alertname"] for one in firing if one["state"] == "firing"]
    assert names == ["Watchdog"]


def test_grade_made_on_the_host_shows_without_a_restart(stack: Docker) -> None:
    """There was none when the gateway started."""
    assert value_of(stack, "count(gateway_grade)") == 0
    record = read_record(ROOT / "docs" / "results" / "grade-demo.json")
    write_record(record, stack.scratch / "grades" / "grade.json")

    expected = {figure.name: figure.value for figure in record.figures}
    expression = 'gateway_grade{job="gateway",figure="tokens/s"}'
    shown = functools.partial(value_of, stack, expression)
    wait_until("it shows", lambda: shown() == expected["tokens/s"], within_s=120)


def test_every_panel_of_the_dashboards_shows_something(stack: Docker) -> None:
    for _ in range(2):  # a rate needs two samples of each series
        make_traffic(GATEWAY)
        time.sleep(6)  # longer than the pause between two scrapes

    findings = check_live(prometheus_of(stack), within_s=PROGRAM_S)

    assert [str(finding) for finding in findings] == []


def test_folder_of_grades_that_is_not_there_is_named_and_not_made(stack: Docker) -> None:
    """Made by the daemon it would be root's, and `make grade` could not write there."""
    folder = stack.scratch / "no-grades"
    check = ("run", "--rm", "--no-deps", "gateway", "check")
    with pytest.raises(DockerError, match=r"path does not exist: \S+/no-grades"):
        stack.compose(*check, variables={"GRADES": str(folder)})
    assert not folder.exists()


# --- what goes wrong ---


def test_engine_container_killed_comes_back(stack: Docker, step: Step) -> None:
    """SIGKILL to its first process: all of it dies at once, as when the memory is used up."""
    before = stack.inspect(name_of("engine"))
    kill_container(stack, name_of("engine"))
    with step("engine's container killed: gateway noticed"):
        wait_until("not ready", lambda: answers(f"{GATEWAY}/readyz", 503), within_s=PROGRAM_S)
    assert answers(f"{GATEWAY}/healthz")

    with step("engine's container killed: ready again"):
        wait_until("ready again", lambda: answers(f"{GATEWAY}/readyz"), within_s=120)
    after = stack.inspect(name_of("engine"))
    assert after["RestartCount"] == before["RestartCount"] + 1
    assert after["Id"] == before["Id"]
    questions, _ = read_pairs(32)
    response = predict(questions)
    assert response.status_code == 200
    assert "errors" not in response.json()
    assert stack.inspect(name_of("gateway"))["RestartCount"] == 0


def test_gateway_published_elsewhere_wants_keys(stack: Docker, step: Step) -> None:
    """The way docs/stack.md shows: make a key, say where the file is and where to listen."""
    up = ("up", "--detach", "--no-build", "--no-deps", "gateway")
    with step("gateway with BIND and no keys refuses to start"):
        stack.compose(*up, variables={"BIND": "0.0.0.0"})
        wait_until("it says why", lambda: "GATEWAY_KEYS_FILE" in log_of(stack), within_s=120)

    made = stack.compose_said("run", "-T", "--rm", "--no-deps", "gateway", "new-key", "alice")
    key = made.err.rpartition("key, shown once: ")[2].split()[0]
    folder = stack.scratch / "keys"
    folder.mkdir()
    file = folder / "keys.toml"
    file.write_text(made.out, encoding="utf-8")
    stack.scratch.chmod(0o755)  # the container's user reads it
    with step("gateway with BIND and a keys file serves who has a key"):
        keys = {"KEYS": str(folder), "KEYS_FILE": file.name}
        stack.compose(*up, variables={"BIND": "0.0.0.0", **keys})
        wait_until("ready", lambda: answers(f"{GATEWAY}/readyz"), within_s=PROGRAM_S)
    assert stack.inspect(name_of("gateway"))["HostConfig"]["PortBindings"] == {
        "8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "8000"}]
    }
    questions, _ = read_pairs(1)
    assert [predict(questions, key=given).status_code for given in ("", "vg-x", key)] == [
        401,
        401,
        200,
    ]
    assert "alice" not in httpx.get(f"{GATEWAY}/metrics", trust_env=False, verify=NO_TLS).text
    by_alice = 'gateway_usage_requests_total{job="gateway",key="alice"}'
    wait_until("Prometheus is told her name", lambda: value_of(stack, by_alice) >= 1, within_s=120)
    with step("a key is taken back by a file that another takes the place of, as editors do"):
        other = folder / "keys.new"
        other.write_text(make_key("bob")[1], encoding="utf-8")
        other.replace(file)
        wait_until(
            "refused", lambda: predict(questions, key=key).status_code == 401, within_s=PROGRAM_S
        )
    stack.compose(*up)
    wait_until("ready", lambda: answers(f"{GATEWAY}/readyz"), within_s=PROGRAM_S)


# --- two gateways ---


def read_limits() -> object:
    """Who keeps them, by the gateway that the balancer asks."""
    return httpx.get(f"{GATEWAY}/readyz", timeout=15, trust_env=False, verify=NO_TLS).json()[
        "limits"
    ]


def test_two_gateways_share_an_address_and_one_may_die(stack: Docker, step: Step) -> None:
    up = ("up", "--detach", "--no-build", "--wait")
    with step("compose.replicas.yaml: two gateways and a balancer"):
        stack.compose(*up, files=TWO_GATEWAYS, timeout_s=120)
    try:
        wait_until(
            "the balancer found them", lambda: answers(f"{GATEWAY}/readyz"), within_s=PROGRAM_S
        )
        wait_until("limits are shared", lambda: read_limits() == "shared", within_s=PROGRAM_S)
        questions, known = read_pairs(40)
        answered = [predict([question]).json()["response"] for question in questions]
        right = sum(given == [want] for given, want in zip(answered, known, strict=True))
        assert right > 30
        served = 'count(gateway_requests_total{job="gateway",route="/predict"} >= 10)'
        wait_until("both served", lambda: value_of(stack, served) == 2, within_s=120)
        test_stream_comes_through_the_published_port(stack)

        kill_container(stack, "vllm-gateway-gateway-2")
        assert [predict([question]).status_code for question in questions] == [200] * 40
    finally:
        stack.compose("rm", "--stop", "--force", "balancer", "redis", files=TWO_GATEWAYS)
        stack.compose(*up, timeout_s=120)
    assert predict(questions[:1]).status_code == 200


# --- two engines ---


def test_two_engines_share_the_work(stack: Docker, step: Step) -> None:
    with step("compose.scale.yaml: two engines"):
        stack.compose("up", "--detach", "--no-build", "--wait", files=TWO_ENGINES, timeout_s=240)
        wait_until("both serve", lambda: count_ready_engines() == 2, within_s=PROGRAM_S)
    before = finished_by_engine(stack)
    questions = [f"第 {number} 问：什么是 warp？" for number in range(200)]
    assert predict(questions).status_code == 200
    gained = {name: count - before[name] for name, count in finished_by_engine(stack).items()}
    assert len(gained) == 2
    assert sum(gained.values()) >= 200
    assert min(gained.values()) >= 80, gained
    wait_until("Prometheus scrapes both", lambda: scrapes_all_engines(stack), within_s=PROGRAM_S)
    status = httpx.get(f"{GATEWAY}/ui/status", trust_env=False, verify=NO_TLS).json()
    assert [one["state"] for one in status["launchers"]] == ["ready"] * 2
    # No GPUs to agree on here, but a cache in common: places of their own in it.
    kept = stack.run("exec", name_of("engine"), "ls", "/cache/gpus", "/cache/vllm-gateway")
    assert [kept.split().count(place) for place in ("cpu-0", "cpu-1", "cpu-2")] == [2, 2, 0]


def test_two_engines_are_replaced_one_after_the_other_and_no_request_is_lost(
    stack: Docker, step: Step
) -> None:
    """As docs/operations.md has it, for one of them: the next would be the same."""
    wait_until("both serve", lambda: count_ready_engines() == 2, within_s=PROGRAM_S)
    before = list_engines(stack)
    is_over = threading.Event()
    with ThreadPoolExecutor(2) as pool:

        def ask() -> list[str]:
            """Of each call what was said where it failed."""
            told: list[str] = []
            while not is_over.is_set():
                response = predict([f"什么是 warp？({len(told)})"])
                is_answered = response.status_code == 200 and "errors" not in response.json()
                told.append("" if is_answered else response.text)
            return told

        callers = [pool.submit(ask) for _ in range(2)]
        try:
            with step("one of two engines replaced, with callers"):
                stack.run("stop", before[0], timeout_s=90)
                stack.run("rm", before[0])
                up = ("up", "--detach", "--no-build", "--wait", "--no-deps", "--no-recreate")
                stack.compose(*up, "engine", files=TWO_ENGINES, timeout_s=240)
            wait_until("both serve", lambda: count_ready_engines() == 2, within_s=PROGRAM_S)
        finally:
            is_over.set()
        told = [one for caller in callers for one in caller.result()]

    after = list_engines(stack)
    assert len(after) == 2
    assert set(before) & set(after) == {before[1]}
    assert len(told) > 20
    assert set(told) == {""}
    wait_until("Prometheus follows", lambda: scrapes_all_engines(stack), within_s=PROGRAM_S)


def test_two_engines_serve_on_when_one_dies(stack: Docker) -> None:
    kill_container(stack, list_engines(stack)[1])
    response = predict([f"第 {number} 问：什么是 warp？" for number in range(50)])
    assert response.status_code == 200
    assert "errors" not in response.json()


# --- the end ---


def test_stop_lets_a_running_batch_finish_and_exits_cleanly(stack: Docker, step: Step) -> None:
    questions = [f"第 {number} 个问题：什么是线程块？" for number in range(800)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(predict, questions)
        wait_until(
            "the batch is in the engine", lambda: running_in_engine(stack) > 0, within_s=PROGRAM_S
        )
        with step("docker compose stop, with a batch running"):
            stack.compose("stop", files=TWO_ENGINES, timeout_s=120)
        response = running.result()
    assert response.status_code == 200, response.text[:500]
    assert len(response.json()["response"]) == len(questions)
    # The second engine was killed a moment ago, so it is told in the middle of its start.
    states = {
        service: [stack.inspect(name)["State"] for name in list_containers(stack, service)]
        for service in SERVICES
    }
    codes = {service: [one["ExitCode"] for one in ended] for service, ended in states.items()}
    assert codes == {"engine": [0, 0], "gateway": [0], "prometheus": [0]}
    assert not any(one["OOMKilled"] for ended in states.values() for one in ended)
    (gateway,) = states["gateway"]
    for engine in states["engine"]:
        assert when(gateway["FinishedAt"]) <= when(engine["FinishedAt"])


def test_course_container_answers_offline_alone(stack: Docker, step: Step) -> None:
    """One container, one port, no network beyond: what the course's judge builds and runs."""
    with step("course's container: started and healthy"):
        stack.compose("up", "--detach", "--no-build", "--wait", "course", timeout_s=240)
    root = httpx.get(COURSE, timeout=15, trust_env=False, verify=NO_TLS)
    assert (root.status_code, root.json()) == (200, {"status": "batch"})
    questions, known = read_pairs(358)
    given = predict(questions, url=COURSE).json()["response"]
    assert sum(one == other for one, other in zip(given, known, strict=True)) > 300
    config = stack.inspect(name_of("course"))
    assert config["Config"]["User"] == "10001:10001"
    # Nothing but the launcher is the first process here: it must bury what its engine leaves.
    assert not config["HostConfig"].get("Init")

    with step("course's container: the engine's core killed, ready again"):
        kill_process(stack, name_of("course"), "EngineCore")
        wait_until("not ready", lambda: answers(f"{COURSE}/readyz", 503), within_s=PROGRAM_S)
        wait_until("ready again", lambda: answers(f"{COURSE}/readyz"), within_s=120)
    with step("course's container: stopped"):
        stack.compose("stop", "course", timeout_s=120)
    assert stack.inspect(name_of("course"))["State"]["ExitCode"] == 0


def test_judge_passes_an_image_with_a_folder_of_ones_own(
    docker: Docker, step: Step, tmp_path: Path
) -> None:
    """Without a network, within the track's limits, and graded; the real vLLM for a CPU in it."""
    model = docker.run("run", "--rm", "--entrypoint=printenv", OWN_IMAGE, "LAUNCHER_MODEL")
    assert model.strip() == f"/models/{OWN_MODEL}"
    config = docker.compose("--profile", "course", "config", "--format", "json")
    course = json.loads(config)["services"]["course"]
    given = [f"--env={name}={value}" for name, value in course["environment"].items()]
    given += [f"--volume={one['source']}:{one['target']}:ro" for one in course["volumes"]]
    judge = ["lab", "judge", "--image", OWN_IMAGE, "--out", str(tmp_path / "judge.json")]
    with step("python -m lab judge"):
        said = docker.call([sys.executable, "-m", *judge, "--", *given], timeout_s=900)

    lines = said.out.splitlines()
    assert lines[-1] == "PASS"
    assert [line.split()[:2] for line in lines if line.startswith("ok")] == [
        ["ok", "healthy"],
        ["ok", "answers"],
        ["ok", "grade"],
    ]
    grade = json.loads((tmp_path / "judge.json").read_text(encoding="utf-8"))
    assert (grade["is_good"], len(grade["answers"])) == (True, 358)


def log_of(stack: Docker) -> str:
    return stack.compose("logs", "--no-color", "gateway")


def running_in_engine(stack: Docker) -> float:
    return read_engine(stack, list_engines(stack)[0], "vllm:num_requests_running")


def finished_by_engine(stack: Docker) -> dict[str, float]:
    return {
        one: read_engine(stack, one, "vllm:request_success_total") for one in list_engines(stack)
    }


def list_containers(stack: Docker, service: str) -> list[str]:
    """By what compose says: of two it may have kept the second."""
    return stack.compose("ps", "--all", "--quiet", service, files=TWO_ENGINES).split()


def list_engines(stack: Docker) -> list[str]:
    return list_containers(stack, "engine")


def scrapes_all_engines(stack: Docker) -> bool:
    """Each with its launcher, by its address, and no other."""
    targets = ask_prometheus(stack, "targets")["activeTargets"]
    up = {
        (target["labels"]["job"], target["labels"]["instance"])
        for target in targets
        if target["health"] == "up" and target["labels"]["job"] in ("engine", "launcher")
    }
    engines = [address_of(stack, one) for one in list_engines(stack)]
    return up == {(job, engine) for job in ("engine", "launcher") for engine in engines}


def count_ready_engines() -> int:
    text = httpx.get(f"{GATEWAY}/metrics", timeout=15, trust_env=False, verify=NO_TLS).text
    rows = [line for line in text.splitlines() if line.startswith("gateway_engine_ready{")]
    return sum(row.endswith(" 1.0") for row in rows)


def read_engine(stack: Docker, container: str, metric: str) -> float:
    url = f"http://{address_of(stack, container)}:8001/metrics"
    text = httpx.get(url, trust_env=False, verify=NO_TLS).text
    rows = [line for line in text.splitlines() if line.startswith(metric + "{")]
    return sum(float(row.rpartition(" ")[2]) for row in rows)
