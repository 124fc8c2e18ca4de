"""The manifest for KServe fits the fields of its InferenceService, and its pod fits Kubernetes."""

import subprocess
import sys

import pytest
import yaml

from helpers import kserve
from pixelclip.commands.serve import manifest

MODEL, IMAGE, MLFLOW = "models:/pixelclip-toy@champion", "registry.example/pixelclip:1", "http://mlflow:5000"


def test_manifest_fits_kserve():
    document = yaml.safe_load(manifest(MODEL, IMAGE, MLFLOW))
    predictor = kserve.check(document)
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"  # KServe's name of a custom predictor's container
    assert container["command"][:4] == ["pixelclip", "serve", "run", MODEL]
    assert container["readinessProbe"]["httpGet"]["port"] == container["ports"][0]["containerPort"]


def test_pods_follow_the_alias_on_request():
    (container,) = kserve.check(yaml.safe_load(manifest(MODEL, IMAGE, MLFLOW, follow=30)))["containers"]
    assert container["command"][-2:] == ["--follow", "30"]
    with pytest.raises(ValueError, match="models:/m/3: only an alias can be followed, models:/NAME@ALIAS"):
        manifest("models:/m/3", IMAGE, MLFLOW, follow=30)


@pytest.mark.parametrize(
    ("uri", "name"), [("models:/My_Model/3", "my-model"), ("models:/7@a", "model-7"), (f"models:/{'x' * 90}@a", "x" * 40)]
)
def test_names_are_valid_for_kserve(uri, name):
    assert yaml.safe_load(manifest(uri, IMAGE, MLFLOW))["metadata"]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("runs/demo/train", IMAGE, MLFLOW), "runs/demo/train: must be models:/NAME@ALIAS or models:/NAME/VERSION"),
        (("models:/name", IMAGE, MLFLOW), "models:/name: must be models:/NAME@ALIAS"),
        ((MODEL, "", MLFLOW), "the container image is missing: set --image or PIXELCLIP_IMAGE"),
        ((MODEL, IMAGE, "sqlite:///a.db"), "MLFLOW_TRACKING_URI must be http"),
        ((MODEL, IMAGE, "http://user:secret@mlflow:5000"), "contains a password or token"),
    ],
)
def test_invalid_manifest_is_one_clear_error(monkeypatch, arguments, message):
    monkeypatch.delenv("PIXELCLIP_IMAGE", raising=False)
    with pytest.raises(ValueError, match=message) as caught:
        manifest(*arguments)
    assert "secret" not in str(caught.value)


def test_serve_without_its_extra_names_the_command_that_installs_it():
    script = "import sys; sys.modules['mlflow'] = None; from pixelclip.cli.app import main; main()"
    words = [sys.executable, "-c", script, "serve", "run", "models:/m@champion"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "serve needs the extra `train` (pip install 'pixelclip[train]')" in " ".join(done.stderr.split())
