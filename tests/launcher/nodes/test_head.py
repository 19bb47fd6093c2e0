"""The head over real sockets: who may join, who is waited for, who is lost and who is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from common.errors import SettingsError
from common.ports import find_free_ports, find_free_row
from launcher.config import LauncherSettings
from launcher.engine.supervisor import Loss
from launcher.nodes.head import Head, serve_head
from launcher.nodes.head_link import HeadAway, HeadClient
from launcher.nodes.messages import Answer, Option, Part, Report
from launcher.plan.spreading import Layout
from tests.plain_http import NO_TLS

PART = Part(
    vllm="0.32.0",
    model="demo",
    model_digest="abc",
    options=[Option(name="tensor-parallel-size", value=2)],
    environment={},
)
TIMEOUT_S = 10.0


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Town:
    """A head, its clock, and a client."""

    head: Head
    clock: Clock
    settings: LauncherSettings
    client: httpx.AsyncClient
    hosts: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def report(self, host: str, **what: Any) -> Answer:
        """As a host of that name does; what it says stays said."""
        told = {"id": f"life of {host}", "host": host, "address": "10.0.0.9", "state": "waiting"}
        told |= {"plan": PART.digest}
        told |= self.hosts.get(host, {}) | what
        self.hosts[host] = told
        return await HeadClient(self.settings, self.client).report(Report(**told))

    async def start(self, *hosts: str) -> str:
        """All are there and told to start; the run."""
        for host in hosts:
            await self.report(host)
        await self.head.gather()
        return (await self.report(hosts[0])).run


@contextlib.asynccontextmanager
async def a_town(nodes: int = 2, token: str = "") -> AsyncIterator[Town]:
    port = find_free_row(3)
    settings = LauncherSettings(nodes=nodes, node_port=port, nodes_token=token)
    clock = Clock()
    layout = Layout(nodes, {"data": 1, "pipeline": 1, "prefill-context": 1, "tensor": nodes})
    head = Head(PART, layout, TIMEOUT_S, clock=clock)
    joins = settings.model_copy(update={"join": f"127.0.0.1:{port}"})
    async with (
        serve_head(head, settings),
        httpx.AsyncClient(trust_env=False, verify=NO_TLS) as client,
    ):
        yield Town(head, clock, joins, client)


async def test_head_waits_for_every_host_and_then_has_all_of_them_start() -> None:
    async with a_town(3) as town:
        gathering = asyncio.create_task(town.head.gather())
        first = await town.report("a")
        again = await town.report("a")
        assert (first.rank, again.rank, first.run, gathering.done()) == (1, 1, "", False)

        second = await town.report("b")
        await gathering
        told = await town.report("a", state="running")

    assert (second.rank, second.nodes) == (2, 3)
    assert told.run != ""
    assert told.part == PART


async def test_host_that_still_ends_its_part_is_waited_for() -> None:
    async with a_town() as town:
        await town.report("a", state="running", run="an older one")
        gathering = asyncio.create_task(town.head.gather())
        await town.report("a")
        assert not gathering.done()
        await town.report("a", state="waiting", run="")
        await gathering


async def test_silent_host_is_lost_and_named() -> None:
    async with a_town() as town:
        await town.start("a")
        watching = asyncio.create_task(town.head.watch())
        town.clock.now += TIMEOUT_S - 1
        await town.report("a", state="running")
        town.clock.now += TIMEOUT_S - 1
        await asyncio.sleep(0)
        assert not watching.done()
        town.clock.now += 2
        loss = await watching

    expected = f"a (10.0.0.9, node 1) has not been heard of for {TIMEOUT_S + 1:.0f} s"
    assert loss == Loss("host", expected, "a")


async def test_host_whose_part_ended_is_lost_and_says_why() -> None:
    async with a_town() as town:
        run = await town.start("a")
        await town.report("a", ended=run, cause="it was killed by signal 9")
        loss = await town.head.watch()

    assert loss.detail == (
        "a (10.0.0.9, node 1) lost its part of the engine: it was killed by signal 9"
    )


async def test_host_whose_launcher_was_started_anew_is_lost_and_keeps_its_place() -> None:
    async with a_town(3) as town:
        await town.start("a", "b")
        answer = await town.report("b", id="another life")
        loss = await town.head.watch()

    assert (answer.rank, loss.host) == (2, "b")
    assert answer.run == ""  # it has no part in what still runs


async def test_lost_host_gets_its_old_place_back() -> None:
    async with a_town(3) as town:
        await town.start("a", "b")
        releasing = asyncio.create_task(town.head.release())
        await asyncio.sleep(0)
        town.clock.now += TIMEOUT_S + 1
        await releasing
        await town.report("b")
        back = await town.report("a", id="another life")

    assert back.rank == 1


async def test_two_launchers_of_one_host_have_two_places() -> None:
    async with a_town(3) as town:
        one = await town.report("a", id="one", engine_port=1)
        other = await town.report("a", id="other", engine_port=2)
        assert (one.rank, other.rank) == (1, 2)


async def test_host_that_leaves_is_lost_at_once_and_not_waited_for() -> None:
    async with a_town() as town:
        await town.start("a")
        await town.report("a", state="left")
        loss = await town.head.watch()
        assert loss.detail == "a (10.0.0.9, node 1) has left"
        assert town.head.describe()[1]["last"] == "a (10.0.0.9)"


async def test_one_host_too_many_is_told_to_wait() -> None:
    async with a_town() as town:
        await town.report("a")
        with pytest.raises(HeadAway, match="all hosts of the engine are there"):
            await town.report("b")


async def test_engine_that_ended_first_is_no_fault_of_a_host() -> None:
    """The parts elsewhere end by themselves for lack of it."""
    async with a_town() as town:
        run = await town.start("a")
        ended_at = town.clock.now
        asking = asyncio.create_task(town.head.find_culprit(ended_at))
        town.clock.now += 2
        await town.report("a", ended=run, ended_s=1.0, cause="it exited with code 1")
        assert await asking is None


async def test_engine_that_ended_for_lack_of_a_host_names_it() -> None:
    async with a_town() as town:
        run = await town.start("a")
        town.clock.now += 5
        asking = asyncio.create_task(town.head.find_culprit(town.clock.now))
        town.clock.now += 1
        await town.report("a", ended=run, ended_s=2.0, cause="it was killed by signal 9")
        loss = await asking

    assert loss is not None
    assert loss.host == "a"


async def test_engine_that_ended_for_lack_of_a_silent_host_names_it() -> None:
    async with a_town() as town:
        await town.start("a")
        town.clock.now += 5
        asking = asyncio.create_task(town.head.find_culprit(town.clock.now))
        town.clock.now += TIMEOUT_S
        loss = await asking

    assert loss is not None
    assert "has not been heard of" in loss.detail


async def test_release_waits_until_the_hosts_have_heard_it() -> None:
    async with a_town() as town:
        await town.start("a")
        releasing = asyncio.create_task(town.head.release())
        await asyncio.sleep(0)
        assert not releasing.done()
        assert (await town.report("a", state="running")).run == ""
        await releasing


async def test_refused_host_is_told_of_and_has_no_place() -> None:
    async with a_town() as town:
        await town.report("a", state="refused", cause="vLLM 0.31.0 is installed here")
        assert town.head.describe()[1]["state"] == "missing"
        await town.report("b")
        await town.head.gather()


async def test_hosts_are_described_with_what_runs_there() -> None:
    async with a_town() as town:
        await town.report("a")
        town.clock.now += 3
        head, other = town.head.describe()

    assert (head["is_head"], head["runs"]) == (True, "process 0 of 2: tensor 0 of 2")
    expected = {"node": 1, "state": "waiting", "host": "a", "address": "10.0.0.9", "heard_s": 3.0}
    assert other == expected | {"runs": "process 1 of 2: tensor 1 of 2"}


async def test_host_that_has_not_agreed_to_the_plan_is_waited_for() -> None:
    """It had joined a head with another one, and fetches the model of this one."""
    async with a_town() as town:
        await town.report("a", plan="of the head before")
        gathering = asyncio.create_task(town.head.gather())
        await town.report("a")
        state = town.head.describe()[1]["state"]
        missing = town.head._find_missing()
        assert not gathering.done()
        await town.report("a", plan=PART.digest)
        await gathering
        later = town.head.describe()[1]["state"]

    assert (state, later) == ("agreeing", "waiting")
    assert missing == "a (10.0.0.9, node 1), which still fetches and compares what is to run"


async def test_hosts_are_counted_as_wanted_joined_and_lost() -> None:
    async with a_town(3) as town:
        none = town.head.count()
        await town.report("a")
        await town.report("b")
        all_of_them = town.head.count()
        await town.report("b", state="left")
        without = town.head.count()

    assert none == {"wanted": 3, "joined": 1, "lost": 0}
    assert all_of_them == {"wanted": 3, "joined": 3, "lost": 0}
    assert without == {"wanted": 3, "joined": 2, "lost": 1}


@pytest.mark.parametrize("token", ["nothing", "another", "wörd"])
async def test_wrong_token_is_refused(token: str) -> None:
    async with a_town(token="the-word") as town:
        url = f"http://127.0.0.1:{town.settings.node_port}/node"
        headers = {b"Authorization": f"Bearer {token}".encode()}
        answers = [
            await town.client.get(url, headers=headers),
            await town.client.post(url, headers=headers),
            await town.client.post(f"{url}/dial", headers=headers, content='{"port": 1}'),
        ]
        assert [one.status_code for one in answers] == [401] * 3
        assert "the-word" not in answers[0].text

        town.settings = town.settings.model_copy(update={"nodes_token": "another"})
        with pytest.raises(SettingsError, match="set LAUNCHER_NODES_TOKEN to the same"):
            await town.report("a")


async def test_right_token_is_let_in() -> None:
    async with a_town(token="the-word") as town:
        assert (await town.report("a")).rank == 1


async def test_report_that_is_none_is_refused() -> None:
    async with a_town() as town:
        url = f"http://127.0.0.1:{town.settings.node_port}/node"
        for body in ("", "[]", '{"id": "x"}', '{"id": 3}'):
            assert (await town.client.post(url, content=body)).status_code == 400
        assert town.head.describe()[1]["state"] == "missing"


async def test_own_address_is_where_the_way_to_the_head_begins() -> None:
    async with a_town() as town:
        near = HeadClient(town.settings, town.client)
        await near.look()
        assert near.address == "127.0.0.1"

        lost = town.settings.model_copy(update={"join": "255.255.255.255"})
        with pytest.raises(HeadAway, match=r"there is no way to 255"):
            await HeadClient(lost, town.client).look()


async def test_what_is_no_head_is_said_to_be_none() -> None:
    async with a_town() as town:
        client = HeadClient(town.settings, town.client)
        with pytest.raises(SettingsError, match="is no head of an engine"):
            await client._call("GET", "/elsewhere")


async def test_head_opens_a_connection_to_who_asks_alone() -> None:
    async with a_town() as town:
        client = HeadClient(town.settings, town.client)
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            assert await client.ask_to_dial(port) == ""
        (free,) = find_free_ports(1)
        assert await client.ask_to_dial(free) != ""


async def test_web_page_can_neither_look_nor_join() -> None:
    """Without a token, as on the loopback, by its name or across sites."""
    async with a_town() as town:
        url = f"http://127.0.0.1:{town.settings.node_port}/node"
        rebound = await town.client.get(url, headers={"Host": "page.example.com"})
        across = await town.client.post(url, headers={"Origin": "http://page.example.com"})
        assert (rebound.status_code, across.status_code) == (403, 403)
