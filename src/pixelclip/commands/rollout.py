"""Serve the version that an alias points to, and follow the alias without an interruption.

The server passes requests on to a process with one version. When the alias moves, a second process loads the new version and
answers a smoke request; then new requests go to it, and the old process ends after its last answer. A version that cannot be
loaded or answers nonsense never gets a request of a user. Processes isolate the versions: each runs the code that it was
registered with, a crash ends only that version, and its memory is free afterwards.
"""

import asyncio
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from http import HTTPStatus
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from pixelclip.commands import serve
from pixelclip.commands.serve import MODEL_HEADER, alias_of, version_of, with_pages
from pixelclip.commands.smoke import check_answer, smoke_request
from pixelclip.tracking.server import reason_of
from pixelclip.workflow.worker_processes import start_worker

_START_SECONDS = 1800.0  # to fetch and load a version
_BASE = "http://localhost"  # the name is not resolved: requests go to a socket file
_PAUSE = 0.1  # seconds between two looks at a process that starts or ends
_MAX_DELAY = 3600.0  # seconds until a rejected version is tried again, at most


def run(model: str, host: str, port: int, interval: float) -> None:
    """Serve the version of an alias, and every version that the alias later points to, until the process is stopped.

    Args:
        model: `models:/NAME@ALIAS`.
        host: address to listen on.
        port: port to listen on.
        interval: seconds between two looks at the alias.

    Raises:
        ValueError: the URI has no alias, MLflow has no such model or is unreachable, or the first version is rejected.
    """
    with tempfile.TemporaryDirectory(prefix="pixelclip-") as folder:
        rollout = Rollout(model, Path(folder), interval)
        rollout.start()
        threading.Thread(target=rollout.watch, daemon=True).start()
        try:
            uvicorn.run(rollout.server(), host=host, port=port)
        finally:
            rollout.stop()


class Answer(NamedTuple):
    """Answer of a version's server."""

    status: int
    body: bytes
    kind: str
    model: str


