"""Storage, tracking and registry on real servers, also when they fail: S3 with credentials, MLflow on PostgreSQL and S3."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import mlflow
import psycopg2
import pytest
from mlflow import MlflowClient

from helpers import services, tiny
from helpers.mlflow_runs import PROVENANCE
from helpers.promotions import meet
from helpers.registrations import evaluation
from pixelclip.config import RegisterConfig
from pixelclip.inference.predictor import Predictor
from pixelclip.register import run as register
from pixelclip.registry.model_version import fetch
from pixelclip.storage.download import local_copy
from pixelclip.storage.files import digest, read_json
from pixelclip.tracking.run import Run

pytestmark = [
    pytest.mark.services,
    pytest.mark.filterwarnings("ignore:.*An input example was not provided"),  # as in test_register
]
BIG = 200 << 20


@pytest.fixture(scope="module")
def big(all_services) -> bytes:
    """Upload an object in several parts, so that its ETag is not an MD5."""
    content = os.urandom(1 << 20) * (BIG >> 20)
    client = all_services.s3.client()
    upload = client.create_multipart_upload(Bucket="data", Key="big.tar")["UploadId"]
    half = BIG // 2
    parts = [
        {"PartNumber": number, "ETag": client.upload_part(
            Bucket="data", Key="big.tar", UploadId=upload, PartNumber=number, Body=content[start : start + half]
        )["ETag"]}
        for number, start in ((1, 0), (2, half))
    ]  # fmt: skip
    client.complete_multipart_upload(Bucket="data", Key="big.tar", UploadId=upload, MultipartUpload={"Parts": parts})
    return content


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PIXELCLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def complete(cache: Path) -> list[Path]:
    """List the complete files in the cache."""
    return [path for path in cache.glob("*/*/*") if ".partial" not in path.name]


def test_object_in_several_parts_is_downloaded(s3, big, cache):
    assert local_copy("s3://data/big.tar").read_bytes() == big


@pytest.mark.parametrize(
    ("uri", "changes", "message"),
    [
        ("s3://data/none", {}, "there is no such key in the bucket (NoSuchKey, status 404, "),
        ("s3://nowhere/none", {}, "there is no such bucket (NoSuchBucket, status 404, "),
        ("s3://data/big.tar", {"AWS_ACCESS_KEY_ID": "nobody"}, "wrong credentials, see AWS_ACCESS_KEY_ID ("),
        ("s3://data/big.tar", {"AWS_SECRET_ACCESS_KEY": "no"}, "wrong credentials, see AWS_SECRET_ACCESS_KEY ("),
        ("s3://dvc/none", {"AWS_ACCESS_KEY_ID": "reader"}, "access denied, or no such key ("),
    ],
)
def test_refused_request_is_not_retried_and_names_the_reason(s3, big, cache, monkeypatch, uri, changes, message):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    if changes.get("AWS_ACCESS_KEY_ID") == "reader":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader)
    with pytest.raises(ValueError, match=r".") as refused:
        local_copy(uri)
    assert f"{uri}: {message}" in str(refused.value) and s3.endpoint in str(refused.value)
    assert complete(cache) == []


def test_read_only_identity_can_download(s3, big, cache, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader)
    assert local_copy("s3://data/big.tar").read_bytes() == big


def when(condition: Callable[[], object], then: Callable[[], None]) -> threading.Thread:
    """Call `then` from a thread as soon as `condition` holds."""

    def watch() -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def arrived(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.partial*") if path.is_file())


def test_download_survives_a_restart_of_the_server(s3, big, cache):
    def restart() -> None:
        s3.server.kill()
        s3.server.start()

    watcher = when(lambda: arrived(cache) > 8 << 20, restart)
    copy = local_copy("s3://data/big.tar")
    watcher.join()
    assert copy.read_bytes() == big


def test_failed_download_leaves_no_files_and_can_be_repeated(s3, big, cache, monkeypatch):
    watcher = when(lambda: arrived(cache) > 8 << 20, s3.server.kill)
    with monkeypatch.context() as patch:
        patch.setattr("pixelclip.storage.s3._ATTEMPTS", 2)
        with pytest.raises(ValueError, match=r"s3://data/big\.tar: "):
            local_copy("s3://data/big.tar")
    watcher.join()
    assert complete(cache) == [] and arrived(cache) == 0
    s3.server.start()
    s3.server.wait()
    assert local_copy("s3://data/big.tar").read_bytes() == big


def test_unreachable_server_is_named_and_a_later_download_succeeds(s3, big, cache, monkeypatch):
    s3.server.kill()
    with monkeypatch.context() as patch:
        patch.setattr("pixelclip.storage.s3._ATTEMPTS", 2)
        with pytest.raises(ValueError, match=rf"big\.tar: .*{s3.endpoint}.*, and no complete copy is in {cache}"):
            local_copy("s3://data/big.tar")
    s3.server.start()
    s3.server.wait()
    assert local_copy("s3://data/big.tar").read_bytes() == big


def rows(database: services.Postgres, query: str) -> list[tuple[object, ...]]:
    with psycopg2.connect(database.uri.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


def downloaded(run: Run, name: str, folder: Path) -> Path:
    """Download an artifact by MLflow's own client, through the server."""
    return Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path=name, dst_path=str(folder / "back")))


