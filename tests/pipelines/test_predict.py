"""The pipeline `pixelclip-predict`: compiled, submitted, and run on this machine like `pixelclip predict`."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kfp import local
from kfp.components import load_component_from_file

from helpers import fake_data, kfp_server, tiny
from helpers.command_line import pixelclip  # noqa: F401
from helpers.kfp_steps import accept_supervisor
from pixelclip import api
from pixelclip_components.fetch_model.component import fetch_model
from pixelclip_components.merge.component import merge
from pixelclip_components.predict.component import predict
from pixelclip_pipelines.artifacts import PACKED, located, place, place_in
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.cluster_sections import Volume
from pixelclip_pipelines.predict import arguments, build
from pixelclip_pipelines.run import write_yaml

kfp, run = kfp_server.kfp, kfp_server.run
CLASSES = "dog|puppy,grass,sky"
REQUIRED = ("--images", "s3://data/photos", "--classes", CLASSES)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    (folder / "cluster.yaml").write_text("{parts: 3, parallel: 2, volume: {claim: shared}, image: 'r/pixelclip:1'}")
    write_yaml(folder / "predict.yaml", build, folder / "cluster.yaml")
    return folder / "predict.yaml"


def test_parts_share_one_model_and_are_merged(compiled):
    assert load_component_from_file(str(compiled)).component_spec.name == "pixelclip-predict"
    spec, platform = yaml.safe_load_all(compiled.read_text())
    tasks = spec["root"]["dag"]["tasks"]
    loop = next(name for name in tasks if name.startswith("for-loop"))
    assert {name: set(task.get("dependentTasks", [])) for name, task in tasks.items()} == {
        "fetch-model": set(),
        "fetch-data": set(),
        loop: {"fetch-model", "fetch-data"},
        "merge": {loop},
    }
    assert json.loads(tasks[loop]["parameterIterator"]["items"]["raw"]) == ["1/3", "2/3", "3/3"]
    assert tasks[loop]["iteratorPolicy"]["parallelismLimit"] == 2
    resources = spec["deploymentSpec"]["executors"]["exec-predict"]["container"]["resources"]
    assert resources["accelerator"]["resourceCount"] == "1"
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert all(pod["pvcMount"][0]["mountPath"] == "/workspace" for pod in pods.values()) and "exec-merge" in pods
    assert all("PIXELCLIP_PIPELINE_RUN" in [each["name"] for each in pod["fieldPathAsEnv"]] for pod in pods.values())


def test_parameters_are_described(compiled):
    spec = next(yaml.safe_load_all(compiled.read_text()))
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert {name for name, each in parameters.items() if "defaultValue" not in each} == {"images", "classes"}
    assert all(len(each["description"]) > 20 for each in parameters.values())
    assert parameters["model"]["defaultValue"] == "models:/pixelclip@champion"


def test_submit_sends_checked_parameters(kfp, run, tmp_path):
    (tmp_path / "classes.txt").write_text("dog, puppy\ntraffic light\n")
    words = ("--images", "s3://data/photos", "--classes", str(tmp_path / "classes.txt"), "--out", "s3://data/labels")
    code, out, err = run("submit-predict", *words, "--quality", "best", "--no-overlays")
    assert (code, err) == (0, "") and "runs/details" in out
    (created,), (version,) = kfp.all("runs"), kfp.all("versions")
    sent = created["runtime_config"]["parameters"]
    assert sent["classes"] == "dog|puppy,traffic light"  # pods do not have the file
    assert (sent["quality"], sent["overlays"], sent["out"]) == ("best", False, "s3://data/labels")
    assert set(sent) == set(version["pipeline_spec"]["documents"][0]["root"]["inputDefinitions"]["parameters"])


def test_schedule_of_a_prediction_needs_a_place_for_each_run(kfp, run):
    code, _, err = run("submit-predict", *REQUIRED, "--out", "s3://data/labels/", "--every", "1d", "--name", "nightly")
    assert code == 2 and "needs its own place, such as s3://data/labels/{run}" in err and kfp.all("recurringruns") == []
    words = ("--out", "s3://data/labels/{run}", "--name", "nightly", "--repo", "https://git.example/data.git")
    assert run("submit-predict", *REQUIRED, *words, "--cron", "0 3 * * *")[0] == 0
    (created,) = kfp.all("recurringruns")
    assert (created["display_name"], created["trigger"]) == ("nightly", {"cron_schedule": {"cron": "0 0 3 * * *"}})
    sent = created["runtime_config"]["parameters"]
    assert (sent["out"], sent["repo"], sent["revision"]) == ("s3://data/labels/{run}", "https://git.example/data.git", "")
    assert kfp.all("runs") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*REQUIRED, "--every", "1d"), "--name: a schedule needs a name"),
        ((*REQUIRED, "--name", "x", "--every", "1d", "--cron", "0 3 * * *"), "give exactly one of --cron and --every"),
        ((*REQUIRED, "--revision", "v1"), "--revision v1 needs --repo"),
        ((*REQUIRED, "--repo", "https://a:secret@git.example/d"), "--repo https://git.example/d contains credentials"),
        (("--images", "", "--classes", CLASSES), "images must name a folder"),
        (("--images", "a", "--classes", "dog,,sky"), "blank class name at position 2"),
        (("--images", "a", "--classes", "no.txt"), "no.txt: cannot read class names"),
        ((*REQUIRED, "--out", "/labels"), "out /labels: must be s3://bucket/folder"),
        ((*REQUIRED, "--model", "https://a:secret@store.example/m"), "--model https://store.example/m contains credentials"),
        ((*REQUIRED, "--workspace", "/labels"), "must be a folder on the volume that steps share"),
        ((*REQUIRED, "--quality", "worst"), "'worst' is not one of"),
        ((*REQUIRED, "--image", "pixelclip"), "must end with a tag"),
    ],
)
def test_errors_are_reported_before_anything_is_sent(kfp, run, words, message):
    code, out, err = run("submit-predict", *words)
    assert code == 2 and message in err and out == ""
    assert kfp.asked == []


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("model")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"), change=0.2)


def test_first_step_checks_and_copies_the_model(model, tmp_path):
    artifact = SimpleNamespace(path=str(tmp_path / "model"), metadata={})
    with pytest.raises(ValueError, match="out /labels: must be s3://"):
        fetch_model.python_func(str(model), CLASSES, artifact, out="/labels")
    with pytest.raises(ValueError, match="must be a folder on the volume"):
        fetch_model.python_func(str(model), CLASSES, artifact, workspace="/labels", volume="/workspace")
    assert not (tmp_path / "model").exists()
    fetch_model.python_func(str(model), CLASSES, artifact)
    expected = json.loads((model / "provenance.json").read_text())["output"]["md5"]
    assert artifact.metadata == {"name": str(model), "md5": expected}
    copied = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert copied == {path.name: path.read_bytes() for path in model.iterdir()}
    assert located(artifact) == tmp_path / "model"


def test_places_of_a_run_contain_its_id(tmp_path, monkeypatch):
    artifact = SimpleNamespace(path=str(tmp_path / "artifact"), metadata={})
    monkeypatch.delenv("PIXELCLIP_PIPELINE_RUN", raising=False)
    with pytest.raises(ValueError, match=r"\{run\} is the ID of a pipeline run, but PIXELCLIP_PIPELINE_RUN is not set"):
        place_in("s3://data/{run}/labels", artifact, "", "predictions")
    monkeypatch.setenv("PIXELCLIP_PIPELINE_RUN", "run-1")
    assert place_in("s3://data/{run}/labels", artifact, "", "predictions") == "s3://data/run-1/labels"
    assert artifact.metadata["location"] == "s3://data/run-1/labels"
    assert place(artifact, str(tmp_path / "{run}"), "predict") == tmp_path / "run-1" / "predict"
    assert artifact.metadata["location"] == str(tmp_path / "run-1" / "predict")


def content(folder: Path) -> dict[str, bytes]:
    """Read all files of an output, except its provenance, which has times and paths."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "provenance.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:.*(custom or non-Python base image|have no effect)")
