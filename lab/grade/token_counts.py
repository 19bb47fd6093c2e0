"""How many tokens the answers have, by the tokenizer of the model that wrote them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from common.json_text import parse_json

_AT_ONCE = 16
_TIMEOUT_S = 30.0
# For all texts together: thousands of slow calls must not outlast the measurement itself.
_LIMIT_S = 120.0


@dataclass(frozen=True)
class TokenCounts:
    """A number a text, and who counted; no numbers if nobody could, and then why."""

    counts: list[int] | None
    source: str


async def count_tokens(
    texts: Sequence[str], model_path: str, url: str, client: httpx.AsyncClient
) -> TokenCounts:
    """By the model folder's own tokenizer if there is one, else by the server's /tokenize."""
    here = _count_here(texts, model_path) if model_path else None
    if here and here.counts is not None:
        return here
    there = await _count_there(texts, url, client)
    if there.counts is None and here:
        return TokenCounts(None, f"{here.source}, and {there.source}")
    return there


def _count_here(texts: Sequence[str], model_path: str) -> TokenCounts | None:
    folder = Path(model_path).expanduser()
    file = folder / "tokenizer.json"
    if not folder.is_dir():
        return None
    if not file.is_file():
        return TokenCounts(None, f"{folder} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001 - it raises nothing narrower
        return TokenCounts(None, f"{file} cannot be read ({error})")
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return TokenCounts([len(one.ids) for one in encoded], f"the tokenizer in {folder}")


async def _count_there(texts: Sequence[str], url: str, client: httpx.AsyncClient) -> TokenCounts:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def count(text: str) -> int:
        body = {"prompt": text, "add_special_tokens": False}
        async with gate:
            answer = await client.post(f"{url}/tokenize", json=body, timeout=_TIMEOUT_S)
        answer.raise_for_status()
        tokens = parse_json(answer.content)["tokens"]
        if not isinstance(tokens, list):
            raise TypeError("`tokens` is no list")
        return len(tokens)

    known = {"": 0}
    different = [text for text in dict.fromkeys(texts) if text]
    try:
        # One first: a server without the route must not be asked hundreds of times.
        async with asyncio.timeout(_LIMIT_S):
            for part in (different[:1], different[1:]):
                known |= dict(zip(part, await asyncio.gather(*map(count, part)), strict=True))
    except TimeoutError:
        return TokenCounts(None, f"the server's /tokenize took longer than {_LIMIT_S:g} s")
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return TokenCounts(None, f"the server's /tokenize cannot be used ({why})")
    return TokenCounts([known[text] for text in texts], "the server's /tokenize")
