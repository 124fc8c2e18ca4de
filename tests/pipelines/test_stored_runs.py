"""KFP's runs and artifacts for `gc`: KFP's answers about real runs, from a small server of its API, and objects in S3."""

import json
from pathlib import Path

import pytest

from helpers import kfp_server
from helpers.gc_store import OLD, YOUNG, kfp_id, kfp_run
from pixelclip.cleanup.named import Named
from pixelclip.cleanup.policy import Policy, decide
from pixelclip.storage.s3 import list_below
from pixelclip_pipelines.stored_runs import items
from pixelclip_pipelines.submit import Target

kfp = kfp_server.kfp
FOLDER = Path(__file__).parents[1] / "fixtures" / "kfp" / "runs"
ROOT = "s3://data/v2/artifacts"
FINISHED_AT_NEVER = "1970-01-01T00:00:00Z"


@pytest.fixture
def experiment(kfp) -> str:
    return str(kfp.add("experiments", {"display_name": "pixelclip"})["experiment_id"])


def add_recorded(kfp, experiment: str, name: str) -> str:
    answer = json.loads((FOLDER / f"{name}.json").read_text())
    created = answer["created_at"]
    kfp.add("runs", {**answer, "display_name": name, "experiment_id": experiment})["created_at"] = created
    return str(answer["run_id"])


def put(bucket, run_id: str, pipeline: str = "pixelclip", size: int = 3) -> str:
    bucket.put_object(Bucket="data", Key=f"v2/artifacts/{pipeline}/{run_id}/train/abc/model/weights", Body=b"x" * size)
    return f"{ROOT}/{pipeline}/{run_id}"


def listed(kfp, root: str = "", roots=(), named: Named | None = None):
    return items(Target(kfp.url), root, list(roots), named or Named())


def test_recorded_runs_go_only_in_a_final_state(kfp, experiment, bucket):
    states = {}
    for path in sorted(FOLDER.glob("*.json")):
        run_id = add_recorded(kfp, experiment, path.stem)
        states[run_id] = kfp.kept["runs"][run_id]["state"]
        put(bucket, run_id)
    found = listed(kfp, ROOT)
    assert len(found) == len(states) and {item.size for item in found} == {3}
    never = {item.name[:8]: item.kept for item in found if item.kept.startswith("running: ")}
    assert never == {
        run_id[:8]: f"running: its state is {state}"
        for run_id, state in states.items()
        if state in ("RUNNING", "CANCELING", "PENDING")
    }
    assert {item.resumable for item in found if states[run_of(states, item)] == "FAILED"} == {True}
    assert all(item.changed > 1.7e9 for item in found)


def run_of(ids, item) -> str:
    return next(run_id for run_id in ids if run_id.startswith(item.name[:8]))


def test_deletion_removes_the_record_and_then_the_artifacts(kfp, experiment, bucket):
    old = kfp_run(kfp, "old", "SUCCEEDED", OLD)
    young = kfp_run(kfp, "young", "SUCCEEDED", YOUNG)
    other = kfp.add("experiments", {"display_name": "others"})["experiment_id"]
    foreign = kfp_run(kfp, "foreign", "SUCCEEDED", OLD)
    kfp.kept["runs"][foreign]["experiment_id"] = other
    gone = [put(bucket, old), put(bucket, kfp_id("deleted"))]
    stay = [put(bucket, young), put(bucket, foreign), put(bucket, kfp_id("unknown"), "somebody-elses")]
    found = listed(kfp, f"minio://{ROOT.removeprefix('s3://')}/")
    assert [item.name for item in found if "deleted run" in item.name] == [
        f"{kfp_id('deleted')[:8]}  artifacts of a deleted run"
    ]
    assert len(found) == 3
    kfp.asked.clear()
    for item in found:
        if not item.name.endswith("young"):
            item.delete()
    assert f"DELETE /apis/v2beta1/runs/{old}" in kfp.asked and set(kfp.kept["runs"]) == {young, foreign}
    assert {one.uri.partition("/train")[0] for one in list_below(ROOT)} == set(stay) and gone
    for item in listed(kfp, ROOT):
        assert item.name.endswith("young")


def test_started_again_run_is_not_deleted(kfp, experiment, bucket):
    run_id = kfp_run(kfp, "old", "FAILED", OLD)
    place = put(bucket, run_id)
    (item,) = listed(kfp, ROOT)
    kfp.kept["runs"][run_id]["state"] = "RUNNING"
    with pytest.raises(ValueError, match="has been started again since it was listed: its state is RUNNING"):
        item.delete()
    assert list_below(place)


