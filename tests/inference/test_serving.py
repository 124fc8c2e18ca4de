"""The served model, logged as code and safetensors and called through MLflow."""

import base64
import io
import json
import os
import re
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from PIL import Image

from helpers import services, tiny
from helpers.fake_data import bomb
from helpers.serving import ask, decoded, photo
from pixelclip.commands.serve import server
from pixelclip.inference import serving
from pixelclip.inference.prediction import overlay
from pixelclip.inference.predictor import Predictor
from pixelclip.inference.serving import Limits, ServedModel

# MLflow asks for an example input, with which it would run the model once more when it is logged.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided")


COLUMNS = ["format_version", "label_map", "classes", "shares", "scores"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("serve")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"))


@pytest.fixture(scope="module")
def logged(folder, tmp_path_factory) -> Path:
    """The model as saved by MLflow."""
    path = tmp_path_factory.mktemp("logged") / "model"
    mlflow.pyfunc.save_model(
        path,
        python_model=serving.__file__,
        artifacts={serving.ARTIFACT: str(folder)},
        signature=serving.SIGNATURE,
        pip_requirements=[],
    )
    return path


@pytest.fixture(scope="module")
def model(logged) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(logged))


def test_every_row_equals_the_predictor(model, folder):
    rows = [(photo(50, 30, 0), "dog|puppy,grass,sky", ["dog, puppy", "grass", "sky"]), (photo(9, 60, 1), "a,b", ["a", "b"])]
    results = model.predict(pd.DataFrame({"image": [row[0] for row in rows], "classes": [row[1] for row in rows]}))
    assert list(results.columns) == COLUMNS
    predictor = Predictor.load(folder, "cpu")
    for (image, _, names), result in zip(rows, results.itertuples(), strict=True):
        assert result.format_version == 2
        assert result.classes == names
        expected = predictor(Image.open(io.BytesIO(image)), names)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(result.label_map))), expected.labels)
        shares = [np.mean(expected.labels == index) for index in range(len(names))]
        assert result.shares == pytest.approx(shares, abs=1e-6) and sum(shares) == pytest.approx(1)
        assert result.scores == pytest.approx([one.max() for one in expected.scores], abs=1e-6)


def test_version_1_of_the_answer_has_lists_as_json_texts(model):
    frame = pd.DataFrame({"image": [photo(50, 30, 0)], "classes": ["dog|puppy,sky"]})
    new = model.predict(frame).iloc[0]
    old = model.predict(frame, params={"format_version": 1})
    assert list(old.columns) == ["label_map", "classes", "shares", "scores"]
    for column in ("classes", "shares", "scores"):
        assert json.loads(old.iloc[0][column]) == new[column]
    assert old.iloc[0]["label_map"] == new["label_map"]
    with pytest.raises(MlflowException, match=r"format_version must be 1 or 2 \(found 3\)"):
        model.predict(frame, params={"format_version": 3})


def test_classes_may_be_a_list(model):
    image = photo(50, 30, 0)
    frame = pd.DataFrame({"image": [image, image], "classes": ["dog|puppy,sky", ["dog|puppy", "sky"]]})
    text, names = model.predict(frame).to_dict("records")
    assert text == names
    for classes, message in (
        (["dog", 3], "row 0: classes: expected a name, found int"),
        (["a, b", "c"], "row 0: classes: a name of a list must not contain a comma, found 'a, b'; write synonyms with a bar"),
        ([], "row 0: classes: the list of class names is empty"),
    ):
        with pytest.raises(MlflowException, match=message):
            model.predict(pd.DataFrame({"image": [image], "classes": [classes]}))


def test_overlay_and_score_maps_are_returned_on_request(model, folder):
    image, names = photo(50, 30, 0), ["dog", "sky"]
    frame = pd.DataFrame({"image": [image], "classes": ["dog,sky"]})
    plain = model.predict(frame, params={"overlay": False}).iloc[0]
    result = model.predict(frame, params={"overlay": True, "score_maps": True}).iloc[0]
    assert result["label_map"] == plain["label_map"] and "overlay" not in plain
    expected = Predictor.load(folder, "cpu")(Image.open(io.BytesIO(image)), names)
    assert np.array_equal(np.load(io.BytesIO(result["score_maps"]), allow_pickle=False), expected.scores)
    shown = Image.open(io.BytesIO(result["overlay"]))
    assert shown.format == "PNG"
    assert np.array_equal(np.asarray(shown), np.asarray(overlay(Image.open(io.BytesIO(image)), expected)))


