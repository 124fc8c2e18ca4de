"""MLflow on sqlite and the curves of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient

from helpers import services, tiny
from helpers.services import Mlflow

PROVENANCE = {
    "stage": "train",
    "settings": {"steps": 3, "clip": "toy"},
    "inputs": {
        "masks": {
            "path": "/there/masks",
            "md5": "m1",
            "provenance": {
                "stage": "masks",
                "settings": {"generator": "given"},
                "inputs": {"shards": {"path": "/there/shards", "md5": "s1"}},
            },
        }
    },
    "revision": "abc",
}


@pytest.fixture
def client(monkeypatch, tmp_path) -> MlflowClient:
    return tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")


def curve(client: MlflowClient, run_id: str, key: str = "loss") -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def mlflow_on_sqlite(folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Mlflow:
    """Return a real MLflow server that can be killed and restarted; its SQLite database is readable without it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.mlflow_at(monkeypatch, folder)
    return services.mlflow_on(f"sqlite:///{folder}/mlflow.db", str(folder), folder / "server.log", environment or {}, options)
