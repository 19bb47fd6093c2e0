"""The code keeps the order that pyproject.toml declares, and the checks find what breaks one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.tree.call_paths import NotMeasured, measure_call_paths
from scripts.tree.drawing import draw_project
from scripts.tree.imports import (
    CHECKS,
    Project,
    find_crowded_folders,
    find_cycles,
    find_import_effects,
    find_unplaced,
    find_upward_imports,
    read_project,
)
from scripts.tree.modules import read_modules
from scripts.tree.sizes import count_lines, find_duplicates, find_long_functions, find_suppressed

pytestmark = pytest.mark.slow  # the code reads the same to every Python

ROOT = Path(__file__).parent.parent
CODE = "\n".join(f"    total = total * {number} + add(total, {number})" for number in range(8))
ORDER = """
[tool.tree.order]
"." = [["gateway", "launcher"], ["common"]]
gateway = [["app"], ["routes"], ["engines"], ["errors"]]
"gateway.routes" = [["*"], ["shared"]]
"""
ENGINE = """
import os
import aiohttp

async def ask(path, body):
    async with aiohttp.ClientSession() as session:
        async with session.post(os.environ["GATEWAY_ENGINES"] + path, json=body) as answer:
            return await answer.read()
"""
GATEWAY = """
import asyncio
import os
import uvloop
from aiohttp import web
from gateway.engine import ask

async def ready(request):
    async with asyncio.TaskGroup() as group:
        group.create_task(ask("/v1/completions", {"prompt": ["warm up"]}))
    return web.Response()

async def generate():
    await ask("/v1/completions", {"prompt": ["one"]})

async def predict(request):
    async with asyncio.TaskGroup() as group:
        group.create_task(generate())
    return web.Response()

async def relay(request):
    response = web.StreamResponse()
    await response.prepare(request)
    await response.write(await ask("/v1/chat/completions", {}))
    return response

async def main():
    asyncio.create_task(ask("/v1/completions", {"prompt": ["warm up"]}))
    app = web.Application()
    app.router.add_get("/readyz", ready)
    app.router.add_post("/predict", predict)
    app.router.add_post("/v1/chat/completions", relay)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", int(os.environ["GATEWAY_PORT"])).start()
    await asyncio.Event().wait()

