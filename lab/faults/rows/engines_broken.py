"""Engines that answer badly, behind a gateway that has a good one, too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lab.faults.experiment import Experiment
from lab.faults.fault import Fault, Signs, Strike
from lab.faults.servers import broken_engine
from lab.faults.servers.broken_engine import BrokenEngine, Spoil

_LASTS_S = 4.0
_SOON = ("--engine-timeout-s", "3", "--stream-idle-timeout-s", "2")


def spoil(how: Spoil) -> Strike:
    """For some seconds."""

    async def strike(at: Experiment) -> None:
        broken = at.get(BrokenEngine)
        broken.spoil = how
        await asyncio.sleep(_LASTS_S)
        broken.spoil = None
        at.notes.append(f"{broken.spoilt} answers were spoilt")
        at.lift()

    return strike


async def start_gateway(at: Experiment) -> None:
    """Before the good engine, and before the same with something between."""
    broken = await at.exits.enter_async_context(BrokenEngine(at.service.engine_url).serve())
    at.keep(broken)
    await at.start_beside(f"{at.service.engine_url},{broken.url}", *_SOON)


def _list_faults() -> Sequence[Fault]:
    panel = "overview: Failed engine calls and retries"
    garbled = Signs("", "BreakerOpen", panel=panel)
    rows = (
        ("too-few", "an engine leaves out an answer", broken_engine.leave_out, garbled),
        ("doubled", "an engine gives one answer twice", broken_engine.double, garbled),
        ("misplaced", "an engine answers in another order", broken_engine.misplace, garbled),
        ("cut-off", "an engine's answers break off", broken_engine.cut_off, garbled),
        ("html", "an engine answers with a page of HTML", broken_engine.answer_html, garbled),
        ("drip", "an engine's answers come in drops", broken_engine.drip, garbled),
        (
            "for-ever",
            "an engine takes calls and never answers",
            broken_engine.never_answer,
            Signs("request_done error_code=engine_timeout", "BreakerOpen", panel=panel),
        ),
    )
    return [
        Fault(f"engine-{name}", what, spoil(how), signs, "beside", prepare=start_gateway)
        for name, what, how, signs in rows
    ]


FAULTS = (*_list_faults(),)
