"""A real MLflow server that requires a login."""

from collections.abc import Iterator

import pytest
from mlflow import MlflowClient

from helpers.mlflow_runs import PROVENANCE, curve, mlflow_on_sqlite
from helpers.services import Mlflow
from pixelclip.registry import promotion
from pixelclip.tracking.run import Run
from pixelclip.tracking.server import connect

pytestmark = pytest.mark.services
PASSWORD = "correct horse battery"


@pytest.fixture(scope="session")
def guarded(tmp_path_factory) -> Iterator[Mlflow]:
    """An MLflow server with basic authentication."""
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests"}
    mlflow_server = mlflow_on_sqlite(tmp_path_factory.mktemp("guarded"), ["--app-name", "basic-auth"], secrets)
    mlflow_server.server.start()
    mlflow_server.server.wait()
    yield mlflow_server
    mlflow_server.server.kill()


@pytest.fixture
def log_in(guarded, monkeypatch):
    def as_user(user: str | None, password: str = PASSWORD) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.uri)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        if user is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    return as_user


def test_run_and_promotion_with_the_right_password(guarded, log_in, tmp_path):
    log_in("admin")
    (tmp_path / "model").mkdir()
    run = Run.start(tmp_path / "model", "demo", PROVENANCE)
    run.log({"loss": 1.0}, 1)
    (tmp_path / "note.txt").write_text("hello")
    run.artifact(tmp_path / "note.txt")
    assert run.finish()
    client = MlflowClient(guarded.uri)
    assert curve(client, run.run_id) == [(1, 1.0)]
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["lineage.json", "note.txt"]
    client.create_registered_model("guarded")
    tags = {"miou": "40", "gain": "10", "measured_on": "x"}
    client.create_model_version("guarded", source=f"runs:/{run.run_id}/model", run_id=run.run_id, tags=tags)
    assert promotion.run("guarded", 1).champion
    assert {alias: str(version) for alias, version in client.get_registered_model("guarded").aliases.items()} == {
        "champion": "1"
    }


@pytest.mark.parametrize(
    ("user", "password", "message"),
    [
        (
            "admin",
            "wrong",
            "rejects user 'admin' with this password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        ("nobody", PASSWORD, "rejects user 'nobody' with this password"),
        (None, "", "rejects a request without a user"),
    ],
)
def test_wrong_password_is_a_clear_error(guarded, log_in, user, password, message):
    log_in(user, password)
    with pytest.raises(ValueError, match=f"MLflow at {guarded.uri} {message}") as raised:
        connect()
    assert "\n" not in str(raised.value) and PASSWORD not in str(raised.value)
