"""Which processes run where, and what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from common.errors import SettingsError
from launcher.commands import check_hosts
from launcher.config import LauncherSettings, load_settings
from launcher.explain import explain
from launcher.host_resources import list_listeners
from launcher.models.model import find_model
from launcher.nodes.agreement import Host, build_part, find_differences
from launcher.nodes.checks import check_as_head
from launcher.nodes.messages import Answer
from launcher.plan.command import InstalledVllm
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.prepare import Prepared, prepare_with
from launcher.plan.spreading import Layout, check_nodes, find_interface, list_node_variables

FLAGS = read_shipped_flags()
VLLM = InstalledVllm("vllm", FLAGS.version, "gpu", "vllm.entrypoints.cli.main", True)
MODELS = Path(__file__).parents[1] / "models"


def plan(*pairs: str, gpu: str = "H200", **settings: Any) -> Prepared:
    """Of the model of eight billion, which nobody has here."""
    words: dict[str, Any] = {"model": str(MODELS / "qwen3-8b"), "gpu": gpu, "nodes": 2, **settings}
    read = LauncherSettings(set=pairs, **words)
    return prepare_with(read, VLLM, FLAGS, find_model(read, config_only=True))


@pytest.mark.parametrize(
    ("nodes", "sizes", "told"),
    [
        (2, (1, 1, 2), ["process 0 of 2: tensor 0 of 2", "process 1 of 2: tensor 1 of 2"]),
        (2, (1, 2, 1), ["process 0 of 2: pipeline 0 of 2", "process 1 of 2: pipeline 1 of 2"]),
        (
            2,
            (4, 1, 2),
            [
                "process 0 to 3 of 8: data 0 to 1 of 4, tensor 0 to 1 of 2",
                "process 4 to 7 of 8: data 2 to 3 of 4, tensor 0 to 1 of 2",
            ],
        ),
        (
            4,
            (2, 2, 1),
            [
                "process 0 of 4: data 0 of 2, pipeline 0 of 2",
                "process 1 of 4: data 0 of 2, pipeline 1 of 2",
                "process 2 of 4: data 1 of 2, pipeline 0 of 2",
                "process 3 of 4: data 1 of 2, pipeline 1 of 2",
            ],
        ),
    ],
)
def test_layout_tells_of_each_host_what_runs_there(
    nodes: int, sizes: tuple[int, int, int], told: list[str]
) -> None:
    data, pipeline, tensor = sizes
    layout = Layout(
        nodes, {"data": data, "pipeline": pipeline, "prefill-context": 1, "tensor": tensor}
    )

    assert [layout.describe(rank) for rank in range(nodes)] == told


def test_head_gets_the_options_of_a_first_node_and_its_address() -> None:
    prepared = plan(
        "tensor-parallel-size=2", node_address="10.0.0.1", node_port=9000, nodes_token="word"
    )
    argv = " ".join(prepared.command.arguments)

    for words in (
        "--distributed-executor-backend mp",
        "--nnodes 2",
        "--node-rank 0",
        "--master-addr 10.0.0.1",
        "--master-port 9001",
        "--data-parallel-rpc-port 9002",
    ):
        assert words in argv
    assert "headless" not in argv
    assert prepared.command.environment["VLLM_HOST_IP"] == "10.0.0.1"


def test_one_host_gets_none_of_them() -> None:
    prepared = plan(nodes=1)
    assert not any(word.startswith("--n") for word in prepared.command.arguments)
    assert "VLLM_HOST_IP" not in prepared.command.environment


def test_ray_gets_its_own_options_and_no_node() -> None:
    prepared = plan("data-parallel-size=4", nodes_backend="ray", node_address="10.0.0.1")
    argv = " ".join(prepared.command.arguments)

    for words in (
        "--distributed-executor-backend ray",
        "--data-parallel-backend ray",
        "--data-parallel-address 10.0.0.1",
        "--data-parallel-size-local 2",
    ):
        assert words in argv
    assert "--nnodes" not in argv


def test_own_interface_is_named_to_the_groups_of_processes() -> None:
    variables = {one.name: one.value for one in list_node_variables("127.0.0.1")}

    assert variables == {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    assert find_interface("203.0.113.7") == ""  # another host's


@pytest.mark.parametrize(
    ("pairs", "nodes", "message"),
    [
        ((), 2, "1 process cannot be dealt out to 2 hosts: set data-parallel-size=2 for a model"),
        (("tensor-parallel-size=4",), 3, "tensor 4 cannot be dealt out to 3 hosts"),
        (
            ("data-parallel-size=3", "tensor-parallel-size=2"),
            2,
            "3 processes a host are neither whole copies of 2 nor an even part of one",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(
    pairs: tuple[str, ...], nodes: int, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        plan(*pairs, nodes=nodes)


def test_stages_on_a_cpu_must_be_compiled() -> None:
    with pytest.raises(SettingsError, match="add --set enforce-eager="):
        plan("pipeline-parallel-size=2", gpu="cpu")

    eager = plan("tensor-parallel-size=2", gpu="cpu").command
    compiled = plan("pipeline-parallel-size=2", "enforce-eager=", gpu="cpu").command
    assert "--enforce-eager" not in compiled.arguments
    # What keeps an eager engine from compiling would end this one's start.
    assert eager.environment["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in compiled.environment


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2", "--join", "head"], "a host that joins is told by the head"),
        (["--nodes", "2", "--node-address", "10.0.0.1"], "set LAUNCHER_NODES_TOKEN"),
        (["--join", "http://head:1"], "is no HEAD or HEAD:PORT"),
        (["--nodes", "2", "--copies", "2"], "copies are engines of one host"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_nodes(load_settings(LauncherSettings, words))


def test_engine_sections_are_of_one_host() -> None:
    with pytest.raises(SettingsError, match="sections and copies are engines of one host"):
        check_nodes(LauncherSettings(nodes=2, engine=({"model": "a"}, {"model": "b"})))


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("head", ("head", 8700)),
        ("10.0.0.1:9000", ("10.0.0.1", 9000)),
        ("[fd00::1]:9000", ("fd00::1", 9000)),
        ("[fd00::1]", ("fd00::1", 8700)),
    ],
)
def test_join_names_a_head_and_perhaps_its_port(text: str, address: tuple[str, int]) -> None:
    assert LauncherSettings(join=text).head_address == address


def test_token_is_shown_by_no_error() -> None:
    shown = repr(LauncherSettings(nodes_token="the-word"))
    assert "the-word" not in shown


def test_explain_shows_what_runs_on_which_host() -> None:
    settings = LauncherSettings(
        model=str(MODELS / "qwen3-8b"), gpu="H200", nodes=2, set=("pipeline-parallel-size=2",)
    )
    (text,) = explain([settings], as_json=False)

    assert "hosts    this one (127.0.0.1:8700): process 0 of 2: pipeline 0 of 2" in text
    assert "2 of 2, who joins: process 1 of 2: pipeline 1 of 2" in text


def test_doctor_shows_the_hosts_and_refuses_an_address_of_another() -> None:
    layout = Layout(2, {"data": 1, "pipeline": 1, "prefill-context": 1, "tensor": 2})
    here = list(check_as_head(LauncherSettings(nodes=2), layout))
    elsewhere = list(check_as_head(LauncherSettings(nodes=2, node_address="203.0.113.7"), layout))

    assert here[:2] == [
        ("ok", "1 of 2: process 0 of 2: tensor 0 of 2"),
        ("ok", "2 of 2: process 1 of 2: tensor 1 of 2"),
    ]
    assert here[2] == (
        "warn",
        "only this machine can join at 127.0.0.1: set LAUNCHER_NODE_ADDRESS",
    )
    assert elsewhere[2][0] == "fail"


def test_ports_of_the_nodes_are_among_those_that_must_be_free() -> None:
    settings = LauncherSettings(nodes=2, node_port=9000)
    ports = [one.port for one in list_listeners([settings], with_gateway=True)]
    assert ports[-3:] == [9000, 9001, 9002]

    with pytest.raises(SettingsError, match=r"LAUNCHER_ENGINE_PORT and LAUNCHER_NODE_PORT \(\+2\)"):
        list_listeners([LauncherSettings(nodes=2, node_port=7999)], with_gateway=True)


@pytest.mark.parametrize("token", ["wörd", "two words", "line\n"])
def test_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(ValidationError, match="a token has letters"):
        LauncherSettings(nodes_token=token)


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("explain", {"join": "head"}, "explain is for the head, which plans for all hosts"),
        ("tune", {"join": "head"}, "tune is for the head"),
        ("tune", {"nodes": 2}, "tune measures on one host"),
    ],
)
def test_commands_of_one_host_refuse_several(
    command: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        check_hosts(command, LauncherSettings(**settings))


def test_joining_host_may_have_the_same_set_as_the_head() -> None:
    """What only a head's server has is no difference."""
    pairs = ("tensor-parallel-size=2", "api-server-count=2")
    prepared = plan(*pairs)
    part = build_part(prepared, {})
    answer = Answer(rank=1, nodes=2, run="", state="joining", beat_s=2, part=part)

    def compare(*pairs: str) -> list[str]:
        settings = LauncherSettings(set=pairs)
        digest, device, model = part.model_digest, prepared.plan.device, prepared.plan.model
        host = Host(settings, VLLM, FLAGS, device, model, digest, "10.0.0.2")
        return list(find_differences(host, answer, {}))

    assert part.find("api-server-count") is None
    assert compare(*pairs) == []
    (told,) = compare(*pairs, "max-num-seqs=7")
    assert "max-num-seqs is 7 here" in told
