"""A joined host's side of the talk with the head: reports, and what the answers mean here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import uuid

import httpx
import structlog
from pydantic import ValidationError

from common.errors import SettingsError
from launcher.config import PREFIX, LauncherSettings
from launcher.engine.supervisor import ExitReport, Loss, ProgramStatus, describe_exit
from launcher.nodes.messages import DIAL_PATH, PATH, Answer, Part, Report, build_headers

log = structlog.get_logger("launcher")
_ANSWER_TIMEOUT_S = 5.0


class HeadAway(Exception):
    """It does not answer, or has no place; it may later."""


class HeadClient:
    """Calls of the head, one by one."""

    def __init__(self, settings: LauncherSettings, client: httpx.AsyncClient) -> None:
        self._place = host, port = settings.head_address
        self.title = f"{host}:{port}"
        self.address = settings.node_address  # of this host; empty until there is a way to the head
        self._url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._headers = build_headers(settings.nodes_token)
        self._client = client

    async def look(self) -> Answer:
        if not self.address:
            self.address = await asyncio.to_thread(find_own_address, *self._place)
        return _read_answer(await self._call("GET", PATH))

    async def report(self, report: Report) -> Answer:
        return _read_answer(await self._call("POST", PATH, report.model_dump_json()))

    async def ask_to_dial(self, port: int) -> str:
        """Why the head cannot open a connection to that port here; empty: it can."""
        response = await self._call("POST", DIAL_PATH, f'{{"port": {port}}}')
        return str(response.json().get("why") or "")

    async def _call(self, method: str, path: str, body: str | None = None) -> httpx.Response:
        try:
            response = await self._client.request(
                method,
                self._url + path,
                content=body,
                headers=self._headers,
                timeout=_ANSWER_TIMEOUT_S,
            )
        except httpx.HTTPError as error:
            raise HeadAway(str(error) or type(error).__name__) from None
        if response.status_code == httpx.codes.OK:
            return response
        try:
            why = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            raise SettingsError(
                f"{PREFIX}JOIN: what answers at {self.title} is no head of an engine; give the "
                "node_address and node_port of the launcher that was started with --nodes"
            ) from None
        if response.status_code == httpx.codes.CONFLICT:
            raise HeadAway(why)
        raise SettingsError(f"the head at {self.title} refuses this host: {why}")


def _read_answer(response: httpx.Response) -> Answer:
    try:
        return Answer.model_validate_json(response.content)
    except ValidationError:
        raise SettingsError(
            "the head answers in a way that is not known here: install the same version of the "
            "launcher on all hosts"
        ) from None


def find_own_address(host: str, port: int) -> str:
    """The one that the way to the head begins with; nothing is sent."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError as error:  # after a reboot name servers and routes come when they come
        raise HeadAway(f"there is no way to {host} from here: {error.strerror}") from None


class HeadLink:
    """`Peers` of the part that runs here: it starts when the head says so, and ends so."""

    def __init__(self, head: HeadClient, first: Answer, settings: LauncherSettings) -> None:
        self._head = head
        self._timeout_s = settings.node_timeout_s
        self._engine_port = settings.engine_port
        self._id = uuid.uuid4().hex
        self._host = socket.gethostname()
        self.answer = first
        self.agreed = first.part  # the plan that this host is known to fit
        self._heard_at = time.monotonic()
        self._run = ""  # whose part runs here, or did last
        self._is_running = False
        self._ended: tuple[str, float, str] | None = None  # the run, when, and why
        self._changed = asyncio.Event()  # here, which the head is told at once
        self._answered = asyncio.Event()  # or not, in its time
        self._told = ""

    @property
    def head_state(self) -> str:
        return self.answer.state

    async def keep(self) -> None:
        """Reports until cancelled."""
        while True:
            await self.beat()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait_news(), self.answer.beat_s)

    async def beat(self) -> bool:
        """Whether the head has answered."""
        try:
            self.answer = await self._head.report(self._describe())
        except HeadAway as error:
            if self._told != str(error):
                self._told = str(error)
                log.warning("head_away", head=self._head.title, why=self._told)
            return False
        finally:
            self._answered.set()
        if self._told:
            self._told = ""
            log.info("head_back", head=self._head.title)
        self._heard_at = time.monotonic()
        return True

    def agree(self, part: Part) -> None:
        """To the plan of a head that was started anew; until then nothing starts."""
        self.agreed = part
        self._answered.set()
        self._changed.set()

    async def refuse(self, cause: str) -> None:
        """The head's log says it, too."""
        report = self._describe().model_copy(update={"state": "refused", "cause": cause[:2000]})
        with contextlib.suppress(HeadAway):
            await self._head.report(report)

    async def leave(self) -> None:
        """The head need not wait for its silence."""
        with contextlib.suppress(HeadAway, SettingsError):
            await self._head.report(self._describe().model_copy(update={"state": "left"}))

    async def gather(self) -> None:
        """Until the head starts anew."""
        self._is_running = False
        self._changed.set()
        while not self._is_wanted() or self.answer.run == self._run:
            await self._wait_answer()
        self._run, self._is_running = self.answer.run, True
        self._changed.set()

    async def watch(self) -> Loss:
        while self._is_wanted() and self.answer.run == self._run:
            await self._wait_answer()
        why = "the head is lost" if self._is_silent() else "the head has ended this start"
        log.info("node_released", why=why)
        return Loss("released", why)

    async def find_culprit(self, ended_at: float) -> Loss | None:
        """Without the head's engine the part here ends by itself."""
        is_heard = await self.beat()
        if is_heard and self.answer.run == self._run:
            return None
        return Loss("released", "it ended with the head's engine")

    async def release(self) -> None:
        """Nobody depends on this one but the head, which asks."""

    async def note_end(self, report: ExitReport, _status: ProgramStatus) -> None:
        self._ended = (self._run, time.monotonic(), describe_exit(report))
        self._is_running = False
        self._changed.set()

    def _is_wanted(self) -> bool:
        is_agreed = self.answer.part == self.agreed
        return bool(self.answer.run) and is_agreed and not self._is_silent()

    def _is_silent(self) -> bool:
        return time.monotonic() - self._heard_at > self._timeout_s

    async def _wait_answer(self) -> None:
        self._answered.clear()
        await self._answered.wait()

    async def _wait_news(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _describe(self) -> Report:
        run, at, cause = self._ended or ("", time.monotonic(), "")
        return Report(
            id=self._id,
            host=self._host,
            address=self._head.address,
            engine_port=self._engine_port,
            state="running" if self._is_running else "waiting",
            plan=self.agreed.digest,
            run=self._run if self._is_running else "",
            ended=run,
            ended_s=time.monotonic() - at,
            cause=cause[:2000],
        )
