"""Submit and schedule: kfp.Client against a small server of KFP's v2beta1 API."""

import json
import socket
from pathlib import Path

import pytest

from helpers import kfp_server
from helpers.command_line import pixelclip  # noqa: F401
from pixelclip_pipelines.submit import ENDPOINTS, TOKEN

kfp, run = kfp_server.kfp, kfp_server.run
DATA = ("--images", "/data/images", "--labelled", "/data/toy")


def test_submit_uploads_once_and_starts_runs_with_every_parameter(kfp, run):
    code, out, err = run("submit", *DATA, "--name", "first", "steps=7", "train.prompt_tokens=3")
    assert (code, err) == (0, "")
    (created,) = kfp.all("runs")
    assert f"{kfp.url}/#/runs/details/{created['run_id']}" in out
    (pipeline,), (version,), (experiment,) = (kfp.all(kind) for kind in ("pipelines", "versions", "experiments"))
    assert created["display_name"] == "first" and created["experiment_id"] == experiment["experiment_id"]
    assert (pipeline["display_name"], experiment["display_name"]) == ("pixelclip", "pixelclip")
    reference = {"pipeline_id": pipeline["pipeline_id"], "pipeline_version_id": version["pipeline_version_id"]}
    assert created["pipeline_version_reference"] == reference
    spec, platform = version["pipeline_spec"]["documents"]
    assert set(created["runtime_config"]["parameters"]) == set(spec["root"]["inputDefinitions"]["parameters"])
    assert created["runtime_config"]["parameters"]["train_steps"] == 7
    assert created["runtime_config"]["parameters"]["settings"] == "train.prompt_tokens=3"
    # KFP shows it under "Show Summary" of the pipeline and of the version.
    assert pipeline["description"] == version["description"] == spec["pipelineInfo"]["description"]
    assert "| `train_steps` | `10000` | Optimizer steps. |" in version["description"].splitlines()
    assert "exec-train" in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    code, out, _ = run("submit", *DATA)
    assert code == 0 and "already exists" in out
    assert [len(kfp.all(kind)) for kind in ("pipelines", "versions", "experiments", "runs")] == [1, 1, 1, 2]


def test_changed_pipeline_is_a_new_version_and_a_known_one_is_reused(kfp, run):
    kfp.page_size = 1
    images = [f"r/pixelclip:{number}" for number in range(2)]
    for image in [*images, images[0]]:
        assert run("submit", *DATA, "--image", image)[0] == 0
    assert len(kfp.all("versions")) == 2 and len(kfp.all("pipelines")) == 1
    used = [created["pipeline_version_reference"]["pipeline_version_id"] for created in kfp.all("runs")]
    assert used[-1] == used[0] and len(set(used)) == 2
    for image, version in zip(images, kfp.all("versions"), strict=True):
        executors = version["pipeline_spec"]["documents"][0]["deploymentSpec"]["executors"]
        assert {executor["container"]["image"] for executor in executors.values()} == {image}


def test_run_without_a_labelled_set_is_a_pipeline_of_its_own(kfp, run):
    assert run("submit", "--images", "/data/images")[0] == 0 and run("submit", *DATA)[0] == 0
    assert [pipeline["display_name"] for pipeline in kfp.all("pipelines")] == ["pixelclip-unlabelled", "pixelclip"]
    for created, version in zip(kfp.all("runs"), kfp.all("versions"), strict=True):
        spec, _ = version["pipeline_spec"]["documents"]
        assert set(created["runtime_config"]["parameters"]) == set(spec["root"]["inputDefinitions"]["parameters"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*DATA, "step=5"), "unknown pipeline parameter 'step', did you mean 'steps'?"),
        ((*DATA, "train.stepz=5"), "did you mean 'steps'?"),
        ((*DATA, "steps=0"), "greater than or equal to 1"),
        ((*DATA, "masks.part=1/2"), "the pipeline computes all parts"),
        ((*DATA, "repo=x"), "see --help"),
        ((*DATA, "--revision", "main"), "revision 'main' without --repo"),
        (("--images", "", "--labelled", "x"), "images must name a folder"),
        ((*DATA, "--image", "pixelclip"), "must end with a tag"),
        ((*DATA, "--nodes", "2"), "volume.claim"),
        ((*DATA, "--cluster", "no.yaml"), "no.yaml: cannot be read"),
        ((*DATA, "--settings-file", "params.yaml"), "settings file 'params.yaml' without --repo"),
    ],
)
def test_errors_are_reported_before_anything_is_sent(kfp, run, words, message):
    code, out, err = run("submit", *words)
    assert code == 2 and message in err and out == ""
    assert kfp.asked == []


