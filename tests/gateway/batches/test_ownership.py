"""The fence: who has lost a batch can write nothing of it any more, whatever they still believe."""

from __future__ import annotations

import asyncio

import pytest

from gateway.batches.ownership import Ownership, OwnershipLost, Result
from gateway.storage.database import Database
from tests.gateway.batches.conftest import CLOCK, claim


async def test_who_has_lost_a_batch_writes_nothing(database: Database) -> None:
    first, second = Ownership(database, "first", CLOCK), Ownership(database, "second", CLOCK)
    old = await claim(first)
    await first.add_results(old, [Result(0, is_good=True, line=b"by first\n")])
    new = await claim(second)

    for write in (
        first.add_results(old, [Result(1, is_good=True, line=b"too late\n")]),
        first.begin_end(old, "completed"),
        first.end(old, None, None, (0, 0)),
    ):
        with pytest.raises(OwnershipLost):
            await write
    await first.give_back()
    await second.add_results(new, [Result(1, is_good=True, line=b"by second\n")])

    lines = [row[3] for row in await second.read_lines(new, -1, 10)]
    assert lines == [b"by first\n", b"by second\n", None]
    assert [line[0] for line in await second.list_unanswered(new)] == [2]
    assert (await second.list_open())[0].worker == "second"


async def test_batch_that_two_want_at_once_is_claimed_by_one(database: Database) -> None:
    first, second = Ownership(database, "first", CLOCK), Ownership(database, "second", CLOCK)
    [job] = await first.list_open()

    claims = await asyncio.gather(first.claim(job), second.claim(job))

    assert sum(one is not None for one in claims) == 1


async def test_batch_whose_owner_has_moved_is_not_claimed(database: Database) -> None:
    first, second = Ownership(database, "first", CLOCK), Ownership(database, "second", CLOCK)
    await claim(first)
    [seen] = await second.list_open()
    await first.beat([seen.id])

    assert await second.claim(seen) is None


async def test_results_of_a_commit_whose_answer_was_lost_are_there_once(
    database: Database,
) -> None:
    owner = Ownership(database, "first", CLOCK)
    job = await claim(owner)
    results = [Result(n, is_good=n == 0, line=b"x\n") for n in range(2)]

    await owner.add_results(job, results)
    await owner.add_results(job, [*results, Result(2, is_good=True, line=b"y\n")])

    assert [row[3] for row in await owner.read_lines(job, -1, 10)] == [b"x\n", b"x\n", b"y\n"]
