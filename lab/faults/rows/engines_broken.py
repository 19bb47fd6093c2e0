"""Engines that answer badly, behind a gateway that has a good one, too; and one whose certificate
expires.
"""

from __future__ import annotations

import asyncio

from lab.faults.experiment import Experiment
from lab.faults.fault import Fault, Signs, Strike
from lab.faults.servers import broken_engine
from lab.faults.servers.broken_engine import BrokenEngine, Spoil
from lab.faults.servers.certificates import Certificates
from lab.faults.servers.link import Link

_LASTS_S = 4.0
_FOR_EVER_S = 10.0  # twice as long as such a call is waited for
_EXPIRED_S = 6.0
_PANEL = "overview: Failed engine calls and retries"


def spoil(how: Spoil, lasts_s: float = _LASTS_S) -> Strike:
    """For some seconds."""

    async def strike(at: Experiment) -> None:
        broken = at.get(BrokenEngine)
        broken.spoil = how
        await asyncio.sleep(lasts_s)
        broken.spoil = None
        at.notes.append(f"{broken.spoilt} answers were spoilt")
        at.lift()

    return strike


def start_gateway(*options: str) -> Strike:
    """Before the good engine, and before the same with something between."""

    async def prepare(at: Experiment) -> None:
        broken = await at.exits.enter_async_context(BrokenEngine(at.service.engine_url).serve())
        at.keep(broken)
        await at.start_beside(f"{at.service.engine_url},{broken.url}", *options)

    return prepare


async def start_gateway_by_tls(at: Experiment) -> None:
    """Before the engine alone, whose certificate it can check."""
    certificates = Certificates(at.folder / "certificates")
    certificates.make()
    link = Link(int(at.service.engine_url.rpartition(":")[2]), certificates.serve())
    await at.exits.enter_async_context(link.serve())
    at.keep(certificates)
    at.keep(link)
    variables = {"SSL_CERT_FILE": str(certificates.authority)}
    await at.start_beside(f"https://127.0.0.1:{link.port}", variables=variables)


async def let_certificate_expire(at: Experiment) -> None:
    """And the engine's proxy restart with it: connections that are there know no date."""
    certificates, link = at.get(Certificates), at.get(Link)
    certificates.serve(is_expired=True)
    link.cut()
    await asyncio.sleep(_EXPIRED_S)
    certificates.serve()
    at.lift()


# The good engine is asked again, so nobody is harmed and nobody called.
_ASKED_AGAIN = Signs(runbook="ErrorRate", panel=_PANEL)

_ROWS = (
    ("too-few", "an engine leaves out an answer", broken_engine.leave_out, _ASKED_AGAIN),
    ("doubled", "an engine gives one answer twice", broken_engine.double, _ASKED_AGAIN),
    ("misplaced", "an engine answers in another order", broken_engine.misplace, Signs()),
    (
        "cut-off",
        "an engine's answers break off",
        broken_engine.cut_off,
        Signs(alert="BreakerOpen", panel=_PANEL),
    ),
    (
        "html",
        "an engine answers with a page of HTML",
        broken_engine.answer_html,
        Signs(alert="BreakerOpen", panel=_PANEL),
    ),
    ("drip", "an engine's answers come in drops", broken_engine.drip, Signs()),
)

FAULTS = (
    *(
        Fault(f"engine-{name}", what, spoil(how), signs, "beside", prepare=start_gateway())
        for name, what, how, signs in _ROWS
    ),
    Fault(
        "engine-for-ever",
        "an engine takes calls and never answers (GATEWAY_ENGINE_TIMEOUT_S=5)",
        spoil(broken_engine.never_answer, _FOR_EVER_S),
        Signs("request_done error_code=engine_timeout", "ErrorRate"),
        "beside",
        prepare=start_gateway("--engine-timeout-s", "5", "--stream-idle-timeout-s", "3"),
    ),
    Fault(
        "certificate-expired",
        "the certificate of an engine behind TLS expires, and is renewed after 6 s",
        let_certificate_expire,
        Signs("engine_lost", "EngineDown"),
        "beside",
        prepare=start_gateway_by_tls,
        needs=("openssl",),
    ),
)