def test_quality_is_a_parameter(model, folder):
    frame = pd.DataFrame({"image": [photo(50, 30, 0)], "classes": ["dog,sky"]})
    scores = model.predict(frame, params={"quality": "best"}).iloc[0]["scores"]
    expected = Predictor.load(folder, "cpu")(Image.open(io.BytesIO(photo(50, 30, 0))), ["dog", "sky"], "best").scores
    assert scores == pytest.approx(expected.max(axis=(1, 2)), abs=1e-6)
    with pytest.raises(MlflowException, match=r"row 0: quality must be fast or best \(found 'good'\)"):
        model.predict(frame, params={"quality": "good"})


@pytest.fixture(scope="module")
def client(model) -> TestClient:
    return TestClient(server(model, "models:/m/3"))


def request_of(**params: object) -> dict:
    data = [[base64.b64encode(photo(50, 30, 0)).decode(), ["dog|puppy", "sky"]]]
    return {"dataframe_split": {"columns": ["image", "classes"], "data": data}, "params": params}


def test_server_answers_with_arrays_and_counts_requests(client):
    answer = client.post("/invocations", json=request_of(overlay=True))
    (row,) = answer.json()["predictions"]
    assert row["format_version"] == 2 and row["classes"] == ["dog, puppy", "sky"]
    assert sum(row["shares"]) == pytest.approx(1) and len(row["scores"]) == 2
    unknown = client.post("/invocations", json=request_of(overlays=True))
    assert unknown.status_code == 400 and "unknown param 'overlays', did you mean 'overlay'?" in unknown.json()["message"]
    assert answer.headers["pixelclip-model"] == "models:/m/3" and client.get("/model").json() == {"model": "models:/m/3"}
    metrics = client.get("/metrics").text
    assert 'pixelclip_model_info{model="models:/m/3"} 1\n' in metrics
    assert 'pixelclip_requests_total{status="200"} 1\n' in metrics
    assert 'pixelclip_requests_total{status="400"} 1\n' in metrics
    assert "pixelclip_request_seconds_count 2\n" in metrics


def test_start_page_leads_to_pages_that_exist(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    links = re.findall('href="(.*?)"', page.text)
    assert links and all(client.get(f"/{link}").status_code == 200 for link in links)


@pytest.fixture
def limited(logged, monkeypatch):
    """Load the model with limits from the environment."""

    def load(**limits: object) -> ServedModel:
        for name, limit in limits.items():
            monkeypatch.setenv(f"PIXELCLIP_SERVE_{name.upper()}", str(limit))
        return mlflow.pyfunc.load_model(str(logged)).unwrap_python_model()

    return load


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_images": 1}, r"2 images in one request; at most 1 are allowed"),
        ({"max_bytes": 50}, r"row 0: image: \d+ bytes; at most 50 are allowed"),
        ({"max_pixels": 1499}, r"row 0: image: 50 x 30 pixels; at most 1499 are allowed"),
        ({"max_classes": 1}, r"row 0: classes: 2 names; at most 1 are allowed"),
        ({"max_names": 2}, r"row 0: classes: 3 names with synonyms; at most 2 are allowed"),
        ({"max_characters": 2}, r"row 0: classes: a name of 3 characters; at most 2 are allowed"),
    ],
)
@pytest.mark.parametrize("form", ["bytes", "base64"])
def test_request_beyond_a_limit_is_rejected(limited, limits, message, form):
    image = photo(50, 30, 0)
    cell = image if form == "bytes" else base64.b64encode(image).decode()
    frame = pd.DataFrame({"image": [cell] * 2, "classes": ["a|one,b"] * 2})
    with pytest.raises(MlflowException, match=message):
        limited(**limits).predict(None, frame)
    assert len(limited(**dict.fromkeys(limits, 10**6)).predict(None, frame)) == 2


@pytest.mark.parametrize("classes", [",".join(map(str, range(300_000))), "|".join(map(str, range(300_000))), "a" * 3_000_000])
def test_names_beyond_the_limits_are_rejected_before_parsing(model, classes, monkeypatch):
    loaded = model.unwrap_python_model()
    monkeypatch.setitem(type(loaded)._segment.__globals__, "parse_names", lambda text: pytest.fail("parsed"))
    with pytest.raises(MlflowException, match=r"row 0: classes: .* are allowed"):
        loaded.predict(None, pd.DataFrame({"image": [photo(20, 20, 2)], "classes": [classes]}))


def test_oversized_image_is_rejected_before_decoding(model):
    """A few hundred bytes whose header promises gigabytes of pixels."""
    header = photo(1, 1, 0)[:16] + struct.pack(">II", 60_000, 60_000) + bytes([8, 2, 0, 0, 0])
    bomb = header + struct.pack(">I", zlib.crc32(header[12:29])) + photo(1, 1, 0)[33:]
    with pytest.raises(MlflowException, match=r"row 0: (unreadable )?image: .*(pixels|exceeds limit)"):
        model.unwrap_python_model().predict(None, pd.DataFrame({"image": [bomb], "classes": ["a,b"]}))


