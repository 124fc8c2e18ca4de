"""Model versions, and processes that promote them at the same moment."""

import multiprocessing
import os

import pytest
from mlflow import MlflowClient

from helpers import tiny
from helpers.promoter import promote_again_and_again

NAME = "demo"


@pytest.fixture
def uri(monkeypatch, tmp_path) -> str:
    """URI of the registry."""
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def client(uri) -> MlflowClient:
    return MlflowClient(uri)


def add(client: MlflowClient, name: str, **tags: object) -> str:
    """Add a version with the tags that `register` writes."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    defaults = {"miou": 40.0, "gain": 10.0, "measured_on": "set", "min_gain": 1.0} | tags
    text = {tag: str(value) for tag, value in defaults.items() if value is not None}
    return str(client.create_model_version(name, source="s3://nowhere/model", tags=text).version)


def aliases(client: MlflowClient, name: str = NAME) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def meet(uri: str, challengers: int, trials: int) -> int:
    """Let processes promote concurrently in every trial and check the aliases, on any server.

    Returns:
        Number of trials in which more than one process won.
    """
    client = MlflowClient(uri)
    context = multiprocessing.get_context("spawn")
    start, end, results = context.Barrier(challengers + 1), context.Barrier(challengers + 1), context.Queue()
    versions = [str(2 + number) for number in range(challengers)]
    processes = [
        context.Process(target=promote_again_and_again, args=(uri, version, trials, start, results, end))
        for version in versions
    ]
    for process in processes:
        process.start()
    taken_over = 0
    try:
        for trial in range(trials):
            name = f"trial{trial}"
            for number in range(challengers + 1):  # the champion, and the challengers, the best last
                add(client, name, miou=40 + number)
            client.set_registered_model_alias(name, "champion", "1")
            start.wait(timeout=120)
            outcomes = [results.get(timeout=120) for _ in versions]
            end.wait(timeout=120)
            assert [error for *_, error in outcomes] == [""] * challengers
            final = aliases(client, name)
            promoted = sorted(version for version, champion, _ in outcomes if champion)
            best = versions[-1]
            assert final["champion"] == best == promoted[-1]
            assert final["previous"] in {"1", *versions[:-1]}
            rejected = set(versions) - set(promoted)
            assert final.get("challenger") in (rejected or {None})
            taken_over += len(promoted) > 1
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return taken_over
