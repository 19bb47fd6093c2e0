"""What strangers send: JSON that may be none, texts that may be broken."""

from __future__ import annotations

import json
import re
from typing import Any

# JSON can name half of a character that UTF-16 writes in two; no file and no socket takes it.
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(data: bytes | str) -> Any:
    """As `json.loads`, and a ValueError too for what is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_whole(text: str) -> bool:
    return _HALF.search(text) is None


def mend(text: str) -> str:
    """Every half of a character as U+FFFD."""
    return _HALF.sub("\ufffd", text)
