"""Limits that hold over several gateways: kept in Redis, by its clock.

A limited request asks Redis once, when it is known what it may come to use (`redis_limits.lua`);
what it used is told beside its answer. It asks before that only where what Redis told last leaves
doubt: an allowance that is nearly used up is no reason to read a caller's bodies.

Redis away never holds a request for more than GATEWAY_REDIS_TIMEOUT_S, and those after it for no
time at all: they are limited in this process, or refused, until it answers again. What was settled
meanwhile is not told later: what had been set aside comes back by the minute, and what is held is
told anew with every call and every few seconds. A gateway that no longer does so holds nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import structlog
from aiohttp import web
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from common.errors import SettingsError
from gateway.admission.limits import (
    LEAST,
    Claim,
    LocalLimits,
    Refusal,
    refuse_requests,
    refuse_tokens,
)
from gateway.config import PREFIX, Settings
from gateway.errors import LimitsAway
from gateway.observability.metrics import Metrics

log = structlog.get_logger("gateway")

_NAMES = "vllm-gateway:limits:"
_SCRIPT = Path(__file__).with_suffix(".lua")
_FAILURES = (RedisError, OSError, TimeoutError)
_LEASE_S = 15.0
_PROBE_PAUSE_S = 0.5
_CONNECTIONS = 64
_MOST_AT_ONCE = 256
# Asked with every look; no key can be called so. It is written, which a full Redis refuses.
_PROBE = Claim("(probe)", 0, 0, 1)


@dataclass(slots=True)
class _Seen:
    """What Redis told last of an account; how many came in on that and are not counted yet."""

    requests_left: float
    tokens_left: float
    at: float
    undecided: int = 0


class RedisLimits:
    """The same for all gateways that are given the same Redis."""

    def __init__(self, settings: Settings, metrics: Metrics, *, lease_s: float = _LEASE_S) -> None:
        self._redis = connect(settings.redis_url)
        self._script = self._redis.register_script(_SCRIPT.read_text(encoding="utf-8"))
        self._timeout_s = settings.redis_timeout_s
        self._refuses = settings.redis_away == "refuse"
        self._lease_s = lease_s
        self._local = LocalLimits()
        self._gateway = uuid.uuid4().hex
        self._order = 0
        self._held: Counter[str] = Counter()
        self._seen: dict[str, _Seen] = {}
        self._settlements: deque[tuple[Claim, int, int]] = deque()
        # Questions whose callers have hung up.
        self._left: set[asyncio.Task[Any]] = set()
        self._is_away = False
        self._wake = asyncio.Event()
        self._telling = asyncio.Lock()
        self._decided_alone = metrics.limits_without_redis
        metrics.redis_away.read = lambda: [((), self._is_away)]

    @property
    def away(self) -> Literal["", "local", "refused"]:
        if not self._is_away:
            return ""
        return "refused" if self._refuses else "local"

    async def count(self, claim: Claim) -> Refusal | None:
        if not (claim.requests_per_minute or claim.tokens_per_minute):
            return None
        if not self._is_away:
            if claim.may_reserve and self._has_room(claim):
                return None
            claim.owed_requests = 0
            if self._settlements or self._telling.locked():
                # Redis would let it in for what it has not been told of.
                await self._tell_ended()
            reply = None if self._is_away else await self._ask(claim, requests=1)
            if reply is not None:
                return _judge(claim, reply, 0)
        return await self._count_alone(claim)

    async def reserve(self, claim: Claim, tokens: int, sequences: int) -> Refusal | None:
        requests, claim.owed_requests = claim.owed_requests, 0
        if not (claim.is_local or self._is_away):
            if not (requests or tokens or sequences):
                return None
            reply = await self._ask_to_the_end(claim, requests, tokens, sequences)
            if reply is not None:
                refusal = _judge(claim, reply, tokens)
                if refusal is None:
                    claim.tokens, claim.sequences = tokens, sequences
                return refusal
        if requests and (refusal := await self._count_alone(claim)):
            return refusal
        self._go_on_alone(claim)
        return await self._local.reserve(claim, tokens, sequences)

    def settle(self, claim: Claim) -> None:
        if claim.is_settled:
            return
        if claim.is_local:
            self._local.settle(claim)
            return
        requests = claim.owed_requests
        self._hold(claim, -claim.sequences)
        tokens = claim.note_settled()
        claim.tokens_left -= tokens
        if self._is_away:
            self._note_counted(claim, requests)
        else:
            self._settlements.append((claim, requests, tokens))
            self._wake.set()

    async def run(self, _app: web.Application) -> AsyncIterator[None]:
        """For as long as the app lives."""
        await self._look(is_due=True)
        working = asyncio.create_task(self._work())
        yield
        working.cancel()
        await asyncio.gather(working, *self._left, return_exceptions=True)
        await self._look(is_due=False)
        with contextlib.suppress(*_FAILURES):
            await self._redis.aclose()

    def _has_room(self, claim: Claim) -> bool:
        """Whether the request may be let in on what is known here, to be counted later."""
        if not (claim.tokens_per_minute or claim.max_concurrency):
            return False  # nothing will be set aside, so now is as good as later
        seen = self._seen.get(claim.account)
        if seen is None:
            return False
        minutes = (time.monotonic() - seen.at) / 60
        if most := claim.requests_per_minute:
            left = min(most, seen.requests_left + minutes * most) - seen.undecided
            if left < 1:
                return False
            claim.requests_left = left - 1
        if most := claim.tokens_per_minute:
            claim.tokens_left = min(most, seen.tokens_left + minutes * most)
            if claim.tokens_left < LEAST:
                return False
        claim.owed_requests = 1
        seen.undecided += 1
        return True

    def _note_counted(self, claim: Claim, requests: int) -> None:
        """Redis knows of them, or will not be told."""
        if requests:
            self._seen[claim.account].undecided -= requests

    def _hold(self, claim: Claim, sequences: int) -> None:
        self._held[claim.account] += sequences
        if not self._held[claim.account]:
            del self._held[claim.account]

    async def _count_alone(self, claim: Claim) -> Refusal | None:
        self._go_on_alone(claim)
        return await self._local.count(claim)

    def _go_on_alone(self, claim: Claim) -> None:
        if claim.is_local:
            return
        self._decided_alone.labels("refused" if self._refuses else "local").inc()
        if self._refuses:
            raise LimitsAway(
                "this key has limits, and where they are kept does not answer; try again soon",
                retry_after_s=1,
            )
        claim.is_local = True

    async def _ask_to_the_end(
        self, claim: Claim, requests: int, tokens: int, sequences: int
    ) -> list[Any] | None:
        """Though the caller hangs up: what Redis sets aside for it, nobody else would give back."""

        async def ask() -> list[Any] | None:
            try:
                return await self._ask(claim, requests, tokens, sequences)
            finally:
                self._note_counted(claim, requests)

        def give_back(asking: asyncio.Task[list[Any] | None]) -> None:
            self._left.discard(asking)
            reply = None if asking.cancelled() else asking.result()
            if reply is not None and not reply[0]:
                self.settle(replace(claim, tokens=tokens, sequences=sequences))

        asking = asyncio.create_task(ask())
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            self._left.add(asking)
            asking.add_done_callback(give_back)
            raise

    async def _ask(
        self, claim: Claim, requests: int, tokens: int = 0, sequences: int = 0
    ) -> list[Any] | None:
        """What the script answers; `None` where Redis does not."""
        if not claim.max_concurrency:
            sequences = 0
        held = self._held[claim.account]
        arguments = self._build_arguments("ask", claim, (requests, tokens, sequences), held)
        # Before it is known: another call on its way says how many there may be.
        self._hold(claim, sequences)
        reply: list[Any] | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                reply = await self._script([_NAMES + claim.account], arguments)
        except _FAILURES as error:
            self._note_away(error)
        finally:
            if reply is None or reply[0]:
                self._hold(claim, -sequences)
        if reply is not None:
            self._note_seen(claim, reply)
        return reply

    def _build_arguments(
        self, verb: str, claim: Claim, wanted: tuple[int, int, int], held: int
    ) -> list[str | int | float]:
        self._order += 1
        requests, tokens, sequences = wanted
        allowances = (claim.requests_per_minute, requests, claim.tokens_per_minute, tokens)
        places = (claim.max_concurrency, held, sequences)
        return [verb, *allowances, *places, self._gateway, self._order, self._lease_s]

    def _note_seen(self, claim: Claim, reply: list[Any]) -> None:
        left, now = (float(reply[1]), float(reply[2])), time.monotonic()
        seen = self._seen.get(claim.account)
        if seen is None:
            self._seen[claim.account] = _Seen(*left, now)
        else:
            seen.requests_left, seen.tokens_left, seen.at = *left, now

    async def _work(self) -> None:
        """Settles as calls end, and looks whether Redis is there."""
        looked_at, own_task = time.monotonic(), asyncio.current_task()
        # A cancellation that comes with Redis's answer, its client may keep to itself.
        while not (own_task and own_task.cancelling()):
            pause_s = _PROBE_PAUSE_S if self._is_away else self._lease_s / 3
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, looked_at + pause_s - time.monotonic())):
                    await self._wake.wait()
            self._wake.clear()
            is_due = time.monotonic() >= looked_at + pause_s
            if is_due:
                looked_at = time.monotonic()
            if is_due or not self._is_away:
                await self._look(is_due=is_due)

    async def _look(self, *, is_due: bool) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                if is_due:
                    await self._tell([(_PROBE, 0, 0), *self._list_held()])
            async with self._telling:
                while self._settlements:
                    count = min(_MOST_AT_ONCE, len(self._settlements))
                    batch = [self._settlements.popleft() for _ in range(count)]
                    async with asyncio.timeout(self._timeout_s):
                        await self._tell(batch)
        except Exception as error:  # noqa: BLE001 — whatever it is, one day Redis is asked again
            self._note_away(error)
        else:
            if is_due and self._is_away:
                self._is_away = False
                log.info("redis_back")

    async def _tell_ended(self) -> None:
        """To the end though the caller hangs up: they are other callers' ends."""
        telling = asyncio.create_task(self._look(is_due=False))
        self._left.add(telling)
        telling.add_done_callback(self._left.discard)
        await asyncio.shield(telling)

    def _list_held(self) -> list[tuple[Claim, int, int]]:
        """So that Redis knows that they are held still, or again."""
        return [(Claim(account, 0, 0, 1), 0, 0) for account in self._held]

    async def _tell(self, settlements: list[tuple[Claim, int, int]]) -> None:
        """In one go; of each, the requests and tokens to take."""
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for claim, requests, tokens in settlements:
                    held = self._held.get(claim.account, 0)
                    arguments = self._build_arguments("settle", claim, (requests, tokens, 0), held)
                    await self._script([_NAMES + claim.account], arguments, client=pipe)
                replies = await pipe.execute()
        finally:
            for claim, requests, _ in settlements:
                self._note_counted(claim, requests)
        for (claim, _, _), reply in zip(settlements, replies, strict=True):
            if claim.requests_per_minute or claim.tokens_per_minute:
                self._note_seen(claim, reply)

    def _note_away(self, error: BaseException) -> None:
        while self._settlements:
            claim, requests, _ = self._settlements.popleft()
            self._note_counted(claim, requests)
        if not self._is_away:
            self._is_away = True
            self._wake.set()  # from now on it is asked more often whether it is back
            reason = str(error) or f"no answer within {self._timeout_s:g} s"
            log.error("redis_away", reason=reason, limited_calls=self.away)


def _judge(claim: Claim, reply: list[Any], tokens: int) -> Refusal | None:
    claim.requests_left, claim.tokens_left = float(reply[1]), float(reply[2])
    limit = reply[0].decode()
    if limit == "requests_per_minute":
        return refuse_requests(claim)
    if limit == "tokens_per_minute":
        return refuse_tokens(claim, tokens)
    if limit == "key_concurrency":
        return Refusal("key_concurrency", held=int(reply[3]))
    return None


def connect(url: str) -> Redis:
    """Connects when it is asked something; an address that can never do stops the start."""
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=_CONNECTIONS,
            timeout=None,  # whoever asks has one
            # A connection that Redis has closed meanwhile says nothing of Redis.
            retry=Retry(NoBackoff(), 1),
        )
        pool.make_connection()  # type: ignore[no-untyped-call]
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{PREFIX}REDIS_URL: {error}") from None
    return Redis.from_pool(pool)