def test_parts_on_this_machine_equal_one_prediction(model, tmp_path, monkeypatch):
    accept_supervisor(monkeypatch)
    files = {f"a/{n}.jpg": fake_data.encoded(fake_data.pixels(24 + n % 3, 32, n)) for n in range(12)} | {"b.jpg": b"no image"}
    photos = fake_data.write_files(tmp_path / "photos", files)
    space = tmp_path / "space"
    settings = {"quality": "fast", "overlays": True, "label_studio": True, "max_bad_share": 0.3}
    given = arguments(str(photos), CLASSES, str(model), workspace=str(space), **settings)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"), raise_on_error=True)
    volume = Volume(claim="shared", mount=str(tmp_path))
    build(Cluster(parts=3, volume=volume, steps={"predict": {"gpus": 0}}))(**given)
    assert {path.name for path in (space / "predict").iterdir()} == {"1-of-3", "2-of-3", "3-of-3"}
    api.predict(photos, CLASSES.split(","), model, tmp_path / "whole", **settings)
    merged = content(space / "predictions")
    assert merged == content(tmp_path / "whole") and len(merged) == 12 + 12 + 5


def test_merged_predictions_are_written_to_a_bucket(model, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    monkeypatch.setattr("pixelclip_pipelines.artifacts._MANY", 1)
    files = {f"{n}.jpg": fake_data.encoded(fake_data.pixels(24, 32, n)) for n in range(3)}
    for name, data in files.items():
        bucket.put_object(Bucket="data", Key=f"photos/{name}", Body=data)
    artifacts = {name: SimpleNamespace(path=str(tmp_path / name), metadata={}) for name in ("parts-1", "parts-2", "all")}
    images = SimpleNamespace(path=str(tmp_path / "images"), metadata={"location": "s3://data/photos"})
    source = SimpleNamespace(path=str(model), metadata={})
    for number in (1, 2):
        predict.python_func(images, source, artifacts[f"parts-{number}"], CLASSES, "fast", True, False, 0.0, f"{number}/2")
        assert (tmp_path / f"parts-{number}" / PACKED).is_dir() and not (tmp_path / f"parts-{number}" / "labels").exists()
    merge.python_func([artifacts["parts-1"], artifacts["parts-2"]], artifacts["all"], "s3://data/labels")
    assert artifacts["all"].metadata == {"location": "s3://data/labels", "images": 3.0, "bad_images": 0.0}
    keys = {entry["Key"] for entry in bucket.list_objects_v2(Bucket="data", Prefix="labels/")["Contents"]}
    api.predict("s3://data/photos", CLASSES.split(","), model, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    assert keys - {"labels/provenance.json"} == {f"labels/{name}" for name in whole}
    assert all(bucket.get_object(Bucket="data", Key=f"labels/{name}")["Body"].read() == data for name, data in whole.items())
