"""Helpers of the component bodies."""

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from kfp import dsl
from safetensors.torch import load_file

from helpers import fake_data, tiny, training
from pixelclip import train
from pixelclip.config import MasksConfig, TrainConfig
from pixelclip.data.shard_sources import describe_shards, list_shards
from pixelclip.evaluate import CONFUSION
from pixelclip.evaluation.confusion import OTHERS, ConfusionMatrix
from pixelclip.masks import run as make_masks
from pixelclip.storage.files import write_json
from pixelclip.workflow.code_version import code_image
from pixelclip_components.evaluate_clip.component import evaluate_clip
from pixelclip_components.masks.component import masks as masks_component
from pixelclip_components.shards.component import shards as shards_component
from pixelclip_pipelines.artifacts import located, pack, place
from pixelclip_pipelines.cluster_config import Cluster, Step, pod_environment
from pixelclip_pipelines.steps import (
    fetched,
    gathered,
    links,
    pinned,
    pinned_clip,
    processes,
    show_confusion,
    train_by,
)

clip, shards = training.clip, training.shards
ROOT = Path(__file__).parents[2]


def artifact(path: Path, **metadata: str) -> dsl.Dataset:
    return dsl.Dataset(name="data", uri=str(path), metadata=metadata)


# Data.


@pytest.mark.parametrize("remote", [False, True])
def test_without_a_repository_the_output_is_a_pointer(tmp_path, request, remote):
    path = str(tmp_path / "images")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"x")
    if remote:
        request.getfixturevalue("bucket").put_object(Bucket="data", Key="images/a.jpg", Body=b"x")
        path = "s3://data/images"
    output = artifact(tmp_path / "step" / "data")
    version = fetched(output, "", path, "unpinned-1", {}, str(tmp_path / "space"))
    assert version.startswith("unpinned-")
    again = fetched(artifact(tmp_path / "other" / "data"), "", path, "unpinned-1", {}, str(tmp_path / "space"))
    assert again != version, "data without a version may have changed"
    passed_on = artifact(tmp_path / "step" / "data", **output.metadata)
    assert str(located(passed_on)) == path
    assert isinstance(located(passed_on), str if path.startswith("s3") else Path)
    # KFP uploads the file at the artifact's path and rejects URIs outside the run's bucket.
    assert output.uri == str(tmp_path / "step" / "data") and (tmp_path / "step" / "data").read_text() == f"{path}\n"
    assert not (tmp_path / "space").exists()