def test_limits_of_the_environment_take_precedence(monkeypatch):
    assert Limits.load({}) == Limits()
    assert Limits.load({"max_pixels": 9, "max_classes": 3}) == Limits(max_pixels=9, max_classes=3)
    monkeypatch.setenv("PIXELCLIP_SERVE_MAX_PIXELS", "7")
    assert Limits.load({"max_pixels": 9}).max_pixels == 7
    for found in ("many", "0"):
        monkeypatch.setenv("PIXELCLIP_SERVE_MAX_PIXELS", found)
        with pytest.raises(ValueError, match=rf"PIXELCLIP_SERVE_.*max_pixels: .*found '{found}'"):
            Limits.load({})
    monkeypatch.delenv("PIXELCLIP_SERVE_MAX_PIXELS")
    with pytest.raises(ValueError, match="unknown setting 'max_pixel', did you mean 'max_pixels'"):
        Limits.load({"max_pixel": 9})


def test_concurrent_requests_with_different_classes_do_not_mix(model):
    """MLflow's server handles requests in threads."""
    loaded, image = model.unwrap_python_model(), photo(20, 20, 2)

    def ask(classes: str) -> list[str]:
        found = [loaded.predict(None, pd.DataFrame({"image": [image], "classes": [classes]})) for _ in range(12)]
        return [row["label_map"] for frame in found for row in frame.to_dict("records")]

    lists = ["a,b", "c,d,e", "f,g,h,i", "j,k"]
    alone = [ask(classes)[0] for classes in lists]
    with ThreadPoolExecutor(len(lists)) as pool:
        together = list(pool.map(ask, lists))
    assert together == [[one] * 12 for one in alone]


def test_at_most_max_parallel_images_are_segmented_at_the_same_time(limited, monkeypatch):
    loaded, running, most, lock = limited(max_parallel=3), 0, 0, threading.Lock()

    def segment(*_: object) -> dict[str, str]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
        raise ValueError("bad row")  # which must free its place

    monkeypatch.setattr(loaded, "_segment", segment)
    frame = pd.DataFrame({"image": [photo(9, 9, 0)], "classes": ["a,b"]})

    def ask(_: int) -> None:
        with pytest.raises(MlflowException, match="row 0: bad row"):
            loaded.predict(None, frame)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(ask, range(24)))
    assert most == 3


def test_base64_equals_bytes(model):
    image = photo(20, 20, 2)
    loaded = model.unwrap_python_model()  # MLflow may pass the text of an HTTP request on undecoded
    frames = [pd.DataFrame({"image": [data], "classes": ["a,b"]}) for data in (image, base64.b64encode(image).decode())]
    first, second = (loaded.predict(None, frame) for frame in frames)
    assert first.equals(second)


@pytest.mark.parametrize(
    ("image", "classes", "message"),
    [
        (b"no image", "a,b", "row 1: unreadable image"),
        ("not base64!", "a,b", "row 1: image: neither bytes nor base64"),
        ("é", "a,b", "row 1: "),
        (None, "a,,b", "row 1: classes: blank class name at position 2"),
    ],
)
def test_invalid_row_is_named(model, image, classes, message):
    good = photo(20, 20, 2)
    frame = pd.DataFrame({"image": [good, good if image is None else image], "classes": ["a,b", classes]})
    with pytest.raises(MlflowException, match=message):
        model.unwrap_python_model().predict(None, frame)


@pytest.mark.parametrize(("cell", "found"), [(None, "nothing"), (float("nan"), "nothing"), ({"a": 1}, "dict"), (5, "int")])
@pytest.mark.parametrize(("column", "expected"), [("image", "bytes or base64"), ("classes", "text or a list of names")])
def test_cell_of_the_wrong_type_is_named(model, column, expected, cell, found):
    rows = {"image": [photo(20, 20, 2)] * 2, "classes": ["a,b"] * 2}
    rows[column][1] = cell
    with pytest.raises(MlflowException, match=f"row 1: {column}: expected {expected}, found {found}"):
        model.predict(pd.DataFrame(rows))


