"""`python -m gateway roll`, beside a gateway under load: no call fails, and a new engine that does
not get warm changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tomllib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gateway.config import Settings, load_settings
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, until

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parents[3]


@dataclass
class Scene:
    """A gateway that follows a settings file with its old engine, and a new engine."""

    config: Path
    old: Behaviour
    new: Behaviour
    old_url: str
    new_url: str
    served: Served

    def read_engines(self) -> list[str]:
        return list(tomllib.loads(self.config.read_text(encoding="utf-8"))["engines"])

    async def start(self, *words: str) -> asyncio.subprocess.Process:
        own = ("--config", str(self.config), "--gateway", self.served.url)
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "roll", *own, *words),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def roll(self, *words: str) -> tuple[int, str, str]:
        process = await self.start(*words)
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture
async def scene(serve: Serve, tmp_path: Path) -> AsyncIterator[Scene]:
    config = tmp_path / "gateway.toml"
    old, new = Behaviour(), Behaviour()

    def reload() -> Settings:
        return load_settings(["--config", str(config)])

    async with (
        serve_app(build_fake_engine(old)) as old_url,
        serve_app(build_fake_engine(new)) as new_url,
    ):
        text = f'# ours\nprompt_style = "raw"\nengines = ["{old_url}"]\n'
        config.write_text(text, encoding="utf-8")
        own = {"config": config, "engines": (old_url,), "reload_interval_s": 0.05}
        async with serve(**own, reload=reload) as served:
            yield Scene(config, old, new, old_url, new_url, served)


@contextlib.asynccontextmanager
async def calling(served: Served) -> AsyncIterator[set[int]]:
    """Eight callers, and the statuses that they see."""
    statuses: set[int] = set()

    async def call_on(caller: int) -> None:
        number = 0
        while True:
            number += 1
            statuses.add((await served.predict(f"question {caller} {number}")).status_code)

    callers = [asyncio.create_task(call_on(number)) for number in range(8)]
    try:
        yield statuses
    finally:
        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)


async def test_roll_under_load_loses_no_call(scene: Scene) -> None:
    async with calling(scene.served) as statuses:
        await until(lambda: len(scene.old.calls) > 20)
        code, out, err = await scene.roll(scene.new_url)
        assert (code, err) == (0, ""), out
        before, after = len(scene.old.calls), len(scene.new.calls) + 20
        await until(lambda: len(scene.new.calls) > after)

    assert statuses == {200}
    assert (len(scene.old.calls), scene.old.running) == (before, 0)
    assert scene.read_engines() == [scene.new_url]
    assert scene.config.read_text(encoding="utf-8").startswith('# ours\nprompt_style = "raw"\n')
    assert out.splitlines()[-1] == f"roll: done; nothing runs any more at {scene.old_url}"


async def test_roll_waits_for_what_the_old_engine_has(scene: Scene) -> None:
    scene.old.slots = asyncio.Semaphore(0)
    call = asyncio.create_task(scene.served.chat("hi"))
    await until(lambda: scene.old.running == 1)

    code, out, _ = await scene.roll(scene.new_url, "--timeout-s", "3")
    assert code == 3
    assert f"{scene.old_url} runs 1 sequences of {scene.served.url}" in out
    assert scene.read_engines() == [scene.new_url]  # nothing new goes to the old one

    scene.old.slots.release()
    assert (await call).status_code == 200


async def test_roll_to_an_engine_that_does_not_get_warm_changes_nothing(scene: Scene) -> None:
    scene.new.status = 500

    code, out, _ = await scene.roll(scene.new_url, "--timeout-s", "2")

    assert code == 3
    assert f"{scene.new_url} is not ready at {scene.served.url}" in out
    assert scene.read_engines() == [scene.old_url]


async def test_roll_to_an_engine_of_another_name_changes_nothing(scene: Scene) -> None:
    scene.new.model = "other"

    code, out, _ = await scene.roll(scene.new_url)

    assert code == 3
    assert f"fake would be gone from {scene.served.url}: the new engines serve other" in out
    assert scene.read_engines() == [scene.old_url]


async def test_roll_that_is_broken_off_changes_nothing(scene: Scene) -> None:
    scene.new.status = 500
    process = await scene.start(scene.new_url)
    await until(lambda: len(scene.read_engines()) == 2)

    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()

    assert (process.returncode, err) == (130, b"")
    assert scene.read_engines() == [scene.old_url]


async def test_roll_that_cannot_work_is_refused_in_one_line(scene: Scene) -> None:
    before = scene.config.read_text(encoding="utf-8")
    for words, told in (
        ((scene.old_url,), "serves already"),
        (("http://127.0.0.1:9",), "start the new engine first"),
        (
            (scene.new_url, "--gateway", scene.new_url),
            "HTTP 404); --gateway says where",
        ),
        ((scene.new_url, "--config", "nosuch.toml"), "cannot read nosuch.toml"),
    ):
        code, _, err = await scene.roll(*words)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert told in err
    assert scene.config.read_text(encoding="utf-8") == before

    other = scene.config.with_name("other.toml")
    other.write_text('engines = ["http://127.0.0.1:9"]\n', encoding="utf-8")
    code, _, err = await scene.roll(scene.new_url, "--config", str(other))
    assert code == 2
    assert "start it with GATEWAY_CONFIG at that file" in err