def test_active_runs_and_schedules_keep_workspaces_and_mlflow_runs(kfp, experiment, tmp_path):
    run_id = kfp_run(kfp, "now", "RUNNING", OLD, workspace="/workspace/now")
    parameters = {"workspace": "/workspace/nightly", "settings": "masks.weights=/weights/sam.pt", "data_images": "s3://data/a"}
    kfp.add(
        "recurringruns", {"display_name": "nightly", "experiment_id": experiment, "runtime_config": {"parameters": parameters}}
    )
    named = Named()
    assert listed(kfp, roots=[tmp_path], named=named) == []
    assert named.active_kfp[run_id] == f"used by the KFP run {run_id[:8]}, which is RUNNING"
    for folder in (Path("/workspace"), tmp_path):
        assert named.of_path(folder / "now") == named.active_kfp[run_id]
        assert named.of_path(folder / "nightly") == "used by the schedule nightly"
        assert named.of_path(folder / "other") == ""
    assert named.of_path(Path("/weights/sam.pt")) and named.places["s3://data/a"]


@pytest.mark.parametrize("name", ["others", ""])
def test_active_runs_and_schedules_of_another_experiment_keep_what_they_use(kfp, bucket, tmp_path, name):
    other = kfp.add("experiments", {"display_name": "mine"})["experiment_id"]
    if name:
        kfp.add("experiments", {"display_name": "pixelclip"})
    active, old = (kfp_run(kfp, state, state, OLD, workspace="/workspace/now") for state in ("RUNNING", "SUCCEEDED"))
    for number in range(4):  # more than one page
        parameters = {"workspace": f"/workspace/nightly{number}"}
        entry = {"display_name": f"nightly {number}", "experiment_id": other, "runtime_config": {"parameters": parameters}}
        kfp.add("recurringruns", entry)
    for run_id in (active, old):
        assert kfp.kept["runs"][run_id]["experiment_id"] == other
        put(bucket, run_id)
    named = Named()
    assert listed(kfp, ROOT, [tmp_path], named) == []
    assert set(named.active_kfp) == {active}
    assert named.of_path(tmp_path / "now") == named.active_kfp[active]
    assert named.of_path(Path("/workspace/nightly3")) == "used by the schedule nightly 3"


def test_artifacts_of_every_pipeline_go_once_their_run_is_deleted(kfp, experiment, bucket):
    for pipeline in ("pixelclip", "pixelclip-unlabelled", "pixelclip-predict", "pixelclip-sweep", "pixelclip-sweep-run"):
        put(bucket, kfp_id(pipeline), pipeline)
    assert len(listed(kfp, ROOT)) == 5


def test_versions_keep_their_run_and_the_evaluation_of_clip_in_another(kfp, experiment, bucket):
    runs = {name: kfp_run(kfp, name, "SUCCEEDED", OLD) for name in ("own", "clip", "other")}
    named = Named()
    named.add_tags({"kfp.run_id": runs["own"]}, "named by models:/demo/1")
    path = f"/minio/data/v2/artifacts/pixelclip/{runs['clip']}/evaluate-clip/1d3ef93b-7361-4cf1-a8ec-bd3354b8a69e/evaluation"
    named.add_place(path, "data of models:/demo/1")
    named.add_place(f"{put(bucket, runs['other'])}/train/abc/model", "named by models:/demo/2")
    kept = {item.name.partition("  ")[2]: item.kept for item in listed(kfp, ROOT, named=named)}
    assert kept == {"own": "named by models:/demo/1", "clip": "data of models:/demo/1", "other": "named by models:/demo/2"}


def test_nothing_goes_while_a_run_uses_cached_results(kfp, experiment, bucket):
    kfp_run(kfp, "old", "SUCCEEDED", OLD)
    run_id = add_recorded(kfp, experiment, "succeeded-cached")
    kfp.kept["runs"][run_id] |= {"state": "RUNNING", "finished_at": FINISHED_AT_NEVER}
    found = listed(kfp, ROOT)
    assert not [each for each in decide(found, Policy(keep=0), 4e9) if each.goes]
    assert {item.kept.partition(" ")[0] for item in found} == {"may", "running:"}


def test_place_that_is_no_object_store_is_an_error(kfp, experiment):
    with pytest.raises(ValueError, match="--pipeline-root runs: must be s3://bucket/folder or minio://bucket/folder"):
        listed(kfp, "runs")
