"""An authority of the lab's own, and certificates by it: a good one, and one that has expired."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
# From 3.13 on Python wants to be told whose key signed, and that it may.
_NAME = ("-subj", "/CN=engine")
_EXTENSIONS = "subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n"
_MAY_SIGN = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign")
_AUTHORITY = ("-subj", "/CN=lab", "-addext", _MAY_SIGN[0], "-addext", _MAY_SIGN[1])


class Certificates:
    """Files of a folder; `authority` is whom a client must trust."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = folder / "engine.key"
        self.authority = folder / "authority.pem"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def make(self) -> None:
        """By the program `openssl`."""
        self._folder.mkdir(parents=True, exist_ok=True)
        key, request = self._folder / "authority.key", self._folder / "engine.csr"
        authority = ("-keyout", key, "-out", self.authority, "-days", 2)
        _run("req", "-x509", *_KEY, *authority, *_AUTHORITY)
        _run("req", *_KEY, "-keyout", self._key, "-out", request, *_NAME)
        extensions = self._folder / "extensions.cnf"
        extensions.write_text(_EXTENSIONS, encoding="ascii")
        for days in (2, -1):
            signed = ("-in", request, "-CA", self.authority, "-CAkey", key, "-CAcreateserial")
            made = ("-out", self._find(days), "-days", days, "-extfile", extensions)
            _run("x509", "-req", *signed, *made)

    def serve(self, *, is_expired: bool = False) -> ssl.SSLContext:
        """Always the same one: whoever serves by it goes on with this certificate."""
        self._context.load_cert_chain(self._find(-1 if is_expired else 2), self._key)
        return self._context

    def _find(self, days: int) -> Path:
        return self._folder / f"engine{days}.pem"


def _run(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)  # noqa: S607
