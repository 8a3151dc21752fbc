"""An HTTP proxy in front of an S3 server that answers wrongly on request.

Requests travel unchanged, so signatures hold. A rule looks at each one and says what is to happen instead:

    None                 pass it on
    503                  that status, with the S3 error that belongs to it
    "reset"              hang up in the middle of the answer
    0.5                  pass it on after so many seconds
    "lost"               pass it on, then hang up: done, but nobody is told
    "deaf"               pass it on, and say that it was done where the server refused to write over a file
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_CODES = {409: "ConditionalRequestConflict", 500: "InternalError", 503: "SlowDown", 429: "TooManyRequests"}

Rule = Callable[[str, str], "int | float | str | None"]  # method, path with its query


@dataclass
class Proxy:
    """What was asked, and the rule for what comes next."""

    upstream: str
    url: str = ""
    rule: Rule = lambda method, path: None
    seen: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    answered: list[tuple[str, str, int]] = field(default_factory=list)  # by the server, with its status

    def puts(self, *folders: str) -> dict[str, list[int]]:
        """What the server answered to the writes of each file below these folders of a store."""
        found: dict[str, list[int]] = {}
        for method, path, status in self.answered:
            if method == "PUT" and any(f"/{folder}/" in path for folder in folders):
                found.setdefault(path.partition("?")[0], []).append(status)
        return found


@contextlib.contextmanager
def proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy on loopback. upstream: http://HOST:PORT."""
    about = Proxy(upstream.removeprefix("http://"))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                about.seen.append((self.command, self.path))
                fault = about.rule(self.command, self.path)
                if fault is not None:
                    about.failed.append((self.command, self.path))
            if isinstance(fault, float):
                time.sleep(fault)
                fault = None
            if isinstance(fault, int):
                self._refuse(fault)
            elif fault == "reset":
                self._hang_up()
            else:
                self._pass_on(body, silent=fault == "lost", deaf=fault == "deaf")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _pass_on(self, body: bytes, silent: bool, deaf: bool) -> None:
            connection = http.client.HTTPConnection(about.upstream, timeout=120)
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                answer = connection.getresponse()
                data = answer.read()
                about.answered.append((self.command, self.path, answer.status))
            except OSError:
                self._hang_up()
                return
            finally:
                connection.close()
            if silent:
                self._hang_up()
                return
            if deaf and answer.status == 412:
                answer.status, answer.reason, data = 200, "OK", b""
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length:
                self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(data)

        def _refuse(self, status: int) -> None:
            code = _CODES.get(status, "Refused")
            said = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>made to fail</Message></Error>'.encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        def _hang_up(self) -> None:
            """With a reset, as a machine does that has just been started again."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that has hung up

    with Server(("127.0.0.1", 0), Handler) as server:
        about.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield about
        finally:
            server.shutdown()
