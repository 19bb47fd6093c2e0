"""A hub as far as huggingface_hub asks it, which fails as it is told to."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Has one model, `some/model`. Answers `failures` first, one a request: a status, or 0 for a
    connection that is cut. The body of the file `stalled` does not come before its end.
    """

    files: dict[str, bytes]
    failures: list[int] = field(default_factory=list)
    stalled: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""
    is_over: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, hub: FakeHub, *rest: Any) -> None:
        self._hub = hub
        super().__init__(*rest)

    def do_GET(self) -> None:
        if "some/model" not in self.path:  # the client's other curiosities
            self._fail(404)
            return
        self._hub.asked.append(f"{self.command} {self.path}")
        if self._hub.failures:
            self._fail(self._hub.failures.pop(0))
        elif self.path.startswith("/api/models/"):
            self._answer(json.dumps(self._describe()).encode(), "Content-Type: application/json")
        elif (name := self.path.rpartition("/")[2]) in self._hub.files:
            self._answer(self._hub.files[name], f'ETag: "{name}"', f"X-Repo-Commit: {_COMMIT}")
        else:
            self._fail(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _describe(self) -> Any:
        files = self._hub.files
        if "/tree/" in self.path:
            return [
                {"type": "file", "path": name, "size": len(body), "oid": name}
                for name, body in files.items()
            ]
        names = [{"rfilename": name} for name in files]
        return {"id": "some/model", "sha": _COMMIT, "siblings": names}

    def _fail(self, status: int) -> None:
        if status:
            self.send_error(status)
        else:
            self.connection.close()

    def _answer(self, body: bytes, *headers: str) -> None:
        self.send_response(200)
        for header in (*headers, f"Content-Length: {len(body)}"):
            self.send_header(*header.split(": "))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._hub.stalled and self.path.endswith(f"/{self._hub.stalled}"):
            self._hub.is_over.wait()
        with contextlib.suppress(OSError):  # who asked may be gone
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve_hub(hub: FakeHub) -> Iterator[FakeHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.is_over.set()
        server.shutdown()
        server.server_close()
        thread.join()