@contextmanager
def serving_process(logged: Path, log: Path, **environment: str) -> Iterator[tuple[str, services.Server]]:
    """Start a real `mlflow models serve`; yield the address of its predictions, and the process."""
    (port,) = services.free_ports(1)
    words = f"-m mlflow models serve -m {logged} --env-manager local --host 127.0.0.1 --port {port}".split()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where MLflow finds its web server
    address = f"http://127.0.0.1:{port}"
    ready = partial(services.get, f"{address}/ping")
    server = services.Server("serving", [sys.executable, *words], log, ready, os.environ | {"PATH": path} | environment)
    with services.running(server):
        server.wait()
        yield f"{address}/invocations", server


@pytest.fixture(scope="module")
def served(logged, tmp_path_factory) -> Iterator[str]:
    """Address of a real server with one limit in its environment."""
    log = tmp_path_factory.mktemp("served") / "server.log"
    with serving_process(logged, log, PIXELCLIP_SERVE_MAX_PIXELS="2000") as (address, _):
        yield address


def peak_memory(group: int) -> float:
    """Return the sum of the peak resident memory of a process group's processes, in MB."""
    peaks = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # the process has just ended
            if os.getpgid(int(folder.name)) == group:
                peaks.append(int(re.search(r"VmHWM:\s*(\d+)", (folder / "status").read_text())[1]) / 1000)
    return sum(peaks)


@pytest.mark.slow
def test_memory_of_the_server_is_bounded_by_two_images(logged, folder, tmp_path):
    """200 requests at once: 50 bombs of 400 megapixels, 50 images above the limit, 50 of 16 megapixels, 50 small ones."""
    names, small, large = ["dog, puppy", "grass", "sky"], photo(50, 30, 0), photo(4000, 4000, 1)
    predictor = Predictor.load(folder, "cpu")
    right = {image: predictor(decoded(image), names).labels for image in (small, large)}
    bombs = [bomb("ICO", 20_000), bomb("TIFF", 20_000)]
    images = [image for number in range(50) for image in (bombs[number % 2], photo(4001, 4000, 2), large, small)]
    environment = {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "1200"}
    with serving_process(logged, tmp_path / "server.log", **environment) as (address, server):
        for image in (small, large):  # the memory of one request
            assert ask(address, [(image, "dog|puppy,grass,sky")])[0] == 200
        alone = peak_memory(server.process.pid)
        with ThreadPoolExecutor(len(images)) as pool:
            answers = list(pool.map(lambda image: ask(address, [(image, "dog|puppy,grass,sky")], seconds=1200), images))
        together = peak_memory(server.process.pid)
    print(f"peak memory: {alone:.0f} MB for one request at a time, {together:.0f} MB for 200 at once")
    for image, (status, answer) in zip(images, answers, strict=True):
        assert status == (200 if image in right else 400), answer
        if image in right:
            assert np.array_equal(np.asarray(decoded(answer["predictions"][0]["label_map"])), right[image])
    assert together < alone + 1500  # a second image of 16 megapixels


@pytest.mark.services
def test_real_server_predicts_over_http(served, folder):
    image = photo(50, 30, 0)
    status, result = ask(served, [(image, "dog|puppy,grass,sky"), (image, "a,b")], overlay=True)
    assert status == 200
    first, second = result["predictions"]
    assert first["classes"] == ["dog, puppy", "grass", "sky"] and second["classes"] == ["a", "b"]
    expected = Predictor.load(folder, "cpu")(decoded(image), ["dog, puppy", "grass", "sky"])
    assert np.array_equal(np.asarray(decoded(first["label_map"])), expected.labels)
    assert np.array_equal(np.asarray(decoded(first["overlay"])), np.asarray(overlay(decoded(image), expected)))
    assert len(first["shares"]) == len(first["scores"]) == 3


@pytest.mark.services
@pytest.mark.parametrize(
    ("image", "classes", "message"),
    [
        (b"no image", "a,b", "row 0: unreadable image: cannot identify image file"),
        (photo(50, 41, 0), "a,b", "row 0: image: 50 x 41 pixels; at most 2000 are allowed"),
        (photo(50, 30, 0), "a,,b", "row 0: classes: blank class name at position 2"),
    ],
)
def test_real_server_reports_the_invalid_row(served, image, classes, message):
    status, result = ask(served, [(image, classes)])
    assert status == 400
    assert message in result["message"] and "Traceback" not in json.dumps(result)


def test_request_without_rows_returns_no_rows(model):
    results = model.unwrap_python_model().predict(None, pd.DataFrame({"image": [], "classes": []}))
    assert len(results) == 0 and list(results.columns) == COLUMNS


def test_logged_model_contains_no_pickle(logged):
    files = [path for path in logged.rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in files)
    for path in files:
        assert path.suffix in (".safetensors", ".json", ".py", ".yaml", ".yml", ".txt", "")
        assert path.suffix != "" or path.name == "MLmodel"
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # a pickle, or torch's zip with one inside
