"""A git server over HTTP that requires a login."""

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from dulwich.repo import Repo
from dulwich.server import DictBackend
from dulwich.web import make_wsgi_chain

from helpers.json_server import running


@contextlib.contextmanager
def git_server(repo: Path, login: str) -> Iterator[str]:
    """Serve a repository over HTTP with the login `user:password`; yield the server's address."""
    expected = f"Basic {base64.b64encode(login.encode()).decode()}"

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with contextlib.closing(Repo(str(repo))) as opened:
        git = make_wsgi_chain(DictBackend({"/data.git": opened}))

        def guarded(environ: dict, start: object) -> object:
            if environ.get("HTTP_AUTHORIZATION") == expected:
                return git(environ, start)
            start("401 Unauthorized", [("WWW-Authenticate", "Basic realm=git"), ("Content-Length", "0")])
            return [b""]

        server = make_server("127.0.0.1", 0, guarded, handler_class=Quiet)
        with running(server) as address:
            yield address
