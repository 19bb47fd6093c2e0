"""What wants in, and on whose account: how much it will be, in which lane, until when.

Whether there is room for it is `queue.py`'s matter; what an account may do is its key's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gateway.admission.keys import Caller
from gateway.admission.limits import Limits
from gateway.errors import InvalidRequest, Overloaded, RateLimited

LaneName = Literal["interactive", "batch"]
LANES: tuple[LaneName, ...] = ("interactive", "batch")
LONGEST_RETRY_AFTER_S = 120.0
_DEADLINE_DIGITS = 9


@dataclass(slots=True)
class Ticket:
    """How many sequences and tokens, in which lane, on whose account, until when."""

    sequences: int
    lane: LaneName = "interactive"
    account: str = ""
    account_limit: int = 0
    deadline: float | None = None  # on the event loop's clock
    is_divisible: bool = False  # it may come in by pieces
    tokens: int = 0  # the most that it is expected to use
    tokens_per_minute: int = 0


def build_ticket(
    headers: Mapping[str, str],
    caller: Caller,
    sequences: int,
    lane: LaneName,
    deadline: float | None,
) -> Ticket:
    """In the key's lane, else the one asked for, else the usual one."""
    asked = headers.get("X-Priority")
    if asked is not None and asked not in LANES:
        raise InvalidRequest("X-Priority is interactive or batch", param="X-Priority")
    return Ticket(
        sequences=sequences,
        lane=caller.lane or asked or lane,
        account=caller.name,
        account_limit=caller.max_concurrency,
        deadline=deadline,
        tokens_per_minute=caller.tokens_per_minute,
    )


def parse_deadline(headers: Mapping[str, str]) -> float | None:
    """X-Deadline-Ms from now, on the event loop's clock."""
    text = headers.get("X-Deadline-Ms")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > _DEADLINE_DIGITS:
        raise InvalidRequest("X-Deadline-Ms is a number of milliseconds", param="X-Deadline-Ms")
    return asyncio.get_running_loop().time() + int(text) / 1000


class Claims:
    """What a ticket takes of its account for as long as it waits and runs, whatever room there is:
    its sequences, and the tokens that it may come to use. What it has used is charged besides.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def open(self, ticket: Ticket, usual_wait_s: float) -> None:
        """All of it or nothing; `Overloaded` and `RateLimited` say when to come back."""
        if ticket.account_limit:
            await self._hold(ticket, usual_wait_s)
        if ticket.tokens_per_minute and ticket.tokens:
            try:
                await self._reserve(ticket)
            except RateLimited:
                await self._release(ticket)
                raise

    async def close(self, ticket: Ticket) -> None:
        if ticket.tokens_per_minute and ticket.tokens:
            amount, most = -ticket.tokens, ticket.tokens_per_minute
            await self._limits.overdraw(name_tokens(ticket.account), amount, most)
        await self._release(ticket)

    async def _hold(self, ticket: Ticket, usual_wait_s: float) -> None:
        held = await self._limits.hold(ticket.account, ticket.sequences, ticket.account_limit)
        if held:
            raise Overloaded(
                f"this key has {held} sequences running or waiting; its limit is "
                f"{ticket.account_limit}",
                code="key_concurrency",
                retry_after_s=min(max(1.0, usual_wait_s), LONGEST_RETRY_AFTER_S),
            )

    async def _release(self, ticket: Ticket) -> None:
        if ticket.account_limit:
            await self._limits.release(ticket.account, ticket.sequences)

    async def _reserve(self, ticket: Ticket) -> None:
        """What may use more than a minute's allowance is let in when all of that is there."""
        most = ticket.tokens_per_minute
        ticket.tokens = min(ticket.tokens, most)
        wait_s = await self._limits.take(name_tokens(ticket.account), ticket.tokens, most)
        if wait_s:
            raise refuse_allowance(wait_s, "tokens_per_minute", most)


def name_tokens(account: str) -> str:
    """The account of a key's tokens, beside those of its requests and its sequences."""
    return f"tokens:{account}"


def refuse_allowance(wait_s: float, limit: str, value: int) -> RateLimited:
    return RateLimited(
        f"this key's {limit.replace('_', ' ')} ({value}) are used up or set aside for what it has "
        "running",
        code=limit,
        retry_after_s=wait_s,
    )