def test_empty_or_missing_data_fail_in_the_first_step(tmp_path, bucket):
    bucket.put_object(Bucket="data", Key="photos/a.jpg", Body=b"x")
    bucket.put_object(Bucket="data", Key="shards.txt", Body=b"a.tar")
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards.txt").write_text("a.tar")
    for path in ("s3://data/photos", "s3://data/photos/", "s3://data", "s3://data/shards.txt", str(tmp_path / "shards.txt")):
        fetched(artifact(tmp_path / "step" / "data"), "", path, "", {}, "")
    for path, message in [
        ("s3://data/photo", "s3://data/photo: there is no such key"),
        ("s3://none/photos", "s3://none/photos: there is no such bucket"),
        (str(tmp_path / "empty"), "empty: the folder is empty"),
        (str(tmp_path / "none"), "none: no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            fetched(artifact(tmp_path / "step" / "data"), "", path, "", {}, "")
    bucket.delete_object(Bucket="data", Key="photos/a.jpg")
    bucket.delete_object(Bucket="data", Key="shards.txt")
    with pytest.raises(ValueError, match="s3://data: no object below this prefix"):
        fetched(artifact(tmp_path / "step" / "data"), "", "s3://data", "", {}, "")


def test_artifact_without_location_is_located_at_its_path(tmp_path):
    assert located(artifact(tmp_path)) == tmp_path


def test_component_writes_to_artifact_or_workspace(tmp_path: Path) -> None:
    def output() -> SimpleNamespace:
        return SimpleNamespace(path=str(tmp_path / "kfp" / "masks"), uri="s3://bucket/masks", metadata={})

    alone, shared = output(), output()
    assert place(alone, "", "masks") == tmp_path / "kfp" / "masks" and alone.metadata == {}
    assert not (tmp_path / "kfp").exists()
    assert place(shared, str(tmp_path), "masks") == tmp_path / "masks"
    # KFP's launcher fails if the URI is a path, so the URI does not change and KFP uploads a pointer.
    assert shared.uri == "s3://bucket/masks" and shared.metadata == {"location": str(tmp_path / "masks")}
    assert (tmp_path / "kfp" / "masks").read_text() == f"{tmp_path / 'masks'}\n"


def test_unwritable_workspace_is_rejected_with_one_line(tmp_path: Path) -> None:
    output = SimpleNamespace(path=str(tmp_path / "kfp" / "masks"), uri="s3://bucket/masks", metadata={})
    (tmp_path / "file").write_text("")
    for workspace in (tmp_path / "file" / "space", Path("/proc/space")):
        with pytest.raises(
            ValueError, match=rf"^workspace {workspace}: user \d+ cannot write there \(.+\); see docs/cluster.md"
        ):
            place(output, str(workspace), "masks")
    assert output.metadata == {}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A DVC repository with two commits on a branch, a third that changes another file, and tags."""
    folder = tmp_path_factory.mktemp("repository")

    def git(*words: str) -> None:
        tiny.git(folder, *words)

    git("init", "-b", "main")
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    (folder / "a").write_text("1")
    git("add", "-A")
    git("commit", "-m", "one")
    git("tag", "v1")
    (folder / "a").write_text("2")
    git("commit", "-am", "two")
    (folder / "b").write_text("another file")
    git("add", "-A")
    git("commit", "-m", "three")
    git("tag", "more")
    git("reset", "--hard", "HEAD~1")
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_revision_is_resolved_to_its_commit(repository):
    def sha(name: str) -> str:
        found = subprocess.run(["git", "rev-parse", name], cwd=repository, check=True, capture_output=True, text=True)
        return found.stdout.strip()

    for name in ("main", "v1"):
        assert pinned(str(repository), name, "") == (sha(name), sha(name))
    assert pinned(str(repository), "", "")[0] == sha("main") != sha("v1")
    assert pinned(str(repository), sha("v1")[:10], "")[0] == sha("v1")
    full = "0123456789" * 4
    assert pinned("nowhere", full, "") == (full, full), "a full SHA needs no repository"
    first, second = (pinned("", "", "") for _ in range(2))
    assert first[0] == second[0] == "", "there is no commit"
    assert first[1].startswith("unpinned-") and first[1] != second[1], "unversioned data are fetched again by every run"
    with pytest.raises(ValueError, match="there is no revision 'nope'"):
        pinned(str(repository), "nope", "")
    with pytest.raises(ValueError, match="nothing: not a readable git repository"):
        pinned(str(repository / "nothing"), "main", "")
    with pytest.raises(ValueError, match=r"data\.git: not a readable git repository") as refused:
        pinned("https://user:very-secret@127.0.0.1:9/data.git", "main", "")
    assert "very-secret" not in str(refused.value)


def test_first_step_rejects_an_unwritable_workspace(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write there"):
        pinned("", "", str(tmp_path / "file" / "space"))


def test_fetch_into_a_workspace_gets_a_unique_cache_key(tmp_path):
    full = "0123456789" * 4
    (commit, first), (_, second) = (pinned("nowhere", full, str(tmp_path)) for _ in range(2))
    assert commit == full and first.startswith("unpinned-") and first != second


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_version_of_fetched_data_depends_on_their_content(repository, tmp_path):
    def versions(workspace: str) -> list[str]:
        found = []
        for name in ("v1", "main", "more"):
            output = artifact(tmp_path / f"{name}{len(workspace)}" / "data")
            space = workspace and f"{workspace}/{name}"
            version = fetched(output, str(repository), "a", pinned(str(repository), name, "")[0], {}, space)
            assert output.metadata["files"] == 1
            found.append(version)
        return found

    one, two, three = versions("")
    assert one.startswith("a md5 ") and one != two
    assert two == three, "another commit with the same data has the same version"
    assert versions(str(tmp_path / "space")) == [one, two, three]
    default = fetched(artifact(tmp_path / "default" / "data"), str(repository), "a", "", {}, "")
    assert default == two, "without a revision the default branch is read"


# Cache key of the CLIP evaluation.


def test_clip_version_depends_on_weights_and_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELCLIP_REVISION", "r1")
    folder = tiny.clip_folder(tmp_path / "clip")
    known = pinned_clip(str(folder), {}, "")
    assert known == pinned_clip(str(folder), {}, "")
    tiny.clip_folder(folder, seed=1)
    changed = pinned_clip(str(folder), {}, "")
    assert changed != known and changed[0].startswith(f"{folder} md5 ")
    (tmp_path / "w.pt").write_bytes(b"1")
    file = pinned_clip(f"ViT-B-16:{tmp_path}/w.pt", {}, "")[0]
    (tmp_path / "w.pt").write_bytes(b"2")
    assert pinned_clip(f"ViT-B-16:{tmp_path}/w.pt", {}, "")[0] != file
    assert pinned_clip("ViT-B-16:openai", {}, "")[0].startswith("ViT-B-16:openai code ")
    assert pinned_clip("ViT-B-16:openai", {}, "") != pinned_clip("ViT-B-16-quickgelu:openai", {}, "")
    # The evaluated CLIP and the code determine the version.
    assert pinned_clip("ViT-B-16:openai", {"evaluate.clip": str(folder)}, "")[0] == changed[0]
    monkeypatch.setenv("PIXELCLIP_REVISION", "r2")
    assert pinned_clip(str(folder), {}, "")[0] != changed[0]


@pytest.mark.parametrize("revision", ["r1+changes", "unknown"])
def test_uncommitted_code_gets_a_unique_cache_key(monkeypatch, revision):
    monkeypatch.setenv("PIXELCLIP_REVISION", revision)
    first, second = (pinned_clip("toy", {}, "")[0] for _ in range(2))
    assert first != second and f"{revision} unpinned-" in first


def test_other_training_settings_do_not_repeat_the_clip_evaluation(monkeypatch):
    monkeypatch.setenv("PIXELCLIP_REVISION", "r1")
    of_clip = {"evaluate.templates": "single", "train.side": 96.0, "train.residual": "patch", "evaluate.pictures": 3.0}
    others = {"train.teacher_momentum": 0.9, "masks.seed": 3.0, "shards.images_per_shard": 5.0}
    assert pinned_clip("toy", {**others, **of_clip}, "") == pinned_clip("toy", of_clip, "")
    assert pinned_clip("toy", of_clip, "")[1] == of_clip


@pytest.mark.parametrize(
    ("settings", "workspace"), [({}, "/mnt/space"), ({"evaluate.masks": "given", "evaluate.masks_folder": "/masks"}, "")]
)
def test_workspace_and_given_masks_get_a_unique_cache_key(settings, workspace):
    first, second = (pinned_clip("toy", settings, workspace)[0] for _ in range(2))
    assert first != second


def test_evaluate_clip_component_passes_its_inputs(tmp_path):
    labelled, output = tiny.labelled_set(tmp_path / "labelled"), artifact(tmp_path / "step" / "evaluation")
    settings = {"train.side": 48.0, "train.residual": "patch", "evaluate.templates": "single", "evaluate.device": "cpu"}
    spec = str(tiny.clip_folder(tmp_path / "clip"))
    evaluate_clip.python_func(artifact(labelled), output, spec, "c1", "d1", settings)
    metrics = json.loads((tmp_path / "step" / "evaluation" / "metrics.json").read_text())
    assert {name: output.metadata[name] for name in metrics} == metrics
    assert (output.metadata["clip_version"], output.metadata["data_version"]) == ("c1", "d1")
    recorded = json.loads((tmp_path / "step" / "evaluation" / "provenance.json").read_text())["settings"]
    assert {key: recorded[key] for key in ("clip", "side", "residual", "templates", "name")} == {
        **{"clip": spec, "side": 48, "residual": "patch", "templates": "single", "name": "labelled"}
    }
    assert located(output) == tmp_path / "step" / "evaluation"


# Artifacts of many files.


def many_files() -> dict[str, bytes]:
    files = {f"images/{number % 3}/{number}.jpg": bytes([number % 251]) * number for number in range(250)}
    return files | {"classes.txt": b"a,b", ".hidden/.gitignore": b"/x", "metrics.json": b"{}"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def packed(tmp_path, monkeypatch) -> dsl.Dataset:
    """A packed folder of many files, as KFP's launcher copies it to the next pod."""
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    monkeypatch.setattr("pixelclip_pipelines.artifacts._TAR_SIZE", 10_000)
    output = artifact(fake_data.write_files(tmp_path / "step", many_files()))
    pack(output)
    return output


def test_folder_of_many_files_travels_in_few_tars(tmp_path, packed):
    names = sorted(content(Path(packed.path)))
    assert names == [".packed/000000.tar", ".packed/000001.tar", ".packed/000002.tar", ".packed/000003.tar", "metrics.json"]
    copied = artifact(tmp_path / "pod" / "data")
    shutil.copytree(packed.path, copied.path)
    for _ in range(2):  # the second call finds the files
        assert located(copied) == Path(copied.path)
        assert content(Path(copied.path)) == many_files()


def test_interrupted_packing_and_unpacking_continue(tmp_path, monkeypatch):
    monkeypatch.setenv("KFP_POD_NAME", "pod")
    monkeypatch.setattr("pixelclip_pipelines.artifacts._TAR_SIZE", 10_000)
    output = artifact(fake_data.write_files(tmp_path / "step", many_files()))
    for method, number in (("replace", 1), ("unlink", 70)):
        effects, real = iter([None] * number + [KeyboardInterrupt]), getattr(Path, method)

        def fail(*words, effects=effects, real=real):
            if effect := next(effects):
                raise effect
            return real(*words)

        with monkeypatch.context() as patch:
            patch.setattr(Path, method, fail)
            with pytest.raises(KeyboardInterrupt):
                pack(output)
        assert (tmp_path / "step" / "metrics.json").is_file(), "the stage recognises its result"
    pack(output)
    assert len(content(tmp_path / "step")) < 8
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            located(output)
    located(output)
    assert content(tmp_path / "step") == many_files()


@pytest.mark.parametrize("case", ["few", "pointer", "local"])
def test_folder_stays_as_it_is(tmp_path, monkeypatch, case):
    files = dict(list(many_files().items())[: 20 if case == "few" else None])
    output = artifact(fake_data.write_files(tmp_path / "step", files))
    if case != "local":  # on one machine several steps read the same folder
        monkeypatch.setenv("KFP_POD_NAME", "pod")
    if case == "pointer":
        output.metadata["location"] = "/workspace/data"
    pack(output)
    assert content(tmp_path / "step") == files


def test_shards_of_packed_images_equal_those_of_the_fetched_folder(tmp_path, monkeypatch):
    images = {f"a/{number}.png": fake_data.encoded(fake_data.pixels(8, 8, number)) for number in range(120)}
    tiny.dvc_repository(tmp_path / "repo", str(tmp_path / "remote"), {"data/images": images}, {})
    made = {}
    for where in ("local", "pod"):
        monkeypatch.setenv("KFP_POD_NAME", where if where == "pod" else "")
        data, output = artifact(tmp_path / where / "data"), artifact(tmp_path / where / "shards")
        version = fetched(data, str(tmp_path / "repo"), "data/images", "v1", {}, "")
        made[where] = len(content(Path(data.path))), version, data.metadata
        shards_component.python_func(data, output, {})
    assert (made["local"][0], made["pod"][0]) == (122, 3) and made["local"][1:] == made["pod"][1:]
    tars = [(tmp_path / where / "shards" / "000000.tar").read_bytes() for where in made]
    assert tars[0] == tars[1]
    inputs = [json.loads((tmp_path / where / "shards" / "provenance.json").read_text())["inputs"] for where in made]
    assert inputs[0]["images"]["md5"] == inputs[1]["images"]["md5"] and "provenance" in inputs[1]["images"]


# Parts of masks.


def test_parts_of_masks_are_gathered_as_one_folder(tmp_path):
    halves = np.zeros((2, 40, 48), bool)
    halves[0, :, :24] = halves[1, :, 24:] = True
    for number in range(5):
        key = f"{number}"
        members = {
            f"{key}.jpg": fake_data.encoded(fake_data.pixels(40, 48, number)),
            f"{key}.json": fake_data.annotation(halves),
        }
        fake_data.write_tar(tmp_path / "shards" / f"{number}.tar", members)
    outputs = []
    for number in (1, 2, 3):
        output = SimpleNamespace(path=str(tmp_path / f"step-{number}" / "masks"), uri="", metadata={})
        source = artifact(tmp_path / "shards")
        masks_component.python_func(source, output, "given", {"masks.workers": 0.0}, part=f"{number}/3")
        outputs.append(artifact(Path(output.path)))
    with gathered(None, outputs) as folder:
        names = sorted(path.name for path in list_shards(folder))
        described = describe_shards(folder)
    assert names == [f"{number}.tar" for number in range(5)]
    assert described["num_files"] == 5 and described["provenance"]["stage"] == "masks"
    assert not folder.exists() and all(Path(each.path).is_dir() for each in outputs), (
        "links are removed, their targets are kept"
    )
    elsewhere = [artifact(tmp_path / "kfp" / each.name, location=each.path) for each in outputs]
    with gathered(None, elsewhere) as folder:
        assert sorted(path.name for path in list_shards(folder)) == names, "in a workspace artifacts are pointers"
    with gathered(None, outputs[:2]) as folder, pytest.raises(ValueError, match="but not 3/3"):
        list_shards(folder)


def test_masks_of_one_step_are_used_directly(tmp_path):
    with gathered(artifact(tmp_path), None) as folder:
        assert folder == tmp_path


def test_parts_share_a_workspace(tmp_path, shards):
    def run(part: str, space: Path) -> str:
        output = artifact(tmp_path / f"step-{space.name}" / "masks")
        settings = {"masks.workers": 0.0, "masks.max_bad_share": 1.0}
        masks_component.python_func(artifact(shards), output, "given", settings, part=part, workspace=str(space))
        return str(located(output))

    assert run("1/1", tmp_path / "a") == str(tmp_path / "a" / "masks" / "1-of-1")
    assert run("", tmp_path / "b") == str(tmp_path / "b" / "masks")
    make_masks(shards, tmp_path / "alone", MasksConfig(generator="given", workers=0, max_bad_share=1))
    assert describe_shards(tmp_path / "b" / "masks")["md5"] == describe_shards(tmp_path / "alone")["md5"]


# Several processes.


def test_step_starts_one_process_per_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [processes(device) for device in ("auto", "cuda", "cpu", "cuda:1")] == [4, 4, 1, 1]
    for name, value in pod_environment(Cluster(), Step(gpus=5), "r/p:1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="CUDA finds 4 of the 5 GPUs"):
        processes("auto")
    assert code_image() == "r/p:1"
    monkeypatch.delenv("PIXELCLIP_GPUS")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert processes("auto") == 1


@pytest.mark.slow
def test_two_processes_train_the_same_model_as_one(shards, clip, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    config = TrainConfig(**{**training.SETTINGS, "steps": 4}, clip=str(clip))
    alone = train_by(1, shards, tmp_path / "alone", config)
    both = train_by(2, shards, tmp_path / "both", config)
    assert both == json.loads((tmp_path / "both" / "metrics.json").read_text())
    assert both["train/loss"] == pytest.approx(alone["train/loss"], abs=1e-5)
    made_by = [json.loads((tmp_path / name / "provenance.json").read_text())["fingerprint"] for name in ("alone", "both")]
    assert made_by[0] == made_by[1], "the processes get exactly the same settings"
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    assert all(torch.allclose(tensor, two[name], atol=2e-3, rtol=1e-3) for name, tensor in one.items())


# Pages of KFP.


def evaluation_of(folder: Path) -> Path:
    """Write the provenance of an evaluation of a model whose images come from a DVC repository."""

    def described(name: str, made_by: dict | None = None) -> dict:
        found = {"path": f"/data/{name}", "md5": name[0] * 32, "num_files": 1, "size": 1}
        return found | ({"provenance": made_by} if made_by else {})

    def stage(name: str, inputs: dict, **settings: str) -> dict:
        return {"stage": name, "settings": settings, "inputs": inputs, "version": "0.1.0", "revision": "abc"}

    fetched_images = stage("fetch_data", {}, path="data/images", revision="main") | {"source": {"git_sha": "c0ffee"}}
    masks = stage("masks", {"shards": described("shards", stage("shards", {"images": described("images", fetched_images)}))})
    model = stage("train", {"masks": described("masks", masks), "clip": described("clip")})
    inputs = {"model": described("model", model), "labelled": described("toy"), "clip": described("clip")}
    output = {"md5": "o" * 32, "num_files": 1, "size": 1}
    write_json(folder / "provenance.json", stage("evaluate", inputs) | {"output": output})
    return folder


@pytest.mark.parametrize("uri", ["http://mlflow.example:5000/", "sqlite:///mlflow.db"])
def test_page_links_run_version_and_data(tmp_path, uri):
    registered = {"name": "m", "version": 7, "role": "champion", "reason": "better", "model_uri": "models:/m/7"}
    registered |= {"run_id": "r1", "experiment_id": "4", "tracking_uri": uri}
    write_json(tmp_path / "registered" / "registration.json", registered)
    text = links(tmp_path / "registered", evaluation_of(tmp_path / "evaluation"))
    addresses = re.findall(r"\]\(([^)]*)\)", text)
    base = "http://mlflow.example:5000/#"
    pages = [f"{base}/{page}?workflowType=machine_learning" for page in ("experiments/4/runs/r1", "models/m/versions/7")]
    assert addresses == (pages if uri.startswith("http") else [])
    rows = {
        row[0]: row[1:] for row in (re.findall(r"(?<=\| )[^|]+(?= \|)", line) for line in text.splitlines()) if len(row) == 4
    }
    assert rows["images"] == [f"`{'i' * 32}`", "c0ffee", "/data/images"]
    assert rows["labelled"] == [f"`{'t' * 32}`", "–", "/data/toy"]
    assert set(rows) == {"data", "images", "labelled", "clip"}


def test_links_use_the_pages_address_instead_of_the_one_inside_the_cluster(tmp_path, monkeypatch):
    monkeypatch.setenv("PIXELCLIP_MLFLOW_UI", "https://mlflow.example/team/")
    registered = {"name": "m", "version": 7, "role": "champion", "reason": "better", "model_uri": "models:/m/7"}
    server = "http://bot:secret@mlflow.mlflow.svc:5000"
    write_json(tmp_path / "registered" / "registration.json", {**registered, "run_id": "r1", "tracking_uri": server})
    text = links(tmp_path / "registered", evaluation_of(tmp_path / "evaluation"))
    base = "https://mlflow.example/team/#"
    pages = [f"{base}/{page}?workflowType=machine_learning" for page in ("runs/r1", "models/m/versions/7")]
    assert re.findall(r"\]\(([^)]*)\)", text) == pages  # a registration of 0.1.0 has no experiment
    assert "svc:5000" not in text and "secret" not in text
    monkeypatch.delenv("PIXELCLIP_MLFLOW_UI")
    assert "secret" not in links(tmp_path / "registered", evaluation_of(tmp_path / "evaluation"))


def test_confusion_of_the_most_frequent_classes():
    counts = np.array([[5, 1, 0, 0, 2], [0, 30, 4, 0, 0], [0, 0, 0, 0, 0], [3, 0, 0, 9, 0]])  # last column: no class predicted
    confusion = ConfusionMatrix(counts)
    names = ["cat", "sky", "ghost", "sea"]
    assert confusion.largest(names, 2) == {
        "classes": ["sky", "sea", OTHERS],
        "counts": [[30, 0, 4], [0, 9, 3], [1, 0, 7]],
    }
    assert confusion.largest(names, 10) == {
        "classes": ["sky", "sea", "cat", OTHERS],
        "counts": [[30, 0, 0, 4], [0, 9, 3, 0], [1, 0, 5, 2], [0, 0, 0, 0]],
    }
    small = ConfusionMatrix(np.array([[2, 1, 0], [0, 3, 0]]))
    assert small.largest(["a", "b"], 10) == {"classes": ["a", "b"], "counts": [[2, 1], [0, 3]]}


def test_confusion_is_logged_to_kfp(tmp_path):
    write_json(tmp_path / CONFUSION, {"classes": ["a", "b"], "counts": [[2, 1], [0, 3]]})
    shown = dsl.ClassificationMetrics(name="confusion", uri=str(tmp_path / "step" / "confusion"))
    show_confusion(shown, tmp_path)
    matrix = shown.metadata["confusionMatrix"]
    assert [each["displayName"] for each in matrix["annotationSpecs"]] == ["a", "b"]
    assert [each["row"] for each in matrix["rows"]] == [[2, 1], [0, 3]]
    before = dsl.ClassificationMetrics(name="confusion", uri=str(tmp_path / "before"))
    show_confusion(before, tmp_path / "nothing")
    assert before.metadata == {}


def test_one_process_calls_the_stage_directly(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(train, "run", lambda *given: seen.append(given) or {"train/loss": 1.0})
    config = TrainConfig()
    assert train_by(1, tmp_path, tmp_path / "out", config) == {"train/loss": 1.0}
    assert seen == [(tmp_path, tmp_path / "out", config)]


@pytest.mark.parametrize("step", ["pin_revision", "train_job", "finish"])
def test_readme_names_every_input_and_output(step):
    spec = getattr(import_module(f"pixelclip_components.{step}.component"), step).component_spec
    text = (ROOT / "components" / step / "README.md").read_text()
    for name in [*(spec.inputs or {}), *(spec.outputs or {})]:
        assert f"`{name}`" in text, name
