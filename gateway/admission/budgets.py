"""What a key may use of a day or of a month (of UTC): held to before the fact, as its minute is.

Around whoever keeps the limits of the minute. What has been used is in the ledger, which knows the
other gateways' share as of its last look at the database; what calls have set aside is known of
this gateway's alone.
"""

from __future__ import annotations

from collections import Counter
from typing import Literal

from gateway.admission.limits import Claim, Limits, Refusal
from gateway.records.ledger import Ledger
from gateway.records.periods import count_seconds_left


class BudgetedLimits:
    """A call of a key without budgets goes by."""

    def __init__(self, inner: Limits, ledger: Ledger) -> None:
        self._inner, self._ledger = inner, ledger
        self._set_aside: Counter[str] = Counter()

    @property
    def away(self) -> Literal["", "local", "refused"]:
        return self._inner.away

    async def count(self, claim: Claim) -> Refusal | None:
        self._note_left(claim)
        return await self._inner.count(claim) if claim.has_rates else None

    async def reserve(self, claim: Claim, tokens: int, sequences: int) -> Refusal | None:
        refusal = self._set_budget_aside(claim)
        self._note_left(claim)
        if refusal is not None:
            return refusal
        if not claim.has_rates:
            return None
        try:
            refusal = await self._inner.reserve(claim, tokens, sequences)
        except BaseException:
            self._give_back(claim)
            raise
        if refusal is not None:
            self._give_back(claim)
        return refusal

    def settle(self, claim: Claim) -> None:
        """What was used stands in the ledger already."""
        self._give_back(claim)
        self._note_left(claim)
        if claim.has_rates:
            self._inner.settle(claim)

    def _set_budget_aside(self, claim: Claim) -> Refusal | None:
        """What uses no tokens needs no budget."""
        wanted = claim.expected_tokens
        if not (wanted and claim.has_budgets):
            return None
        for most, month in ((claim.tokens_per_month, True), (claim.tokens_per_day, False)):
            if most and (refusal := self._judge(claim, most, month=month)):
                return refusal
        claim.budgeted_tokens = wanted
        self._set_aside[claim.account] += wanted
        return None

    def _note_left(self, claim: Claim) -> None:
        """As its caller is told: after what is set aside, for this call and for others."""
        if not claim.has_budgets:
            return
        name, set_aside = claim.account, self._set_aside[claim.account]
        if claim.tokens_per_day:
            spent = self._ledger.find_spent(name, month=False)
            claim.day_left = claim.tokens_per_day - spent - set_aside
        if claim.tokens_per_month:
            spent = self._ledger.find_spent(name, month=True)
            claim.month_left = claim.tokens_per_month - spent - set_aside

    def _judge(self, claim: Claim, most: int, *, month: bool) -> Refusal | None:
        left = most - self._ledger.find_spent(claim.account, month=month)
        if claim.expected_tokens + self._set_aside[claim.account] <= left:
            return None
        limit: Literal["tokens_per_day", "tokens_per_month"]
        limit = "tokens_per_month" if month else "tokens_per_day"
        if claim.expected_tokens <= left:  # what runs may give some back
            return Refusal(limit)
        return Refusal(limit, count_seconds_left(month=month), max(0, left))

    def _give_back(self, claim: Claim) -> None:
        if claim.budgeted_tokens:
            self._set_aside[claim.account] -= claim.budgeted_tokens
            if not self._set_aside[claim.account]:
                del self._set_aside[claim.account]
            claim.budgeted_tokens = 0
