"""What the tests' httpx clients are given as `verify`: they speak plain HTTP to this machine.

Without it each client, and each `httpx.get`, reads all the authorities that there are, which takes
more CPU than most requests of a test: 30 ms, at every look of a test that polls.
"""

from __future__ import annotations

import ssl

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
