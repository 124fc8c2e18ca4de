"""Stage register: gate, registered versions and their code, in a real MLflow database."""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from PIL import Image
from typer.testing import CliRunner

from helpers import tiny
from helpers.artifact_server import slow_artifacts
from helpers.fake_data import encoded, write_tar
from helpers.registrations import evaluation, evaluation_of
from helpers.training import Killed
from pixelclip.cli.app import app
from pixelclip.config import MasksConfig, RegisterConfig
from pixelclip.inference.predictor import Predictor
from pixelclip.masks import run as make_masks
from pixelclip.models.checkpoint import load_model
from pixelclip.register import run
from pixelclip.registry import model_version, promotion
from pixelclip.registry.gate import GateMetrics, decide
from pixelclip.registry.model_version import copy_code, fetch, markdown
from pixelclip.registry.promotion import metrics_of
from pixelclip.storage.files import read_json, write_json
from pixelclip.tracking import server
from pixelclip.tracking.server import experiment_id
from pixelclip.workflow.stage import describe

NAME = "demo"
CONFIG = RegisterConfig(name=NAME, min_gain=1.0)
# MLflow asks for an example input, with which it would run the model once more when it is logged.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


@pytest.mark.parametrize(
    ("challenger", "champion", "becomes", "reason"),
    [
        (GateMetrics(30, 5, "x"), None, True, "there was no champion"),
        (GateMetrics(30, 1, "x"), None, True, "there was no champion"),
        (GateMetrics(30, 0.99, "x"), None, False, "gain 0.99 over CLIP is below register.min_gain 1"),
        (GateMetrics(30, 5, "x"), GateMetrics(29.9, 9, "x"), True, "mIoU 30.00 against the champion's 29.90"),
        (GateMetrics(30, 5, "x"), GateMetrics(30.1, 2, "x"), False, "mIoU 30.00 against the champion's 30.10"),
        (GateMetrics(30, 5, "x"), GateMetrics(30, 5, "x"), False, "mIoU 30.00 against the champion's 30.00"),
        (GateMetrics(90, 0.5, "x"), GateMetrics(30, 5, "x"), False, "below register.min_gain"),
        (GateMetrics(90, 50, "x"), GateMetrics(30, 5, "y"), False, "a different labelled set"),
    ],
)
def test_gate_compares_gain_and_miou(challenger, champion, becomes, reason):
    decision = decide(challenger, champion, min_gain=1.0)
    assert decision.champion is becomes
    assert reason in decision.reason


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gate_rejects_metrics_that_are_not_finite(bad):
    for challenger, champion in (
        (GateMetrics(bad, 5, "x"), None),
        (GateMetrics(30, bad, "x"), None),
        (GateMetrics(30, 5, "x"), GateMetrics(bad, 5, "x")),
    ):
        with pytest.raises(ValueError, match="finite"):
            decide(challenger, champion, min_gain=1.0)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(promotion, "_SETTLE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three models, the first of them registered as champion."""
    base = tmp_path_factory.mktemp("register")
    clip = tiny.clip_folder(base / "clip")
    for seed in range(3):
        tiny.model_folder(base / f"model{seed}", clip, change=0.01, seed=seed)
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny.mlflow_at(monkeypatch, base / "mlflow")
        evaluation(base / "evaluation0", base / "model0", miou=40.0, gain=10.0)
        run(base / "model0", base / "evaluation0", base / "registration0", CONFIG)
    return base


@pytest.fixture
def client(made, monkeypatch, tmp_path) -> MlflowClient:
    return tiny.mlflow_at(monkeypatch, tmp_path / "mlflow", copy_of=made / "mlflow" / "mlflow.db")


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


def versions(client: MlflowClient) -> list[int]:
    return sorted(int(version.version) for version in client.search_model_versions(f"name = '{NAME}'"))


def test_first_model_with_enough_gain_becomes_champion(made, client):
    assert aliases(client) == {"champion": "1"}
    tags = client.get_model_version(NAME, "1").tags
    assert (float(tags["miou"]), float(tags["gain"])) == (40.0, 10.0)
    assert tags["gate"].startswith("champion: gain 10.00")
    assert tags["data.shards.md5"] == "0" * 32 and tags["data.labelled.md5"] == "l1"  # lineage down to the images
    written = read_json(made / "registration0" / "registration.json")
    assert (written["name"], written["version"], written["role"]) == (NAME, 1, "champion")
    assert client.get_run(written["run_id"]).data.params["train.steps"] == "3"
    assert "**models:/demo/1** is **champion**" in markdown(made / "registration0")


def test_version_has_the_model_card_as_description(made, client):
    description = client.get_model_version(NAME, "1").description
    assert description.startswith("# demo, version 1") and "+10.0" in description and "--model models:/demo/1 " in description
    assert "models:/demo@champion" in client.get_registered_model(NAME).description


def test_model_without_evaluation_is_unmeasured_and_never_champion(made, client, tmp_path, capsys):
    assert run(made / "model1", None, tmp_path / "out", CONFIG) == {"register/version": 2, "register/champion": 0}
    assert "version 2 is unmeasured" in capsys.readouterr().out
    assert read_json(tmp_path / "out" / "registration.json")["role"] == "unmeasured"
    found = client.get_model_version(NAME, "2")
    assert found.tags["gate"].startswith("unmeasured: ") and "miou" not in found.tags and found.tags["data.shards.md5"]
    assert "unmeasured" in found.description and aliases(client) == {"champion": "1"}
    with pytest.raises(ValueError, match="demo version 2: has no tag miou"):
        promotion.run(NAME, 2)
    evaluation(tmp_path / "evaluation", made / "model1", miou=50.0, gain=11.0)
    assert run(made / "model1", tmp_path / "evaluation", tmp_path / "measured", CONFIG)["register/version"] == 2
    assert aliases(client) == {"champion": "2", "previous": "1"}


def test_evaluated_model_is_not_registered_as_unmeasured(made, client, tmp_path):
    with pytest.raises(ValueError, match="demo version 1 of these weights has been evaluated"):
        run(made / "model0", None, tmp_path / "out", CONFIG)
    assert aliases(client) == {"champion": "1"}


def test_registered_model_predicts(made, client):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "green").save(buffer, "PNG")
    mlflow.set_tracking_uri(str(client.tracking_uri))
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    answer = served.predict(pd.DataFrame({"image": [buffer.getvalue()], "classes": ["dog|puppy,sky"]})).iloc[0]
    assert answer["classes"] == ["dog, puppy", "sky"]
    expected = Predictor.load(made / "model0", "cpu")(Image.new("RGB", (20, 10), "green"), ["dog, puppy", "sky"]).labels
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer["label_map"]))), expected)


