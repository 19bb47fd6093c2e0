"""The body of a call with a list of prompts, cut into bodies with some of them each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.errors import InvalidRequest
from gateway.schemas.fields import parse_json
from gateway.schemas.large_json import cut_items, scan_members
from gateway.schemas.openai import CHAT_BATCH

# Where the list lies whose items are answered one by one.
LISTS: Mapping[str, str] = {"/v1/completions": "prompt", CHAT_BATCH: "messages"}
# What every call carries along with its prompts, and what that may come to if each goes alone.
_MOST_BESIDE_BYTES = 2**18
_MOST_REPEATED_BYTES = 2**25


@dataclass(slots=True)
class PromptList:
    """The prompts of a call and what stands around them."""

    before: bytes
    after: bytes
    prompts: list[bytes]
    answers: int  # to each prompt

    @property
    def size_beside(self) -> int:
        return len(self.before) + len(self.after)

    def take(self, places: range) -> bytes:
        """The body of a call with these alone. Here they are let go."""
        few = self.prompts[places.start : places.stop]
        self.prompts[places.start : places.stop] = [b""] * len(few)
        return b"".join((self.before, b",".join(few), self.after))


async def cut_prompts(path: str, body: bytes, most: int) -> PromptList | None:
    """`None` where it is not a list of prompts alone that is answered."""
    members = await scan_members(body, most)
    prompts = members.get(LISTS[path])
    embeds = members.get("prompt_embeds")
    has_embeds = embeds is not None and body[embeds.start : embeds.end] != b"null"
    if prompts is None or not prompts.items or has_embeds:
        return None
    if len({body[start : start + 1] for start, _ in prompts.items}) > 1:
        raise InvalidRequest(
            f"the items of {LISTS[path]} must be of one kind",
            param=LISTS[path],
            code="invalid_type",
        )
    start, end = prompts.items[0][0], prompts.items[-1][1]
    most_beside = min(_MOST_BESIDE_BYTES, _MOST_REPEATED_BYTES // len(prompts.items))
    if len(body) - (end - start) > most_beside:
        raise InvalidRequest(
            f"a list of {len(prompts.items)} prompts goes to the engines by pieces, with each what "
            f"stands beside it in the body: at most {most_beside} bytes of so many; send fewer "
            "prompts at once, or less beside them",
            param=LISTS[path],
        )
    answers = 1
    if (copies := members.get("n")) is not None:
        told = parse_json(body[copies.start : copies.end])
        answers = max(1, told) if isinstance(told, int) else 1
    return PromptList(body[:start], body[end:], await cut_items(body, prompts), answers)
