"""What a key's limits leave: requests and tokens of a minute, and sequences at this moment.

`Limits` is all that the gateway asks of whoever keeps them. `LocalLimits` keeps them in this
process, so each of several replicas grants a key's limits anew; where they must hold over all of
them, `redis_limits.py` answers the same questions.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal, Protocol

from aiohttp import web

from gateway.records.periods import count_seconds_left

# What counts as nothing left: an allowance is paid back when it is above this.
LEAST = 1e-9

LimitName = Literal[
    "requests_per_minute",
    "tokens_per_minute",
    "key_concurrency",
    "tokens_per_day",
    "tokens_per_month",
]


@dataclass(slots=True)
class Claim:
    """What one request has taken of its key's limits, and what they leave, as its caller is told.

    A limit of 0 is none.
    """

    account: str
    requests_per_minute: int
    tokens_per_minute: int
    max_concurrency: int
    may_reserve: bool = False  # so the request itself may be counted then, in the same breath
    owed_requests: int = 0  # let in and not counted yet
    is_local: bool = False  # taken in this process, whoever keeps the others
    tokens: int = 0  # set aside
    used_tokens: int = 0  # by the engine's count, not charged yet
    sequences: int = 0  # held
    requests_left: float = 0.0
    tokens_left: float = 0.0
    # Budgets, see `budgets.py`.
    tokens_per_day: int = 0
    tokens_per_month: int = 0
    expected_tokens: int = 0  # that it may come to use, before any limit is asked
    budgeted_tokens: int = 0  # set aside of them
    day_left: int = 0
    month_left: int = 0

    @property
    def has_rates(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.max_concurrency)

    @property
    def has_budgets(self) -> bool:
        return bool(self.tokens_per_day or self.tokens_per_month)

    @property
    def is_settled(self) -> bool:
        return not (self.owed_requests or self.tokens or self.used_tokens or self.sequences)

    def note_settled(self) -> int:
        """Nothing is outstanding any more; returns the tokens that this leaves to be charged, which
        are fewer than none where more had been set aside.
        """
        charged = self.used_tokens - self.tokens
        self.owed_requests = self.tokens = self.used_tokens = self.sequences = 0
        return charged

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """OpenAI's headers, of those limits that the key has; those of budgets in their form."""
        if self.requests_per_minute:
            _tell_rate(headers, "requests", self.requests_per_minute, self.requests_left)
        if self.tokens_per_minute:
            _tell_rate(headers, "tokens", self.tokens_per_minute, self.tokens_left)
        if self.tokens_per_day:
            reset_s = count_seconds_left(month=False)
            _tell(headers, "tokens-day", self.tokens_per_day, self.day_left, reset_s)
        if self.tokens_per_month:
            reset_s = count_seconds_left(month=True)
            _tell(headers, "tokens-month", self.tokens_per_month, self.month_left, reset_s)


CLAIM = web.RequestKey("claim", Claim)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Which limit leaves no room; for how long (of a budget, 0 is until what runs has ended), or
    what is held, or left, of it.
    """

    limit: LimitName
    wait_s: float = 0.0
    held: int = 0


class Limits(Protocol):
    """Accounts are names of keys. What is refused has taken nothing, but for the request itself:
    one that has been counted stays so.
    """

    async def count(self, claim: Claim) -> Refusal | None:
        """Takes the request from its minute, unless the key's tokens are overdrawn. Where the claim
        may reserve, this may be left to that.
        """

    async def reserve(self, claim: Claim, tokens: int, sequences: int) -> Refusal | None:
        """Sets tokens aside and holds sequences, all or nothing. Whoever holds nothing may hold
        more than the limit at once.
        """

    def settle(self, claim: Claim) -> None:
        """Gives back what is set aside and held, and charges what has been used, whatever is left.
        Returns at once; a second time does nothing.
        """

    @property
    def away(self) -> Literal["", "local", "refused"]:
        """What becomes of limited calls while the limits that all gateways share are away."""


LIMITS: web.AppKey[Limits] = web.AppKey("limits")


@dataclass(slots=True)
class _Allowance:
    """A minute's allowance that refills steadily."""

    left: float
    filled_at: float

    def refill(self, per_minute: int) -> None:
        now = time.monotonic()
        gained = (now - self.filled_at) * per_minute / 60
        self.left, self.filled_at = min(float(per_minute), self.left + gained), now


