"""Access to MLflow: tracking URI, a checked client, the experiment of new runs, timeouts.

`MLFLOW_TRACKING_URI` and MLflow's other variables are honoured. Without it the address is `PIXELCLIP_MLFLOW_URI`, which pods of
KFP use, since KFP's MLflow plugin sets the former; the default is `sqlite:///runs/mlflow.db` with artifacts in the same folder.
"""

import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException

from pixelclip.storage.urls import public_url
from pixelclip.tracking.description import EXPERIMENT
from pixelclip.tracking.pages import run_page
from pixelclip.workflow.failures import first_line

ADDRESSES = ("MLFLOW_TRACKING_URI", "PIXELCLIP_MLFLOW_URI")
"""Environment variables with the address of MLflow; the first that is set is used."""
_DEFAULT_URI = "sqlite:///runs/mlflow.db"
_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_DEFAULTS = {_TIMEOUT: "20", _RETRIES: "2"}  # MLflow's own retries block for minutes
_TRANSFER_SECONDS = 600
_PAGE_SECONDS = 5


def tracking_uri() -> str:
    """Return the URI of the tracking server or database."""
    return os.environ.get(_variable()) or _DEFAULT_URI


def public_uri() -> str:
    """Return `tracking_uri` without password and token, for files and messages."""
    return public_url(tracking_uri())


def _variable() -> str:
    """Return the variable that sets the address."""
    return next((name for name in ADDRESSES if os.environ.get(name)), ADDRESSES[0])


def ui_address(server: str = "") -> str:
    """Return the URL of MLflow's pages in a browser: PIXELCLIP_MLFLOW_UI, else the server's; empty for a database.

    Inside a cluster the server's own address often opens in no browser. `server` is by default `tracking_uri()`.
    """
    uri = os.environ.get("PIXELCLIP_MLFLOW_UI") or server or tracking_uri()
    return public_url(uri).rstrip("/") if uri.startswith(("http://", "https://")) else ""


def run_url(client: MlflowClient, run_id: str) -> str:
    """Return the URL of a run's page, or its ID and database if there is none."""
    address = ui_address()
    return run_page(address, run_id, _experiment_of(client, run_id)) if address else f"{run_id} at {public_uri()}"


def _experiment_of(client: MlflowClient, run_id: str) -> str:
    """Return the ID of a run's experiment; empty if the server does not respond soon."""
    with suppress(MlflowException, OSError), request_limits(timeout=_PAGE_SECONDS, retries=0):
        return str(client.get_run(run_id).info.experiment_id)
    return ""


def artifact_address(run_id: str, path: str) -> str:
    """Return the address of a run's file relative to MLflow's pages, for pictures in descriptions."""
    return f"get-artifact?{urllib.parse.urlencode({'path': path, 'run_uuid': run_id})}"


def connect() -> MlflowClient:
    """Return a client of the tracking server or database.

    Raises:
        ValueError: the server is unreachable or denies access.
    """
    uri = tracking_uri()
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # At the end of a run MLflow prints its URL with the password; `Run.start` prints it without.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # Otherwise a server in front of S3 redirects its clients to an S3 address that often only the server can reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(("http://", "https://")):
        _check_alive(public_url(uri))
    mlflow.set_tracking_uri(uri)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises many types, from SQLAlchemy's to its own
        problem = f"cannot be used ({_variable()}): {reason_of(error)}"
        if "error code 403" in str(error):
            reason = "the user may not read experiments, or this host and port are missing from the server's --allowed-hosts"
            problem = f"rejects this request (403): {reason}"
        elif "error code 401" in str(error):
            user = os.environ.get("MLFLOW_TRACKING_USERNAME")
            who = f"user {user!r} with this password" if user else "a request without a user"
            problem = f"rejects {who}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or _TOKEN)"
        raise ValueError(f"MLflow at {public_uri()} {problem}") from None
    return client


@contextmanager
def request_limits(timeout: int, retries: int | None = None) -> Iterator[None]:
    """Set MLflow's timeout (seconds) and retries for the requests inside; values set by the user are kept."""
    # MLflow reads both from the environment at every request. Defaults are recognised by value: subprocesses inherit them.
    limits = {_TIMEOUT: timeout, _RETRIES: retries}
    ours = [name for name, value in _DEFAULTS.items() if limits[name] is not None and os.environ.get(name) == value]
    os.environ.update({name: str(limits[name]) for name in ours})
    try:
        yield
    finally:
        os.environ.update({name: _DEFAULTS[name] for name in ours})


@contextmanager
def transfer() -> Iterator[None]:
    """Allow more time for files: MLflow's server responds after its store has received or sent a whole file.

    Raises:
        MlflowException: a file could not be sent or fetched, even where MLflow raises another type.
    """
    with request_limits(timeout=_TRANSFER_SECONDS):
        try:
            yield
        except (MlflowException, OSError) as error:  # `requests` raises OSError
            message = reason_of(error)
            if "timed out" in message:
                raise MlflowException(f"{message}; {_TIMEOUT} is {os.environ.get(_TIMEOUT)} s") from None
            if isinstance(error, OSError):
                raise MlflowException(message) from None
            raise


def _check_alive(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # the server is up; the first real request checks access
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"MLflow at {uri} cannot be reached ({_variable()}): {reason}") from None


def is_missing(error: MlflowException) -> bool:
    """Return True only for RESOURCE_DOES_NOT_EXIST; any other error leaves it open."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, without the secrets of the tracking URI and of other URLs."""
    return first_line(error, tracking_uri())


def find_experiment(client: MlflowClient) -> Experiment | None:
    """Return the experiment of `experiment_id` if it exists."""
    if env_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return client.get_experiment(env_id)
    return client.get_experiment_by_name(_experiment_name())


def _experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME", "pixelclip")


def experiment_id(client: MlflowClient) -> str:
    """Return the ID of the experiment for new runs: MLFLOW_EXPERIMENT_ID, MLFLOW_EXPERIMENT_NAME or `pixelclip`.

    The experiment is created if it does not exist; tags of `EXPERIMENT` that it lacks are added.
    """
    if env_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return env_id
    name = _experiment_name()
    if existing := client.get_experiment_by_name(name):
        for key, value in EXPERIMENT.items():
            if key not in existing.tags:  # created before 0.2.0, or by hand
                client.set_experiment_tag(existing.experiment_id, key, value)
        return str(existing.experiment_id)
    uri = tracking_uri()
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location, tags=EXPERIMENT))
    except MlflowException:
        if existing := client.get_experiment_by_name(name):  # another process has just created it
            return str(existing.experiment_id)
        raise
