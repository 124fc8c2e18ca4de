"""The first step checks everything that KFP's form accepts, with the messages of `submit`."""

import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from helpers import tiny
from helpers.command_line import pixelclip  # noqa: F401
from helpers.json_server import JsonHandler, served
from pixelclip.models.clip_checks import check_clip
from pixelclip.settings import load_all
from pixelclip_components.pin_revision.component import pin_revision
from pixelclip_pipelines.parameters import arguments, as_text, flat, parse
from pixelclip_pipelines.run import compile_to


@pytest.fixture(scope="module")
def defaults(tmp_path_factory) -> dict[str, Any]:
    """The form as KFP fills it: the defaults in the compiled pipeline."""
    path = tmp_path_factory.mktemp("form") / "pipeline.yaml"
    compile_to(path)
    spec = next(yaml.safe_load_all(path.read_text()))
    return {name: each.get("defaultValue") for name, each in spec["root"]["inputDefinitions"]["parameters"].items()}


@pytest.fixture
def form(defaults, tmp_path):
    """Return a form with existing data and the CLIP of the package."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labelled").mkdir()
    data = {"data_images": str(tmp_path / "images"), "data_labelled": str(tmp_path / "labelled")}
    return lambda **typed: {**defaults, "train_clip": "toy", **data, "settings": "train.side=96", **typed}


def named(pins: tuple) -> dict[str, Any]:
    names = list(pin_revision.component_spec.outputs)
    assert len(names) == len(pins)
    return dict(zip(names, pins, strict=True))


WRONG = [
    ({"train_steps": -5}, ["steps=-5"], "steps: Input should be greater than or equal to 1 (found -5)"),
    ({"settings": "train.stepz=5"}, ["train.stepz=5"], "unknown setting 'stepz', did you mean 'steps'?"),
    ({"settings": "stepz=5"}, ["stepz=5"], "unknown pipeline parameter 'stepz', did you mean 'steps'?"),
    ({"settings": "register.min_gian=3"}, ["register.min_gian=3"], "unknown setting 'min_gian', did you mean 'min_gain'?"),
    ({"settings": "trian.crop=3"}, ["trian.crop=3"], "unknown stage 'trian' in setting 'trian.crop', did you mean 'train'?"),
    ({"settings": "train.crop=big"}, ["train.crop=big"], "crop: Input should be a valid integer"),
    ({"settings": "train.crop"}, ["train.crop"], "settings are written NAME=VALUE, found 'train.crop'"),
    (
        {"masks_generator": "sma"},
        ["generator=sma"],
        "generator: Input should be 'felzenszwalb', 'given', 'sam', 'dino', 'labels' or 'model'",
    ),
    ({"masks_generator": "sam"}, ["generator=sam"], "weights is required for generator sam or dino or model"),
    (
        {"settings": "train.shortest_edge=99 train.longest_edge=98"},
        ["train.shortest_edge=99", "train.longest_edge=98"],
        "larger",
    ),
    ({"settings": "masks.part=1/2"}, ["masks.part=1/2"], "the pipeline computes all parts"),
    ({"register_name": "a/b"}, ["registry_name=a/b"], "name: String should match pattern"),
    ({"data_revision": "main"}, ["--revision", "main"], "revision 'main' without --repo"),
    ({"data_repo": "https://x:secret@git.example/a"}, ["--repo", "https://x:secret@git.example/a"], "contains credentials"),
    ({"data_images": ""}, ["--images", ""], "images must name a folder"),
    ({"data_labelled": ""}, [], "labelled must name a folder"),  # such as an unset variable of a shell
]


@pytest.mark.parametrize(("typed", "words", "message"), WRONG, ids=[wrong[-1] for wrong in WRONG])
def test_first_step_reports_what_submit_reports(form, pixelclip, typed, words, message):  # noqa: F811
    filled = form(**typed)
    with pytest.raises(ValueError, match=r"^.+") as refused:
        pin_revision.python_func(**filled)
    text = str(refused.value)
    assert message in text and "\n" not in text and "very-secret" not in text
    data = [] if "--images" in words else ["--images", filled["data_images"]]
    given = ["clip=toy", *words] if filled["settings"] != "train.side=96" else ["clip=toy", "train.side=96", *words]
    code, _, err = pixelclip("pipeline", "submit", *data, "--labelled", filled["data_labelled"], *given)
    assert code == 2 and err.strip().removeprefix("pixelclip: ").replace("'-5'", "-5") == text  # a text as typed


def refused(filled: dict[str, Any]) -> list[str]:
    """Return the lines of the error of a form, one per fault."""
    with pytest.raises(ValueError, match=r"^.+") as error:
        pin_revision.python_func(**filled)
    return str(error.value).splitlines()


def test_run_without_a_labelled_set_is_checked_and_pinned(form, tmp_path):
    filled = form()
    with_set = named(pin_revision.python_func(**filled))
    (tmp_path / "labelled").rmdir()
    assert refused(filled) == [f"labelled: {tmp_path / 'labelled'}: no such folder"]
    del filled["data_labelled"]
    varying = ("fetch", "clip_version")
    without = named(pin_revision.python_func(**filled))
    assert {name: value for name, value in without.items() if name not in varying} == {
        name: value for name, value in with_set.items() if name not in varying
    }


def test_everything_out_of_reach_is_reported_at_once(form, tmp_path):
    missing = tmp_path / "nothing"
    settings = f"train.side=96 masks.weights={missing}/sam.pth train.dino={missing}/dino.pth train.concept_kind=names"
    settings += f" train.concept_names={missing}/names.txt evaluate.clip=ViT-B-17:openai"
    settings += f" evaluate.masks=given evaluate.protocol=masks evaluate.masks_folder={missing}"
    typed = {"data_images": str(missing), "masks_generator": "sam", "train_clip": f"ViT-B-16:{missing}.pt"}
    lines = refused(form(**typed, settings=settings))
    assert [line.partition(":")[0] for line in lines] == [
        *(
            "images",
            "masks.weights",
            "train.dino",
            "train.concept_names",
            "evaluate.masks_folder",
            "train.clip",
            "evaluate.clip",
        )
    ]
    assert lines[0] == f"images: {missing}: no such folder"
    assert lines[-1].endswith("no such folder or CLIP, did you mean 'ViT-B-16'?")
    assert "no such file or pretrained weights" in lines[-2]


def test_prefixes_and_weights_in_a_bucket(form, bucket):
    for key in ("photos/1.jpg", "sam.pth", "empty/"):
        bucket.put_object(Bucket="data", Key=key, Body=b"x")
    good = {
        "data_images": "s3://data/photos",
        "masks_generator": "sam",
        "settings": "masks.weights=s3://data/sam.pth train.side=96",
    }
    assert named(pin_revision.python_func(**form(**good)))["generator"] == "sam"
    for images in ("s3://data/photo", "s3://data/empty/", "s3://data/phot", "s3://nowhere/photos"):
        (line,) = refused(form(**good | {"data_images": images}))
        assert line.startswith(f"images: {images}: ")
    (line,) = refused(form(**good | {"settings": "masks.weights=s3://data/sam.pt train.side=96"}))
    assert line.startswith("masks.weights: s3://data/sam.pt: there is no such key in the bucket")


@contextmanager
def hub(files: set[str]):
    """Serve the headers of these files as a model hub does."""

    class Handler(JsonHandler):
        def do_HEAD(self) -> None:
            found = self.path.partition("/resolve/main/")[::2] if "/resolve/main/" in self.path else ("", "")
            self.send_response(200 if found[1] in files else 404)
            for name, value in {"ETag": '"1"', "X-Repo-Commit": "c" * 40, "Content-Length": "1"}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            self.answer(404, {})

    with served(Handler) as url:
        yield url


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path, cache):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    real = huggingface_hub.hf_hub_url
    for files, message in (({"open_clip_model.safetensors"}, ""), ({"open_clip_pytorch_model.bin"}, ""), (set(), "404")):
        with hub(files) as url:
            monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda repo, file, url=url: real(repo, file, endpoint=url))
            if not message:
                check_clip("ViT-B-16-quickgelu:openai")
                continue
            with pytest.raises(ValueError, match=message) as error:
                check_clip("ViT-B-16-quickgelu:openai")
            assert str(error.value).startswith(
                "CLIP 'ViT-B-16-quickgelu:openai': the weights (timm/vit_base_patch16_clip_224.openai) cannot be downloaded: "
            )
            with pytest.raises(ValueError, match="404"):
                check_clip(f"ViT-B-16:{url}/weights.pt")
    with pytest.raises(ValueError, match="cannot be downloaded"):
        check_clip("ViT-B-16-quickgelu:openai")  # the server is gone
    tiny.clip_config(tmp_path / "clip", tiny.CLIP_CONFIG)
    check_clip(str(tmp_path / "clip"))
    with pytest.raises(ValueError, match="no such file"):
        check_clip(str(tmp_path))


def test_sides_must_fit_the_patches_of_the_clip(form, tmp_path):
    assert refused(form(settings="train.side=97")) == [
        "train.side 97 is not a multiple of the patch size (12); nearest valid: 96, 108"
    ]
    assert "evaluate.side 150" in refused(form(settings="train.side=96 evaluate.side=150"))[0]
    pin_revision.python_func(**form(settings="train.side=96 evaluate.side=150 evaluate.protocol=slide"))


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"workspace": "/elsewhere/a", "volume": "/workspace"}, "--workspace /elsewhere/a: must be a folder on the volume"),
        ({"workspace": "/workspace/a", "volume": ""}, "volume in cluster.yaml: none"),
        ({"nodes": 2, "volume": "/workspace"}, "--nodes 2 needs --workspace"),
        ({"gpus": 8, "train_batch_size": 7}, "train.batch_size 7 is too small for 8 processes with train.accumulate 1"),
        (
            {"gpus": 8, "settings": "train.side=96 train.accumulate=7"},
            "48 is too small for 8 processes with train.accumulate 7",
        ),
    ],
)
def test_workspace_and_batch_must_fit_the_cluster(form, typed, message):
    (line,) = refused(form(**typed))
    assert message in line


def test_compiled_step_knows_the_cluster(tmp_path):
    (tmp_path / "cluster.yaml").write_text("volume: {claim: shared, mount: /mnt}\nsteps: {train: {gpus: 4}}")
    compile_to(tmp_path / "pipeline.yaml", tmp_path / "cluster.yaml", nodes=3)
    spec = next(yaml.safe_load_all((tmp_path / "pipeline.yaml").read_text()))
    given = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]["pin-revision"]["inputs"]["parameters"]
    known = {name: given[name]["runtimeValue"]["constant"] for name in ("volume", "nodes", "gpus")}
    assert known == {"volume": "/mnt", "nodes": 3, "gpus": 4}


# Settings as text.


def test_text_json_and_mapping_are_the_same_settings(form):
    text = "train.crop=80 evaluate.side=144 train.flip=false steps=7 train.side=96\nevaluate.name='a b'"
    old = {"train.crop": 80.0, "evaluate.side": 144, "train.flip": False, "steps": 7, "train.side": 96, "evaluate.name": "ab"}
    written = {"train.crop": 80, "evaluate.side": 144, "train.flip": False, "train.side": 96, "evaluate.name": "ab"}
    for settings in (text.replace("a b", "ab"), json.dumps(old), old, f"  {json.dumps(old)}\n"):
        pins = named(pin_revision.python_func(**form(settings=settings)))
        chosen = {"train.clip": "toy", "train.steps": 7, **written}
        assert pins["stage_settings"] == chosen and pins["steps"] == 7
        assert isinstance(pins["stage_settings"]["train.crop"], int)
    assert parse(text)["evaluate.name"] == "a b"


def test_settings_of_an_older_run_are_still_accepted(form):
    # As KFP 2.17 recorded them: numbers have lost their type.
    recorded = {"evaluate.name": "toy", "evaluate.side": 144, "masks.felzenszwalb_scale": 800, "train.color_jitter": False}
    recorded |= {"train.learning_rate_prompts": 1e-05, "train.side": 96, "train.teacher_momentum": 0.98, "train.workers": 0}
    pins = named(pin_revision.python_func(**form(settings=json.dumps(recorded))))
    assert pins["stage_settings"] == {**recorded, "train.clip": "toy"}
    again = named(pin_revision.python_func(**form(settings=as_text(recorded))))
    assert again["stage_settings"] == pins["stage_settings"]
    assert pins["clip_settings"] == {"evaluate.name": "toy", "evaluate.side": 144, "train.side": 96}


NUMBERS = {"train.steps": 7, "train.weight_decay": 1e-05, "train.assignment_scale": 2e16, "train.flip": False}
TEXTS = ["toy", "a b", "1.50", "007", "true", "null", "it's", 'a "b"', '"a"', "dog #1|puppy,grass", "a: b", "#", " x ", "["]


@pytest.mark.parametrize("text", TEXTS)
def test_settings_survive_as_text(text):
    texts = {"train.concept_names": text, "fetch_data.path": text}
    settings = {**NUMBERS, **texts, "train.concept_kind": "names"}
    loaded = flat(load_all(None, parse(as_text(settings))))
    assert {name: loaded[name] for name in settings} == settings
    assert all(type(loaded[name]) is type(value) for name, value in settings.items())


@pytest.mark.parametrize("text", TEXTS)
def test_pipeline_keeps_text_settings_as_typed(form, text, tmp_path):
    settings = f"train.side=96 train.concept_kind=names {shlex.quote(f'train.concept_names={text}')}"
    pins = named(pin_revision.python_func(**form(settings=settings)))
    assert pins["stage_settings"]["train.concept_names"] == text
    sent = arguments("i", "l", "", None, {"train.concept_kind": "names", "train.concept_names": text, "registry_name": "007"})
    assert sent["register_name"] == "007"
    assert parse(sent["settings"])["train.concept_names"] == text


def test_json_number_is_no_text(form):
    (line,) = refused(form(settings='{"fetch_data.revision": 1.10}'))
    assert "fetch_data: revision: must be text; quote it: '...' (found 1.1)" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train.crop='80", "no closing quotation"),
        ('{"train.crop": 80', "cannot be read as JSON"),
        ([1], "must be text such as"),
        ("train.steps=5 steps=6", "train.steps is given twice"),
    ],
)
def test_settings_that_cannot_be_parsed(form, settings, message):
    (line,) = refused(form(settings=settings))
    assert message in line


def test_field_and_text_must_not_disagree(form):
    assert refused(form(train_steps=5, settings="train.side=96 train.steps=6")) == [
        "train.steps is given twice: in train_steps (5) and in settings (6)"
    ]


# Settings in the DVC repository.

PARAMS = {"train": {"steps": 300, "side": 96, "crop": 80, "clip": "toy"}, "register": {"min_gain": 5.0}, "toy": {"seed": 7}}


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("settings")
    tracked = {"photos": {"1.jpg": b"1"}, "city": {"images/1.jpg": b"1"}}
    plain = {"params.yaml": yaml.safe_dump(PARAMS).encode(), "bad.yaml": b"train: {stepz: 3}", "picture.png": b"\xff\xfe"}
    tiny.dvc_repository(base / "repo", str(base / "remote"), tracked, plain)
    return base / "repo"


@pytest.fixture
def in_repository(defaults, repository):
    data = {"data_repo": str(repository), "data_images": "photos", "data_labelled": "city", "settings_file": "params.yaml"}
    return lambda **typed: {**defaults, **data, **typed}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_settings_file_of_the_repository(in_repository, repository):
    pins = named(pin_revision.python_func(**in_repository()))
    assert (pins["steps"], pins["clip"], pins["min_gain"], pins["batch_size"]) == (300, "toy", 5.0, 48)
    in_file = {"train.steps": 300, "train.side": 96, "train.crop": 80, "train.clip": "toy", "register.min_gain": 5.0}
    assert pins["stage_settings"] == in_file
    assert pins["commit"] == pins["fetch"] == tiny.git(repository, "rev-parse", "HEAD")
    pins = named(pin_revision.python_func(**in_repository(train_steps=7, settings="train.crop=64 min_gain=1.0")))
    assert (pins["steps"], pins["stage_settings"]["train.crop"], pins["min_gain"]) == (7, 64, 1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_submit_sends_only_the_name_of_the_settings_file(in_repository, repository):
    data = ("photos", "city", "", None)
    sent = arguments(*data, {"min_gain": 1.0, "train.crop": 64, "seed": 3}, str(repository), settings_file="params.yaml")
    assert (sent["settings_file"], sent["settings"]) == ("params.yaml", "train.crop=64 register.min_gain=1.0")
    assert (sent["train_seed"], sent["train_steps"]) == (3, 10_000)
    pins = named(pin_revision.python_func(**sent))
    assert (pins["seed"], pins["steps"], pins["min_gain"], pins["stage_settings"]["train.crop"]) == (3, 300, 1.0, 64)
    with pytest.raises(ValueError, match="give only one"):
        arguments("photos", "city", "", repository / "params.yaml", {}, str(repository), settings_file="params.yaml")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"settings_file": "param.yaml"}, "param.yaml at {sha}: there is no such path; the repository contains bad.yaml"),
        ({"settings_file": "bad.yaml"}, "bad.yaml: train: unknown setting 'stepz', did you mean 'steps'?"),
        ({"settings_file": "picture.png"}, "picture.png at {sha}: cannot be read as text"),
        ({"settings": "train.crop=big"}, "settings: train: crop: Input should be a valid integer"),
        ({"data_images": "photo"}, "photo at {sha}: there is no such path; the repository contains"),
        ({"data_revision": "v9"}, "there is no revision 'v9'"),
        ({"data_repo": ""}, "settings file 'params.yaml' without --repo"),
    ],
)
def test_errors_in_the_repository(in_repository, repository, typed, message):
    (line,) = refused(in_repository(**typed))
    assert message.format(sha=tiny.git(repository, "rev-parse", "HEAD")[:12]) in line


# As KFP runs it.


def run_on_kfp(folder: Path, filled: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run the compiled step with KFP's executor."""
    outputs = {name: {"outputFile": str(folder / "out" / name)} for name in pin_revision.component_spec.outputs}
    written = {"parameters": outputs, "outputFile": str(folder / "out.json")}
    entered = {"inputs": {"parameterValues": filled}, "outputs": written}
    (folder / "step.py").write_text(pin_revision.component_spec.implementation.container.command[-1])
    words = ["-m", "kfp.dsl.executor_main", "--component_module_path", str(folder / "step.py")]
    words += ["--function_to_execute", "pin_revision", "--executor_input", json.dumps(entered)]
    environment = os.environ | {"_KFP_RUNTIME": "true"}
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)


def test_step_in_kfps_executor(form, tmp_path):
    done = run_on_kfp(
        tmp_path, form(train_steps=20.0, settings='{"train.side": 96.0, "train.crop": 80.0}', volume="/", nodes=1, gpus=0)
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "out.json").read_text())["parameterValues"]
    assert (written["steps"], written["clip"], written["commit"]) == (20, "toy", "")
    assert written["stage_settings"] == {"train.clip": "toy", "train.steps": 20, "train.side": 96, "train.crop": 80}
