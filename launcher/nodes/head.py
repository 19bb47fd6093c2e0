"""The head's side: which hosts have joined, whether they may start, and which one is lost.

Nobody is ordered: a host reports every few seconds and is told what is to run. The supervisor asks
here before it starts the engine, and hears from here when a host is lost (`Peers`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError

from common.errors import SettingsError
from common.web.foreign_pages import build_middleware
from launcher.config import PREFIX, LauncherSettings
from launcher.engine.status import build_page_guard
from launcher.engine.supervisor import Loss
from launcher.nodes.messages import (
    BEATS_IN_TIME,
    DIAL_PATH,
    MOST_BEAT_S,
    PATH,
    Answer,
    Dial,
    Part,
    Report,
    describe_problem,
    is_allowed,
)
from launcher.plan.spreading import Layout

log = structlog.get_logger("launcher")
_MOST_BODY = 64 * 1024
_DIAL_TIMEOUT_S = 5.0


@dataclass
class Member:
    """A host that has joined."""

    rank: int
    report: Report
    heard_at: float
    told_run: str = ""  # by the last answer

    @property
    def ended_at(self) -> float:
        return self.heard_at - self.report.ended_s

    @property
    def title(self) -> str:
        return f"{self.report.host} ({self.report.address}, node {self.rank})"


class Full(Exception):
    """One host more than there are places."""


class Head:
    """`Peers` of the head's engine."""

    def __init__(
        self,
        part: Part,
        layout: Layout,
        timeout_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._part = part
        self._layout = layout
        self._timeout_s = timeout_s
        self._beat_s = min(MOST_BEAT_S, timeout_s / BEATS_IN_TIME)
        self._clock = clock
        self._life = uuid.uuid4().hex[:8]
        self._starts = 0
        self._run = ""
        self._crew: dict[int, Member] = {}  # of this run, as they were at its start
        self._members: dict[int, Member] = {}
        self._refused: dict[str, str] = {}  # by host, why
        self._last_seen: dict[int, Report] = {}  # of who had a place last
        self._changed = asyncio.Event()
        self.read_state: Callable[[], str] = lambda: "joining"

    def report(self, report: Report) -> Answer:
        """What a host tells, and is told."""
        now = self._clock()
        is_leaving = report.state in ("refused", "left")
        if is_leaving:
            self._let_go(report)
        self._forget_silent()
        member = self._find(report) or Member(self._find_place(report), report, now)
        member.report, member.heard_at = report, now
        if not is_leaving:
            if member.rank not in self._members:
                self._refused.pop(report.host, None)
                log.info("node_joined", node=member.title)
            self._members[member.rank] = member
            self._last_seen[member.rank] = report
        # One that was started anew has no part in what runs.
        then = self._crew.get(member.rank)
        member.told_run = self._run if then and then.report.id == report.id else ""
        self._changed.set()
        return self._answer(member.rank, member.told_run)

    def preview(self) -> Answer:
        """For who only looks whether it would fit (`doctor`)."""
        return self._answer(0, "")

    def _answer(self, rank: int, run: str) -> Answer:
        return Answer(
            rank=rank,
            nodes=self._layout.nodes,
            run=run,
            state=self.read_state(),
            beat_s=self._beat_s,
            part=self._part,
        )

    async def gather(self) -> None:
        self._run, told = "", ""
        while missing := self._find_missing():
            if missing != told:
                told = missing
                have = f"{1 + len(self._members)} of {self._layout.nodes}"
                log.warning("nodes_missing", here=have, missing=missing)
            await self._wait_change()
        self._starts += 1
        self._run = f"{self._life}:{self._starts}"
        self._crew = {
            rank: Member(rank, one.report, one.heard_at) for rank, one in self._members.items()
        }
        log.info("nodes_complete", nodes=[one.title for one in self._list()])

    async def watch(self) -> Loss:
        while not (loss := self._find_loss()):
            await self._wait_change()
        return loss

    async def find_culprit(self, ended_at: float) -> Loss | None:
        """What happened elsewhere before; what came after is a consequence. Known when every host
        has been heard of since, or has been silent for too long.
        """
        while True:
            before = self._find_loss(before=ended_at)
            waited = [one for one in self._members.values() if one.heard_at < ended_at]
            if before or not waited:
                return before
            await self._wait_change()

    async def release(self) -> None:
        """They hear it with their next report; who is silent hears nothing."""
        self._run = ""
        until = self._clock() + 2 * self._beat_s
        while any(one.told_run for one in self._members.values()) and self._clock() < until:
            await self._wait_change()

    def describe(self) -> list[dict[str, Any]]:
        """For the status: every place, and who has it."""
        now = self._clock()
        rows: list[dict[str, Any]] = [{"node": 0, "state": self.read_state(), "is_head": True}]
        for rank in range(1, self._layout.nodes):
            member = self._members.get(rank)
            row: dict[str, Any] = {"node": rank, "state": "missing"}
            if member:
                row |= {
                    "state": self._describe_state(member),
                    "host": member.report.host,
                    "address": member.report.address,
                    "heard_s": round(now - member.heard_at, 1),
                }
            elif rank in self._last_seen:
                row["last"] = self._last_seen[rank].title
            rows.append(row)
        for row in rows:
            row["runs"] = self._layout.describe(row["node"])
        return rows

    def count(self) -> dict[str, int]:
        """Hosts that the engine is to have, those that are there, those that were there."""
        lost = self._last_seen.keys() - self._members.keys()
        present = 1 + len(self._members)
        return {"wanted": self._layout.nodes, "joined": present, "lost": len(lost)}

    def _has_agreed(self, member: Member) -> bool:
        """To this plan, and not to that of the head before."""
        return member.report.plan == self._part.digest

    def _describe_state(self, member: Member) -> str:
        is_waiting = member.report.state == "waiting"
        return "agreeing" if is_waiting and not self._has_agreed(member) else member.report.state

    def _list(self) -> list[Member]:
        return [self._members[rank] for rank in sorted(self._members)]

    def _find(self, report: Report) -> Member | None:
        """The place it has, by its name: a launcher that was started anew is the same host."""
        for one in self._members.values():
            if one.report.id == report.id:
                return one
        return next((one for one in self._list() if one.report.is_same_host(report)), None)

    def _find_place(self, report: Report) -> int:
        """Where it was before, or any that is free."""
        free = [rank for rank in range(1, self._layout.nodes) if rank not in self._members]
        if not free:
            if report.state in ("refused", "left"):
                return 0
            raise Full
        last = self._last_seen
        return next(
            (rank for rank in free if rank in last and last[rank].is_same_host(report)), free[0]
        )

    def _let_go(self, report: Report) -> None:
        """It has told so itself: it does not fit, or its launcher was told to stop."""
        if report.state == "refused" and self._refused.get(report.host) != report.cause:
            self._refused[report.host] = report.cause
            log.error("node_refused", node=report.title, why=report.cause)
        for rank, one in list(self._members.items()):
            if one.report.id == report.id:
                del self._members[rank]
                log.warning("node_left", node=one.title)

    def _find_missing(self) -> str:
        """Who is waited for, in words; empty: nobody."""
        self._forget_silent()
        rows = []
        for rank in range(1, self._layout.nodes):
            member = self._members.get(rank)
            if member is None:
                last = self._last_seen.get(rank)
                rows.append(f"node {rank}" + (f", last {last.title}" if last else ""))
            elif member.report.state != "waiting":
                rows.append(f"{member.title}, which still ends its part")
            elif not self._has_agreed(member):
                rows.append(f"{member.title}, which still fetches and compares what is to run")
        refused = [f"{host} does not fit: {why}" for host, why in self._refused.items()]
        return "; ".join([*rows, *refused]) if rows else ""

    def _forget_silent(self) -> None:
        """Outside of a run: in one it is a loss first."""
        if self._run:
            return
        for rank, one in list(self._members.items()):
            if self._is_silent(one):
                del self._members[rank]
                log.warning("node_left", node=one.title)

    def _is_silent(self, member: Member) -> bool:
        return self._clock() - member.heard_at > self._timeout_s

    def _find_loss(self, before: float | None = None) -> Loss | None:
        for rank, then in self._crew.items():
            now = self._members.get(rank)
            why, at = "", 0.0
            if now is None:
                why, at = "has left", then.heard_at
            elif now.report.id != then.report.id:
                why, at = "was lost, and its launcher started anew", then.heard_at
            elif self._is_silent(now):
                why = f"has not been heard of for {self._clock() - now.heard_at:.0f} s"
                at = now.heard_at
            elif now.report.ended == self._run and self._run:
                why, at = f"lost its part of the engine: {now.report.cause}", now.ended_at
            if why and (before is None or at < before):
                return Loss("host", f"{then.title} {why}", then.report.host)
        return None

    async def _wait_change(self) -> None:
        """For a report, or for time to pass: silence is none."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), self._beat_s / 2)


@contextlib.asynccontextmanager
async def serve_head(head: Head, settings: LauncherSettings) -> AsyncIterator[None]:
    """While inside."""
    host, port = settings.node_address_used, settings.node_port
    runner = web.AppRunner(build_head_app(head, settings), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host}:{port} ({error.strerror}), where hosts are to join; set "
                f"{PREFIX}NODE_ADDRESS to an address of this host, or {PREFIX}NODE_PORT"
            ) from None
        yield
    finally:
        await runner.cleanup()


def build_head_app(head: Head, settings: LauncherSettings) -> web.Application:
    """Who has the word is no web page; without one, on the loopback, it may be."""
    guard, token = build_middleware(build_page_guard(settings)), settings.nodes_token

    @web.middleware
    async def require_token(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_allowed(request, token):
            return _refuse(401, f"the token is not the head's: set {PREFIX}NODES_TOKEN to the same")
        return await handler(request)

    async def report(request: web.Request) -> web.Response:
        try:
            told = Report.model_validate_json(await request.read())
            answer = head.report(told)
        except ValidationError as error:
            return _refuse(400, describe_problem(error))
        except Full:
            return _refuse(409, "all hosts of the engine are there; start it with more nodes")
        return web.Response(text=answer.model_dump_json(), content_type="application/json")

    async def look(_request: web.Request) -> web.Response:
        text = head.preview().model_dump_json()
        return web.Response(text=text, content_type="application/json")

    async def dial(request: web.Request) -> web.Response:
        """To who asks alone: nobody has the head call somebody else."""
        try:
            port = Dial.model_validate_json(await request.read()).port
        except ValidationError as error:
            return _refuse(400, describe_problem(error))
        why = await _try_connection(request.remote or "", port)
        return web.json_response({"reached": not why, "why": why})

    middleware = require_token if token else guard
    app = web.Application(client_max_size=_MOST_BODY, middlewares=[middleware])
    app.router.add_post(PATH, report)
    app.router.add_get(PATH, look)
    app.router.add_post(DIAL_PATH, dial)
    return app


async def _try_connection(host: str, port: int) -> str:
    """Why it cannot be made; empty: it can."""
    try:
        async with asyncio.timeout(_DIAL_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return error.strerror or str(error)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""


def _refuse(status: int, why: str) -> web.Response:
    body = json.dumps({"error": why})
    return web.Response(text=body, status=status, content_type="application/json")
