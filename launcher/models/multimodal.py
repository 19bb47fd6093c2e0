"""Whether a model reads more than text, as far as its config tells without vLLM.

It need not be exact: a model counts as one that does unless it is plainly a decoder of text, for
what follows from it (`plan/command.py`) means nothing to a model that reads text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TEXT_DECODER = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
_MEDIA_NAME = re.compile(
    r"VL|OCR|Omni|MM|[a-z\d]V(?=For)|Vision|V41|Note|Kimia|Molmo|Moondream|Ovis|Fuyu|MultiModal"
)
_MEDIA_KEY = re.compile(r"vision|image|img|audio|video|visual|speech|thinker|^mm_")


def reads_media(architecture: str, config_keys: Iterable[str]) -> bool:
    is_decoder = _TEXT_DECODER.fullmatch(architecture) and not _MEDIA_NAME.search(architecture)
    return not is_decoder or any(map(_MEDIA_KEY.search, config_keys))
