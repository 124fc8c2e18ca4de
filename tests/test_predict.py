"""Segmentation of many images: files, COCO and Label Studio, sources, parts, kills, bad images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from helpers import fake_data, s3_sources, tiny
from helpers.command_line import pixelclip  # noqa: F401
from pixelclip import api, predict
from pixelclip.data import image_sources
from pixelclip.data.image_sources import check_output, list_photos
from pixelclip.inference.prediction import INFERENCE
from pixelclip.inference.prediction_files import brush_rle
from pixelclip.inference.predictor import Predictor
from pixelclip.storage import cache
from pixelclip.storage.files import write_json
from pixelclip.storage.s3 import UnreachableError

NAMES = ["dog|puppy", "grass", "sky", "traffic light"]
WITH_COMMAS = ["dog, puppy", "grass", "sky", "traffic light"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("predict")
    return tiny.model_folder(base / "model", tiny.clip_folder(base / "clip"), change=0.2)


def image_bytes(number: int, kind: str = "JPEG") -> bytes:
    return fake_data.encoded(fake_data.pixels(24 + number % 3, 32, number), kind)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Write eleven images and one damaged file; names repeat in subfolders and with another suffix."""
    files = {
        f"{folder}{number}.jpg": image_bytes(number + shift) for shift, folder in ((0, ""), (5, "a/")) for number in range(5)
    }
    files |= {"a/0.png": image_bytes(20, "PNG"), "b/0.jpg": b"no image", "notes.txt": b"mine"}
    return fake_data.write_files(tmp_path / "photos", files)


def run(photos: object, model: Path, out: Path, **settings) -> dict[str, float]:
    return api.predict(str(photos), NAMES, model, out, **{"device": "cpu", "max_bad_share": 0.2, **settings})


