#!/usr/bin/env python3
"""Exit 0 if an address answers 200: the images' health check, without curl. `health.py URL`

Variables in the address are those of the container. Without urllib too: it would go through a proxy
that the container may have been given.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4.0


def main() -> int:
    url = os.path.expandvars(sys.argv[1])
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/" + path)
        response = connection.getresponse()
        answer = response.read(300).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        print(f"{url}: {error}")
        return 1
    print(f"{url}: {response.status} {answer}")
    return 0 if response.status == http.client.OK else 1


if __name__ == "__main__":
    sys.exit(main())
