"""The gate to champion, and the registry in a real MLflow database."""

import io
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import tiny
from artifact_server import slow_artifacts
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from PIL import Image

from pixelclip import server
from pixelclip.config import EvaluateConfig, RegisterConfig
from pixelclip.predict import Predictor
from pixelclip.promote import Figures, _Turn, decide, figures_of
from pixelclip.protocol import protocol_of
from pixelclip.register import fetch, markdown, run
from pixelclip.server import experiment_id
from pixelclip.stage import describe
from pixelclip.storage import digest, read_json, write_json

NAME = "demo"
CONFIG = RegisterConfig(name=NAME, min_gain=1.0)
# MLflow asks for an example input, with which it would run the model once more when it is logged.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


@pytest.mark.parametrize(
    ("candidate", "champion", "becomes", "reason"),
    [
        (Figures(30, 5, "x"), None, True, "there was no champion"),
        (Figures(30, 1, "x"), None, True, "there was no champion"),
        (Figures(30, 0.99, "x"), None, False, "gain 0.99 over CLIP is below register.min_gain 1"),
        (Figures(30, 5, "x"), Figures(29.9, 9, "x"), True, "mIoU 30.00 against the champion's 29.90"),
        (Figures(30, 5, "x"), Figures(30.1, 2, "x"), False, "mIoU 30.00 against the champion's 30.10"),
        (Figures(30, 5, "x"), Figures(30, 5, "x"), False, "mIoU 30.00 against the champion's 30.00"),
        (Figures(90, 0.5, "x"), Figures(30, 5, "x"), False, "below register.min_gain"),
        (Figures(90, 50, "x"), Figures(30, 5, "y"), False, "another labelled set"),
    ],
)
def test_the_gate(candidate, champion, becomes, reason):
    decision = decide(candidate, champion, min_gain=1.0)
    assert decision.champion is becomes
    assert reason in decision.reason


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_gate_does_not_decide_on_what_is_no_number(bad):
    for candidate, champion in (
        (Figures(bad, 5, "x"), None),
        (Figures(30, bad, "x"), None),
        (Figures(30, 5, "x"), Figures(bad, 5, "x")),
    ):
        with pytest.raises(ValueError, match="finite"):
            decide(candidate, champion, min_gain=1.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three models and a registry whose champion is the first of them."""
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


def evaluation(folder: Path, model: Path, miou: float, gain: float, **settings: object) -> Path:
    """What `evaluate` leaves behind."""
    return evaluation_of(folder, model, {"miou/set": miou, "gain/set": gain}, **settings)


def evaluation_of(
    folder: Path, model: Path, metrics: Mapping[str, float], labelled: str = "l1", masks_md5: str = "", **settings: object
) -> Path:
    folder.mkdir()
    write_json(folder / "metrics.json", dict(metrics))
    inputs = {"model": describe(model), "labelled": {"path": "/there/set", "md5": labelled, "num_files": 1, "size": 1}}
    if masks_md5:
        inputs["masks"] = inputs["labelled"] | {"path": settings["masks_folder"], "md5": masks_md5}
    config = EvaluateConfig(**settings)
    side = config.side or read_json(model / "config.json")["side"]
    write_json(folder / "protocol.json", protocol_of(config.model_copy(update={"name": config.name or "set", "side": side})))
    chosen = config.model_dump(exclude={"batch_size", "pictures", "device"})
    write_json(
        folder / "provenance.json",
        {
            "stage": "evaluate",
            "fingerprint": "f3",
            "settings": chosen,
            "inputs": inputs,
            "version": "0.1.0",
            "revision": "abc",
            "output": digest(folder, [folder / "metrics.json"]),
        },
    )
    return folder


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(NAME).aliases.items()}


def versions(client: MlflowClient) -> list[int]:
    return sorted(int(version.version) for version in client.search_model_versions(f"name = '{NAME}'"))


def test_the_first_good_model_is_champion(made, client):
    assert aliases(client) == {"champion": "1"}
    tags = client.get_model_version(NAME, "1").tags
    assert (float(tags["miou"]), float(tags["gain"])) == (40.0, 10.0)
    assert tags["gate"].startswith("champion: gain 10.00")
    assert tags["data.shards.md5"] == "0" * 32 and tags["data.labelled.md5"] == "l1"  # lineage down to the images
    written = read_json(made / "registration0" / "registration.json")
    assert (written["name"], written["version"], written["role"]) == (NAME, 1, "champion")
    assert client.get_run(written["run_id"]).data.params["train.steps"] == "3"
    assert "**models:/demo/1** is **champion**" in markdown(made / "registration0")


def test_the_registered_model_answers(made, client):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 10), "green").save(buffer, "PNG")
    mlflow.set_tracking_uri(str(client.tracking_uri))
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    answer = served.predict(pd.DataFrame({"image": [buffer.getvalue()], "classes": ["dog|puppy,sky"]})).iloc[0]
    assert json.loads(answer["classes"]) == ["dog, puppy", "sky"]
    expected = Predictor.load(made / "model0", "cpu")(Image.new("RGB", (20, 10), "green"), ["dog, puppy", "sky"]).labels
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer["label_map"]))), expected)


def test_a_registered_model_can_be_fetched_and_is_the_same(made, client, tmp_path):
    fetched = fetch(f"models:/{NAME}@champion", tmp_path / "fetched")
    for name in ("model.safetensors", "config.json", "provenance.json"):
        assert (fetched / name).read_bytes() == (made / "model0" / name).read_bytes()
    assert describe(fetched)["md5"] == describe(made / "model0")["md5"]
    with pytest.raises(ValueError, match="models:/demo@nobody: no such model"):
        fetch(f"models:/{NAME}@nobody", tmp_path / "none")


@pytest.fixture
def slow_store(client, monkeypatch):
    """A store for artifacts that takes longer with the weights than MLflow's server may with an answer."""
    monkeypatch.setattr(server, "_ANSWER", "1")
    monkeypatch.setattr(server, "_TRANSFER", "20")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with slow_artifacts("model.safetensors", seconds=1.5) as place:
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("slow", artifact_location=place))
        yield


