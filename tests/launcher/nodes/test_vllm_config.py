"""What vLLM's own configuration makes of the launcher's argv, for every host of a layout: the real
vLLM reads it, without starting anything. What a CPU cannot run is proven so.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from common.project import DEMO_MODEL
from launcher.config import LauncherSettings
from launcher.models.model import find_model
from launcher.nodes.agreement import build_command, build_part, look_at_host
from launcher.nodes.messages import Answer
from launcher.plan.command import find_vllm
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.prepare import Prepared, prepare_with
from tests.launcher.programs import share_vllm_cache
from tests.vllm_python import VllmPython

pytestmark = pytest.mark.engine

# Ray need not be installed: whether it is, and what runs on it, is answered here.
READER = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.executor import Executor, ray_utils
from vllm.v1.executor.uniproc_executor import UniProcExecutor
ray_utils.assert_ray_available = lambda: None
find = Executor.get_class
Executor.get_class = staticmethod(
    lambda config: UniProcExecutor if config.parallel_config.use_ray else find(config)
)
parser = make_arg_parser(FlexibleArgumentParser())
FIELDS = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "nnodes", "node_rank",
    "master_addr", "master_port", "data_parallel_size_local", "data_parallel_rank",
    "data_parallel_master_ip", "data_parallel_rpc_port", "data_parallel_backend",
    "distributed_executor_backend", "node_rank_within_dp", "local_world_size", "use_ray",
)
for line in sys.stdin:
    args = parser.parse_args(json.loads(line))
    validate_parsed_serve_args(args)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(headless=args.headless)
    parallel = config.parallel_config
    row = {name: getattr(parallel, name) for name in FIELDS}
    print("row " + json.dumps(row | {"headless": args.headless}), flush=True)
"""

FLAGS = read_shipped_flags()
LAYOUTS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "tensor": (2, "mp", ("tensor-parallel-size=2",)),
    "pipeline": (2, "mp", ("pipeline-parallel-size=2", "enforce-eager=")),
    "data": (2, "mp", ("data-parallel-size=4",)),
    "tensor in pipeline": (
        2,
        "mp",
        ("pipeline-parallel-size=2", "tensor-parallel-size=2", "enforce-eager="),
    ),
    "copies over two hosts each": (4, "mp", ("data-parallel-size=2", "tensor-parallel-size=2")),
    "ray": (2, "ray", ("tensor-parallel-size=2",)),
    "ray, copies": (2, "ray", ("data-parallel-size=4",)),
}


def plan(nodes: int, backend: str, pairs: tuple[str, ...]) -> Prepared:
    settings = LauncherSettings(
        nodes=nodes,
        nodes_backend=backend,
        node_address="127.0.0.1",
        node_port=9000,
        set=(*pairs, "kv-cache-memory-bytes=67108864", "max-num-seqs=16"),
    )
    return prepare_with(settings, find_vllm(), FLAGS, find_model(settings))


def list_argv(prepared: Prepared) -> list[list[str]]:
    """Of every host: the head's, and what the others make of what they are told."""
    settings = prepared.settings
    argv = [list(prepared.command.arguments)]
    if settings.nodes_backend == "mp":
        part = build_part(prepared, {})
        host = look_at_host(LauncherSettings(), part, "127.0.0.2")
        for rank in range(1, settings.nodes):
            answer = Answer(
                rank=rank, nodes=settings.nodes, run="1", state="starting", beat_s=2, part=part
            )
            argv.append(list(build_command(host, answer).arguments))
    return argv


@pytest.fixture(scope="module")
def rows(
    tmp_path_factory: pytest.TempPathFactory, vllm_python: VllmPython
) -> dict[str, list[dict[str, Any]]]:
    """One process reads all of them."""
    every = {name: list_argv(plan(*layout)) for name, layout in LAYOUTS.items()}
    folder = tmp_path_factory.mktemp("reader")
    share_vllm_cache(folder)
    flat = [json.dumps(argv) for argvs in every.values() for argv in argvs]
    environment = {**os.environ, "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "VLLM_CACHE_ROOT": str(folder / "cache" / "vllm"),
    }
    result = vllm_python.run(
        [sys.executable, "-c", READER], input="\n".join(flat) + "\n", env=environment
    )
    assert result.returncode == 0, result.stderr[-4000:]
    told = [json.loads(r[4:]) for r in result.stdout.splitlines() if r.startswith("row ")]
    found = iter(told)
    assert len(told) == len(flat)
    return {name: [next(found) for _ in argvs] for name, argvs in every.items()}


def test_model_of_this_test_is_the_demo() -> None:
    assert plan(*LAYOUTS["tensor"]).plan.model.path == DEMO_MODEL


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "ray" not in name])
def test_vllm_reads_every_host_as_a_node_of_one_engine(
    rows: dict[str, list[dict[str, Any]]], name: str
) -> None:
    nodes = LAYOUTS[name][0]
    told = rows[name]

    assert [one["headless"] for one in told] == [False] + [True] * (nodes - 1)
    assert [one["node_rank"] for one in told] == list(range(nodes))
    assert {one["nnodes"] for one in told} == {nodes}
    assert {(one["master_addr"], one["master_port"]) for one in told} == {("127.0.0.1", 9001)}
    assert {one["distributed_executor_backend"] for one in told} == {"mp"}


def test_vllm_gives_every_host_its_part(rows: dict[str, list[dict[str, Any]]]) -> None:
    def read(name: str, *fields: str) -> list[tuple[int, ...]]:
        return [tuple(one[field] for field in fields) for one in rows[name]]

    one_process = ("local_world_size", "node_rank_within_dp")
    assert read("tensor", *one_process) == [(1, 0), (1, 1)]
    assert read("pipeline", *one_process) == [(1, 0), (1, 1)]
    assert read("tensor in pipeline", *one_process) == [(2, 0), (2, 1)]
    copies = ("data_parallel_size_local", "data_parallel_rank", "data_parallel_rpc_port")
    assert read("data", *copies) == [(2, 0, 9002), (2, 2, 9002)]
    spread = ("data_parallel_rank", "node_rank_within_dp", "local_world_size")
    expected = [(0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1)]
    assert read("copies over two hosts each", *spread) == expected


def test_vllm_leaves_the_hosts_to_ray(rows: dict[str, list[dict[str, Any]]]) -> None:
    (one,), (copies,) = rows["ray"], rows["ray, copies"]

    assert (one["use_ray"], one["nnodes"], one["headless"]) == (True, 1, False)
    assert (copies["use_ray"], copies["data_parallel_backend"]) == (True, "ray")
    assert (copies["data_parallel_size"], copies["data_parallel_size_local"]) == (4, 2)
    assert copies["data_parallel_master_ip"] == "127.0.0.1"
