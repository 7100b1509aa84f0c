"""An S3 server in a process of its own, for tests: prints its port, and ends when its standard input does.

In a process of its own because the daemon's requests would otherwise wait for the test's interpreter, and the test
for them. What it holds is in memory only.
"""

from __future__ import annotations

import logging
import sys

from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler


def main() -> None:
    # Without it each request would open a connection of its own.
    WSGIRequestHandler.protocol_version = "HTTP/1.1"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    sys.stdout.write(f"{server.get_host_and_port()[1]}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
