"""Lineage of a registered model, and its reproduction."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from PIL import Image

from helpers import fake_data, tiny
from helpers.s3_sources import put, sources
from helpers.training import SMALL
from pixelclip import evaluate, evaluate_clip, masks, register, shards, train
from pixelclip.cli.app import main
from pixelclip.commands import reproduce
from pixelclip.config import EvaluateConfig, MasksConfig, RegisterConfig, ShardsConfig, TrainConfig
from pixelclip.registry import lineage
from pixelclip.storage.files import digest, read_json, write_json
from pixelclip.workflow.stage import METRICS, PROVENANCE

NAME = "demo"
IMAGE = "registry.example/pixelclip@sha256:" + "0" * 64
RUNTIME = {"masks.workers": 0, "train.workers": 0, "train.device": "cpu", "train.picture_every": 0, "evaluate.device": "cpu"}
SOURCE = {"repo": "/there/repository", "git_sha": "a" * 40, "path": "photos", "md5": "b" * 32 + ".dir", "nfiles": 6, "size": 9}
# As in test_register.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A registered model with all stages before it; the provenance of the images names DVC as their source."""
    base = tmp_path_factory.mktemp("lineage")
    (base / "images").mkdir()
    for number in range(6):
        Image.fromarray(fake_data.pixels(40, 48, number)).save(base / "images" / f"{number}.png")
    fetched = {"stage": "fetch_data", "fingerprint": "f", "settings": {"path": "photos"}, "inputs": {}, "version": "0.1.0"}
    fetched |= {"revision": "abc", "source": SOURCE, "output": digest(base / "images")}
    write_json(base / "images" / PROVENANCE, fetched)
    clip = tiny.clip_folder(base / "clip")
    tiny.labelled_set(base / "labelled", images=4)
    with pytest.MonkeyPatch.context() as patch:
        client = tiny.mlflow_at(patch, base / "mlflow")
        patch.setenv("PIXELCLIP_IMAGE", IMAGE)
        patch.setenv("PIXELCLIP_REVISION", "r1")
        shards.run(base / "images", base / "shards", ShardsConfig())
        masks.run(base / "shards", base / "masks", MasksConfig(felzenszwalb_min_size=30, workers=0))
        config = TrainConfig(**{**SMALL, "clip": str(clip), "steps": 2, "picture_every": 0})
        train.run(base / "masks", base / "model", config)
        evaluate_config = EvaluateConfig(device="cpu", pictures=1)
        evaluate_clip.run(str(clip), base / "labelled", base / "clip_evaluation", evaluate_config, config.side, config.residual)
        evaluate.run(base / "model", base / "labelled", base / "evaluation", evaluate_config, base / "clip_evaluation")
        chosen = RegisterConfig(name=NAME, min_gain=-100)
        register.run(base / "model", base / "evaluation", base / "registration", chosen)
        yield SimpleNamespace(base=base, client=client, metrics=read_json(base / "evaluation" / METRICS))