def test_runs_are_stored_in_postgresql_and_files_in_s3(mlflow_server, all_services, tmp_path):
    with pytest.raises(Exception, match=r"(?i)credentials"):
        boto3.client(
            "s3", endpoint_url=all_services.s3.endpoint, region_name="us-east-1"
        ).list_buckets()  # only the server has keys
    (tmp_path / "stage").mkdir()
    run = Run.start(tmp_path / "stage", "real", PROVENANCE)
    for step in range(1, 4):
        run.log({"loss": 1 / step}, step)
    picture = tmp_path / "picture.bin"
    picture.write_bytes(os.urandom(12 << 20))
    run.artifact(picture, "pictures")
    assert run.finish()
    query = f"SELECT step, value FROM metrics WHERE run_uuid = '{run.run_id}' AND key = 'loss' ORDER BY step"
    assert rows(all_services.postgres, query) == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    listed = all_services.s3.client().list_objects_v2(Bucket="mlflow")["Contents"]
    stored = {one["Key"].rpartition("/artifacts/")[2]: one["Size"] for one in listed if run.run_id in one["Key"]}
    assert stored["pictures/picture.bin"] == 12 << 20 and "lineage.json" in stored
    back = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, artifact_path="pictures/picture.bin", dst_path=tmp_path / "back"
    )
    assert Path(back).read_bytes() == picture.read_bytes()


def test_registered_model_can_be_fetched(mlflow_server, all_services, tmp_path):
    clip = tiny.clip_folder(tmp_path / "clip")
    model = tiny.model_folder(tmp_path / "model", clip, change=0.01)
    evaluated = evaluation(tmp_path / "evaluation", model, miou=40.0, gain=10.0)
    assert register(model, evaluated, tmp_path / "out", RegisterConfig(name="real", min_gain=1.0))["register/champion"] == 1
    written = read_json(tmp_path / "out" / "registration.json")
    assert written["tracking_uri"] == mlflow_server.uri
    query = "SELECT version, alias FROM registered_model_aliases WHERE name = 'real'"
    assert rows(all_services.postgres, query) == [(1, "champion")]
    fetched = fetch("models:/real@champion", tmp_path / "fetched")
    assert digest(fetched / "model.safetensors") == digest(model / "model.safetensors")
    Predictor.load(fetched, "cpu")


def test_files_pass_through_mlflow_if_only_mlflow_reaches_s3(mlflow_server, monkeypatch, tmp_path):
    """Clients may be outside the cluster, but by default MLflow redirects them to the address of S3 inside."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri.replace("127.0.0.1", "localhost"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{services.free_ports(1)[0]}")  # a closed port
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Small files are then uploaded like those above 500 MB.
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1")
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"), change=0.01, seed=2)
    evaluated = evaluation(tmp_path / "evaluation", model, miou=40.0, gain=10.0)
    register(model, evaluated, tmp_path / "out", RegisterConfig(name="far", min_gain=1.0))
    fetched = fetch("models:/far@champion", tmp_path / "fetched")
    assert digest(fetched / "model.safetensors") == digest(model / "model.safetensors")


@pytest.mark.parametrize("name", [" ", "x" * 300], ids=["blank", "longer than a column of PostgreSQL"])
def test_registry_name_that_mlflow_rejects_is_an_error(mlflow_server, tmp_path, name):
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"), change=0.01, seed=1)
    evaluated = evaluation(tmp_path / "evaluation", model, miou=40.0, gain=10.0)
    with pytest.raises(ValueError, match=r"register\.name '.*' is rejected by MLflow at http:"):
        register(model, evaluated, tmp_path / "out", RegisterConfig(name=name, min_gain=1.0))
    assert not (tmp_path / "out").exists()


def test_concurrent_promotions_leave_one_champion_in_each_of_20_trials(mlflow_server, all_services):
    taken_over = meet(mlflow_server.uri, challengers=2, trials=20)
    query = """SELECT name, count(*) FILTER (WHERE alias = 'champion'), max(version) FILTER (WHERE alias = 'champion'),
        count(*) FILTER (WHERE alias = 'previous'), sum(version) FILTER (WHERE alias = 'previous')
        FROM registered_model_aliases WHERE name LIKE 'trial%' GROUP BY name"""
    found = rows(all_services.postgres, query)
    assert len(found) == 20
    assert {(champions, best, befores) for _, champions, best, befores, _ in found} == {(1, 3, 1)}
    # If version 2 came first, it was champion for a moment.
    assert sum(previous == 2 for *_, previous in found) >= taken_over


def test_outages_lose_no_metrics_or_files(mlflow_server, all_services, monkeypatch, tmp_path, capsys):
    """Kill and restart the database, then S3, then MLflow during one run."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 120.0)
    (tmp_path / "stage").mkdir()
    run = Run.start(tmp_path / "stage", "outage", PROVENANCE)
    files = []
    for number, server in enumerate((all_services.postgres.server, all_services.s3.server, mlflow_server.server)):
        server.kill()
        run.log({"loss": float(number)}, 2 * number + 1)
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(f"file {number}")
        run.artifact(files[-1])
        assert not run.journal.flush(0)
        server.start()
        server.wait()
        run.log({"loss": float(number)}, 2 * number + 2)
        assert run.journal.flush(60)
    assert run.finish() is True
    client = MlflowClient(mlflow_server.uri)
    curve = [(point.step, point.value) for point in client.get_metric_history(run.run_id, "loss")]
    assert curve == [(2 * number + half, float(number)) for number in range(3) for half in (1, 2)]
    assert client.get_run(run.run_id).info.status == "FINISHED"
    for file in files:
        assert downloaded(run, file.name, tmp_path).read_text() == file.read_text()
    assert capsys.readouterr().out.count("again; everything is delivered") == 3
