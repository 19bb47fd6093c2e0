"""The launcher of a host that joins, in this process, before a real head."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from common.project import DEMO_MODEL
from launcher.config import LauncherSettings
from launcher.engine.polling import poll
from launcher.engine.terminal import Terminal
from launcher.models.model import find_model
from launcher.nodes.agreement import Host
from launcher.nodes.head_link import HeadClient, HeadLink
from launcher.nodes.messages import Part
from launcher.nodes.worker import HeadlessPart, Worker
from launcher.plan.command import InstalledVllm
from launcher.plan.flags.known_flags import read_shipped_flags
from launcher.plan.hardware import parse_device
from tests.launcher.fake_hub import FakeHub, serve_hub
from tests.launcher.nodes.test_head import PART, a_town
from tests.launcher.programs import Launcher, running, wait_for

FLAGS = read_shipped_flags()
VLLM = InstalledVllm("vllm", FLAGS.version, "gpu", "vllm.entrypoints.cli.main", True)


def make_host(settings: LauncherSettings, part: Part, address: str) -> Host:
    """As if the head's model were here, by its name."""
    model = replace(find_model(LauncherSettings(model=str(DEMO_MODEL))), path=Path("/", part.model))
    device = parse_device("H200")
    return Host(settings, VLLM, FLAGS, device, model, part.model_digest, address)


async def test_part_of_another_plan_starts_only_when_the_host_has_agreed_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head came back with another model, which takes its time to come here."""
    old = PART.model_copy(update={"model": "old"})
    may_go_on = threading.Event()

    def fetch(*of_host: object) -> Host:
        assert may_go_on.wait(60)
        return make_host(*of_host)  # type: ignore[arg-type]

    monkeypatch.setattr("launcher.nodes.worker.look_at_host", fetch)
    monkeypatch.setattr("launcher.nodes.worker.find_differences", lambda *_: iter(()))
    async with a_town() as town:
        head = HeadClient(town.settings, town.client)
        first = (await head.look()).model_copy(update={"part": old})
        link = HeadLink(head, first, town.settings.model_copy(update={"node_timeout_s": 600}))
        part = HeadlessPart(town.settings, link, make_host(town.settings, old, "10.0.0.9"))
        worker = Worker(town.settings, cast("Terminal", None), town.client)
        watching = asyncio.create_task(worker._watch_plan(link, part))
        gathering = asyncio.create_task(link.gather())
        try:
            of_head = asyncio.create_task(town.head.gather())
            for _ in range(3):
                await link.beat()
            assert town.head.describe()[1]["state"] == "agreeing"
            assert (of_head.done(), gathering.done()) == (False, False)
            may_go_on.set()
            await poll(lambda: asyncio.to_thread(lambda: link.agreed == PART), pause_s=0.02)
            await link.beat()
            await of_head
            await link.beat()
            await gathering
        finally:
            may_go_on.set()
            watching.cancel()
            gathering.cancel()
            of_head.cancel()
            await asyncio.gather(watching, gathering, of_head, return_exceptions=True)

    argv = part.command()[0]
    assert argv[argv.index("serve") + 1] == f"/{PART.model}"


@pytest.mark.programs
async def test_host_told_to_stop_while_its_model_comes_does_not_wait_for_it(
    tmp_path: Path,
) -> None:
    weights = "model.safetensors"
    files = {path.name: path.read_bytes() for path in DEMO_MODEL.iterdir() if path.is_file()}

    def stop_while_it_comes(launcher: Launcher, hub: FakeHub) -> int:
        with running(launcher):
            wait_for(
                lambda: any("GET" in one and one.endswith(weights) for one in hub.asked),
                f"the download; {launcher.err}",
            )
            return launcher.stop()

    async with a_town() as town:
        with serve_hub(FakeHub(files, stalled=weights)) as hub:
            settings = {
                "LAUNCHER_JOIN": town.settings.join,
                "LAUNCHER_MODEL": "some/model",
                "HF_HOME": str(tmp_path / "hf"),
                "HF_ENDPOINT": hub.url,
                "HF_HUB_DOWNLOAD_TIMEOUT": "3600",
            }
            launcher = Launcher(tmp_path, command="up", settings=settings)
            code = await asyncio.to_thread(stop_while_it_comes, launcher, hub)

    assert code == 0, launcher.err
    assert "launcher_stopped" in launcher.err
    assert launcher.processes() == []
