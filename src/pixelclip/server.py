"""MLflow's server: where it is, a client of it, and the experiment that runs go to.

`MLFLOW_TRACKING_URI` and MLflow's other variables are honoured; the default is `sqlite:///runs/mlflow.db` with artifacts
beside it.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

_DEFAULT_URI = "sqlite:///runs/mlflow.db"
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_ANSWER, _TRANSFER = "20", "600"  # seconds


def tracking_uri() -> str:
    """Where runs are stored."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_URI


def connect() -> MlflowClient:
    """A client of the tracking server or file.

    Raises:
        ValueError: it cannot be reached.
    """
    uri = tracking_uri()
    # A long outage is survived by the journal, so one delivery must not block for MLflow's own minutes of retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault(_TIMEOUT, _ANSWER)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Else a server before S3 sends its clients there, by the address that it knows itself: one that often only it can reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    elif uri.startswith(("http://", "https://")):
        _check_alive(uri)
    mlflow.set_tracking_uri(uri)
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow raises many kinds here, from SQLAlchemy's to its own
        if "error code 403" in str(error):
            raise ValueError(
                f"MLflow at {uri} refuses this request (403): the user may not read experiments, or the server's "
                "--allowed-hosts does not name this host and port"
            ) from None
        if "error code 401" in str(error):
            user = os.environ.get("MLFLOW_TRACKING_USERNAME")
            who = f"user {user!r} with this password" if user else "a request without a user"
            raise ValueError(
                f"MLflow at {uri} refuses {who}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or _TOKEN)"
            ) from None
        raise ValueError(f"MLflow at {uri} cannot be used (MLFLOW_TRACKING_URI): {first_line(error)}") from None
    return client


@contextmanager
def transfer() -> Iterator[None]:
    """Time for files: MLflow's server answers when its store has taken, or given, the whole of one.

    A timeout that somebody set is kept. MLflow reads it from the environment for every request, in whichever thread.

    Raises:
        MlflowException: a file could not be sent or fetched, also where MLflow itself raises another kind.
    """
    before = os.environ.get(_TIMEOUT)
    try:
        if before == _ANSWER:  # by its value, since the steps of a local pipeline inherit it
            os.environ[_TIMEOUT] = _TRANSFER
        yield
    except (MlflowException, OSError) as error:  # `requests` raises the latter
        said = first_line(error)
        if "timed out" in said:
            raise MlflowException(f"{said}; {_TIMEOUT} is {os.environ.get(_TIMEOUT)} s") from None
        if isinstance(error, OSError):
            raise MlflowException(said) from None
        raise
    finally:
        if before is not None:
            os.environ[_TIMEOUT] = before


def _check_alive(uri: str) -> None:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # somebody answers; whether we may use it shows with the first real request
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"MLflow at {uri} cannot be reached (MLFLOW_TRACKING_URI): {reason}") from None


def is_missing(error: MlflowException) -> bool:
    """Whether MLflow says that something is not there; any other error leaves that open."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def first_line(error: BaseException) -> str:
    """What an error says, without the lines below it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def experiment_id(client: MlflowClient) -> str:
    """The experiment that runs go to: MLFLOW_EXPERIMENT_ID, or MLFLOW_EXPERIMENT_NAME, or `pixelclip`; made when new."""
    if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return given
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "pixelclip")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = tracking_uri()
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
