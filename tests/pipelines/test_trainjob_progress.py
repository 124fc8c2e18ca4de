"""Progress of a TrainJob: reports of the training, curves on the shared volume, and the state of the nodes."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job_status import TrainerV1alpha1TrainJobStatus
from kubernetes import client

from pixelclip_pipelines.trainjob_progress import nodes, training

NOW = datetime(2026, 11, 29, 12, 0, tzinfo=UTC)


def job(status: dict | None = None, count: int = 2) -> dict:
    """Return a TrainJob that was created an hour ago."""
    status = status or {}
    assert TrainerV1alpha1TrainJobStatus.from_dict(status) is not None  # which checks the fields
    created = (NOW - timedelta(hours=1)).isoformat()
    return {"metadata": {"creationTimestamp": created}, "spec": {"trainer": {"numNodes": count}}, "status": status}


def reported(minutes_ago: float = 0.0, **metrics: str) -> dict:
    time = (NOW - timedelta(minutes=minutes_ago)).strftime("%Y-%m-%dT%H:%M:%SZ")
    listed = [{"name": name, "value": value} for name, value in metrics.items()]
    return {
        "trainerStatus": {
            "progressPercentage": 12,
            "estimatedRemainingSeconds": 860,
            "metrics": listed,
            "lastUpdatedTime": time,
        }
    }


def test_report_of_the_training_is_shown(tmp_path):
    status = reported(step="120", steps="1000", loss="0.1234")
    shown = training(job(status), tmp_path / "train", 1000, NOW.timestamp())
    assert shown == (12, "step 120 of 1000 (12 %), loss 0.1234, 0:14:20 left")


def test_age_of_an_old_report_is_shown(tmp_path):
    status = reported(12, step="120", steps="1000")
    assert training(job(status), tmp_path / "train", 1000, NOW.timestamp())[1].endswith("0:14:20 left, reported 0:12:00 ago")


def write_curves(out, points: list[tuple[int, float, float]], ending: str = "", name: str = ".train.0123456789ab.partial"):
    """Write points: step, minutes before now, loss."""
    folder = out.with_name(name)
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"step": step, "time": int((NOW.timestamp() - 60 * minutes) * 1000), "metrics": {"train/loss": loss}})
        for step, minutes, loss in points
    ]
    (folder / "curves.jsonl").write_text("".join(f"{line}\n" for line in lines) + ending)


def test_curves_are_read_if_the_cluster_reports_nothing(tmp_path):
    out = tmp_path / "train"
    assert training(job(), out, 400, NOW.timestamp()) == (-1, "")
    write_curves(out, [(10, 90, 9.0), (100, 20, 0.5), (200, 10, 0.25)], ending='{"step": 21')
    # 100 steps took ten minutes, so the other 200 take twenty. The first point is older than the TrainJob.
    expected = (50, "step 200 of 400 (50 %), loss 0.2500, 0:20:00 left, reported 0:10:00 ago")
    assert training(job(), out, 400, NOW.timestamp()) == expected
    assert training(job(reported(unknown="1")), out, 400, NOW.timestamp()) == expected


def test_long_curves_are_read_from_their_end(tmp_path):
    out = tmp_path / "train"
    write_curves(out, [(step, 30 - step / 1000, 1 / step) for step in range(1, 5001)])
    percent, text = training(job(), out, 10_000, NOW.timestamp() - 60 * 25)
    assert (percent, text) == (50, "step 5000 of 10000 (50 %), loss 0.0002, 0:05:00 left")


def test_curves_of_an_earlier_job_are_not_shown(tmp_path):
    write_curves(tmp_path / "train", [(100, 80, 0.5), (200, 70, 0.25)])
    write_curves(tmp_path / "other", [(100, 1, 0.5)], name=".other.0123456789ab.partial")
    assert training(job(), tmp_path / "train", 400, NOW.timestamp()) == (-1, "")


def pod(number: int, phase: str, age: float = 1.0, **fields: object) -> client.V1Pod:
    """Return a pod as the client returns it: read from JSON."""
    states = fields.pop("container", None)
    status = {"phase": phase, **fields}
    if states:
        container = {"name": "node", "image": "r/p:1", "imageID": "", "ready": False, "restartCount": 0, "state": states}
        status["containerStatuses"] = [container]
    created = (NOW - timedelta(minutes=age)).isoformat()
    labels = {"batch.kubernetes.io/job-completion-index": str(number)}
    document = {"metadata": {"creationTimestamp": created, "labels": labels}, "status": status}
    response = type("Response", (), {"data": json.dumps(document)})
    return client.ApiClient().deserialize(response, "V1Pod")


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}


@pytest.mark.parametrize(
    ("pods", "text"),
    [
        ([pod(0, "Running"), pod(1, "Running")], "2 of 2 nodes up"),
        ([pod(0, "Succeeded"), pod(1, "Running")], "2 of 2 nodes up"),
        ([pod(0, "Running")], "1 of 2 nodes up (node 1: has no pod yet)"),
        ([], "0 of 2 nodes up (node 0: has no pod yet; node 1: has no pod yet)"),
        (
            [pod(0, "Running"), pod(1, "Pending", conditions=[UNSCHEDULABLE])],
            "1 of 2 nodes up (node 1: Unschedulable: 0/3 nodes are available)",
        ),
        (
            [pod(0, "Running"), pod(1, "Pending", container={"waiting": {"reason": "ImagePullBackOff", "message": "r/p:1"}})],
            "1 of 2 nodes up (node 1: ImagePullBackOff: r/p:1)",
        ),
        (
            [pod(0, "Pending", container={"waiting": {"reason": "ContainerCreating"}}), pod(1, "Running")],
            "1 of 2 nodes up (node 0: is starting)",
        ),
        (
            [pod(0, "Running"), pod(1, "Failed", container={"terminated": {"reason": "OOMKilled", "exitCode": 137}})],
            "1 of 2 nodes up (node 1: OOMKilled (exit code 137))",
        ),
        (
            [pod(0, "Running"), pod(1, "Failed", reason="Evicted", message="low on memory")],
            "1 of 2 nodes up (node 1: Evicted low on memory)",
        ),
        ([pod(0, "Running"), pod(1, "Running"), pod(1, "Failed", age=9)], "2 of 2 nodes up"),  # the later pod counts
    ],
)
def test_state_of_the_nodes(pods, text):
    assert nodes(job(), pods) == text


def test_many_nodes_without_a_pod_are_counted():
    assert nodes(job(count=8), [pod(0, "Running")]).endswith("node 3: has no pod yet; 4 more)")


def test_suspended_job_gives_its_reason():
    condition = {"type": "Suspended", "status": "True", "reason": "Suspended", "message": "TrainJob is suspended"}
    status = {"conditions": [condition | {"lastTransitionTime": NOW.isoformat()}]}
    assert nodes(job(status), []) == "suspended: TrainJob is suspended"
