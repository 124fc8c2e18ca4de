"""`gc` on a store with 30 MLflow runs of every state and three registered versions, killed at ten moments."""

import contextlib
import copy
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from mlflow import MlflowClient
from moto.s3.models import s3_backends

from helpers import tiny
from helpers.gc_process import collect
from helpers.gc_store import (
    OLD,
    OLDER,
    YOUNG,
    age,
    copy_in_cache,
    end_earlier,
    kfp_id,
    kfp_run,
    mlflow_run,
    output,
    registered,
    tree,
    unfinished,
)
from helpers.kfp_server import FakeKfp, fake_kfp
from pixelclip.inference.predictor import Predictor
from pixelclip.registry.model_version import fetch
from pixelclip.storage.s3 import list_below
from pixelclip.workflow.stage import describe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.filterwarnings("ignore:.*An input example was not provided"),  # as in test_register
]
ROOT = "s3://data/v2/artifacts"
WORDS = ["runs", "--older-than", "30d", "--pipeline-root", ROOT]
MOMENTS = 10
AGES = (OLDER, OLD, YOUNG)
STATES = ("FINISHED", "FAILED", "KILLED", "RUNNING", "SCHEDULED", "deleted", "model", "sibling", "active")


@dataclass
class Everything:
    """The store, what must stay and which runs of KFP must go; `built` in its folder is a copy."""

    folder: Path
    kfp: FakeKfp
    bucket: Any
    kept_runs: set[str]
    kept_workspaces: set[str]
    gone_kfp: set[str]
    kept_kfp: dict[str, dict[str, Any]]
    environment: dict[str, str]

    def restore(self) -> None:
        """Make everything as it was built."""
        for name in ("runs", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            shutil.copytree(self.folder / "built" / name, self.folder / name, symlinks=True)
        self.kfp.kept = copy.deepcopy(self.kept_kfp)
        for run_id in (*self.kept_kfp["runs"], kfp_id("deleted")):
            for name in ("train/1/model/a", "train/1/model/b", "shards/2/data"):
                self.bucket.put_object(Bucket="data", Key=f"v2/artifacts/pixelclip/{run_id}/{name}", Body=name.encode())
        for backends in s3_backends.values():  # S3 has no request that changes when an object was written
            for backend in backends.values():
                for key in backend.buckets["data"].keys.values() if "data" in backend.buckets else ():
                    key.last_modified = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=OLD)

    def content(self) -> dict[str, Any]:
        """Return everything that exists: files, MLflow's runs and models, KFP's runs and objects."""
        with contextlib.closing(sqlite3.connect(self.folder / "runs" / "mlflow.db")) as database:
            runs = database.execute("SELECT run_uuid, lifecycle_stage, status FROM runs").fetchall()
            models = database.execute("SELECT model_id, source_run_id, lifecycle_stage, status FROM logged_models").fetchall()
        files = {name: md5 for name, md5 in tree(self.folder / "runs").items() if not name.startswith("mlflow.db")}
        copies = {name: md5 for name, md5 in tree(self.folder / "cache").items() if not name.endswith("/lock")}
        objects = {one.uri for one in list_below(ROOT)}
        found = {"runs": {*runs}, "models": {*models}, "objects": objects, "kfp": {*self.kfp.kept["runs"]}}
        return {**found, "files": files, "cache": copies}

    def gc(self, *more: str, kill_at: int = 0) -> tuple[int, int, str]:
        log = self.folder / "log"
        code, count = collect([*WORDS, *more], self.environment, log, kill_at)
        return code, count, log.read_text()