def test_weights_may_take_longer_than_an_answer(made, slow_store, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=41.0, gain=10.0)
    assert run(made / "model1", evaluated, tmp_path / "out", CONFIG)["register/champion"] == 1
    fetched = fetch(f"models:/{NAME}@champion", tmp_path / "fetched")
    assert (fetched / "model.safetensors").read_bytes() == (made / "model1" / "model.safetensors").read_bytes()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"  # of everything else, as before


def test_a_timeout_that_somebody_set_is_kept(made, client, slow_store, monkeypatch, tmp_path):
    monkeypatch.setattr(server, "_ANSWER", "20")  # so 1 is somebody's
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=41.0, gain=10.0)
    with pytest.raises(ValueError, match=r"demo: refused by MLflow at sqlite:.*timed out.*MLFLOW_HTTP_REQUEST_TIMEOUT is 1 s"):
        run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    (trained,) = client.search_runs([os.environ["MLFLOW_EXPERIMENT_ID"]])
    assert trained.info.status == "FINISHED"  # the training did not fail


def test_again_changes_nothing(made, client, tmp_path):
    first = run(made / "model0", made / "evaluation0", tmp_path / "out", CONFIG)  # another folder
    again = run(made / "model0", made / "evaluation0", tmp_path / "out", CONFIG)  # the same folder
    assert first == again == {"register/version": 1.0, "register/champion": 1.0}
    assert versions(client) == [1]
    assert aliases(client) == {"champion": "1"}


