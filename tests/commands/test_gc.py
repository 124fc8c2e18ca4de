"""Command `gc` on workspaces, a real MLflow database, KFP's API, S3 and the cache."""

import os
import re
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus, ViewType

from helpers import command_line, tiny
from helpers.gc_store import OLD, YOUNG, age, copy_in_cache, end_earlier, mlflow_run, output, registered, tree, unfinished
from helpers.mlflow_runs import mlflow_on_sqlite
from helpers.services import running
from pixelclip.cleanup.policy import Item, Policy, Verdict
from pixelclip.commands.gc import run, table
from pixelclip.inference.predictor import Predictor
from pixelclip.registry.model_version import fetch
from pixelclip.tracking.server import experiment_id
from pixelclip.workflow.stage import describe

pixelclip = command_line.pixelclip
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")  # as in test_register


@pytest.fixture
def runs(monkeypatch, tmp_path, cache) -> Path:
    """Folder of workspaces beside an empty MLflow database, in the current folder; KFP is not configured."""
    for name in ("KFP_ENDPOINT", "KF_PIPELINES_ENDPOINT", "MLFLOW_BACKEND_STORE_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    tiny.mlflow_at(monkeypatch, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def client(runs) -> MlflowClient:
    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def all_ids(client: MlflowClient) -> set[str]:
    return {run.info.run_id for run in client.search_runs([experiment_id(client)], run_view_type=ViewType.ALL)}


def files_of(client: MlflowClient, run_id: str) -> Path:
    return Path(client.get_run(run_id).info.artifact_uri.removeprefix("file://"))


def test_registered_version_keeps_its_run_files_and_data(runs, client, pixelclip):
    clip = tiny.clip_folder(runs.parent / "clip")
    masks = output(runs / "data" / "masks", "masks")
    run_id = registered(runs / "named", clip, 1, {"masks": describe(masks)})
    end_earlier(runs / "mlflow.db", run_id, OLD)
    sibling = mlflow_run(client, "FINISHED", OLD, **{"kfp.run_id": client.get_run(run_id).data.tags["kfp.run_id"]})
    parent = mlflow_run(client, "FINISHED", OLD)
    client.set_tag(run_id, "mlflow.parentRunId", parent)
    gone = mlflow_run(client, "FINISHED", OLD, model=True)
    files = files_of(client, gone)
    (best,) = client.search_logged_models([experiment_id(client)], "name = 'best'")
    output(runs / "unnamed" / "shards")
    for path in runs.glob("*/"):
        age(path, OLD)
    before = tree(runs)
    assert pixelclip("gc", "--older-than", "30d")[0] == 0
    assert {name: md5 for name, md5 in tree(runs).items() if name != "mlflow.db"} == {
        name: md5 for name, md5 in before.items() if name != "mlflow.db"
    }
    code, out, err = pixelclip("gc", "--older-than", "30d", "--delete")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith("Deleted 2 (")
    assert all_ids(client) == {run_id, sibling, parent}
    assert not files.exists() and not Path(best.artifact_location.removeprefix("file://")).exists()
    assert [model.name for model in client.search_logged_models([experiment_id(client)])] == ["model"]
    kept = {path: md5 for path, md5 in before.items() if re.match("data|named", path)}
    assert tree(runs).items() >= kept.items() and not (runs / "unnamed").exists()
    assert Predictor.load(fetch("models:/demo@champion"), device="cpu")


def test_runs_go_by_state_and_age(runs, client, capsys):
    young = {mlflow_run(client, status, YOUNG) for status in ("FINISHED", "FAILED", "KILLED")}
    open_ = {mlflow_run(client, status, OLD) for status in ("RUNNING", "SCHEDULED")}
    for status in ("FINISHED", "FAILED", "KILLED"):
        mlflow_run(client, status, OLD)
    mlflow_run(client, "FINISHED", OLD, deleted=True)
    trash = mlflow_run(client, "FINISHED", YOUNG, deleted=True)
    assert run(Policy("30d"), delete=True) == 0
    assert all_ids(client) == {*young, *open_, trash}
    assert run(Policy(keep=1), delete=True) == 0
    left = {client.get_run(run_id).info.status for run_id in all_ids(client)}
    assert {"RUNNING", "SCHEDULED", "KILLED"} <= left  # a killed training can be continued
    assert len(all_ids(client)) == 4
    assert "running: its status is SCHEDULED" in " ".join(capsys.readouterr().out.split())


def test_data_of_a_running_training_stay(runs, client):
    output(runs / "old" / "masks")
    run_id = mlflow_run(client, "RUNNING", OLD)
    masks = {"path": str(runs / "old" / "masks"), "md5": "1", "num_files": 1, "size": 1}
    client.log_dict(run_id, {"stage": "train", "settings": {}, "inputs": {"masks": masks}}, "lineage.json")
    age(runs / "old", OLD)
    assert run(Policy("30d"), delete=True) == 0
    assert (runs / "old" / "masks").exists()
    client.set_terminated(run_id)
    assert run(Policy("30d"), delete=True) == 0
    assert not (runs / "old").exists()


def test_running_sweep_keeps_its_rows_and_its_folder(runs, client):
    sweep = runs / "sweep"
    parent = mlflow_run(client, "RUNNING", OLD, **{"sweep.out": str(sweep)})
    row = mlflow_run(client, "FINISHED", OLD, model=True, **{"mlflow.parentRunId": parent, "sweep.row": "a"})
    below = mlflow_run(client, "FINISHED", OLD, **{"mlflow.parentRunId": row})
    mlflow_run(client, "FINISHED", OLD)
    for folder in (sweep, runs / "other"):
        age(output(folder / "a" / "seed-1" / "model", "train").parents[2], OLD)
    assert run(Policy("30d"), delete=True) == 0
    assert all_ids(client) == {parent, row, below} and (files_of(client, row) / "notes").is_dir()
    assert (sweep / "a" / "seed-1" / "model").is_dir() and not (runs / "other" / "a" / "seed-1").exists()
    client.set_terminated(parent)
    assert run(Policy("30d"), delete=True) == 0
    assert all_ids(client) == {parent} and not (sweep / "a" / "seed-1").exists()


def test_deletion_that_fails_is_named_and_counted_and_others_go_on(runs, client, pixelclip):
    mlflow_run(client, "FINISHED", OLD)
    bad = mlflow_run(client, "FAILED", OLD)
    files_of(client, bad).joinpath("notes").rename(runs / "notes")
    files_of(client, bad).joinpath("notes").write_text("no folder")
    files_of(client, bad).rename(runs / "moved")
    files_of(client, bad).symlink_to(runs / "moved")  # cannot be removed as a folder
    code, out, _ = pixelclip("gc", "--older-than", "30d", "--delete", "--only", "mlflow")
    assert code == 1
    assert f"FAILED {bad[:8]}" in out
    assert "Deleted 1 (" in out and "failed to delete 1 (" in out
    assert all_ids(client) == {bad} and (runs / "moved").exists()
    files_of(client, bad).unlink()
    assert pixelclip("gc", "--older-than", "30d", "--delete", "--only", "mlflow")[0] == 0
    assert all_ids(client) == set()


def test_cache_needs_no_mlflow_and_goes_by_last_use(monkeypatch, tmp_path, cache, pixelclip):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    old, young = copy_in_cache("s3://data/old.pt", OLD), copy_in_cache("s3://data/young.pt", YOUNG)
    partial = copy_in_cache("s3://data/half.pt", YOUNG, "half.pt.partial")
    out = unfinished(cache / "0123456789abcdef" / "out" / "model")
    age(out, OLD)
    code, text, _ = pixelclip("gc", "--only", "cache", "--keep", "2", "--delete")
    assert code == 0 and "s3://data/old.pt" in text
    assert not old.exists() and young.exists() and partial.exists() and out.exists()
    assert pixelclip("gc", "--only", "cache", "--older-than", "3d", "--delete")[0] == 0
    assert [path for path in cache.rglob("*") if path.is_file() and path.name not in ("lock", "uri")] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "gc needs a policy: --older-than, --keep or --max-size"),
        (("--keep", "3", "--only", "runs"), "--only runs: must be one of workspaces, mlflow, kfp, cache"),
        (("--keep", "3", "nowhere"), "nowhere: no such folder of workspaces"),
        (("--keep", "3", "--pipeline-root", "s3://data/root"), "KFP's URL is missing"),
    ],
)
def test_mistake_is_one_message(runs, pixelclip, words, message):
    code, _, err = pixelclip("gc", *words)
    assert code == 2 and err.startswith(f"pixelclip: {message}")