uvloop.run(main())
"""


def write_tree(root: Path, files: dict[str, str], order: str = ORDER) -> Project:
    for name, text in {"pyproject.toml": order, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return read_project(root)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_project_keeps_its_order(check: Callable[[Project], list[str]]) -> None:
    assert check(read_project(ROOT)) == []


def test_drawing_in_the_docs_is_what_the_imports_say() -> None:
    drawn = (ROOT / "docs" / "images" / "tree.svg").read_text(encoding="utf-8")

    assert drawn == draw_project(read_project(ROOT)), "run `make docs`"


async def test_predict_takes_at_most_ten_frames_in_eight_files_to_the_engine() -> None:
    predict, stream, chunk = await measure_call_paths(ROOT)

    assert len(predict.frames) <= 10
    assert len(predict.files) <= 8
    assert len(stream.frames) <= len(predict.frames)
    assert len(chunk.frames) <= 6


def test_checks_of_an_orderly_tree_find_nothing(tmp_path: Path) -> None:
    project = write_tree(
        tmp_path,
        {
            "gateway/__init__.py": '"""The HTTP face."""\n',
            "gateway/app.py": "from gateway.routes import predict\nimport common.ports\n",
            "gateway/routes/predict.py": "from . import shared\nfrom ..engines.pool import Pool\n",
            "gateway/routes/shared.py": "import os\n",
            "gateway/engines/pool.py": "from gateway.errors import Refused\nclass Pool: pass\n",
            "gateway/errors.py": "class Refused(Exception): pass\n",
            "common/ports.py": "PORT = 8000\n",
        },
    )

    assert [fault for check in CHECKS for fault in check(project)] == []
    assert project.graph["gateway.routes.predict"] == {
        "gateway.routes.shared",
        "gateway.engines.pool",
    }


def test_cycle_through_a_function_and_a_relative_import_is_found(tmp_path: Path) -> None:
    project = write_tree(
        tmp_path,
        {
            "gateway/engines/pool.py": "from .engine import Engine\n",
            "gateway/engines/engine.py": "def ask():\n    from gateway.engines import wait\n",
            "gateway/engines/wait.py": "import gateway.engines.pool\n",
            "gateway/errors.py": "",
        },
    )

    (found,) = find_cycles(project)
    assert {"gateway.engines.pool", "gateway.engines.engine", "gateway.engines.wait"} == set(
        found.removeprefix("cycle: ").split(" < ")
    )


@pytest.mark.parametrize(
    ("importer", "text", "target"),
    [
        ("gateway/engines/pool.py", "from gateway.app import build", "gateway.app"),
        ("gateway/routes/predict.py", "from gateway.routes import relay", "gateway.routes.relay"),
        ("gateway/routes/shared.py", "import gateway.routes.relay", "gateway.routes.relay"),
        ("gateway/__init__.py", "from gateway.app import build", "gateway.app"),
        ("launcher/session.py", "from gateway.errors import Refused", "gateway.errors"),
        ("common/ports.py", "from gateway import errors", "gateway.errors"),
    ],
)
def test_import_of_what_is_not_below_is_found(
    tmp_path: Path, importer: str, text: str, target: str
) -> None:
    others = ("gateway/app.py", "gateway/errors.py", "gateway/routes/relay.py")
    project = write_tree(tmp_path, {**dict.fromkeys(others, ""), importer: text})

    (found,) = find_upward_imports(project)
    assert found.endswith(f" imports {target}")


def test_name_without_a_floor_is_found_once(tmp_path: Path) -> None:
    project = write_tree(tmp_path, {"gateway/extra/a.py": "", "gateway/extra/b.py": ""})

    assert find_unplaced(project) == ["unplaced: gateway has no floor for extra"]


def test_thirteenth_module_of_a_folder_is_found(tmp_path: Path) -> None:
    twelve = {f"gateway/engines/part_{number}.py": "" for number in range(12)}
    doors = {"gateway/engines/__init__.py": "", "gateway/engines/__main__.py": ""}

    assert find_crowded_folders(write_tree(tmp_path, twelve | doors)) == []
    project = write_tree(tmp_path, {"gateway/engines/part_12.py": ""})
    assert find_crowded_folders(project) == [
        "crowded: gateway/engines holds 13 modules, more than 12"
    ]


def test_call_at_the_top_of_a_module_is_found(tmp_path: Path) -> None:
    project = write_tree(tmp_path, {"gateway/app.py": '"""An app."""\nPORT = 1\nprint(PORT)\n'})

    assert find_import_effects(project) == [
        "effect: gateway/app.py:3 does something when it is imported"
    ]


def test_lines_without_blanks_comments_and_docstrings_are_code(tmp_path: Path) -> None:
    text = '"""Two\nlines."""\n\n# why\nNAME = """\ntext"""  # noqa: E501\n\ndef f():\n    "says"\n'
    write_tree(tmp_path, {"gateway/app.py": text})
    modules = read_modules(tmp_path)

    assert count_lines(modules) == {"modules": 1, "lines": 9, "code": 3}
    assert find_suppressed(modules) == ["gateway/app.py:6 # noqa: E501"]


def test_function_of_51_lines_is_long(tmp_path: Path) -> None:
    fits, long = ("def f():\n" + "    pass\n" * lines for lines in (49, 50))
    write_tree(tmp_path, {"gateway/a.py": fits, "gateway/b.py": long})

    assert find_long_functions(read_modules(tmp_path)) == ["gateway/b.py:1 f, 51 lines"]


def test_renamed_copy_of_code_is_a_duplicate(tmp_path: Path) -> None:
    copy = CODE.replace("total", "amount").replace("add", "join")
    write_tree(
        tmp_path,
        {
            "gateway/a.py": f"def f(total, add):\n{CODE}\n",
            "gateway/b.py": f"import os\n\ndef g(amount, join, more):\n{copy}\n",
            "gateway/c.py": f"def h(amount, join):\n{copy.replace('(amount', '(join')}\n",
        },
    )

    assert list(map(str, find_duplicates(read_modules(tmp_path)))) == [
        "gateway/a.py:2-9 and gateway/b.py:4-11, 8 lines"
    ]


def test_picture_names_every_folder_and_counts_imports(tmp_path: Path) -> None:
    project = write_tree(
        tmp_path,
        {
            "gateway/routes/predict.py": "import gateway.engines.pool\nimport common.ports\n",
            "gateway/engines/pool.py": "",
            "common/ports.py": "",
        },
    )

    picture = draw_project(project)
    for shown in (">routes<", ">engines<", ">pool<", ">ports<", ">gateway to common: 1<"):
        assert shown in picture


async def test_call_paths_lead_through_tasks_and_leave_out_the_warm_up(tmp_path: Path) -> None:
    write_tree(tmp_path, {"gateway/__main__.py": GATEWAY, "gateway/engine.py": ENGINE})

    predict, stream, chunk = await measure_call_paths(tmp_path)

    assert predict.frames == [
        "gateway/__main__.py:predict",
        "gateway/__main__.py:generate",
        "gateway/engine.py:ask",
    ]
    assert predict.files == ["gateway/__main__.py", "gateway/engine.py"]
    assert stream.frames == ["gateway/__main__.py:relay", "gateway/engine.py:ask"]
    assert chunk.frames == ["gateway/__main__.py:relay"]


async def test_gateway_that_does_not_start_is_not_measured(tmp_path: Path) -> None:
    write_tree(tmp_path, {"gateway/__main__.py": "raise SystemExit('no settings')\n"})

    with pytest.raises(NotMeasured, match="no settings"):
        await measure_call_paths(tmp_path)