class Version:
    """A version in a process of its own, which listens on a Unix socket.

    Attributes:
        model: `models:/NAME/VERSION`.
        requests: number of requests under way; changed by the server under its lock.
    """

    def __init__(self, model: str, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.model, self.requests = model, 0
        self._socket = str(folder / f"{model.rpartition('/')[2]}-{time.monotonic_ns()}")
        self._failure, failure = context.Pipe(duplex=False)
        self.process = context.Process(target=_serve, args=(model, self._socket, failure), daemon=True)
        try:
            self.process.start()
        except OSError:
            self._failure.close()
            raise
        finally:
            failure.close()

    def wait(self) -> None:
        """Wait until the version is loaded and has answered a smoke request.

        Raises:
            ValueError: it cannot be loaded, or its answer is wrong.
        """
        end = time.monotonic() + _START_SECONDS
        while not asyncio.run(self._responds()):
            if not self.process.is_alive():
                raise ValueError(self._ended())
            if time.monotonic() > end:
                raise ValueError(f"not loaded after {_START_SECONDS:.0f} s")
            time.sleep(_PAUSE)
        request = smoke_request()
        try:
            answer = asyncio.run(self.ask(request.body, "application/json"))
        except aiohttp.ClientError:
            self.process.join()
            raise ValueError(f"{self._ended()} during the smoke request") from None
        check_answer(request, answer.status, answer.body)

    async def ask(self, body: bytes, kind: str) -> Answer:
        """Send a request to `/invocations`.

        Raises:
            aiohttp.ClientError: the process ended before its answer.
        """
        headers = {"Content-Type": kind}
        async with self._session() as session, session.post(f"{_BASE}/invocations", data=body, headers=headers) as reply:
            return Answer(reply.status, await reply.read(), reply.content_type, reply.headers.get(MODEL_HEADER, ""))

    async def _responds(self) -> bool:
        try:
            async with self._session() as session, session.get(f"{_BASE}/ping") as reply:
                return reply.status == HTTPStatus.OK
        except aiohttp.ClientError:
            return False

    def _session(self) -> aiohttp.ClientSession:
        # Without a time limit: the version's own server answers 504 after MLflow's. Without a pool: no connection can be stale.
        return aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._socket), timeout=aiohttp.ClientTimeout(total=None))

    def _ended(self) -> str:
        """Return why the process ended: its own message, or its exit code."""
        try:
            return str(self._failure.recv())
        except EOFError:
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return f"its process ended ({how}{', often for lack of memory' if code == -signal.SIGKILL else ''})"

    def stop(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join()
        self._failure.close()


def _serve(model: str, socket: str, failure: Connection) -> None:
    """Serve a version on a Unix socket; send the reason if it cannot be loaded."""
    os.setsid()  # Ctrl-C in a terminal goes to the server alone, which first answers what it has accepted
    start_worker()
    try:
        serve.run(model, uds=socket, access_log=False)
    except Exception as error:  # whatever an old or damaged model raises
        failure.send(reason_of(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {reason_of(error)}")


class Rollout:
    """The versions of one alias: the one that serves, and the one that is being tried.

    Args:
        model: `models:/NAME@ALIAS`.
        folder: folder for sockets.
        interval: seconds between two looks at the alias.
    """

    def __init__(self, model: str, folder: Path, interval: float) -> None:
        self._alias, self._folder, self._interval = alias_of(model), folder, interval
        self._follows = model
        self._current: Version | None = None
        self._lock = threading.Lock()  # for `_current` and the numbers of requests
        self._stopped = threading.Event()
        self._results = Counter(switched=0, rejected=0)
        self._rejected: dict[str, str] = {}
        self._attempts, self._retry, self._unread = 0, 0.0, ""
        self._lost = ""  # the version that crashed, until one is served again

    def start(self) -> None:
        """Load the first version; errors as in `run`."""
        model = version_of(*self._alias)
        try:
            version = self._load(model)
        except ValueError as error:
            raise ValueError(f"{model}: is not served: {error}") from None
        self._switch(version)

    def watch(self) -> None:
        """Follow the alias until `stop`."""
        while not self._stopped.is_set():
            try:
                self._look()
            except OSError as error:  # no memory or no file descriptor for a process: there may be later
                self._print(f"next attempt in {self._interval:.0f} s: {error}")
                self._stopped.wait(self._interval)

    def _look(self) -> None:
        """Wait for the next look at the alias or a crash; load a crashed version again, then look at the alias."""
        current = self._current
        if current is None:
            self._stopped.wait(self._interval)
        else:
            current.process.join(self._interval)  # returns earlier if the process ends
            if not current.process.is_alive() and not self._stopped.is_set():
                self._print(f"{current.model}: {current._ended()}; it is loaded again")
                self._lost = current.model
                with self._lock:
                    self._current = None
                current.stop()  # closes its pipe
        if self._lost and not self._stopped.is_set():
            self._restore()
        if not self._stopped.is_set():
            self.check()

    def _restore(self) -> None:
        """Load the version that crashed; the alias may point to one that is rejected, and until then nothing is served."""
        try:
            version = self._load(self._lost)
        except ValueError as error:
            self._print(f"{self._lost} cannot be loaded again: {error}; next attempt in {self._interval:.0f} s")
            return
        self._switch(version)

    def _load(self, model: str) -> Version:
        """Start a version and return it when it is ready; stop it if it fails.

        Raises:
            ValueError: it cannot be loaded, or its answer is wrong.
            OSError: there is no memory or no file descriptor for its process.
        """
        version = Version(model, self._folder)
        try:
            version.wait()
        except (ValueError, OSError):
            version.stop()
            raise
        return version

    def check(self) -> None:
        """Look at the alias once; if it points to another version, try that version and switch to it."""
        wanted = self._wanted()
        if wanted is None:
            return
        if self._current and self._current.model == wanted:
            self._rejected = {}  # the alias was set back
            return
        if self._rejected.get("model") == wanted and time.monotonic() < self._retry:
            return
        try:
            version = self._load(wanted)
        except ValueError as error:
            self._reject(wanted, str(error))
            return
        if self._wanted() not in (wanted, None):
            version.stop()  # the alias moved on while the version was loaded
            return
        self._rejected = {}
        self._switch(version)

    def _wanted(self) -> str | None:
        """Return the version of the alias, or None if it cannot be read."""
        try:
            wanted = version_of(*self._alias)
        except ValueError as error:
            if str(error) != self._unread:
                self._print(f"the alias cannot be read, so the version stays: {error}")
            self._unread = str(error)
            return None
        self._unread = ""
        return wanted

    def _reject(self, model: str, reason: str) -> None:
        self._attempts = self._attempts + 1 if self._rejected.get("model") == model else 1
        delay = min(_MAX_DELAY, self._interval * 2**self._attempts)  # a store may have been away, a damaged model stays so
        self._retry = time.monotonic() + delay
        self._rejected = {"model": model, "reason": reason}
        self._results["rejected"] += 1
        stays = f"{self._current.model} stays" if self._current else "nothing is served"
        self._print(f"{model} is rejected, {stays}: {reason}; next attempt in {delay:.0f} s")

    def _switch(self, version: Version) -> None:
        """Send new requests to a version, and end the former one after its last answer."""
        with self._lock:
            former, self._current = self._current, version
        self._lost = ""
        self._results["switched"] += 1
        self._print(f"{version.model} is served{f', instead of {former.model}' if former else ''}")
        while former and former.requests and former.process.is_alive():
            time.sleep(_PAUSE)
        if former:
            former.stop()

    def stop(self) -> None:
        """End the current version's process and `watch`."""
        self._stopped.set()
        with self._lock:
            current, self._current = self._current, None
        if current:
            current.stop()

    def state(self) -> dict[str, Any]:
        """Return the model that answers, the alias, how many versions were switched to or rejected, and the rejected one."""
        current = self._current
        return {
            "model": current.model if current else "",
            "follows": self._follows,
            "rollouts": dict(self._results),
            "rejected": self._rejected or None,
        }

    def server(self) -> FastAPI:
        """Return the server that passes requests on to the current version."""
        app = FastAPI()

        @app.post("/invocations")
        async def invocations(request: Request) -> Response:
            body = await request.body()
            with self._lock:
                version = self._current
                if version:
                    version.requests += 1
            if version is None:
                return _error(HTTPStatus.SERVICE_UNAVAILABLE, "no version is loaded; see GET /model")
            try:
                answer = await version.ask(body, request.headers.get("content-type", ""))
            except aiohttp.ClientError:
                return _error(HTTPStatus.BAD_GATEWAY, f"{version.model}: its process ended during this request")
            finally:
                with self._lock:
                    version.requests -= 1
            return Response(answer.body, answer.status, {MODEL_HEADER: answer.model}, answer.kind)

        @app.get("/ping")
        @app.get("/health")
        async def ping() -> Response:
            return Response("\n", HTTPStatus.OK if self._current else HTTPStatus.SERVICE_UNAVAILABLE)

        return with_pages(app, self.state)

    def _print(self, event: str) -> None:
        print(f"{self._follows}: {event}", file=sys.stderr, flush=True)


def _error(status: HTTPStatus, message: str) -> Response:
    """Return an error in the form of MLflow's."""
    return JSONResponse({"error_code": "TEMPORARILY_UNAVAILABLE", "message": message}, status)