def test_batch_must_have_an_image_for_every_gpu(kfp, run):
    Path("cluster.yaml").write_text("steps: {train: {gpus: 8}}")
    code, _, err = run("submit", *DATA, "batch_size=15", "train.accumulate=2")
    assert code == 2 and "train.batch_size 15 is too small for 8 processes with train.accumulate 2" in err and kfp.asked == []
    assert run("submit", *DATA, "batch_size=15", "train.accumulate=2", "train.device=cpu")[0] == 0


def test_several_nodes_need_a_workspace(kfp, run):
    Path("cluster.yaml").write_text("volume: {claim: shared}")
    code, _, err = run("submit", *DATA, "--nodes", "2")
    assert code == 2 and "--workspace" in err and kfp.asked == []
    assert run("submit", *DATA, "--nodes", "2", "--workspace", "/workspace/a")[0] == 0
    assert "exec-train-job" in kfp.all("versions")[0]["pipeline_spec"]["documents"][0]["deploymentSpec"]["executors"]


@pytest.mark.parametrize("volume", ["{}", "{claim: shared, mount: /mnt/other}"])
def test_workspace_off_the_shared_volume_is_rejected(kfp, run, volume):
    Path("cluster.yaml").write_text(f"volume: {volume}")
    code, _, err = run("submit", *DATA, "--workspace", "/workspace/a")
    assert code == 2 and "--workspace /workspace/a: must be a folder on the volume" in err and kfp.asked == []


def test_cluster_settings_reach_run_and_experiment(kfp, run, monkeypatch):
    text = f"{{endpoint: {kfp.url}, experiment: nightly, service_account: trainer}}"
    Path("mine.yaml").write_text(text)
    assert run("submit", *DATA, "--cluster", "mine.yaml")[0] == 0
    assert kfp.all("experiments")[0]["display_name"] == "nightly"
    assert kfp.all("runs")[0]["service_account"] == "trainer"


def test_pipeline_is_reused_within_its_namespace(kfp, run):
    for namespace in ("team-a", "team-b", "", "team-a"):
        Path("cluster.yaml").write_text(f"namespace: '{namespace}'")
        code, _, err = run("submit", *DATA)
        assert (code, err) == (0, "")
    assert [created.get("namespace", "") for created in kfp.all("pipelines")] == ["team-a", "team-b", ""]
    used = [created["pipeline_version_reference"]["pipeline_id"] for created in kfp.all("runs")]
    assert used[0] == used[-1] and len(set(used)) == 3 and len(kfp.all("versions")) == 3


def test_endpoint_order(kfp, pixelclip, monkeypatch):  # noqa: F811
    words = ("pipeline", "schedule", "list")
    code, _, err = pixelclip(*words)
    assert code == 2 and all(name in err for name in ("--endpoint", *ENDPOINTS, "cluster.yaml"))
    code, _, err = pixelclip(*words, "--endpoint", "kfp.example")
    assert code == 2 and "http:// or https://" in err
    Path("cluster.yaml").write_text(f"endpoint: {kfp.url}")
    assert pixelclip(*words) == (0, "no schedules\n", "")
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", "http://127.0.0.1:9")
    assert pixelclip(*words)[0] == 2
    monkeypatch.setenv("KFP_ENDPOINT", f"{kfp.url}/")
    assert pixelclip(*words)[0] == 0


