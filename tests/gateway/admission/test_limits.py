"""Allowances of a minute, and what is held: in this process."""

from __future__ import annotations

from gateway.admission.limits import LocalLimits


async def test_take_from_a_full_allowance_leaves_the_rest() -> None:
    limits = LocalLimits()

    assert [await limits.take("a", 1, 2) for _ in range(2)] == [0.0, 0.0]
    wait_s = await limits.take("a", 1, 2)

    assert 29 < wait_s <= 30
    assert await limits.take("b", 1, 2) == 0.0


async def test_take_of_nothing_waits_until_an_overdraft_is_paid() -> None:
    limits = LocalLimits()
    assert await limits.take("a", 0, 60) == 0.0

    await limits.overdraw("a", 90, 60)

    assert 29 < await limits.take("a", 0, 60) <= 31


async def test_what_was_set_aside_and_not_used_can_be_taken_again() -> None:
    limits = LocalLimits()
    assert await limits.take("a", 60, 60) == 0.0
    assert await limits.take("a", 30, 60) > 29

    await limits.overdraw("a", -60, 60)

    assert await limits.take("a", 60, 60) == 0.0


async def test_hold_more_than_the_limit_is_refused_unless_nothing_is_held() -> None:
    limits = LocalLimits()
    assert await limits.hold("a", 5, 4) == 0
    assert await limits.hold("a", 1, 4) == 5
    await limits.release("a", 5)

    assert await limits.hold("a", 4, 4) == 0