@pytest.fixture
def made(whole, monkeypatch):
    """The same, in a process without the recorded image."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(whole.client.tracking_uri))
    monkeypatch.delenv("PIXELCLIP_IMAGE", raising=False)
    monkeypatch.setenv("PIXELCLIP_REVISION", "r1")
    return whole


def test_champion_is_traced_to_its_images(made, capsys):
    found = lineage.run(f"models:/{NAME}@champion", as_json=True)
    assert json.loads(capsys.readouterr().out) == found
    assert (found["model"]["version"], found["model"]["aliases"]) == (1, ["champion"])
    assert found["model"]["metrics"] == made.metrics
    assert found["model"]["md5"] == read_json(made.base / "model" / PROVENANCE)["output"]["md5"]
    assert found["run"]["id"] == read_json(made.base / "registration" / "registration.json")["run_id"]
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == ["evaluate_clip", "fetch_data", "shards", "masks", "train", "evaluate"]
    assert {stage["image"] for name, stage in stages.items() if name != "fetch_data"} == {IMAGE}
    assert {stage["revision"] for stage in stages.values()} == {"abc", "r1"}
    assert stages["masks"]["settings"]["felzenszwalb_min_size"] == 30
    data = {each["name"]: each for each in found["data"]}
    assert data["images"]["md5"] == digest(made.base / "images", sorted((made.base / "images").glob("*.png")))["md5"]
    assert data["images"]["source"] == SOURCE and data["labelled"]["source"] == {}
    assert data["clip"]["path"] == str(made.base / "clip")
    assert (data["clip"]["of"], data["labelled"]["of"]) == ("train", "evaluate")
    assert set(data) == {"images", "labelled", "clip"}


def test_table_shows_settings_that_differ_from_the_defaults(made, capsys):
    found = lineage.run(f"models:/{NAME}/1")
    output = capsys.readouterr().out
    words = [f"models:/{NAME}/1 (champion)", found["run"]["id"], IMAGE, "code r1", SOURCE["git_sha"], SOURCE["md5"]]
    for word in [*words, found["data"][0]["md5"], "felzenszwalb_min_size=30", "weights clip", "gain/labelled"]:
        assert word in output, word
    assert "jpeg_quality" not in output and "pictures=1" in output and "stride" not in output  # a default is not shown


def test_tags_and_datasets_have_the_source(made):
    version = made.client.get_model_version(NAME, "1")
    run = made.client.get_run(version.run_id)
    for tags in (version.tags, run.data.tags):
        assert (tags["code.image"], tags["code.revision"]) == (IMAGE, "r1")
        for key in ("md5", "git_sha", "repo"):
            assert tags[f"data.images.{key}"] == str(SOURCE[key])
    assert version.tags.items() >= {f"data.images.{key}": str(value) for key, value in SOURCE.items()}.items()
    named = {each.dataset.name: (each.dataset, each.tags[0].value) for each in run.inputs.dataset_inputs}
    assert set(named) == {"images", "labelled"}
    images, context = named["images"]
    assert (images.digest, images.source_type, json.loads(images.source), context) == (SOURCE["md5"], "dvc", SOURCE, "training")
    labelled, context = named["labelled"]
    assert (labelled.digest, labelled.source_type, context) == (digest(made.base / "labelled")["md5"], "local", "evaluation")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"models:/{NAME}@nobody", "has no alias 'nobody'; its aliases: champion"),
        (f"models:/{NAME}/7", "not found"),
        ("models:/dmo@champion", "no such registered model .*did you mean 'demo'"),
        ("runs:/1", "expected models:/NAME@ALIAS or models:/NAME/VERSION"),
    ],
)
def test_unknown_model_is_named(made, uri, message):
    with pytest.raises(ValueError, match=message):
        lineage.run(uri)


def test_version_not_registered_by_pixelclip_is_an_error(made):
    made.client.create_registered_model("other")
    made.client.create_model_version("other", source="/nowhere")
    with pytest.raises(ValueError, match="has no tag 'evaluation'; `pixelclip register`"):
        lineage.run("models:/other/1")


def history(made) -> tuple[dict[str, float], dict[str, str], int]:
    """Metrics and tags of the recorded run, and the number of points of one metric."""
    run = made.client.get_run(made.client.get_model_version(NAME, "1").run_id)
    return run.data.metrics, run.data.tags, len(made.client.get_metric_history(run.info.run_id, "eval/labelled/gain"))


def test_reproduced_evaluation_leaves_the_recorded_run_unchanged(made, tmp_path, capsys, monkeypatch):
    before = history(made)
    monkeypatch.setenv("MLFLOW_RUN_ID", "theirs")
    assert reproduce.run(f"models:/{NAME}@champion", tmp_path / "out") is True
    assert os.environ["MLFLOW_RUN_ID"] == "theirs"
    output = capsys.readouterr().out
    assert "equal within 0.01 points" in output and "<--" not in output
    assert "WARNING: evaluate, evaluate_clip: run with different code: image registry.example" in output
    assert read_json(tmp_path / "out" / "reproduction.json")["found"] == made.metrics
    assert history(made) == before
    found = made.client.search_runs([made.client.get_experiment_by_name("pixelclip").experiment_id])
    (own,) = [run for run in found if run.data.tags.get("reproduces") == f"models:/{NAME}/1" and run.data.metrics]
    assert (own.info.status, own.data.tags["reproduction"]) == ("FINISHED", "equal")
    assert own.data.metrics["eval/labelled/gain"] == made.metrics["gain/labelled"]


def test_training_is_reproduced_from_the_images(made, tmp_path, capsys):
    recorded = {"stage": "evaluate", "fingerprint": "of the recorded model"}
    write_json(tmp_path / "out" / "evaluation" / PROVENANCE, recorded)
    moved = {name: made.base / f"{name}.away" for name in ("shards", "masks")}
    for name, away in moved.items():
        (made.base / name).rename(away)
    try:
        assert reproduce.run(f"models:/{NAME}/1", tmp_path / "out", train=True, runtime=RUNTIME) is True
    finally:
        for name, away in moved.items():
            away.rename(made.base / name)
    output = capsys.readouterr().out
    assert "WARNING: evaluate, train, masks, shards, evaluate_clip: run with different code: image" in output
    for stage in ("shards", "masks", "train"):
        assert f"reproduce: {stage}: the same files as recorded" in output
    assert (tmp_path / "out" / "train" / "model.safetensors").read_bytes() == (
        made.base / "model" / "model.safetensors"
    ).read_bytes()


def test_training_on_an_s3_prefix_is_reproduced_from_there(bucket, tmp_path, capsys, monkeypatch):
    """As published: multipart tars, whose ETags are not MD5s, and other files under the prefix."""
    client = tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    put(bucket, sources(tmp_path / "here"), "sa1b")
    bucket.put_object(Bucket="data", Key="sa1b/README.md", Body=b"no shard")
    content = {"Bucket": "data", "Key": "sa1b/0.tar"}
    upload = content | {"UploadId": bucket.create_multipart_upload(**content)["UploadId"]}
    etag = bucket.upload_part(**upload, PartNumber=1, Body=(tmp_path / "here" / "0.tar").read_bytes())["ETag"]
    bucket.complete_multipart_upload(**upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": etag}]})
    config = TrainConfig(**{**SMALL, "clip": str(tiny.clip_folder(tmp_path / "clip")), "steps": 2, "picture_every": 0})
    train.run("s3://data/sa1b", tmp_path / "model", config)
    labelled = tiny.labelled_set(tmp_path / "labelled")
    evaluate.run(tmp_path / "model", labelled, tmp_path / "evaluation", EvaluateConfig(device="cpu", pictures=1))
    chosen = RegisterConfig(name=NAME, min_gain=-100)
    register.run(tmp_path / "model", tmp_path / "evaluation", tmp_path / "registration", chosen)
    assert client.get_model_version(NAME, "1").tags["data.masks.path"] == "s3://data/sa1b"
    assert reproduce.run(f"models:/{NAME}/1", tmp_path / "out", train=True, runtime=RUNTIME) is True
    assert "reproduce: train: the same files as recorded" in capsys.readouterr().out
    bucket.put_object(Bucket="data", Key="sa1b/2.tar", Body=(tmp_path / "here" / "1.tar").read_bytes())
    with pytest.raises(ValueError, match=r"masks: s3://data/sa1b with md5 \w+ now has md5 \w+"):
        reproduce.run(f"models:/{NAME}/1", tmp_path / "again", train=True, runtime=RUNTIME)


def test_different_metrics_are_listed_with_their_difference(made, tmp_path, capsys, monkeypatch):
    registered = lineage.recorded(f"models:/{NAME}/1")
    changed = {**registered.metrics, "miou/labelled": registered.metrics["miou/labelled"] - 0.5}
    monkeypatch.setattr(
        reproduce,
        "recorded",
        lambda uri: lineage.Registered(registered.version, registered.aliases, changed, registered.provenance),
    )
    assert reproduce.run(f"models:/{NAME}/1", tmp_path / "out") is False
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if line.endswith("<--")]
    assert line.startswith("miou/labelled") and " 0.5 " in line
    assert "DIFFERENT within 0.01 points" in output
    assert reproduce.run(f"models:/{NAME}/1", tmp_path / "out", tolerance=0.6) is True


@pytest.mark.parametrize("method", ["set_tag", "set_terminated"])
def test_comparison_is_written_even_if_mlflow_fails(made, tmp_path, capsys, monkeypatch, method):
    def unavailable(*_, **__):
        raise MlflowException("API request failed with error code 503 != 200")

    monkeypatch.setattr(MlflowClient, method, unavailable)
    monkeypatch.setattr("pixelclip.tracking.run._CLOSE_SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"^demo: rejected by MLflow at sqlite:.* 503 != 200$"):
        reproduce.run(f"models:/{NAME}/1", tmp_path / "out")
    assert read_json(tmp_path / "out" / "reproduction.json")["equal"] is True
    assert "equal within 0.01 points" in capsys.readouterr().out


def test_changed_or_missing_data_are_an_error(made, tmp_path):
    labels = made.base / "labelled"
    shutil.copytree(labels, tmp_path / "kept")
    try:
        (labels / "classes.txt").write_text("dog\ngrass\nsee\n")
        with pytest.raises(ValueError, match=r"labelled: .* now has md5 \w+, and DVC does not track it"):
            reproduce.run(f"models:/{NAME}/1", tmp_path / "out")
        shutil.rmtree(labels)
        with pytest.raises(ValueError, match=r"labelled: .* no longer exists, and DVC does not track it"):
            reproduce.run(f"models:/{NAME}/1", tmp_path / "out")
    finally:
        shutil.rmtree(labels, ignore_errors=True)
        shutil.copytree(tmp_path / "kept", labels)
    found = made.client.search_runs([made.client.get_experiment_by_name("pixelclip").experiment_id], "status = 'FAILED'")
    assert {run.data.tags["reproduces"] for run in found} == {f"models:/{NAME}/1"}


def test_missing_clip_is_named(made, tmp_path):
    away = made.base / "clip.away"
    (made.base / "clip").rename(away)
    try:
        with pytest.raises(ValueError, match=r"clip: .*clip with md5 \w+ no longer exists, and DVC does not track it"):
            reproduce.run(f"models:/{NAME}/1", tmp_path / "out")
    finally:
        away.rename(made.base / "clip")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.steps", "train.steps changes the result of stage train"),
        ("device", "STAGE.SETTING"),
        ("train.stepz", "unknown setting"),
    ],
)
def test_only_runtime_settings_can_be_changed(made, tmp_path, key, message):
    with pytest.raises(ValueError, match=message):
        reproduce.run(f"models:/{NAME}/1", tmp_path / "out", runtime={key: 1})


@pytest.mark.parametrize(
    ("recorded", "found", "equal"),
    [
        ({"miou/a": 40.0}, {"miou/a": 40.009}, True),
        ({"miou/a": 40.0}, {"miou/a": 40.02}, False),
        ({"image_recall_clip/a": 0.5}, {"image_recall_clip/a": 0.50009}, True),
        ({"image_recall_clip/a": 0.5}, {"image_recall_clip/a": 0.5002}, False),
        ({"miou/a": 40.0}, {}, False),
        ({}, {"miou/a": 40.0}, False),
        ({"miou/a": 40.0}, {"miou/a": float("nan")}, False),
    ],
)
def test_metrics_are_equal_within_the_tolerance(recorded, found, equal):
    assert reproduce.compare(recorded, found, 0.01)[0] is equal


def test_exit_codes_of_the_commands(made, monkeypatch, capsys):
    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["pixelclip", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0

    made.client.create_registered_model("second")
    made.client.create_model_version("second", source="/nowhere", tags={"miou": "1", "gain": "-1", "measured_on": "x"})
    assert call("promote", "second", "1") == 1
    assert "is not promoted: gain -1.00 over CLIP is below" in capsys.readouterr().out
    assert call("promote", "second", "1", "--force", "to see it") == 0
    assert call("promote", "second") == call("promote", "second", "1", "--rollback") == 2
    assert "give either VERSION or --rollback" in capsys.readouterr().err
    assert call("promote", "second", "--rollback") == 2
    assert "no previous champion to roll back to" in capsys.readouterr().err
    assert call("lineage", f"models:/{NAME}@champion", "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"]["version"] == 1
    monkeypatch.setattr(reproduce, "run", lambda *_, **__: False)
    assert call("reproduce", f"models:/{NAME}@champion", "--out", "unused") == 1
