"""What wants in, and on whose account: how much it will be, in which lane, until when.

Whether there is room for it is `queue.py`'s matter; what an account may do is its key's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from gateway.admission.keys import Caller
from gateway.admission.limits import Claim, Limits, Refusal
from gateway.errors import BudgetUsedUp, GatewayError, InvalidRequest, Overloaded, RateLimited

LaneName = Literal["interactive", "batch"]
LANES: tuple[LaneName, ...] = ("interactive", "batch")
LONGEST_RETRY_AFTER_S = 120.0
_DEADLINE_DIGITS = 9


@dataclass(slots=True)
class Ticket:
    """How many sequences and tokens, in which lane, on whose account, until when."""

    sequences: int
    lane: LaneName = "interactive"
    claim: Claim | None = None  # of a key without limits there is none
    deadline: float | None = None  # on the event loop's clock
    is_divisible: bool = False  # it may come in by pieces
    step: int = 1  # of so many sequences each, or a multiple of that
    tokens: int = 0  # the most that it is expected to use
    on_waiting: Callable[[], None] | None = None  # told when it is let wait, however long that is


def build_ticket(
    headers: Mapping[str, str],
    caller: Caller,
    sequences: int,
    lane: LaneName,
    deadline: float | None,
    *,
    claim: Claim | None = None,
) -> Ticket:
    """In the key's lane, else the one asked for, else the usual one; of a key with limits, what the
    request has claimed of them so far.
    """
    asked = headers.get("X-Priority")
    if asked is not None and asked not in LANES:
        raise InvalidRequest("X-Priority is interactive or batch", param="X-Priority")
    if claim is None and caller.has_limits:
        claim = open_claim(caller)
    return Ticket(
        sequences=sequences, lane=caller.lane or asked or lane, claim=claim, deadline=deadline
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
    """What tickets take of their keys' limits for as long as they wait and run, whatever room there
    is: sequences, and the tokens that they may come to use.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    async def open(self, ticket: Ticket, claim: Claim, usual_wait_s: float) -> None:
        """All of it or nothing; `Overloaded` and `RateLimited` say when to come back. What may use
        more than a minute's allowance is let in when all of that is there.
        """
        claim.expected_tokens = ticket.tokens
        tokens = min(ticket.tokens, claim.tokens_per_minute)
        sequences = ticket.sequences if claim.max_concurrency else 0
        if refusal := await self._limits.reserve(claim, tokens, sequences):
            raise explain_refusal(refusal, claim, usual_wait_s)

    def close(self, claim: Claim) -> None:
        self._limits.settle(claim)


def open_claim(caller: Caller, *, may_reserve: bool = False) -> Claim:
    """With nothing taken yet."""
    return Claim(
        caller.name,
        caller.requests_per_minute,
        caller.tokens_per_minute,
        caller.max_concurrency,
        may_reserve,
        tokens_per_day=caller.tokens_per_day,
        tokens_per_month=caller.tokens_per_month,
    )


def explain_refusal(refusal: Refusal, claim: Claim, usual_wait_s: float = 0.0) -> GatewayError:
    """What a caller is told whom their key's limits leave no room."""
    short_wait_s = min(max(1.0, usual_wait_s), LONGEST_RETRY_AFTER_S)
    if refusal.limit in {"tokens_per_day", "tokens_per_month"}:
        return _explain_budget(refusal, claim, short_wait_s)
    if refusal.limit == "key_concurrency":
        return Overloaded(
            f"this key has {refusal.held} sequences running or waiting; its limit is "
            f"{claim.max_concurrency}",
            code="key_concurrency",
            retry_after_s=short_wait_s,
        )
    is_tokens = refusal.limit == "tokens_per_minute"
    value = claim.tokens_per_minute if is_tokens else claim.requests_per_minute
    return RateLimited(
        f"this key's {refusal.limit.replace('_', ' ')} ({value}) are used up or set aside for what "
        "it has running",
        code=refusal.limit,
        retry_after_s=refusal.wait_s,
    )


def _explain_budget(refusal: Refusal, claim: Claim, short_wait_s: float) -> GatewayError:
    is_month = refusal.limit == "tokens_per_month"
    most = claim.tokens_per_month if is_month else claim.tokens_per_day
    name = f"{most} tokens per {'month' if is_month else 'day'}"
    if not refusal.wait_s:
        return RateLimited(
            f"the rest of this key's {name} is set aside for what it has running",
            code=refusal.limit,
            retry_after_s=short_wait_s,
        )
    told = (
        f"{refusal.held} of this key's {name} are left, and this call may come to use "
        f"{claim.expected_tokens}: ask for fewer (max_tokens)"
        if refusal.held
        else f"this key's {name} are used up"
    )
    return BudgetUsedUp(
        f"{told}; the next {'month' if is_month else 'day'} begins at 0:00 UTC",
        code=refusal.limit,
        retry_after_s=refusal.wait_s,
    )
