"""How many requests of batches run at once, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.admission.throughput import FirstTokens
from gateway.batches.window import Slot, Window, Windows


def make_window(most: int, count_others: Callable[[], int] = lambda: 0) -> Window:
    return Windows(most, count_others).find("fake")


async def fill(window: Window) -> list[Slot]:
    """As many as it lets in."""
    return [await window.enter(0.0) for _ in range(int(window.limit) - window.running)]


async def run_rounds(window: Window, rounds: int) -> None:
    for _ in range(rounds):
        for slot in await fill(window):
            slot.leave("answered")


async def test_window_grows_by_one_a_round_up_to_its_most() -> None:
    window = make_window(12)
    first = int(window.limit)

    await run_rounds(window, 2)
    grown = int(window.limit)
    await run_rounds(window, 50)

    assert (first, grown) == (8, 9)
    assert window.limit == 12
    assert window.running == 0


async def test_window_is_halved_once_a_round_however_many_are_refused() -> None:
    window = make_window(64)
    slots = await fill(window)

    for slot in slots:
        slot.leave("refused")
    once = window.limit
    for slot in await fill(window):
        slot.leave("refused")

    assert once == 4
    assert window.limit == 2


async def test_window_grows_no_more_where_requests_wait_for_their_place() -> None:
    window = make_window(64)

    for slot in await fill(window):
        slot.leave("answered", wait_s=1.0)
    kept = window.limit
    for slot in await fill(window):
        slot.leave("answered", wait_s=10.0)

    assert kept == 8
    assert window.limit == 4


async def test_window_opens_again_after_the_pause_that_was_asked_for() -> None:
    window = make_window(64)
    slots = await fill(window)
    slots[0].leave("refused", pause_s=0.05)
    for slot in slots[1:]:
        slot.leave()
    waiting = asyncio.create_task(window.enter(0.0))
    await asyncio.sleep(0)
    was_open = waiting.done()

    slot = await asyncio.wait_for(waiting, 30)

    assert not was_open
    slot.leave()


async def test_slot_is_given_to_the_lowest_clock_and_left_once() -> None:
    window = make_window(1)
    slot = await window.enter(0.0)
    served: list[str] = []

    async def run(name: str, clock: float) -> None:
        mine = await window.enter(clock)
        served.append(name)
        mine.leave()
        mine.leave()

    others = [asyncio.create_task(run(name, clock)) for name, clock in (("late", 2), ("soon", 1))]
    await asyncio.sleep(0)
    slot.leave()
    await asyncio.gather(*others)

    assert served == ["soon", "late"]
    assert window.running == 0


async def test_waiter_that_is_cancelled_leaves_its_slot_to_others() -> None:
    window = make_window(1)
    slot = await window.enter(0.0)
    gone = asyncio.create_task(window.enter(1.0))
    stays = asyncio.create_task(window.enter(2.0))
    await asyncio.sleep(0)

    slot.leave()  # it is the turn of the one who is cancelled in this moment
    gone.cancel()
    given = await asyncio.wait_for(stays, 30)

    assert gone.cancelled() or gone.cancelling()
    assert window.running == 1
    given.leave()


async def test_window_is_a_quarter_beside_callers_who_wait() -> None:
    others = 0
    window = make_window(64, lambda: others)
    window.limit = 16
    alone = await fill(window)
    for slot in alone:
        slot.leave()

    others = 1
    waiting = [asyncio.create_task(window.enter(0.0)) for _ in range(10)]
    await asyncio.sleep(0)
    beside = window.running
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)

    assert (len(alone), beside) == (16, 4)


async def test_window_beside_callers_follows_their_time_to_the_first_token() -> None:
    """An engine whose every line makes a stream a tenth later bears one, or two, of 64."""
    first_tokens = FirstTokens()
    window = Windows(64, lambda: 1, lambda _name: first_tokens).find("fake")
    window.limit = 64
    for _ in range(24):
        first_tokens.learn(0.1, lines=0)
    running: list[Slot] = []
    sizes: list[int] = []

    async def run_a_while() -> None:
        for _ in range(24):
            first_tokens.learn(0.1 * (1 + 0.1 * window.running), window.running)
        if running:
            running.pop(0).leave("answered")
        while len(running) > 1 and window.running >= sizes[-1]:
            running.pop(0).leave("answered")
        entering = asyncio.create_task(window.enter(0.0))
        await asyncio.sleep(0)
        while entering.done():
            running.append(entering.result())
            entering = asyncio.create_task(window.enter(0.0))
            await asyncio.sleep(0)
        entering.cancel()
        await asyncio.gather(entering, return_exceptions=True)

    for _ in range(60):
        sizes.append(window.running)
        await run_a_while()

    assert max(sizes[:5]) >= 16
    assert max(sizes[30:]) <= 3
    assert min(sizes[30:]) >= 1


async def test_window_beside_callers_grows_where_they_feel_nothing() -> None:
    first_tokens = FirstTokens()
    window = Windows(64, lambda: 1, lambda _name: first_tokens).find("fake")
    window.limit = 16
    sizes = []
    for _ in range(30):
        for _ in range(24):
            first_tokens.learn(0.1, window.running)
        sizes.append(window._find_beside())

    assert sizes[0] <= 5
    assert sizes[-1] == 16


async def test_model_that_is_refused_leaves_the_windows_of_others_alone() -> None:
    windows = Windows(64)
    one, other = windows.find("one"), windows.find("other")
    refused, fine = await fill(one), await fill(other)

    for slot in refused:
        slot.leave("refused", pause_s=60)
    for slot in fine:
        slot.leave("answered")

    assert (one.limit, int(other.limit)) == (4, 8)
    assert await fill(other)


async def test_windows_of_all_models_have_one_common_most() -> None:
    windows = Windows(10)
    one, other = windows.find("one"), windows.find("other")
    slots = await fill(one)
    waiting = [asyncio.create_task(other.enter(float(number))) for number in range(8)]
    await asyncio.sleep(0)
    beside = (one.running, other.running)
    for slot in slots:
        slot.leave("answered")
    await asyncio.gather(*waiting)

    assert beside == (8, 2)
    assert windows.running == other.running == 8


async def test_window_whose_engine_was_away_opens_with_the_first_answer() -> None:
    window = make_window(64)
    slots = await fill(window)
    for slot in slots[1:]:
        slot.leave("away", pause_s=600)
    waiting = asyncio.create_task(window.enter(0.0))
    await asyncio.sleep(0)
    was_open = waiting.done()

    slots[0].leave("answered")
    await asyncio.wait_for(waiting, 30)

    assert not was_open
    assert window.limit >= 8
