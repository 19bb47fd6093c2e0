"""The page's own files, read once at the start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

_FILES = Path(__file__).parent / "static"
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class PageAsset:
    """One file of the page, read once."""

    body: bytes
    content_type: str
    etag: str


def read_assets() -> dict[str, PageAsset]:
    """By path; what is not in here cannot be asked for, however the path is written."""
    files = (path for path in _FILES.rglob("*") if path.suffix in _TYPES)
    return {path.relative_to(_FILES).as_posix(): _read_file(path) for path in files}


def _read_file(path: Path) -> PageAsset:
    body = path.read_bytes()
    return PageAsset(body, _TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:16])


PAGE_ASSETS = web.AppKey("page_assets", dict[str, PageAsset])