def test_without_registry_nothing_is_deleted(runs, pixelclip, monkeypatch):
    age(output(runs / "old" / "shards").parent, OLD)
    (runs / "mlflow.db").unlink()
    code, _, err = pixelclip("gc", "--older-than", "30d", "--delete")
    assert code == 2 and "mlflow.db: no such MLflow database; gc must know the registered versions" in err
    assert not (runs / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, _, err = pixelclip("gc", "--older-than", "30d", "--delete")
    assert code == 2 and "cannot be reached" in err
    assert (runs / "old").exists()


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(width):
    items = [Item("runs/" + "x" * 70, 3 * 10**9, 0.0, lambda: None), Item("b", 12, 86400 * 39.0, lambda: None)]
    verdicts = [Verdict(items[0], True, "older than 30d"), Verdict(items[1], False, "data of models:/pixelclip/3 (champion)")]
    lines = table({"workspaces": verdicts}, Policy("30d", max_size="1KB"), 86400 * 40.0, width)
    assert all(len(line) <= width for line in lines)
    assert lines[0] == "workspaces: 1 (3 GB) go, 1 (12 B) stay"
    assert lines[1].split()[:5] == ["delete", "3", "GB", "40", "d"]
    text = "".join(line.replace(" ", "") for line in lines)
    assert "dataofmodels:/pixelclip/3(champion)" in text


@pytest.mark.services
def test_files_go_through_the_server_and_records_with_its_database(runs, monkeypatch):
    folder = runs.parent / "server"
    server = mlflow_on_sqlite(folder)
    with running(server.server):
        server.server.wait()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        client = MlflowClient(server.uri)
        stays, gone = mlflow_run(client, "FINISHED", YOUNG), mlflow_run(client, "FAILED", OLD)
        model = client.create_logged_model(experiment_id(client), name="best", source_run_id=gone)
        (runs / "best").mkdir()
        (runs / "best" / "weights").write_text("weights")
        client.log_model_artifacts(model.model_id, str(runs / "best"))
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        assert gone in str(tree(folder)) and model.model_id in str(tree(folder))
        assert run(Policy("30d"), stores=["mlflow"], delete=True) == 0
        assert gone not in str(tree(folder)) and model.model_id not in str(tree(folder))
        assert client.get_run(gone).info.lifecycle_stage == "deleted" and all_ids(client) == {stays, gone}
        monkeypatch.setenv("MLFLOW_BACKEND_STORE_URI", server.store)
        assert run(Policy("30d"), stores=["mlflow"], delete=True) == 0
        assert all_ids(client) == {stays}
        assert client.list_artifacts(stays, "notes")