def test_better_and_worse(made, client, tmp_path):
    worse = evaluation(tmp_path / "worse", made / "model1", miou=39.0, gain=20.0)
    assert run(made / "model1", worse, tmp_path / "a", CONFIG) == {"register/version": 2.0, "register/champion": 0.0}
    assert aliases(client) == {"champion": "1", "challenger": "2"}
    assert "mIoU 39.00 against the champion's 40.00" in client.get_model_version(NAME, "2").tags["gate"]
    assert "mIoU 39.00" in read_json(tmp_path / "a" / "registration.json")["reason"]

    better = evaluation(tmp_path / "better", made / "model2", miou=41.0, gain=5.0)
    assert run(made / "model2", better, tmp_path / "b", CONFIG) == {"register/version": 3.0, "register/champion": 1.0}
    assert aliases(client) == {"champion": "3", "challenger": "2", "previous": "1"}

    # Measured anew, the challenger wins: it is registered once and no longer a challenger.
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
        ({}, {"side": 64}),
        (GIVEN, GIVEN | {"masks_md5": "m2"}),
    ],
)
def test_another_labelled_set_or_protocol_is_not_compared(made, client, tmp_path, one, other):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=90.0, gain=50.0, **other)
    second = evaluation(tmp_path / "second", made / "model1", miou=99.0, gain=50.0, name="renamed", **one)
    run(made / "model0", evaluated, tmp_path / "a", CONFIG)  # the champion, measured on something else
    assert run(made / "model1", second, tmp_path / "b", CONFIG)["register/champion"] == 0
    assert "another labelled set or protocol" in read_json(tmp_path / "b" / "registration.json")["reason"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (GIVEN, GIVEN | {"masks_folder": "s3://elsewhere/masks"}),
        ({"stride": 100, "felzenszwalb_scale": 9, "name": "a"}, {"stride": 200, "max_bad_share": 0.5, "name": "b"}),
        ({"side": tiny.SIDE}, {}),  # the side that the model has anyway
    ],
)
def test_what_the_figures_do_not_hang_on_may_differ(made, client, tmp_path, one, other):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=50.0, **other)
    second = evaluation(tmp_path / "second", made / "model1", miou=41.0, gain=50.0, **one)
    run(made / "model0", evaluated, tmp_path / "a", CONFIG)
    run(made / "model1", second, tmp_path / "b", CONFIG)
    assert "mIoU 41.00 against the champion's 40.00" in client.get_model_version(NAME, "2").tags["gate"]


def test_a_champion_that_an_older_version_measured_is_one_line(made, client, tmp_path):
    client.set_model_version_tag(NAME, "1", "measured_on", "0" * 32)  # of the settings as they were given
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=99.0, gain=50.0)
    assert run(made / "model1", evaluated, tmp_path / "out", CONFIG)["register/champion"] == 0
    reason = read_json(tmp_path / "out" / "registration.json")["reason"]
    assert "\n" not in reason and "or by an older pixelclip" in reason and "measure it on this one" in reason
    again = evaluation(tmp_path / "again", made / "model0", miou=40.0, gain=10.0)
    run(made / "model0", again, tmp_path / "measured", CONFIG)
    run(made / "model1", evaluated, tmp_path / "out2", CONFIG)
    assert aliases(client) == {"champion": "2", "previous": "1"}


def test_figures_are_written_in_the_turn_of_their_promotion(made, client, tmp_path):
    """A gate that runs meanwhile must not pair new figures of the champion with what the old ones were measured on."""
    again = evaluation(tmp_path / "again", made / "model0", miou=90.0, gain=60.0, labelled="l2")
    before = figures_of(client.get_model_version(NAME, "1"))
    with ThreadPoolExecutor(1) as pool:
        with _Turn(client, NAME):
            registered = pool.submit(run, made / "model0", again, tmp_path / "out", CONFIG)
            while num_waiting(client) < 2 and not registered.done():
                time.sleep(0.05)
            assert figures_of(client.get_model_version(NAME, "1")) == before
        registered.result()
    after = figures_of(client.get_model_version(NAME, "1"))
    assert (after.miou, after.gain) == (90.0, 60.0) and after.measured_on != before.measured_on


def num_waiting(client: MlflowClient) -> int:
    """How many promotions have drawn a number."""
    tags = client.get_registered_model(NAME).tags
    return sum(json.loads(value)["number"] > 0 for tag, value in tags.items() if tag.startswith("promotion."))


@pytest.mark.parametrize("killed_at", ["miou", "gain", "measured_on"])
def test_figures_that_were_half_written_are_none(made, client, monkeypatch, tmp_path, killed_at):
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
    assert figures_of(client.get_model_version(NAME, "1")).miou == 90.0


def test_a_wiped_registry_is_filled_again(made, monkeypatch, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=10.0)
    out = tmp_path / "out"
    for place in ("one", "two"):
        client = tiny.mlflow_at(monkeypatch, tmp_path / place)
        assert run(made / "model0", evaluated, out, CONFIG)["register/version"] == 1.0
        assert versions(client) == [1]
        assert place in read_json(out / "registration.json")["tracking_uri"]