def test_server_errors_are_one_line(kfp, run, pixelclip, monkeypatch):  # noqa: F811
    kfp.token = "right"
    code, _, err = run("status", "x")
    assert code == 2 and "rejected the request (401" in err and TOKEN in err and err.count("\n") == 1
    monkeypatch.setenv(TOKEN, "right")
    code, _, err = run("status", "x")
    assert code == 2 and "rejected the request (404" in err and "runs x not found" in err
    kfp.token = ""
    kfp.gone = True
    code, _, err = run("status", "x")
    assert code == 2 and "cannot be reached" in err
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    code, _, err = pixelclip("pipeline", "submit", *DATA, "--endpoint", endpoint)
    assert code == 2 and f"{endpoint} cannot be reached" in err and err.count("\n") == 1


def test_schedules_are_created_listed_and_deleted(kfp, run):
    assert run("schedule", "list") == (0, "no schedules\n", "")
    assert run("schedule", "create", "weekly", *DATA, "--cron", "0 3 * * 1", "seed=4")[0] == 0
    assert run("schedule", "create", "often", *DATA, "--every", "6h")[0] == 0
    weekly, often = kfp.all("recurringruns")
    assert weekly["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * 1"}}
    assert often["trigger"] == {"periodic_schedule": {"interval_second": 21600}}
    assert weekly["runtime_config"]["parameters"]["train_seed"] == 4
    assert (weekly["mode"], weekly["no_catchup"], int(weekly["max_concurrency"])) == ("ENABLE", True, 1)
    assert len(kfp.all("versions")) == 1
    kfp.page_size = 1
    code, out, _ = run("schedule", "list")
    assert code == 0 and [line.split()[-1] for line in out.splitlines()] == ["weekly", "often"]
    assert "cron 0 0 3 * * 1" in out and "every 21600 s" in out

    code, _, err = run("schedule", "create", "often", *DATA, "--every", "1d")
    assert code == 2 and "a schedule named 'often' already exists" in err and len(kfp.all("recurringruns")) == 2
    assert run("schedule", "delete", weekly["recurring_run_id"])[0] == 0
    assert [created["display_name"] for created in kfp.all("recurringruns")] == ["often"]
    code, _, err = run("schedule", "delete", weekly["recurring_run_id"])
    assert code == 2 and "not found" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give exactly one of --cron and --every"),
        (("--cron", "0 3 * * 1", "--every", "1d"), "give exactly one of --cron and --every"),
        (("--cron", "0 3 * *"), "MINUTE HOUR DAY"),
        (("--cron", "0 3 * * ;"), "MINUTE HOUR DAY"),
        (("--every", "soon"), "for example 6h"),
        (("--every", "6h", "stepz=1"), "did you mean 'steps'?"),
    ],
)
def test_invalid_schedule_is_rejected_before_anything_is_sent(kfp, run, words, message):
    code, _, err = run("schedule", "create", "s", *DATA, *words)
    assert code == 2 and message in err and kfp.asked == []


@pytest.mark.parametrize("login", ["bot:very-secret@", "very-secret@"])
@pytest.mark.parametrize("words", [("submit",), ("schedule", "create", "s", "--every", "6h")])
def test_credentials_in_repository_url_are_rejected(kfp, run, words, login):
    code, out, err = run(*words, *DATA, "--repo", f"https://{login}git.example/data.git")
    assert code == 2 and "--repo https://git.example/data.git contains credentials" in err and "docs/cluster.md" in err
    assert "very-secret" not in out + err and kfp.asked == []


def test_repository_url_without_credentials_is_sent(kfp, run):
    for repo in ("ssh://git@git.example/data.git", "git@git.example:data.git", "https://git.example/a@b.git"):
        assert run("submit", *DATA, "--repo", repo)[0] == 0
        assert kfp.all("runs")[-1]["runtime_config"]["parameters"]["data_repo"] == repo


def test_no_secret_is_sent(kfp, run, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "even-more")
    Path("cluster.yaml").write_text("secrets: [{name: s3, env: {AWS_SECRET_ACCESS_KEY: secret}}]")
    assert run("submit", *DATA)[0] == 0
    sent = json.dumps(kfp.kept)
    assert "very-secret" not in sent and "even-more" not in sent and "AWS_SECRET_ACCESS_KEY" in sent