@pytest.fixture(scope="module")
def everything(tmp_path_factory, moto) -> Iterator[Everything]:
    folder = tmp_path_factory.mktemp("gc")
    with pytest.MonkeyPatch.context() as patch, fake_kfp() as kfp:
        for name in ("MLFLOW_BACKEND_STORE_URI", "KF_PIPELINES_ENDPOINT", "KFP_TOKEN", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("PIXELCLIP_CACHE", str(folder / "cache"))
        patch.setenv("HOME", str(folder))  # kfp.Client stores a context there
        patch.setenv("KFP_ENDPOINT", kfp.url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "somebody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", moto)
        patch.chdir(folder)
        bucket = boto3.client("s3")
        bucket.create_bucket(Bucket="data")
        client = tiny.mlflow_at(patch, folder / "runs")
        yield build(folder, client, kfp, bucket)
        for one in list_below("s3://data"):
            bucket.delete_object(Bucket="data", Key=one.uri.removeprefix("s3://data/"))
        bucket.close()


def build(folder: Path, client: MlflowClient, kfp: FakeKfp, bucket: Any) -> Everything:
    clip = tiny.clip_folder(folder / "clip")
    runs = folder / "runs"
    masks = output(runs / "data" / "masks", "masks")
    inputs = {"masks": describe(masks)}
    named = [registered(runs / f"named{number}", clip, number, inputs if number else {}) for number in range(3)]
    for run_id in named:
        end_earlier(runs / "mlflow.db", run_id, OLDER)
    active = kfp_run(kfp, "active", "RUNNING", OLD, workspace=str(runs / "nightly"))
    kept_runs = {*named}
    for state in STATES:
        for days in AGES:
            tags = {"sibling": {"kfp.run_id": kfp_id("registered 0")}, "active": {"kfp.run_id": active}}.get(state, {})
            status = state if state.isupper() else "FINISHED"
            run_id = mlflow_run(client, status, days, model=state == "model", deleted=state == "deleted", **tags)
            if days == YOUNG or state not in ("FINISHED", "FAILED", "KILLED", "deleted", "model"):
                kept_runs.add(run_id)
    for number in range(3):
        output(runs / f"old{number}" / "shards")
        output(runs / f"old{number}" / "masks")
    unfinished(runs / "half" / "train")
    output(runs / "nightly" / "shards")
    output(runs / "mine" / "shards")
    (runs / "mine" / "notes.txt").write_text("mine")
    for path in runs.glob("*/"):
        age(path, OLD)
    output(runs / "young" / "shards")
    unfinished(runs / "young" / "train")
    age(runs / "young", YOUNG)
    gone_kfp = {kfp_run(kfp, f"old {state}", state, OLD) for state in ("SUCCEEDED", "FAILED", "CANCELED")}
    for number in range(3):
        kfp_run(kfp, f"registered {number}", "SUCCEEDED", OLDER)
    kfp_run(kfp, "young", "FAILED", YOUNG)
    copy_in_cache("s3://data/old.pt", OLD)
    copy_in_cache("s3://data/half.pt", OLD, "half.pt.partial")
    copy_in_cache("s3://data/young.pt", YOUNG)
    for name in ("runs", "cache"):
        shutil.copytree(folder / name, folder / "built" / name, symlinks=True)
    settings = ("AWS_", "KFP_", "MLFLOW_", "PIXELCLIP_", "HOME")
    environment = {name: value for name, value in os.environ.items() if name.startswith(settings)}
    workspaces = {"data", "named0", "named1", "named2", "nightly", "mine", "young"}
    return Everything(folder, kfp, bucket, kept_runs, workspaces, gone_kfp, copy.deepcopy(kfp.kept), environment)


def check_versions(before: list[dict[str, str]] | None = None) -> list[dict[str, str]]:
    """Download and load the three versions and the champion; compare their files."""
    found = []
    for uri in ("models:/demo/1", "models:/demo/2", "models:/demo/3", "models:/demo@champion"):
        model = fetch(uri)
        assert Predictor.load(model, device="cpu")
        found.append(tree(model))
    assert found[2] == found[3] and found[0] != found[1] != found[2]
    assert before is None or found == before
    return found


def check_kept(everything: Everything, built: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that whatever is not gone is whole."""
    active = {run_id for run_id, stage, _ in now["runs"] if stage == "active"}
    ready = {model_id for model_id, _, stage, status in now["models"] if stage == "active" and status == "READY"}
    workspaces = {path.name for path in (everything.folder / "runs").iterdir() if not path.name.startswith(".")}
    assert everything.kept_workspaces <= workspaces and everything.kept_runs <= {run_id for run_id, *_ in now["runs"]}
    for name, md5 in built["files"].items():
        top, _, below = name.partition("/")
        owner = below.removeprefix("models/").partition("/")[0]
        if (owner in active | ready) if top == "mlartifacts" else top in workspaces:
            assert now["files"].get(name) == md5, name
    for run_id in now["kfp"]:
        assert {uri for uri in built["objects"] if run_id in uri} <= now["objects"]


def test_store_is_collected_also_after_a_kill_at_any_moment(everything):
    everything.restore()
    built, models = everything.content(), check_versions()
    code, listing, out = everything.gc()
    assert code == 0 and everything.content() == built
    print(out)  # the table, for a reader of the test
    assert "Would delete 20 (" in out
    code, total, out = everything.gc("--delete")
    assert code == 0, out
    final = everything.content()
    assert {run_id for run_id, *_ in final["runs"]} == everything.kept_runs and len(everything.kept_runs) == 20
    assert {path.name for path in (everything.folder / "runs").glob("*/")} == everything.kept_workspaces | {"mlartifacts"}
    assert built["kfp"] - final["kfp"] == everything.gone_kfp
    gone = {*everything.gone_kfp, kfp_id("deleted")}
    assert built["objects"] - final["objects"] == {uri for uri in built["objects"] if any(run_id in uri for run_id in gone)}
    assert {source for _, source, _, _ in final["models"]} <= everything.kept_runs
    assert [path.read_text() for path in (everything.folder / "cache").rglob("*.pt*")] == ["s3://data/young.pt"]
    check_versions(models)
    check_kept(everything, built, final)
    for moment in range(1, MOMENTS + 1):
        everything.restore()
        at = listing + moment * (total - listing) // (MOMENTS + 1)
        code, _, out = everything.gc("--delete", kill_at=at)
        assert code == -signal.SIGKILL, out
        check_kept(everything, built, everything.content())
        code, _, out = everything.gc("--delete")
        assert code == 0, out
        assert everything.content() == final, f"killed at {at} of {total}"
        check_versions(models)
