"""The package against real servers: S3 that knows its keys, MLflow over PostgreSQL and S3, all of which may die."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import boto3
import mlflow
import psycopg2
import pytest
import services
import tiny
from mlflow import MlflowClient
from test_promote import meet
from test_register import evaluation
from test_tracking import PROVENANCE

from pixelclip import tracking
from pixelclip.config import RegisterConfig
from pixelclip.download import local_copy
from pixelclip.model_version import fetch
from pixelclip.predict import Predictor
from pixelclip.register import run as register
from pixelclip.storage import digest, read_json
from pixelclip.tracking import Run

pytestmark = [
    pytest.mark.services,
    pytest.mark.filterwarnings("ignore:.*An input example was not provided"),  # as in test_register
]
BIG = 200 << 20


@pytest.fixture(scope="module")
def big(all_services) -> bytes:
    """An object in several parts, so that its ETag is no MD5."""
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


def whole(cache: Path) -> list[Path]:
    """Files that a reader would take for finished."""
    return [path for path in cache.glob("*/*/*") if ".partial" not in path.name]


def test_an_object_in_several_parts(s3, big, cache):
    assert local_copy("s3://data/big.tar").read_bytes() == big


@pytest.mark.parametrize(
    ("uri", "changes", "said"),
    [
        ("s3://data/none", {}, "there is no such key in the bucket (NoSuchKey, status 404, "),
        ("s3://nowhere/none", {}, "there is no such bucket (NoSuchBucket, status 404, "),
        ("s3://data/big.tar", {"AWS_ACCESS_KEY_ID": "nobody"}, "wrong credentials, see AWS_ACCESS_KEY_ID ("),
        ("s3://data/big.tar", {"AWS_SECRET_ACCESS_KEY": "no"}, "wrong credentials, see AWS_SECRET_ACCESS_KEY ("),
        ("s3://dvc/none", {"AWS_ACCESS_KEY_ID": "reader"}, "these credentials may not do that, or there is no such key ("),
    ],
)
def test_a_refusal_is_final_and_says_why(s3, big, cache, monkeypatch, uri, changes, said):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    if changes.get("AWS_ACCESS_KEY_ID") == "reader":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader)
    with pytest.raises(ValueError, match=r".") as refused:
        local_copy(uri)
    assert f"{uri}: {said}" in str(refused.value) and s3.endpoint in str(refused.value)
    assert whole(cache) == []


def test_one_who_may_only_read_reads(s3, big, cache, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader)
    assert local_copy("s3://data/big.tar").read_bytes() == big


def when(condition: Callable[[], object], then: Callable[[], None]) -> threading.Thread:
    """Does `then` as soon as `condition` holds, beside the test."""

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


def test_failed_download_leaves_nothing_and_can_be_repeated(s3, big, cache, monkeypatch):
    watcher = when(lambda: arrived(cache) > 8 << 20, s3.server.kill)
    with monkeypatch.context() as patch:
        patch.setattr("pixelclip.s3._ATTEMPTS", 2)
        with pytest.raises(ValueError, match=r"s3://data/big\.tar: "):
            local_copy("s3://data/big.tar")
    watcher.join()
    assert whole(cache) == [] and arrived(cache) == 0
    s3.server.start()
    s3.server.wait()
    assert local_copy("s3://data/big.tar").read_bytes() == big


def test_server_that_is_down_at_the_start(s3, big, cache, monkeypatch):
    s3.server.kill()
    with monkeypatch.context() as patch:
        patch.setattr("pixelclip.s3._ATTEMPTS", 2)
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
    """An artifact as MLflow's own client gets it, which sends it through the server."""
    return Path(mlflow.artifacts.download_artifacts(run_id=run.run_id, artifact_path=name, dst_path=str(folder / "back")))


def test_a_run_and_its_files_stand_in_postgresql_and_s3(mlflow_server, all_services, tmp_path):
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
    (there,) = [
        entry for entry in all_services.s3.client().list_objects_v2(Bucket="mlflow")["Contents"] if run.run_id in entry["Key"]
    ]
    assert there["Key"].endswith("pictures/picture.bin") and there["Size"] == 12 << 20
    back = mlflow.artifacts.download_artifacts(
        run_id=run.run_id, artifact_path="pictures/picture.bin", dst_path=tmp_path / "back"
    )
    assert Path(back).read_bytes() == picture.read_bytes()


def test_a_model_is_registered_and_fetched(mlflow_server, all_services, tmp_path):
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


def test_files_come_and_go_through_mlflow_where_only_mlflow_reaches_s3(mlflow_server, monkeypatch, tmp_path):
    """As outside of a cluster: MLflow's server would send its clients to S3, by the address that it knows itself."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri.replace("127.0.0.1", "localhost"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{services.free_ports(1)[0]}")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "localhost")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # MLflow's own limits, so that small files stand for those from 500 MB on.
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1")
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"), change=0.01, seed=2)
    evaluated = evaluation(tmp_path / "evaluation", model, miou=40.0, gain=10.0)
    register(model, evaluated, tmp_path / "out", RegisterConfig(name="far", min_gain=1.0))
    fetched = fetch("models:/far@champion", tmp_path / "fetched")
    assert digest(fetched / "model.safetensors") == digest(model / "model.safetensors")


@pytest.mark.parametrize("name", [" ", "x" * 300], ids=["blank", "longer than a column of PostgreSQL"])
def test_a_registry_name_that_mlflow_refuses(mlflow_server, tmp_path, name):
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"), change=0.01, seed=1)
    evaluated = evaluation(tmp_path / "evaluation", model, miou=40.0, gain=10.0)
    with pytest.raises(ValueError, match=r"register\.name '.*' is refused by MLflow at http:"):
        register(model, evaluated, tmp_path / "out", RegisterConfig(name=name, min_gain=1.0))
    assert not (tmp_path / "out").exists()


def test_two_promotions_at_once_leave_one_champion_in_each_of_20_trials(mlflow_server, all_services):
    taken_over = meet(mlflow_server.uri, challengers=2, trials=20)
    query = """SELECT name, count(*) FILTER (WHERE alias = 'champion'), max(version) FILTER (WHERE alias = 'champion'),
        count(*) FILTER (WHERE alias = 'previous'), sum(version) FILTER (WHERE alias = 'previous')
        FROM registered_model_aliases WHERE name LIKE 'trial%' GROUP BY name"""
    found = rows(all_services.postgres, query)
    assert len(found) == 20
    assert {(champions, best, befores) for _, champions, best, befores, _ in found} == {(1, 3, 1)}
    # Version 2 was champion for a while where it came first.
    assert sum(previous == 2 for *_, previous in found) >= taken_over


def test_servers_that_are_gone_for_a_while_cost_nothing(mlflow_server, all_services, monkeypatch, tmp_path, capsys):
    """First the database, then S3, then MLflow itself, all during one run."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 120.0)
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
    assert capsys.readouterr().out.count("is back; everything is delivered") == 3
