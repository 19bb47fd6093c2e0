"""Whether this gateway stores responses at all. Loads no database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from gateway.admission.keys import CALLER
from gateway.errors import NotFound
from gateway.request_context import CONTEXT
from gateway.responses.turns import Turn

if TYPE_CHECKING:
    from gateway.responses.service import Responses

RESPONSES: web.AppKey[Responses] = web.AppKey("responses")
TURN = web.RequestKey("turn", Turn)  # of a call of /v1/responses, where they are stored


def find_responses(app: web.Application) -> Responses:
    responses = app.get(RESPONSES)
    if responses is None:
        raise NotFound(
            "this gateway stores no responses: its operator can turn that on with "
            "GATEWAY_RESPONSES_DATABASE",
            code="responses_off",
        )
    return responses


async def begin_turn(request: web.Request, body: bytes) -> bytes:
    """What the engine gets of a call of /v1/responses."""
    responses = request.app.get(RESPONSES)
    if responses is None:
        return body
    turn = await responses.begin(request[CALLER], request[CONTEXT], body)
    if turn is None:
        return body
    request[TURN] = turn
    body, turn.body = turn.body, b""  # which is dropped once the engine has it
    return body
