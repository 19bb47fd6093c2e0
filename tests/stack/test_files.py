"""The files of the stack, by their own judges; these need no container."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.plan.budget import WORKER_SHARED_BYTES

pytestmark = pytest.mark.slow  # compose and hadolint judge, not Python

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
COMPOSE_FILES = sorted(ROOT.glob("compose*.yaml"))
WAYS = [
    (),
    ("compose.cpu.yaml",),
    ("compose.scale.yaml",),
    ("compose.replicas.yaml",),
    ("compose.tls.yaml",),
    ("compose.alerts.yaml",),
    ("compose.tls.yaml", "compose.replicas.yaml", "compose.alerts.yaml"),
    ("compose.cpu.yaml", "compose.replicas.yaml"),
    ("compose.scale.yaml", "compose.replicas.yaml"),
    ("compose.scale.yaml", "compose.replicas.yaml", "compose.cpu.yaml"),
    ("tests/stack/compose.ci.yaml",),
    ("compose.scale.yaml", "tests/stack/compose.ci.yaml"),
]


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # compose.tls.yaml wants the one, and the others leave it be.
    environment = {**os.environ, "DOMAIN": "llm.example.com", **variables}
    return subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def passes(*words: str | Path, **variables: str) -> str:
    result = run(*words, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def compose(way: tuple[str, ...], *words: str, folder: Path = ROOT, **variables: str) -> str:
    if run("docker", "compose", "version").returncode != 0:
        pytest.skip("no `docker compose` here; scripts/system.sh containers gets it")
    files = [part for name in ("compose.yaml", *way) for part in ("-f", str(folder / name))]
    own = {"STACK_PYTHON": "/python", "STACK_SITE": "/site"}
    return passes("docker", "compose", *files, *words, **(own | variables))


def services(way: tuple[str, ...] = (), folder: Path = ROOT, /, **variables: str) -> dict[str, Any]:
    text = compose(way, "config", "--format", "json", folder=folder, **variables)
    described = json.loads(text)
    found: dict[str, Any] = described["services"]
    return found


def mount(service: dict[str, Any], target: str) -> dict[str, Any]:
    found: list[dict[str, Any]] = [one for one in service["volumes"] if one["target"] == target]
    assert len(found) == 1, service["volumes"]
    return found[0]


@pytest.mark.parametrize("path", sorted(ROOT.glob("Dockerfile.*")), ids=lambda path: path.name)
def test_dockerfile_is_clean(path: Path) -> None:
    passes(BIN / "hadolint", "--failure-threshold", "warning", path)


def test_course_container_is_given_up_when_its_judge_gives_it_up() -> None:
    text = (ROOT / "Dockerfile.engine").read_text(encoding="utf-8")
    check = text.rpartition("HEALTHCHECK ")[2].partition("\n")[0]
    seconds = {name: int(value) for name, value in re.findall(r"--([\w-]+)=(\d+)", check)}
    longest = seconds["retries"] * (seconds["interval"] + seconds["timeout"])
    assert seconds["start-period"] + longest == 420


def test_models_of_ones_own_are_built_from_but_not_committed() -> None:
    ignored = run("git", "check-ignore", "models/my-ft/config.json", "models/README.md")
    assert ignored.stdout.split() == ["models/my-ft/config.json"], ignored.stderr
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"!models", "!course.toml"} <= set(lines)
    for name in ("Dockerfile.engine", "Dockerfile.gateway"):
        assert "COPY . ." not in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_compose_file_keeps_to_the_schema(path: Path, tmp_path: Path) -> None:
    # The schema knows no tags; what they mean is Compose's matter, and tested below.
    plain = tmp_path / path.name
    text = re.sub("!override|!reset", "", path.read_text(encoding="utf-8"))
    plain.write_text(text, encoding="utf-8")
    passes(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", plain)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "compose.yaml")
def test_compose_files_fit_together(way: tuple[str, ...]) -> None:
    assert compose(way, "config", "--quiet") == ""


def test_engine_gets_its_gpu_and_several_see_all_of_them() -> None:
    def list_gpus(*way: str) -> list[Any]:
        resources = services(way, ENGINES="3")["engine"]["deploy"]["resources"]
        return [
            gpu.get("device_ids") or gpu["count"]
            for gpu in resources.get("reservations", {}).get("devices", ())
        ]

    assert list_gpus() == [["0"]]
    assert list_gpus("compose.scale.yaml") == [-1]
    assert list_gpus("compose.cpu.yaml") == []
    assert list_gpus("compose.scale.yaml", "compose.cpu.yaml") == []


@pytest.mark.parametrize(
    "others", [(), ("compose.replicas.yaml",), ("compose.replicas.yaml", "compose.cpu.yaml")]
)
def test_number_of_engines_is_one_number(others: tuple[str, ...]) -> None:
    """Nothing else knows it: engines are found by their name, in their volume they agree."""
    way = ("compose.scale.yaml", *others)
    two, four = services(way, ENGINES=""), services(way, ENGINES="4")
    engine, gateway = four["engine"], four["gateway"]["environment"]

    assert [one["engine"]["deploy"].pop("replicas") for one in (two, four)] == [2, 4]
    assert two == four
    assert gateway["GATEWAY_ENGINES"] == "dns+http://engine:8001"
    assert gateway["GATEWAY_LAUNCHERS"] == "http://*:8002"
    locks = Path(engine["environment"]["LAUNCHER_GPU_LOCKS"])
    assert mount(engine, str(locks.parent))["type"] == "volume"
    folder = mount(four["prometheus"], "/etc/prometheus/engines")["source"]
    assert folder == str(ROOT / "deploy" / "prometheus" / "scale")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "compose.yaml")
def test_engine_has_room_for_worker_processes(way: tuple[str, ...]) -> None:
    """Below that the launcher must do without, and the host's work delays the GPU's."""
    engine = services(way)["engine"]
    assert int(engine.get("shm_size", 64 * 2**20)) >= WORKER_SHARED_BYTES
    assert engine.get("ipc") != "host"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "compose.yaml")
def test_gateway_reads_the_grade_that_make_grade_writes(way: tuple[str, ...]) -> None:
    gateway = services(way, GRADES="")["gateway"]
    grades = mount(gateway, "/grades")
    record = Path(gateway["environment"]["GATEWAY_GRADE_RECORD"])
    written = Path(grades["source"]) / record.relative_to("/grades")

    assert f"--record {written.relative_to(ROOT)} " in passes("make", "--dry-run", "grade")
    # Every checkout has the folder, so no daemon makes it, and a grade is nobody's change.
    assert passes("git", "ls-files", written.parent)
    assert passes("git", "check-ignore", written)
    assert grades["read_only"]
    assert not grades["bind"].get("create_host_path")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "compose.yaml")
def test_gateway_sees_a_keys_file_that_is_written_anew(way: tuple[str, ...]) -> None:
    """Editors put another file in its place; a mount of the file would stay with the first."""
    gateway = services(way, KEYS="", KEYS_FILE="keys.toml")["gateway"]
    keys = mount(gateway, "/keys")
    folder = Path(keys["source"])

    assert gateway["environment"]["GATEWAY_KEYS_FILE"] == "/keys/keys.toml"
    assert folder.is_dir()
    assert passes("git", "ls-files", folder)
    assert passes("git", "check-ignore", folder / "keys.toml")
    assert keys["read_only"]
    assert not keys["bind"].get("create_host_path")
    assert "secrets" not in gateway


def test_gateway_reads_keys_from_a_folder_of_ones_own_and_none_unasked(tmp_path: Path) -> None:
    gateway = services(KEYS=str(tmp_path), KEYS_FILE="")["gateway"]
    assert mount(gateway, "/keys")["source"] == str(tmp_path)
    assert not gateway["environment"]["GATEWAY_KEYS_FILE"]


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_stored_responses_have_a_volume_and_can_be_turned_off(way: tuple[str, ...]) -> None:
    gateways = [one for name, one in services(way).items() if name.startswith("gateway")]
    for gateway in gateways:
        place = gateway["environment"]["GATEWAY_RESPONSES_DATABASE"]
        volume = mount(gateway, str(Path(place).parent))
        assert (volume["type"], volume["source"]) == ("volume", "responses")
        assert not volume.get("read_only")
    off = services(way, RESPONSES_DATABASE="")["gateway"]

    assert gateways
    assert off["environment"]["GATEWAY_RESPONSES_DATABASE"] == ""
    folders = re.search(r"RUN install -d -o 10001 .*", (ROOT / "Dockerfile.gateway").read_text())
    assert folders is not None
    assert "/responses" in folders[0].split()  # else the volume is root's


def test_names_of_keys_are_told_to_prometheus_and_not_through_the_published_port() -> None:
    gateway = services()["gateway"]
    port = gateway["environment"]["GATEWAY_METRICS_PORT"]
    folder = ROOT / "deploy" / "prometheus"
    path = folder / "gateways" / "gateway.yml"

    assert f"port: {port}\n" in (folder / "replicas" / "gateway.yml").read_text(encoding="utf-8")
    assert f"- targets: [gateway:{port}]\n" in path.read_text(encoding="utf-8")
    assert gateway["environment"]["GATEWAY_METRICS_HOST"] == "0.0.0.0"
    assert [str(one["target"]) for one in gateway["ports"]] == ["8000"]
    assert port != "8000"


def test_gateway_reads_grades_from_a_folder_of_ones_own(tmp_path: Path) -> None:
    grades = mount(services(GRADES=str(tmp_path))["gateway"], "/grades")
    assert grades["source"] == str(tmp_path)


PASSWORDS = [
    ({}, True),
    ({"GRAFANA_BIND": "127.0.0.1"}, True),
    ({"GRAFANA_BIND": "[::1]"}, True),
    ({"GRAFANA_BIND": "0.0.0.0"}, False),
    ({"GRAFANA_BIND": "192.0.2.1", "GRAFANA_PASSWORD": "admin"}, False),
    ({"GRAFANA_BIND": "[::]"}, False),
    ({"GRAFANA_BIND": "0.0.0.0", "GRAFANA_PASSWORD": "of-my-own"}, True),
]


@pytest.mark.parametrize(("variables", "starts"), PASSWORDS, ids=str)
def test_grafana_published_elsewhere_wants_a_password(
    variables: dict[str, str], starts: bool, tmp_path: Path
) -> None:
    grafana = services(**({"GRAFANA_BIND": "", "GRAFANA_PASSWORD": ""} | variables))["grafana"]
    shell, script, program = grafana["entrypoint"]
    start = mount(grafana, script)["source"]

    result = subprocess.run(
        [shell, start, "echo", program, "runs"],
        env=grafana["environment"] | {"GF_PATHS_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    if starts:
        assert (result.returncode, result.stdout) == (0, "/run.sh runs\n"), result.stderr
    else:
        assert (result.returncode, result.stdout) == (2, "")
        assert "set GRAFANA_PASSWORD" in result.stderr


@pytest.mark.parametrize(
    ("bind", "is_published"),
    [("", False), ("127.0.0.1", False), ("[::1]", False), ("0.0.0.0", True), ("[::]", True)],
)
def test_grafana_published_elsewhere_has_no_account_from_before(
    bind: str, is_published: bool, tmp_path: Path
) -> None:
    """Where `admin` was good enough must not be where others log in, however that was said."""
    grafana = services(GRAFANA_BIND=bind, GRAFANA_PASSWORD="of-my-own")["grafana"]
    shell, script, _ = grafana["entrypoint"]
    assert mount(grafana, "/var/lib/grafana")["source"] == "grafana"

    result = subprocess.run(
        [shell, mount(grafana, script)["source"], "printenv", "GF_PATHS_DATA"],
        env=grafana["environment"] | {"GF_PATHS_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )

    data = tmp_path / "published" if is_published else tmp_path
    assert result.stdout == f"{data}\n"
    assert data.is_dir()


@pytest.mark.parametrize("way", [(), ("compose.cpu.yaml",), ("compose.scale.yaml",)], ids=str)
def test_settings_of_ones_own_files_reach_both_programs(
    way: tuple[str, ...], tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    for path in COMPOSE_FILES:
        shutil.copy(path, tmp_path)

    def read(name: str, variable: str) -> str | None:
        found: str | None = services(way, tmp_path)[name]["environment"].get(variable)
        return found

    is_cpu = "compose.cpu.yaml" in way
    assert read("gateway", "GATEWAY_WARMUP_PROMPTS") == ("32" if is_cpu else None)
    assert read("engine", "LAUNCHER_ENGINE_LOG") is None

    (tmp_path / "gateway.env").write_text("GATEWAY_WARMUP_PROMPTS=8\n")
    (tmp_path / "engine.env").write_text("LAUNCHER_ENGINE_LOG=requests\n")

    assert read("gateway", "GATEWAY_WARMUP_PROMPTS") == "8"
    assert read("engine", "LAUNCHER_ENGINE_LOG") == "requests"
    # A program's settings are its own: the other would refuse them.
    assert read("gateway", "LAUNCHER_ENGINE_LOG") is None


def test_model_in_the_image_is_not_fetched_again_for_a_change_of_the_programs() -> None:
    text = (ROOT / "Dockerfile.engine").read_text(encoding="utf-8")
    stages = {part.split("\n")[0].split()[-1]: part for part in text.split("\nFROM ")[1:]}
    assert stages["model"].startswith("base AS model")
    assert stages["base"].startswith("${DEVICE} AS base")
    copied = [
        line.split()[1:]
        for name in ("base", "model")
        for line in stages[name].splitlines()
        if line.startswith(("COPY", "ADD", "RUN --mount=from"))
    ]
    # Of another stage only the list of what the image lacks, which no change of them changes.
    assert [words for words in copied if words[0].startswith("--")] == [
        ["--from=wheel", "/build/lacking.txt", "/tmp/"]  # noqa: S108
    ]
    sources = {word for words in copied for word in words[:-1] if not words[0].startswith("--")}
    assert {source for source in sources if not source.startswith("scripts/")} == {
        "demo",
        "common/__init__.py",
        "common/files.py",
        "common/project.py",
        "launcher/__init__.py",
        "launcher/models/__init__.py",
        "launcher/models/model_files.py",
        "launcher/models/retrying.py",
    }


def test_several_gateways_are_published_by_their_balancer_alone() -> None:
    one, several = services(), services(("compose.replicas.yaml",), GATEWAYS="3")
    assert not {"balancer", "redis"} & set(one)
    assert "ports" not in several["redis"]
    assert "ports" not in several["gateway"]
    assert several["gateway"]["deploy"]["replicas"] == 3
    assert several["gateway"]["deploy"]["resources"] == one["gateway"]["deploy"]["resources"]
    assert several["balancer"]["ports"] == one["gateway"]["ports"]
    for key in ("init", "restart", "security_opt", "cap_drop", "logging"):
        assert several["balancer"][key] == several["redis"][key] == one["gateway"][key], key


def test_gateway_behind_tls_is_reached_by_caddy_alone_and_with_keys() -> None:
    stack = services(("compose.tls.yaml",))
    assert "ports" not in stack["gateway"]
    assert stack["gateway"]["command"] == ["--no-allow-anonymous"]
    assert stack["gateway"]["environment"]["GATEWAY_ALLOWED_HOSTS"] == "llm.example.com"
    assert [port["target"] for port in stack["caddy"]["ports"]] == [80, 443]
    for key in ("init", "restart", "security_opt", "cap_drop", "logging"):
        assert stack["caddy"][key] == services()["gateway"][key], key


def test_alertmanager_is_told_where_it_is_there_and_on_the_loopback_alone() -> None:
    before, after = services(), services(("compose.alerts.yaml",))
    target = "/etc/prometheus/alertmanagers"
    assert "alertmanager" not in before
    assert [one for one in before["prometheus"]["volumes"] if one["target"] == target] == []
    folder = Path(mount(after["prometheus"], target)["source"])
    (path,) = folder.iterdir()
    assert path.read_text(encoding="utf-8") == "- targets: [alertmanager:9093]\n"
    assert {port["host_ip"] for port in after["alertmanager"]["ports"]} == {"127.0.0.1"}


def test_prometheus_data_is_bounded_in_size() -> None:
    command = services(PROMETHEUS_SIZE="")["prometheus"]["command"]
    assert "--storage.tsdb.retention.size=10GB" in command


def test_every_image_of_a_registry_is_pinned() -> None:
    ways = ("compose.replicas.yaml", "compose.tls.yaml", "compose.alerts.yaml")
    images = compose(ways, "config", "--images").split()
    foreign = [image for image in images if not image.startswith("vllm-gateway")]
    assert len(foreign) == 6
    assert all(":" in image and not image.endswith(":latest") for image in foreign)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(way) or "compose.yaml")
def test_prometheus_configuration_is_valid(way: tuple[str, ...], tmp_path: Path) -> None:
    """With the folders in their places that each way mounts."""
    if not shutil.which("promtool"):
        pytest.skip("no promtool here; scripts/system.sh prometheus gets it")
    for one in services(way)["prometheus"]["volumes"]:
        if one["type"] == "bind":
            place = tmp_path / Path(one["target"]).relative_to("/etc")
            shutil.copytree(one["source"], place, dirs_exist_ok=True)
    passes("promtool", "check", "config", tmp_path / "prometheus" / "prometheus.yml")


def test_several_engines_are_scraped_as_one_is() -> None:
    """By the same jobs at the same ports, each `instance` without its port."""
    folder = ROOT / "deploy" / "prometheus"
    one, several = (
        (folder / name / "engines.yml").read_text(encoding="utf-8") for name in ("engines", "scale")
    )
    for text in (one, several):
        assert re.findall("job_name: (.*)", text) == ["engine", "launcher"]
        assert text.count("relabel_configs: ") == 2
    assert re.findall(r"engine:(\d+)", one) == re.findall(r"port: (\d+)", several)
    assert "names: [engine]" in several
