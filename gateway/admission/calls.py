"""What a /v1 call must pass before it enters, whoever makes it: its parser, its key's rights, the
hosts of its media, and what is set aside for it. Whose turn it is, is `queue.py`'s matter.
"""

from __future__ import annotations

from gateway.admission.accounts import Accounts, Spent
from gateway.admission.keys import Caller
from gateway.admission.limits import Claim
from gateway.admission.media_hosts import MediaHosts
from gateway.admission.queue import AdmissionQueue
from gateway.admission.served_models import ServedModels
from gateway.config import Settings
from gateway.engines.lists.long_lists import LongListCall
from gateway.engines.pool import ModelPool
from gateway.errors import InvalidRequest
from gateway.schemas.large_json import SMALL_BYTES
from gateway.schemas.openai import (
    COPYING,
    NotWritable,
    OpenAIRequest,
    parse_large_openai_request,
    parse_openai_request,
)
from gateway.schemas.prompt_lists.bodies import LISTS, PromptList, cut_prompts

BYTES_A_TOKEN = 4
_SHORT_BYTES = 4096  # no model's context is too short for that


async def parse_call(
    path: str, body: bytes, settings: Settings, models: ServedModels, deadline: float | None
) -> OpenAIRequest:
    most = _SHORT_BYTES
    if len(body) > _SHORT_BYTES:
        length = await models.find_shortest_context(deadline)
        most = SMALL_BYTES if length is None else length * settings.max_bytes_per_token
    if len(body) <= min(SMALL_BYTES, most):
        try:
            return parse_openai_request(path, body, settings)
        except NotWritable:
            pass  # what is nested too deep is copied where it lies, as what is large
    return await parse_large_openai_request(
        path, body, settings, lambda model: models.find_context(model, deadline)
    )


async def check_call(
    call: OpenAIRequest, caller: Caller, settings: Settings, media_hosts: MediaHosts
) -> None:
    if caller.models:
        caller.check_model(call.model)
    if call.constraints:
        caller.check_constraints(call.constraints, settings.structured_outputs)
    if call.media_hosts:
        await media_hosts.ensure_allowed(call.media_hosts)


async def cut_long_list(
    path: str, call: OpenAIRequest, queue: AdmissionQueue, settings: Settings
) -> PromptList | None:
    """The prompts of a list that is longer than its lane's share, which comes in by pieces; `None`
    for every other call. What writes so much and cannot be cut is refused: it would fill the
    engines, and everybody else wait inside them.
    """
    share = queue.largest
    if call.sequences <= share or not queue.is_feeding or path not in COPYING:
        return None
    if path in LISTS and call.copies <= share:
        prompts = await cut_prompts(path, call.body, settings.max_prompts)
        if prompts is not None and len(prompts.prompts) * call.copies <= call.sequences:
            # Fewer, where a list that the path does not read is longer.
            call.body, call.sequences = b"", len(prompts.prompts) * call.copies
            return prompts
    if call.copies > share:
        raise InvalidRequest(
            f"n must be at most {share} here: the answers to one prompt run at once, and one call "
            "may take so many of what the engines run; ask for fewer at a time",
            param="n",
        )
    raise InvalidRequest(
        f"{call.sequences} sequences that cannot come in one after the other; at most {share} are "
        "taken in such a call: send fewer at once",
        param=LISTS.get(path),
        code="too_many_prompts",
    )


async def charge_cut_list(
    accounts: Accounts,
    caller: Caller,
    cut: LongListCall,
    told: Spent,
    *,
    most_each: int,
    claim: Claim | None,
) -> None:
    """What was told of a list that broke off, and for what ran in the middle the least that it can
    have been. Else hanging up would be free, and a bad prompt behind a hundred good ones, too.
    """
    told.prompt_tokens = max(told.prompt_tokens, cut.sent_bytes // BYTES_A_TOKEN)
    pieces = [Spent(0, one.told_tokens, one.seconds, one.sequences) for one in cut.cut_pieces]
    if told.prompt_tokens or told.completion_tokens or pieces:
        await accounts.charge_pieces(caller, told, pieces, most_each, claim)


def bound_answer(call: OpenAIRequest, settings: Settings, pool: ModelPool) -> int:
    """The most new tokens of a sequence, by the caller's word and by the model's context."""
    card = pool.read_card()
    context = card.max_model_len if card and card.max_model_len else settings.max_new_tokens
    return min(call.most_new_tokens or context, context)


def expect_tokens(
    call: OpenAIRequest, taken: int, bound: int, caller: Caller, accounts: Accounts
) -> int:
    """What is set aside of the key's minute until it is known what the call has used; `taken` for
    its prompt.
    """
    if call.most_new_tokens is None:
        bound = min(bound, accounts.expect_answer(caller))
    return taken + bound * call.sequences
