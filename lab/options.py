"""Command-line options: the types they are checked by, and those that several commands share.

What is not here: what one command alone is told.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
from pydantic import Field, TypeAdapter, ValidationError

from common.project import DEMO_QUESTIONS
from common.settings import is_address

GATEWAY_PORT = 8000
# The engine listens one port above the gateway, the launcher's status page two.
_STATUS_ABOVE = 2


def build_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m lab {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_options(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Dashes and underscores mean the same in a name; what follows `--` is the launcher's."""
    at = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args([_normalise(word) for word in words[:at]])
    arguments.launcher_options = list(words[at + 1 :])
    return arguments


def _normalise(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else word


def add_service(parser: argparse.ArgumentParser, command: str, url_names: Sequence[str]) -> None:
    """A running gateway, its launcher, and the key to it."""
    add = parser.add_argument_group("the server").add_argument
    add(*url_names, dest="url", type=address, default="", metavar="URL", help="of the gateway")
    add(
        "--status-url",
        "--status",
        type=address,
        default="",
        metavar="URL",
        help="the launcher's status page (default: two ports above the gateway's)",
    )
    variable = f"{command.upper()}_API_KEY"
    add(
        "--api-key",
        type=header_text,
        default=os.environ.get(variable, ""),
        metavar="KEY",
        help=f"for a gateway with keys; also the variable {variable}",
    )
    add("--machine", default="", help="what to write down as the machine, if it is another one")


def add_questions(parser: argparse.ArgumentParser, *names: str) -> None:
    parser.add_argument(
        "--questions",
        *names,
        default=str(DEMO_QUESTIONS),
        metavar="FILE",
        help="the course's text form, JSON or JSONL (default: the demo's)",
    )


def add_record(parser: argparse.ArgumentParser, *names: str) -> None:
    parser.add_argument(
        "--record",
        *names,
        metavar="FILE",
        help="the figures as a record of a run, for docs/results/",
    )


def find_neighbour(url: str) -> str:
    """Where the launcher's status page is unless it was said."""
    where = urlsplit(url)
    host = f"[{where.hostname}]" if ":" in (where.hostname or "") else where.hostname
    return f"http://{host}:{(where.port or 80) + _STATUS_ABOVE}"


def build_headers(api_key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def hide(text: str, *secrets: str) -> str:
    """A key stands on the command line, but must not stand in a report."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "…")
    return text


def address(text: str) -> str:
    """An http address that paths can be put behind."""
    url = text.strip()
    try:
        httpx.URL(url)
        is_good = is_address(url) and not re.search(r"[?#\s]", url)
    except httpx.InvalidURL:
        is_good = False
    if text and not is_good:
        example = f"http://127.0.0.1:{GATEWAY_PORT}"
        raise argparse.ArgumentTypeError(f"{text} is no http address, like {example}")
    return url.rstrip("/")


def header_text(text: str) -> str:
    if not (text.isascii() and text.isprintable()):
        raise argparse.ArgumentTypeError("it holds characters that no HTTP header can carry")
    return text


def _build_check(kind: Any, complaint: str) -> Callable[[str], Any]:
    adapter = TypeAdapter(kind)

    def parse(text: str) -> Any:
        try:
            return adapter.validate_python(text)
        except ValidationError:
            raise argparse.ArgumentTypeError(f"{text} is {complaint}") from None

    return parse


def whole_number(least: int) -> Callable[[str], int]:
    kind = Annotated[int, Field(ge=least, lt=10**18)]
    return _build_check(kind, f"no whole number from {least} on")


def whole_numbers(text: str) -> tuple[int, ...]:
    """From 1 on, separated by commas."""
    parse = whole_number(1)
    return tuple(parse(part) for part in text.split(","))


port = _build_check(Annotated[int, Field(ge=1, le=65535)], "no port from 1 to 65535")
seconds = _build_check(Annotated[float, Field(gt=0, allow_inf_nan=False)], "no time in seconds")
share = _build_check(Annotated[float, Field(ge=0, le=1)], "no score from 0 to 1")