def unavailable(*_: object, **__: object) -> None:
    raise MlflowException("API request failed with error code 503 != 200\nResponse body: 'busy'", TEMPORARILY_UNAVAILABLE)


@pytest.mark.parametrize("finished", [True, False])
def test_a_registry_that_does_not_answer_is_no_empty_one(made, client, monkeypatch, tmp_path, finished):
    evaluated = evaluation(tmp_path / "evaluation", made / "model0", miou=40.0, gain=10.0)
    if finished:
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "search_model_versions", unavailable)
        with pytest.raises(ValueError, match=r"^demo: refused by MLflow at sqlite:.*: API request failed with .* 503 != 200$"):
            run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    assert {path: path.read_bytes() for path in (tmp_path / "out").glob("*")} == before
    assert versions(client) == [1]


def test_a_registry_that_does_not_answer_is_not_said_to_lack_a_model(made, client, monkeypatch, tmp_path):
    store = "mlflow.store.model_registry.sqlalchemy_store.SqlAlchemyStore"
    monkeypatch.setattr(f"{store}.get_model_version_by_alias", unavailable)
    with pytest.raises(ValueError, match=r"^models:/demo@champion: cannot be fetched from sqlite:.* 503 != 200$"):
        fetch(f"models:/{NAME}@champion", tmp_path / "fetched")


def test_an_evaluation_of_another_model_is_refused(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    with pytest.raises(ValueError, match=r"evaluation: is the evaluation of another model than .*model0"):
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"model1: is no evaluation, stage 'train' made it"):
        run(made / "model0", made / "model1", tmp_path / "out", CONFIG)
    assert versions(client) == [1]


@pytest.mark.parametrize(
    "metrics", [{"miou/set": 1.0}, {"gain/set": 1.0}, {"gain/set": 1.0, "miou/other": 1.0}, {}], ids=lambda m: ",".join(m)
)
def test_a_missing_metric_is_named(made, client, tmp_path, metrics):
    evaluated = evaluation_of(tmp_path / "evaluation", made / "model0", metrics)
    with pytest.raises(ValueError, match=r"metrics\.json: one gain/NAME with its miou/NAME is needed, found"):
        run(made / "model0", evaluated, tmp_path / "out", CONFIG)


def test_a_name_that_mlflow_refuses_is_one_error_and_nothing_is_logged(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    before = len(client.search_logged_models(experiment_ids=[experiment_id(client)]))
    with pytest.raises(ValueError, match=r"register\.name ' ' is refused by MLflow at sqlite:"):
        run(made / "model1", evaluated, tmp_path / "out", RegisterConfig(name=" "))
    assert len(client.search_logged_models(experiment_ids=[experiment_id(client)])) == before


def test_a_figure_that_is_no_number_stops_before_anything_is_registered(made, client, tmp_path):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    (evaluated / "metrics.json").write_text('{"miou/set": NaN, "gain/set": NaN}')
    with pytest.raises(ValueError, match="finite"):
        run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    assert aliases(client) == {"champion": "1"}
    assert versions(client) == [1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("provenance.json", "[]", r"named entries are expected, found \[\]"),
        ("provenance.json", "{}", "stage is missing"),
        (
            "provenance.json",
            '{"stage": "evaluate", "settings": {}, "inputs": {}, "output": {"md5": "x"}}',
            "inputs.model is missing",
        ),
        ("metrics.json", "[]", r"named entries are expected, found \[\]"),
        ("metrics.json", '{"gain/toy": "x", "miou/toy": 3}', r"gain/toy: Input should be a valid number \(found x\)"),
        ("protocol.json", "[]", r"named entries are expected, found \[\]"),
        ("protocol.json", '{"name": "set"}', "side is missing"),
    ],
)
def test_a_damaged_evaluation_is_one_line_that_names_the_file(made, client, tmp_path, name, content, message):
    evaluated = evaluation(tmp_path / "evaluation", made / "model1", miou=40.0, gain=10.0)
    (evaluated / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^\S+evaluation/{name}: is damaged: {message}$"):
        run(made / "model1", evaluated, tmp_path / "out", CONFIG)
    assert versions(client) == [1]