@dataclass(slots=True)
class _Account:
    """Allowances begin full, with the first request that has such a limit."""

    requests: _Allowance | None = None
    tokens: _Allowance | None = None
    held: int = 0


class LocalLimits:
    """In this process: nothing here waits for anything."""

    away: Literal[""] = ""

    def __init__(self) -> None:
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)

    async def count(self, claim: Claim) -> Refusal | None:
        account = self._refill(claim)
        if claim.tokens_per_minute and claim.tokens_left < LEAST:
            return refuse_tokens(claim, 0)
        if claim.requests_per_minute and claim.requests_left < 1:
            return refuse_requests(claim)
        _take(claim, account, requests=1)
        return None

    async def reserve(self, claim: Claim, tokens: int, sequences: int) -> Refusal | None:
        account, most = self._refill(claim), claim.max_concurrency
        if most and account.held and account.held + sequences > most:
            return Refusal("key_concurrency", held=account.held)
        if tokens and claim.tokens_left < tokens:
            return refuse_tokens(claim, tokens)
        account.held += sequences
        claim.tokens, claim.sequences = tokens, sequences
        _take(claim, account, tokens=tokens)
        return None

    def settle(self, claim: Claim) -> None:
        if claim.is_settled:
            return
        account = self._refill(claim)
        account.held -= claim.sequences
        _take(claim, account, tokens=claim.note_settled())

    def _refill(self, claim: Claim) -> _Account:
        """And tells the claim what there is."""
        account = self._accounts[claim.account]
        if per_minute := claim.requests_per_minute:
            if account.requests is None:
                account.requests = _Allowance(per_minute, time.monotonic())
            account.requests.refill(per_minute)
            claim.requests_left = account.requests.left
        if per_minute := claim.tokens_per_minute:
            if account.tokens is None:
                account.tokens = _Allowance(per_minute, time.monotonic())
            account.tokens.refill(per_minute)
            claim.tokens_left = account.tokens.left
        return account


def _take(claim: Claim, account: _Account, requests: int = 0, tokens: int = 0) -> None:
    if claim.requests_per_minute and account.requests:
        claim.requests_left = account.requests.left = account.requests.left - requests
    if claim.tokens_per_minute and account.tokens:
        claim.tokens_left = account.tokens.left = account.tokens.left - tokens


def refuse_requests(claim: Claim) -> Refusal:
    per_minute = claim.requests_per_minute
    return Refusal("requests_per_minute", (1 - claim.requests_left) * 60 / per_minute)


def refuse_tokens(claim: Claim, tokens: int) -> Refusal:
    """With no tokens wanted: until nothing is overdrawn."""
    missing = max(tokens, LEAST) - claim.tokens_left
    return Refusal("tokens_per_minute", missing * 60 / claim.tokens_per_minute)


def _tell_rate(headers: MutableMapping[str, str], what: str, per_minute: int, left: float) -> None:
    left = min(left, per_minute)
    _tell(headers, what, per_minute, left, (per_minute - left) * 60 / per_minute)


def _tell(
    headers: MutableMapping[str, str], what: str, most: int, left: float, reset_s: float
) -> None:
    headers[f"x-ratelimit-limit-{what}"] = str(most)
    headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(left)))
    headers[f"x-ratelimit-reset-{what}"] = format_duration(reset_s)


def format_duration(seconds: float) -> str:
    """As OpenAI's headers write it: `120ms`, `1.5s`, `6m0s`, `3h0m0s`."""
    milliseconds = max(0, math.ceil(seconds * 1000))
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    told = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{told}"
    return f"{minutes}m{told}" if minutes else told