def test_registered_model_sees_the_sizes_of_its_evaluation(made, client, tmp_path):
    """The same weights with another size are another version; a version of older code, without the tag, does not resize."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8))
    found = []
    model = load_model(made / "model1")
    cases = (
        {},
        {"shortest_edge": 0},
        {"shortest_edge": 0, "longest_edge": 9, "side": model.side},
        {"shortest_edge": 0, "side": 64, "window": 32},
    )
    for number, settings in enumerate(cases):
        evaluated = evaluation(tmp_path / f"e{number}", made / "model1", miou=50.0, gain=10.0, **settings)
        version = run(made / "model1", evaluated, tmp_path / f"r{number}", CONFIG)["register/version"]
        fetched = fetch(f"models:/{NAME}/{version:.0f}", tmp_path / f"m{number}")
        loaded = Predictor.load(fetched, "cpu")
        found.append((version, [loaded(image, ["dog", "sky"], quality).scores for quality in ("fast", "best")]))
    assert [version for version, _ in found] == [2, 3, 3, 4]
    sizes = [(640, 2560, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 64, 32)]
    for (_, scores), (shortest_edge, longest_edge, side, window) in zip(found, sizes, strict=True):
        predictor = Predictor(model, "cpu", shortest_edge=shortest_edge, longest_edge=longest_edge, side=side, window=window)
        for quality, expected in zip(("fast", "best"), scores, strict=True):
            assert np.array_equal(predictor(image, ["dog", "sky"], quality).scores, expected)
    assert not np.array_equal(found[0][1][0], found[1][1][0])
    assert not np.array_equal(found[1][1][0], found[3][1][0]) and not np.array_equal(found[1][1][1], found[3][1][1])
    client.delete_model_version_tag(NAME, "3", "resize")
    before = evaluation(tmp_path / "before", made / "model1", miou=50.0, gain=10.0)
    document = read_json(before / "provenance.json")
    document["settings"] = {key: value for key, value in document["settings"].items() if not key.endswith("est_edge")}
    write_json(before / "provenance.json", document)
    assert run(made / "model1", before, tmp_path / "old", CONFIG)["register/version"] == 3


@pytest.mark.parametrize("settings", [{"shortest_edge": 0}, {"kind": "voc", "names": "readable"}])
def test_models_evaluated_with_another_resize_or_names_are_not_compared(made, client, tmp_path, settings):
    first = evaluation(tmp_path / "first", made / "model0", miou=40.0, gain=10.0, **{"kind": settings.get("kind", "folder")})
    run(made / "model0", first, tmp_path / "one", CONFIG)
    other = evaluation(tmp_path / "evaluation", made / "model1", miou=99.0, gain=50.0, **settings)
    assert run(made / "model1", other, tmp_path / "out", CONFIG)["register/champion"] == 0
    assert "a different labelled set or protocol" in read_json(tmp_path / "out" / "registration.json")["reason"]


_SHIPPED = """
import sys, mlflow, pandas
from importlib.util import find_spec

sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.path[:] = [path for path in sys.path if path not in sys.argv[3:]]
assert find_spec("pixelclip") is None
model = mlflow.pyfunc.load_model(sys.argv[1])
image = open(sys.argv[2], "rb").read()
print(model.predict(pandas.DataFrame({"image": [image], "classes": ["dog,sky"]}))["classes"][0])
used = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "pixelclip"]
assert len(used) > 5 and all(file.startswith(sys.argv[1]) for file in used), used
"""


def test_registered_model_makes_the_masks_of_a_second_round(made, client, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (5, 5, 3), np.uint8).repeat(12, axis=0).repeat(12, axis=1)
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": encoded(photo)}).parent
    settings = {"generator": "model", "model_min_area": 1, "workers": 0, "device": "cpu"}
    for name, weights in (("registered", f"models:/{NAME}@champion"), ("folder", str(made / "model0"))):
        make_masks(shards, tmp_path / name, MasksConfig(**settings, weights=weights))
    assert (tmp_path / "registered" / "0.tar").read_bytes() == (tmp_path / "folder" / "0.tar").read_bytes()
    with pytest.raises(ValueError, match=f"models:/{NAME}@missing: no such model"):
        make_masks(shards, tmp_path / "none", MasksConfig(**settings, weights=f"models:/{NAME}@missing"))


def test_registered_model_runs_on_its_own_code_where_pixelclip_is_not_installed(made, client, tmp_path):
    mlflow.set_tracking_uri(str(client.tracking_uri))
    model = mlflow.artifacts.download_artifacts(f"models:/{NAME}@champion", dst_path=str(tmp_path / "fetched"))
    Image.new("RGB", (20, 10), "green").save(tmp_path / "image.png")
    source = str(Path(promotion.__file__).parents[1])
    command = [sys.executable, "-I", "-W", "ignore", "-c", _SHIPPED, str(Path(model)), str(tmp_path / "image.png"), source]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['dog', 'sky']"


def test_fetched_model_leaves_nothing_in_the_temporary_folder(made, client, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mlflow.set_tracking_uri(str(client.tracking_uri))
    assert (fetch(f"models:/{NAME}@champion") / "model.safetensors").is_file()
    model_version._copies.close()  # as at the end of the process
    assert not list((tmp_path / "temporary").iterdir())


def test_licences_are_in_every_model_card(client, tmp_path):
    model = tiny.model_folder(tmp_path / "model", tiny.clip_folder(tmp_path / "clip"))
    config = RegisterConfig(name="licensed", licence="Apache-2.0", data_licence="CC BY 4.0")
    run(model, None, tmp_path / "out", config)
    version = client.get_model_version("licensed", "1")
    both = "Licence of the weights: Apache-2.0. Licence of the training images: CC BY 4.0."
    assert both in version.description and both in client.get_run(version.run_id).data.tags["mlflow.note.content"]
    words = ["export", "--model", "models:/licensed/1", "--format", "huggingface", "--data-licence", "CC0"]
    shown = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "hub")])
    assert shown.exit_code == 0, shown.output
    exported = (tmp_path / "hub" / "README.md").read_text()
    assert "Licence of the weights: Apache-2.0. Licence of the training images: CC0." in exported

    run(model, None, tmp_path / "again", RegisterConfig(name="licensed", licence="MIT"))
    version = client.get_model_version("licensed", "1")
    assert "Licence of the weights: MIT. Licence of the training images: not stated." in version.description
    assert model_version.licences_of("models:/licensed/1") == {"licence": "MIT"}
    assert model_version.licences_of(f"models:/{version.model_id}") == {}


def test_shipped_code_keeps_subpackages_and_leaves_assets_out(tmp_path):
    files = ["__init__.py", "a.py", "models/__init__.py", "models/deep/b.py", "assets/c.py", "assets/d.json", "e.txt"]
    for name in [*files, "models/__pycache__/f.pyc"]:
        (tmp_path / "pixelclip" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pixelclip" / name).write_text(name)
    copy = copy_code(tmp_path / "pixelclip", tmp_path)
    assert copy == tmp_path / "code" / "pixelclip"
    copied = {str(path.relative_to(copy)): path.read_text() for path in copy.rglob("*") if path.is_file()}
    assert copied == {name: name for name in files[:4]}


def test_fetched_model_is_identical(made, client, tmp_path):
    fetched = fetch(f"models:/{NAME}@champion", tmp_path / "fetched")
    for name in ("model.safetensors", "config.json", "provenance.json"):
        assert (fetched / name).read_bytes() == (made / "model0" / name).read_bytes()
    assert describe(fetched)["md5"] == describe(made / "model0")["md5"]
    with pytest.raises(ValueError, match="models:/demo@nobody: no such model"):
        fetch(f"models:/{NAME}@nobody", tmp_path / "none")
    with pytest.raises(ValueError, match="models:/demo: names no version; write models:/demo@champion"):
        fetch(f"models:/{NAME}", tmp_path / "none")
    with pytest.raises(ValueError, match="models:/dmo: no such model at "):
        fetch("models:/dmo", tmp_path / "none")


@pytest.fixture
def slow_store(client, monkeypatch):
    """Artifact store that needs longer for the weights than the time-out of other requests."""
    monkeypatch.setitem(server._DEFAULTS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(server, "_TRANSFER_SECONDS", 20)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with slow_artifacts("model.safetensors", seconds=1.5) as location:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("slow", artifact_location=location))
        yield


def test_weights_may_take_longer_than_other_requests(made, slow_store, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=41.0, gain=10.0)
    assert run(made / "model1", evaluated, tmp_path / "out", CONFIG)["register/champion"] == 1
    fetched = fetch(f"models:/{NAME}@champion", tmp_path / "fetched")
    assert (fetched / "model.safetensors").read_bytes() == (made / "model1" / "model.safetensors").read_bytes()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"  # restored for other requests


def test_timeout_set_by_the_user_is_kept(made, client, slow_store, monkeypatch, tmp_path):
    monkeypatch.setitem(server._DEFAULTS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # so the 1 is the user's
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=41.0, gain=10.0)
    with pytest.raises(ValueError, match=r"demo: rejected by MLflow at sqlite:.*timed out.*MLFLOW_HTTP_REQUEST_TIMEOUT is 1 s"):
        run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    (trained,) = client.search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]])
    assert trained.info.status == "FINISHED"  # the training did not fail


def test_registering_twice_creates_one_version(made, client, tmp_path):
    first = run(made / "model0", made / "evaluation0", tmp_path / "out", CONFIG)  # another folder
    again = run(made / "model0", made / "evaluation0", tmp_path / "out", CONFIG)  # the same folder
    assert first == again == {"register/version": 1.0, "register/champion": 1.0}
    assert versions(client) == [1]
    assert aliases(client) == {"champion": "1"}


def test_better_model_becomes_champion_and_worse_one_challenger(made, client, tmp_path):
    worse = evaluation(tmp_path / "worse", made / "model1", miou=39.0, gain=20.0)
    assert run(made / "model1", worse, tmp_path / "a", CONFIG) == {"register/version": 2.0, "register/champion": 0.0}
    assert aliases(client) == {"champion": "1", "challenger": "2"}
    assert "mIoU 39.00 against the champion's 40.00" in client.get_model_version(NAME, "2").tags["gate"]
    assert "mIoU 39.00" in read_json(tmp_path / "a" / "registration.json")["reason"]

    better = evaluation(tmp_path / "better", made / "model2", miou=41.0, gain=5.0)
    assert run(made / "model2", better, tmp_path / "b", CONFIG) == {"register/version": 3.0, "register/champion": 1.0}
    assert aliases(client) == {"champion": "3", "challenger": "2", "previous": "1"}

    # After a new evaluation the challenger wins: still one version, and no longer a challenger.
    anew = evaluation(tmp_path / "anew", made / "model1", miou=42.0, gain=20.0)
    assert run(made / "model1", anew, tmp_path / "c", CONFIG) == {"register/version": 2.0, "register/champion": 1.0}
    assert aliases(client) == {"champion": "2", "previous": "3"}
    assert versions(client) == [1, 2, 3]


GIVEN = {"protocol": "masks", "masks": "given", "masks_folder": "/there/masks", "masks_md5": "m1"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"labelled": "l2"}),
        ({}, {"templates": "single"}),
        ({"side": 64}, {}),
        (GIVEN, GIVEN | {"masks_md5": "m2"}),
    ],
)
def test_models_evaluated_under_different_conditions_are_not_compared(made, client, tmp_path, one, other):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=90.0, gain=50.0, **other)
    second = evaluation(tmp_path / "second", made / "model1", miou=99.0, gain=50.0, name="renamed", **one)
    run(made / "model0", evaluated, tmp_path / "a", CONFIG)  # the champion, evaluated on something else
    assert run(made / "model1", second, tmp_path / "b", CONFIG)["register/champion"] == 0
    assert "a different labelled set or protocol" in read_json(tmp_path / "b" / "registration.json")["reason"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GIVEN, GIVEN | {"masks_folder": "s3://elsewhere/masks"}),
        ({"stride": 100, "felzenszwalb_scale": 9, "name": "a"}, {"stride": 200, "max_bad_share": 0.5, "name": "b"}),
        ({"side": tiny.SIDE}, {}),  # the side that the model has anyway
    ],
)
def test_settings_that_do_not_affect_the_metrics_may_differ(made, client, tmp_path, one, other):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=50.0, **other)
    second = evaluation(tmp_path / "second", made / "model1", miou=41.0, gain=50.0, **one)
    run(made / "model0", evaluated, tmp_path / "a", CONFIG)
    run(made / "model1", second, tmp_path / "b", CONFIG)
    assert "mIoU 41.00 against the champion's 40.00" in client.get_model_version(NAME, "2").tags["gate"]


def test_champion_evaluated_by_an_older_version_must_be_evaluated_again(made, client, tmp_path):
    client.set_model_version_tag(NAME, "1", "measured_on", "0" * 32)  # a hash of other settings
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=99.0, gain=50.0)
    assert run(made / "model1", evaluated, tmp_path / "out", CONFIG)["register/champion"] == 0
    reason = read_json(tmp_path / "out" / "registration.json")["reason"]
    assert "\n" not in reason and "or with another first resize; evaluate both alike" in reason
    again = evaluation(tmp_path / "again", made / "model0", miou=40.0, gain=10.0)
    run(made / "model0", again, tmp_path / "measured", CONFIG)
    run(made / "model1", evaluated, tmp_path / "out2", CONFIG)
    assert aliases(client) == {"champion": "2", "previous": "1"}


@pytest.mark.parametrize("killed_at", ["miou", "gain", "measured_on"])
def test_partially_written_metrics_are_rejected(made, client, monkeypatch, tmp_path, killed_at):
    again = evaluation(tmp_path / "again", made / "model0", miou=90.0, gain=60.0, labelled="l2")
    write = MlflowClient.set_model_version_tag

    def die(self, name, version, key, value):
        if key == killed_at:
            raise KeyboardInterrupt
        write(self, name, version, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_model_version_tag", die)
        with pytest.raises(KeyboardInterrupt):
            run(made / "model0", again, tmp_path / "out", CONFIG)
    other = evaluation(tmp_path / "other", made / "model1", miou=50.0, gain=50.0)
    with pytest.raises(ValueError, match="demo version 1: has no tag measured_on; `pixelclip register` with its evaluation"):
        run(made / "model1", other, tmp_path / "second", CONFIG)
    run(made / "model0", again, tmp_path / "out", CONFIG)
    assert metrics_of(client.get_model_version(NAME, "1")).miou == 90.0


def test_model_is_registered_again_in_an_empty_registry(made, monkeypatch, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=10.0)
    out = tmp_path / "out"
    for folder in ("one", "two"):
        client = tiny.mlflow_at(monkeypatch, tmp_path / folder)
        assert run(made / "model0", evaluated, out, CONFIG)["register/version"] == 1.0
        assert versions(client) == [1]
        assert folder in read_json(out / "registration.json")["tracking_uri"]


def unavailable(*_: object, **__: object) -> None:
    raise MlflowException("API request failed with error code 503 != 200\nResponse body: 'busy'", TEMPORARILY_UNAVAILABLE)


@pytest.mark.parametrize("finished", [True, False])
def test_unavailable_registry_is_not_taken_for_an_empty_one(made, client, monkeypatch, tmp_path, finished):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=10.0)
    if finished:
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_model_versions", unavailable)
        with pytest.raises(ValueError, match=r"^demo: rejected by MLflow at sqlite:.*: API request failed with .* 503 != 200$"):
            run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*")} == before
    assert versions(client) == [1]


def test_unavailable_registry_is_not_reported_as_a_missing_model(made, client, monkeypatch, tmp_path):
    store = "mlflow.store.model_registry.sqlalchemy_store.SqlAlchemyStore"
    monkeypatch.setattr(f"{store}.get_model_version_by_alias", unavailable)
    with pytest.raises(ValueError, match=r"^models:/demo@champion: cannot be fetched from sqlite:.* 503 != 200$"):
        fetch(f"models:/{NAME}@champion", tmp_path / "fetched")


def test_evaluation_of_a_different_model_is_rejected(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    with pytest.raises(ValueError, match=r"^\S+evaluation: evaluates a different model than \S+model0$"):
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"^\S+model1: expected the output of evaluate, found that of 'train'$"):
        run(made / "model0", made / "model1", tmp_path / "out", CONFIG)
    assert versions(client) == [1]


@pytest.mark.parametrize(
    "metrics", [{"miou/set": 1.0}, {"gain/set": 1.0}, {"gain/set": 1.0, "miou/other": 1.0}, {}], ids=lambda m: ",".join(m)
)
def test_missing_metric_is_named(made, client, tmp_path, metrics):
    evaluated = evaluation_of(tmp_path / "evaluation", made / "model0", metrics)
    with pytest.raises(ValueError, match=r"metrics\.json: needs exactly one gain/NAME with its miou/NAME, found"):
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)


def test_invalid_name_is_rejected_before_anything_is_logged(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    before = len(client.search_logged_models(experiment_ids=[experiment_id(client)]))
    with pytest.raises(ValueError, match=r"register\.name ' ' is rejected by MLflow at sqlite:"):
        run(made / "model1", evaluated, tmp_path / "out", RegisterConfig(name=" "))
    assert len(client.search_logged_models(experiment_ids=[experiment_id(client)])) == before


def test_metric_that_is_not_finite_is_rejected_before_anything_is_registered(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    for gain in ("NaN", '"x"'):
        (evaluated / "metrics.json").write_text(f'{{"miou/set": 1, "gain/set": {gain}}}')
        with pytest.raises(ValueError, match=r"metrics\.json: gain/set: Input should be .* number \(found (nan|'x')\)$"):
            run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    assert aliases(client) == {"champion": "1"}
    assert versions(client) == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("provenance.json", "[]", r"Input should be an object \(found \[\]\)"),
        ("provenance.json", "{}", "entry 'stage' is missing"),
        (
            "provenance.json",
            '{"stage": "evaluate", "settings": {}, "inputs": {"model": {}}}',
            "entry 'inputs.model.md5' is missing",
        ),
        ("metrics.json", "[]", r"Input should be a valid dictionary \(found \[\]\)"),
        ("protocol.json", "[]", r"Input should be an object \(found \[\]\)"),
        ("protocol.json", '{"name": "set", "kind": "folder", "protocol": "whole"}', "entry 'side' is missing"),
    ],
)
def test_damaged_evaluation_names_the_file(made, client, tmp_path, name, content, message):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    (evaluated / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^\S+evaluation/{name}: {message}$"):
        run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    assert versions(client) == [1]


REQUESTS = {
    "create_run": "tracking",
    "update_run_info": "tracking",
    "create_logged_model": "tracking",
    "log_outputs": "tracking",
    "finalize_logged_model": "tracking",
    "create_model_version": "model_registry",
}
"""Methods of MLflow's stores that a registration calls, and the package of the store."""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_registration_killed_at_a_request_closes_its_run_and_uploads_weights_once(
    made, client, monkeypatch, tmp_path, request_name, when
):
    evaluation(tmp_path / "evaluation", made / "model1", miou=50.0, gain=20.0)
    shutil.copytree(made / "model1", tmp_path / "model")
    inputs = (tmp_path / "model", tmp_path / "evaluation", tmp_path / "registration", CONFIG)
    uploads = []
    upload = LocalArtifactRepository.log_artifacts
    monkeypatch.setattr(LocalArtifactRepository, "log_artifacts", lambda *given: (uploads.append(given), upload(*given)))
    store = import_module(f"mlflow.store.{REQUESTS[request_name]}.sqlalchemy_store").SqlAlchemyStore
    original = getattr(store, request_name)

    def kill(*given, **named):
        if when == "after":
            original(*given, **named)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, request_name, kill)
        with pytest.raises(Killed):
            run(*inputs)
    run(*inputs)
    registered = read_json(tmp_path / "registration" / "registration.json")
    orphan = (request_name, when) == ("create_run", "after")  # nobody has learned its ID
    assert client.get_run(registered["run_id"]).info.status == "FINISHED"
    runs = client.search_runs([experiment_id(client)])
    assert sum(each.info.status != "FINISHED" for each in runs) == orphan
    assert versions(client)[0] == 1 and fetch(f"models:/{NAME}/{registered['version']}", tmp_path / "fetched").is_dir()
    again = (request_name, when) == ("finalize_logged_model", "before")  # nobody knows whether the upload was complete
    assert len(uploads) == 1 + again