def content(folder: Path, *ignored: str) -> dict[str, bytes]:
    """Read all files of an output; provenance has times and paths, and parts have other records."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in ("provenance.json", *ignored)}


def labels_of_coco(file: Path) -> dict[str, np.ndarray]:
    """Rebuild the label maps from a COCO dataset with pycocotools; check box and area of every annotation."""
    coco, maps = COCO(file), {}
    for image in coco.loadImgs(coco.getImgIds()):
        labels = np.full((image["height"], image["width"]), -1)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"])):
            mask = coco.annToMask(annotation).astype(bool)
            rows, columns = np.nonzero(mask)
            assert annotation["area"] == mask.sum() > 0 and (labels[mask] == -1).all()
            assert annotation["bbox"] == [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            labels[mask] = annotation["category_id"]
        maps[image["file_name"]] = labels
    return maps


def test_folder_gives_label_maps_overlays_and_a_coco_dataset(photos, model, tmp_path, capsys):
    assert run(photos, model, tmp_path / "out") == {"images": 11, "bad_images": 1}
    printed = capsys.readouterr()
    assert "b/0.jpg: unreadable image" in printed.out and "1 of 12 samples cannot be used" in printed.out
    assert "1 files of" in printed.out  # notes.txt
    assert "images/s" in printed.err
    expected = {}
    for path in sorted(photos.rglob("*.*g")):
        if path.parent.name != "b":
            name = path.relative_to(photos).as_posix()
            with Image.open(path) as image:
                expected[name] = Predictor.load(model, "cpu")(image, WITH_COMMAS).labels
    found = labels_of_coco(tmp_path / "out" / "predictions.json")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    for name, labels in expected.items():
        stem = name if name in ("a/0.jpg", "a/0.png") else name.removesuffix(".jpg")
        with Image.open(tmp_path / "out" / "labels" / f"{stem}.png") as image:
            assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
        assert (tmp_path / "out" / "overlays" / f"{stem}.jpg").is_file()
    document = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert document["categories"] == [{"id": i, "name": name} for i, name in enumerate(WITH_COMMAS)]
    assert [bad.partition(":")[0] for bad in json.loads((tmp_path / "out" / "bad_images.json").read_text())] == ["b/0.jpg"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("labels", "overlays", "predictions.json", "bad_images.json", "metrics.json", "provenance.json")
    }


def test_finished_result_is_reused(photos, model, tmp_path, capsys):
    run(photos, model, tmp_path / "out", overlays=False)
    assert not (tmp_path / "out" / "overlays").exists()
    run(photos, model, tmp_path / "out", overlays=False, max_bad_share=0.5)
    assert "predict: reused" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"different inputs or settings \(predict.quality 'fast' → 'best'\)"):
        run(photos, model, tmp_path / "out", overlays=False, quality="best")


def test_same_weights_of_another_size_are_another_model(photos, model, tmp_path):
    registered = shutil.copytree(model, tmp_path / "registered")
    for number, side in enumerate((tiny.SIDE, 2 * tiny.SIDE)):
        write_json(registered / INFERENCE, {"shortest_edge": 0, "longest_edge": 0, "side": side})
        if number:
            with pytest.raises(ValueError, match="different inference"):
                run(photos, registered, tmp_path / "out", overlays=False)
        else:
            run(photos, registered, tmp_path / "out", overlays=False)


@pytest.mark.parametrize("count", [2, 3])
def test_merged_parts_equal_a_run_without_parts(photos, model, tmp_path, count):
    run(photos, model, tmp_path / "whole", label_studio=True)
    for number in range(1, count + 1):
        options = {"part": f"{number}/{count}", "label_studio": True, "max_bad_share": 0.3}
        run(photos, model, tmp_path / "parts" / f"{number}-of-{count}", **options)
    assert api.merge(tmp_path / "parts", tmp_path / "merged") == {"images": 11, "bad_images": 1}
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_a_part_reads_only_its_own_images_and_the_names_and_sizes_of_all(photos):
    def inputs(part: str) -> dict[str, str]:
        return {name: described["md5"] for name, described in list_photos(str(photos), part).inputs.items()}

    first, second = inputs("1/2"), inputs("2/2")
    assert first["images"] == second["images"] and first["part"] != second["part"]
    last = photos / "b" / "0.jpg"
    last.write_bytes(b"other..."[: last.stat().st_size])  # the same size
    assert inputs("1/2") == first
    assert inputs("2/2")["images"] == first["images"] and inputs("2/2")["part"] != second["part"]
    last.write_bytes(b"longer than before")
    assert inputs("1/2")["images"] != first["images"] and inputs("1/2")["part"] == first["part"]


def test_parts_of_a_folder_that_changed_between_them_are_not_merged(photos, model, tmp_path):
    run(photos, model, tmp_path / "parts" / "1", part="1/2", max_bad_share=0.4)
    (photos / "c.jpg").write_bytes(image_bytes(30))
    run(photos, model, tmp_path / "parts" / "2", part="2/2", max_bad_share=0.4)
    with pytest.raises(ValueError, match="contains parts from different runs"):
        api.merge(tmp_path / "parts", tmp_path / "merged")


def test_missing_part_and_other_folders_are_not_merged(photos, model, tmp_path):
    run(photos, model, tmp_path / "parts" / "one", part="1/2")
    with pytest.raises(ValueError, match="but not 2/2"):
        api.merge(tmp_path / "parts", tmp_path / "merged")
    with pytest.raises(ValueError, match="contains no parts of a prediction"):
        api.merge(photos, tmp_path / "merged")
    with pytest.raises(ValueError, match="there are 12 images, so at most 12 parts are possible"):
        run(photos, model, tmp_path / "out", part="1/13")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_killed_run_continues_to_the_same_files(photos, model, tmp_path, monkeypatch, at):
    monkeypatch.setattr(predict, "_CHUNK", 2)
    run(photos, model, tmp_path / "whole")
    calls = iter(range(100))
    forward = Predictor.__call__

    def dying(self, *arguments):
        if next(calls) == at:
            raise Killed
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "__call__", dying)
        with pytest.raises(Killed):
            run(photos, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    counted = []
    monkeypatch.setattr(Predictor, "__call__", lambda self, *arguments: counted.append(1) or forward(self, *arguments))
    run(photos, model, tmp_path / "out")
    assert len(counted) <= 11 - at + 2
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_shards_manifest_and_glob_of_tars_give_the_same_predictions(model, tmp_path):
    for number in range(2):
        members = {f"{i}.jpg": image_bytes(i + 3 * number) for i in range(3)} | {"x.png": b"ignored kind"}
        fake_data.write_tar(tmp_path / "shards" / f"00{number}.tar", members)
    (tmp_path / "shards.txt").write_text("shards/000.tar\nshards/001.tar\n")
    (tmp_path / "shards" / "preview.jpg").write_bytes(image_bytes(0))
    sources = {"a": tmp_path / "shards", "b": tmp_path / "shards.txt", "c": tmp_path / "shards" / "*.tar"}
    for out, source in sources.items():
        assert run(source, model, tmp_path / out, max_bad_share=0.3) == {"images": 6, "bad_images": 2}
    found = labels_of_coco(tmp_path / "a" / "predictions.json")
    assert [*found] == [f"00{number}/{i}.jpg" for number in range(2) for i in range(3)]
    assert (tmp_path / "a" / "labels" / "001" / "2.png").is_file()
    for out in "bc":
        assert content(tmp_path / out, "bad_images.json") == content(tmp_path / "a", "bad_images.json")
    with pytest.raises(ValueError, match="Label Studio reads image files, not shards"):
        run(tmp_path / "shards", model, tmp_path / "d", label_studio=True)


def test_bucket_gives_what_a_folder_gives(bucket, photos, model, tmp_path):
    s3_sources.put(bucket, photos, "photos")
    s3_sources.sources(tmp_path / "shards")
    s3_sources.put(bucket, tmp_path / "shards", "shards")
    run(photos, model, tmp_path / "local")
    run("s3://data/photos", model, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert not [file for file in cache.root().rglob("*") if file.suffix in (".jpg", ".png")]
    run("s3://data/photos/a/0.png", model, tmp_path / "one")
    assert [*labels_of_coco(tmp_path / "one" / "predictions.json")] == ["0.png"]
    run(tmp_path / "shards", model, tmp_path / "of_shards")
    run("s3://data/shards", model, "s3://data/out")
    names = {one["Key"] for one in bucket.list_objects_v2(Bucket="data", Prefix="out/")["Contents"]}
    stored = {name.removeprefix("out/"): bucket.get_object(Bucket="data", Key=name)["Body"].read() for name in names}
    del stored["provenance.json"]
    assert stored == content(tmp_path / "of_shards")


def test_outage_of_the_store_is_no_bad_image_and_the_same_command_continues(bucket, photos, model, tmp_path, monkeypatch):
    s3_sources.put(bucket, photos, "photos")
    run(photos, model, tmp_path / "local")
    with monkeypatch.context() as outage:
        download = image_sources.download

        def fail_once(uri, files):
            if uri.endswith("/a/1.jpg"):
                raise UnreachableError(f"{uri}: cannot be reached")
            download(uri, files)

        outage.setattr(image_sources, "download", fail_once)
        with pytest.raises(ValueError, match="cannot be reached"):
            run("s3://data/photos", model, tmp_path / "out")
    run("s3://data/photos", model, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "local")


def test_glob_takes_what_matches(photos, model, tmp_path):
    run(photos / "**" / "[01].jpg", model, tmp_path / "out", max_bad_share=0.5)
    assert [*labels_of_coco(tmp_path / "out" / "predictions.json")] == ["0.jpg", "1.jpg", "a/0.jpg", "a/1.jpg"]


def rle_pack_decoded(data: list[int]) -> np.ndarray:
    """Decode rle-pack as its JavaScript does, bit by bit."""
    bits = "".join(f"{byte:08b}" for byte in data)
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        return int(bits[position - count : position], 2)

    total, word, sizes = read(32), read(5) + 1, [read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeated, length = read(1), read(sizes[read(2)]) + 1
        values += [read(word)] * length if repeated else [read(word) for _ in range(length)]
    return np.array(values)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (40, 60), (200, 300)])
@pytest.mark.parametrize("kind", ["random", "full", "empty", "left"])
def test_brush_is_label_studio_s_rle(size, kind):
    masks = {"random": np.random.default_rng(0).random(size) < 0.5, "full": np.ones(size, bool), "empty": np.zeros(size, bool)}
    mask = masks.get(kind, np.arange(size[1])[None].repeat(size[0], axis=0) < size[1] // 2)
    decoded = rle_pack_decoded(brush_rle(mask)).reshape(*size, 4)
    assert np.array_equal(decoded, np.repeat(mask[..., None] * 255, 4, axis=2))


def test_label_studio_tasks_equal_the_label_maps(photos, model, tmp_path):
    run(photos, model, tmp_path / "out", label_studio=True)
    tasks = json.loads((tmp_path / "out" / "label_studio.json").read_text())
    assert len(tasks) == 11 and tasks[0]["data"] == {"image": f"/data/local-files/?d={str(photos)[1:]}/0.jpg"}
    with Image.open(tmp_path / "out" / "labels" / "0.png") as image:
        labels = np.asarray(image)
    found = np.full(labels.shape, -1)
    for result in tasks[0]["predictions"][0]["result"]:
        assert (result["type"], result["original_width"], result["original_height"]) == ("brushlabels", *labels.shape[::-1])
        mask = rle_pack_decoded(result["value"]["rle"]).reshape(*labels.shape, 4)[..., 3] > 0
        found[mask] = WITH_COMMAS.index(result["value"]["brushlabels"][0])
    assert np.array_equal(found, labels)
    interface = (tmp_path / "out" / "label_studio.xml").read_text()
    assert all(f'value="{name}"' in interface for name in WITH_COMMAS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photos": "nowhere"}, "nowhere: no such image, folder, manifest of shards or glob"),
        ({"photos": "photos/*.gif"}, r"photos/\*.gif: contains no image"),
        ({"photos": "empty"}, "empty: contains no image"),
        ({"photos": "mixed"}, r"mixed: contains both images \(1.jpg\) and shards \(0.tar\)"),
        ({"max_bad_share": 0.05}, "1 of 12 samples cannot be used"),
        ({"photos": "photos/b", "max_bad_share": 1}, "none of the images can be used"),
        ({"part": "3/2"}, "part must be written i/n"),
        ({"quality": "good"}, "quality: .*'fast' or 'best'"),
        ({"out": "photos/out"}, "photos/out: predictions must not be inside the images that are read"),
        ({"photos": "s3://data/x", "out": "s3://data/x/y"}, "s3://data/x/y: predictions must not be inside .* s3://data/x;"),
        ({"photos": "s3://data/x/", "out": "s3://data/x"}, "predictions must not be inside"),
        ({"photos": "photos/**/*.jpg", "out": "photos/a/out"}, "predictions must not be inside"),
        ({"photos": "pho*/*/*.jpg", "out": "photos/out"}, "predictions must not be inside"),
        ({"colour": 1}, "unknown setting 'colour'"),
    ],
)
def test_invalid_input_is_an_error_without_a_result(photos, model, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    fake_data.write_files(tmp_path / "mixed", {"1.jpg": image_bytes(1), "0.tar": b""})
    options = {"photos": photos, "out": tmp_path / "out"} | change
    with pytest.raises(ValueError, match=message):
        run(options.pop("photos"), model, options.pop("out"), **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "out"), [("*.jpg", "out"), ("photos/*.jpg", "photos/out"), ("a/**", "b"), ("s3://data/x", "s3://data/xy")]
)
def test_output_beside_what_is_read_is_accepted(tmp_path, monkeypatch, source, out):
    monkeypatch.chdir(tmp_path)
    check_output(source, out)


def test_command_writes_a_folder_and_one_photo_still_a_file(pixelclip, photos, model, tmp_path):  # noqa: F811
    words = ("--classes", "dog|puppy,grass,sky,traffic light", "--model", model, "--device", "cpu")
    code, _, err = pixelclip("predict", photos, *words, "--out", tmp_path / "out", "--no-overlays", "--max-bad-share", 0.2)
    assert code == 0, err
    code, _, err = pixelclip("predict", photos / "0.jpg", *words, "--out", tmp_path / "one.png", "--quality", "best")
    assert code == 0, err
    best = api.load(model, "cpu")(photos / "0.jpg", NAMES, "best").labels
    with Image.open(tmp_path / "one.png") as image:
        assert np.array_equal(np.asarray(image), best)
    code, _, err = pixelclip("predict", photos, *words, "--out", tmp_path / "one.png")
    assert code == 2 and "photos: is a folder; its results need a folder, too" in err
    for number in (1, 2):
        part = ("--part", f"{number}/2", "--no-overlays", "--max-bad-share", 0.4)
        assert pixelclip("predict", photos, *words, "--out", tmp_path / "parts" / str(number), *part)[0] == 0
    assert pixelclip("merge", tmp_path / "parts", "--out", tmp_path / "merged")[0] == 0
    assert content(tmp_path / "merged") == content(tmp_path / "out")


PROCESS = """
import sys
from pixelclip.cli.app import main
sys.argv = ["pixelclip", *sys.argv[1:]]
main()
"""


def start(*words: object) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # faster for a tiny model
    command = [sys.executable, "-c", PROCESS, *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


def finished(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process to end without an error; return what it printed."""
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()
    return out.decode()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2000_images_with_a_kill_and_in_parts_equal_an_undisturbed_run(model, tmp_path):
    photos = fake_data.write_files(
        tmp_path / "photos", {f"{number % 7}/{number}.jpg": image_bytes(number) for number in range(2000)}
    )
    words = ("predict", photos, "--classes", "dog,grass,sky", "--model", model, "--device", "cpu")
    finished(start(*words, "--out", tmp_path / "whole"))
    chunks = 0
    killed = start(*words, "--out", tmp_path / "out")
    while chunks < 20:
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.05)
        chunks = len(list(tmp_path.glob(".out.*.partial/.chunks/*.jsonl")))
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert "continues an interrupted run" in finished(start(*words, "--out", tmp_path / "out"))
    for number in (1, 2, 3):
        finished(start(*words, "--out", tmp_path / "parts" / str(number), "--part", f"{number}/3"))
    api.merge(tmp_path / "parts", tmp_path / "merged")
    whole = content(tmp_path / "whole")
    assert len(whole) == 2 * 2000 + 2
    assert content(tmp_path / "out") == whole == content(tmp_path / "merged")
    maps = labels_of_coco(tmp_path / "whole" / "predictions.json")
    assert len(maps) == 2000
    for name, labels in maps.items():
        with Image.open(tmp_path / "whole" / "labels" / Path(name).with_suffix(".png")) as image:
            assert np.array_equal(np.asarray(image), labels)
