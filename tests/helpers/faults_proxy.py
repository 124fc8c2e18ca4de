"""An HTTP proxy that damages the bodies of requests or answers, between a client and an S3 or file server."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.json_server import running

_HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection"}


@dataclass
class Message:
    """A request or an answer on its way."""

    method: str  # of the request
    path: str
    headers: dict[str, str]
    body: bytes
    keeps_length: bool = True
    """Whether Content-Length is that of `body`; otherwise it stays, and the connection is reset after the body."""

    def flip(self, position: float) -> None:
        """Change one bit of the byte at a relative position."""
        changed = bytearray(self.body)
        changed[int(position * len(changed))] ^= 1
        self.body = bytes(changed)

    def truncate(self, position: float) -> None:
        """Break the connection off within the body."""
        self.body, self.keeps_length = self.body[: int(position * len(self.body))], False

    def shorten(self, position: float) -> None:
        """Remove the end of the body and announce the shorter length."""
        self.body = self.body[: int(position * len(self.body))]

    def lengthen(self, position: float) -> None:
        """Repeat a part of the body at its end and announce the greater length."""
        self.body += self.body[int(position * len(self.body)) :]


Damage = Callable[[Message], None]


@dataclass
class Proxy:
    """A running proxy; `request` and `answer` change what passes, and must be set before the client connects."""

    url: str
    request: Damage = lambda message: None
    answer: Damage = lambda message: None


@contextmanager
def damaging_proxy(target: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at `target`, `http://host:port`."""
    proxy = Proxy("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Message(self.command, self.path, dict(self.headers.items()), body)
            if body:
                proxy.request(request)
            upstream = HTTPConnection(target.removeprefix("http://"), timeout=60)
            upstream.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in {*_HOP, "expect"}:
                    size = str(len(request.body)) if request.keeps_length else value
                    upstream.putheader(name, size if name.lower() == "content-length" else value)
            upstream.endheaders(request.body)
            if not request.keeps_length:
                upstream.close()
                return self._reset()
            reply = upstream.getresponse()
            answer = Message(request.method, request.path, dict(reply.getheaders()), reply.read())
            status, length = reply.status, reply.headers.get("Content-Length", "0")
            upstream.close()
            if answer.body:
                proxy.answer(answer)
                length = str(len(answer.body)) if answer.keeps_length else length
            self.send_response_only(status)
            for name, value in answer.headers.items():
                if name.lower() not in {*_HOP, "content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(answer.body)
            if not answer.keeps_length:
                self._reset()

        def _reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{method}", Handler._pass_on)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """Ignore clients that disconnect."""

    with running(Server(("127.0.0.1", 0), Handler)) as address:
        proxy.url = f"http://{address}"
        yield proxy
