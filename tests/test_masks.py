"""Stage masks: masks against scikit-image and naive counting; unusable samples are reported."""

import io
import json
import signal
import tracemalloc
import zlib
from pathlib import Path
from threading import Event
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as rle
from skimage.segmentation import felzenszwalb as reference

from helpers import random_dino, random_sam, tiny
from helpers.fake_data import annotation, bomb, die, encoded, pixels, read_tar, turned, write_files, write_tar
from pixelclip import masks as module
from pixelclip.config import MasksConfig
from pixelclip.data.annotations import annotate, decode_masks
from pixelclip.data.shard_sources import describe_shards, list_shards
from pixelclip.mask_generators import EncodedSample
from pixelclip.mask_generators.dino import IMAGENET_MEAN, IMAGENET_STD, load_dino, segment
from pixelclip.mask_generators.felzenszwalb import felzenszwalb
from pixelclip.mask_generators.shrink import shrink_sample
from pixelclip.masks import GENERATORS, run
from pixelclip.workflow.termination import Terminated

HEIGHT, WIDTH = 24, 32
JPEG = encoded(pixels(HEIGHT, WIDTH), quality=95)
STRIPES = np.stack([np.add.outer(np.zeros(HEIGHT, int), np.arange(WIDTH)) // 8 == k for k in range(4)])
STRIPES[3, :, -1] = False  # 192, 192, 192 and 168 pixels
STRIPES[0, 0] = False  # 184


def config(**settings: object) -> MasksConfig:
    return MasksConfig(**{"workers": 0, "felzenszwalb_min_size": 10} | settings)


def masked(path: Path, key: str) -> np.ndarray:
    """Decode the masks of a sample independently: [N, H, W]."""
    entries = json.loads(read_tar(path)[f"{key}.json"])["annotations"]
    return np.stack([rle.decode(entry["segmentation"]) for entry in entries]).astype(bool)


def test_felzenszwalb_equals_scikit_image() -> None:
    image = pixels(HEIGHT, WIDTH, seed=3)
    segments = felzenszwalb(Image.fromarray(image), 100, 0.5, 10)
    assert segments.max() >= 3
    assert np.array_equal(segments, reference(image, scale=100, sigma=0.5, min_size=10))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)])
def test_tiny_image_is_one_segment(size: tuple[int, int]) -> None:
    segments = felzenszwalb(Image.new("RGB", size), 200, 0.8, 100)
    assert segments.shape == (size[1], size[0])
    assert not segments.any()


def test_annotation_describes_its_masks() -> None:
    masks = np.random.default_rng(1).random((3, 5, 9)) < 0.3
    written = annotate(masks, (9, 5), "some/key")
    assert written["image"] == {"image_id": 0, "width": 9, "height": 5, "file_name": "some/key.jpg"}
    for entry, mask in zip(written["annotations"], masks, strict=True):
        rows, columns = np.nonzero(mask)
        left, top = columns.min(), rows.min()
        assert entry["area"] == mask.sum()
        assert entry["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        x, y = entry["point_coords"][0]
        assert mask[int(y), int(x)]
    decoded = decode_masks(json.loads(json.dumps(written)))
    assert np.array_equal(decoded.transpose(2, 0, 1), masks)


def test_every_sample_gets_masks_and_keeps_its_image_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    odd = "ü b" * 40
    write_tar(shards / "0.tar", {"a.jpg": JPEG, "deep/folder/b.jpg": JPEG})
    write_tar(shards / "1.tar", {f"{odd}.jpg": JPEG})
    metrics = run(shards, tmp_path / "out", config())
    first, second = (read_tar(tmp_path / "out" / name) for name in ("0.tar", "1.tar"))
    assert list(first) == ["a.jpg", "a.json", "deep/folder/b.jpg", "deep/folder/b.json"]
    assert list(second) == [f"{odd}.jpg", f"{odd}.json"]
    assert {first["a.jpg"], second[f"{odd}.jpg"]} == {JPEG}
    found = masked(tmp_path / "out" / "0.tar", "a")
    assert (found.sum(0) == 1).all()
    assert metrics == {"images": 3.0, "masks": 3.0 * len(found), "masks_per_image": float(len(found)), "bad_images": 0.0}
    summary = f"masks: 3 images with {len(found)}.0 masks per image by generator felzenszwalb, 0 unusable\n"
    assert capsys.readouterr().out.endswith(summary)
    assert run(shards, tmp_path / "out", config()) == metrics


def test_killed_worker_is_a_one_line_error_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "in"
    for number in range(2):
        write_tar(shards / f"{number}.tar", {f"{number}.jpg": JPEG})
    mask_shard = module._mask_shard

    def kill_in_the_second(tar: Path, *others: object) -> dict[str, object]:
        monkeypatch.setattr(module, "_mask_one", die if tar.name == "1.tar" else mask_one)
        return mask_shard(tar, *others)

    mask_one = module._mask_one
    with monkeypatch.context() as patched:
        patched.setattr(module, "_mask_shard", kill_in_the_second)
        with pytest.raises(
            ValueError, match=r"^\S+1\.tar: a worker process died, .*masks\.workers below 1; the same command resumes"
        ):
            run(shards, tmp_path / "out", config(workers=1))
    monkeypatch.setattr(module, "_mask_one", mask_one)
    made = []
    monkeypatch.setattr(module, "_mask_shard", lambda tar, *others: made.append(tar.name) or mask_shard(tar, *others))
    assert run(shards, tmp_path / "out", config(workers=0))["images"] == 2
    assert made == ["1.tar"]


def test_two_workers_write_the_same_bytes_as_none(tmp_path: Path) -> None:

    images = {f"{i}.jpg": encoded(pixels(HEIGHT, WIDTH, seed=i)) for i in range(5)} | {"bad.jpg": b"x"}
    shards = write_tar(tmp_path / "shards" / "0.tar", images).parent
    metrics = [run(shards, tmp_path / f"out{n}", config(workers=n, max_bad_share=0.2)) for n in (0, 2)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["bad_images"] == 1
    assert (tmp_path / "out0" / "0.tar").read_bytes() == (tmp_path / "out2" / "0.tar").read_bytes()


@pytest.mark.parametrize("settings", [{}, {"shortest_edge": 8}, {"generator": "given"}])
@pytest.mark.parametrize("kind", ["ICO", "TIFF"])
def test_bomb_is_a_bad_sample(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict) -> None:
    monkeypatch.setenv("PIXELCLIP_MAX_PIXELS", "1000000")
    masks = annotation(STRIPES) if settings.get("generator") == "given" else b""
    members = {"a.jpg": JPEG, "a.json": masks, "b.jpg": bomb(kind, 1001), "b.json": masks}
    shards = write_tar(tmp_path / "shards" / "0.tar", {name: data for name, data in members.items() if data}).parent
    assert run(shards, tmp_path / "out", config(max_bad_share=0.5, **settings))["bad_images"] == 1
    reason = "unreadable image" if kind == "ICO" else "image: 1001 x 1001 pixels; at most 1000000 are allowed"
    assert f"0.tar: b: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["shard", "folder"])
def test_given_masks_are_copied_unchanged(tmp_path: Path, source: str) -> None:
    files = {"x/a.json": annotation(STRIPES)}
    shards = write_tar(tmp_path / "shards" / "0.tar", {"./x/a.jpg": JPEG} | (files if source == "shard" else {})).parent
    folder = str(write_files(tmp_path / "given", files)) if source == "folder" else ""
    metrics = run(shards, tmp_path / "out", config(generator="given", given_folder=folder))
    assert metrics["masks"] == 4
    assert np.array_equal(masked(tmp_path / "out" / "0.tar", "x/a"), STRIPES)


@pytest.mark.parametrize("area", ["right", "missing", "nonsense", "wrong", "negative", "infinite"])
def test_only_the_largest_masks_are_kept(tmp_path: Path, area: str) -> None:
    document = json.loads(annotation(STRIPES))
    for number, entry in enumerate(document["annotations"] if area != "right" else []):
        entry["area"] = {"wrong": number * 7, "negative": -entry["area"], "infinite": 10**400}.get(area, "large")
        if area == "missing":
            del entry["area"]
    data = json.dumps(document).encode()
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG, "a.json": data}).parent
    run(shards, tmp_path / "out", config(generator="given", max_masks=3))
    assert np.array_equal(masked(tmp_path / "out" / "0.tar", "a"), STRIPES[[1, 2, 0]])
    written = json.loads(read_tar(tmp_path / "out" / "0.tar")["a.json"])["annotations"]
    assert [entry["area"] for entry in written] == [192, 192, 184]


def test_empty_masks_are_dropped(tmp_path: Path) -> None:
    none = np.zeros_like(STRIPES[:1])
    members = {"a.jpg": JPEG, "a.json": annotation(np.concatenate([none, STRIPES, none])), "b.jpg": JPEG}
    shards = write_tar(tmp_path / "shards" / "0.tar", members | {"b.json": annotation(none)}).parent
    metrics = run(shards, tmp_path / "out", config(generator="given", max_bad_share=0.5))
    assert (metrics["images"], metrics["masks"], metrics["bad_images"]) == (1, 4, 1)
    assert np.array_equal(masked(tmp_path / "out" / "0.tar", "a"), STRIPES)


@pytest.mark.parametrize("absolute", [False, True])
def test_given_folder_is_not_left_by_the_name_of_a_member(tmp_path: Path, capsys, absolute: bool) -> None:
    write_files(tmp_path, {"outside.json": annotation(STRIPES), "given/good.json": annotation(STRIPES)})
    name = f"{tmp_path}/outside" if absolute else "../outside"
    shards = write_tar(tmp_path / "shards" / "0.tar", {"good.jpg": JPEG, f"{name}.jpg": JPEG}).parent
    settings = {"generator": "given", "given_folder": str(tmp_path / "given"), "max_bad_share": 0.5}
    assert run(shards, tmp_path / "out", config(**settings))["bad_images"] == 1
    assert set(read_tar(tmp_path / "out" / "0.tar")) == {"good.jpg", "good.json"}
    assert f"0.tar: {name}.jpg: not read: a member's name must be relative" in capsys.readouterr().out


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_of_foreign_tars_are_turned_upright(tmp_path: Path, orientation: int) -> None:
    stored = pixels(HEIGHT, WIDTH)
    photo = encoded(stored, exif=turned(orientation), quality=95)
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": photo}).parent
    run(shards, tmp_path / "out", config())
    written = read_tar(tmp_path / "out" / "0.tar")
    image = Image.open(io.BytesIO(written["a.jpg"]))
    assert image.getexif().get(0x0112, 1) == 1
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(photo))), int)
    assert np.abs(np.asarray(image, int) - upright).max() <= 12  # JPEG encoded twice
    assert masked(tmp_path / "out" / "0.tar", "a").shape[1:] == upright.shape[:2]
    assert (written["a.jpg"] == photo) == (orientation == 1)


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_given_masks_of_a_turned_image_are_refused(tmp_path: Path, capsys, orientation: int) -> None:
    members = {"good.jpg": JPEG, "good.json": annotation(STRIPES), "odd.json": annotation(STRIPES)}
    members["odd.jpg"] = encoded(pixels(HEIGHT, WIDTH), exif=turned(orientation))
    shards = write_tar(tmp_path / "shards" / "0.tar", members).parent
    metrics = run(shards, tmp_path / "out", config(generator="given", max_bad_share=0.5))
    assert (metrics["images"], metrics["bad_images"]) == (1, 1)
    assert f"odd: EXIF orientation {orientation} turns this image, but not its masks" in capsys.readouterr().out


def uncompressed() -> bytes:
    segmentation = {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}
    return json.dumps({"annotations": [{"segmentation": segmentation}]}).encode()


BAD = {
    "wrong size": (annotation(STRIPES[:, 1:]), "mask has size 32x23, but the image is 32x24"),
    "no JSON": (b"{", "unreadable JSON"),
    "uncompressed": (uncompressed(), "counts must be a compressed RLE"),
    "empty": (b'{"annotations": []}', "no mask found"),
    "foreign": (b'{"shapes": []}', "not in SA-1B's annotation format"),
    "zero bytes": (b"", "no JSON with masks beside the image"),
    "missing": (None, "no JSON with masks beside the image"),
    "damaged": (annotation(STRIPES).replace(b'"counts": "', b'"counts": "ooooo'), "damaged RLE"),
}


@pytest.mark.parametrize("kind", BAD)
def test_sample_without_usable_masks_is_skipped_and_reported(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, reason = BAD[kind]
    members = {"good.jpg": JPEG, "good.json": annotation(STRIPES), "odd.jpg": JPEG}
    shards = write_tar(tmp_path / "shards" / "0.tar", members | ({} if data is None else {"odd.json": data})).parent
    metrics = run(shards, tmp_path / "out", config(generator="given", max_bad_share=0.5))
    assert (metrics["images"], metrics["bad_images"]) == (1, 1)
    assert list(read_tar(tmp_path / "out" / "0.tar")) == ["good.jpg", "good.json"]
    output = capsys.readouterr().out
    assert "1 of 2 samples cannot be used" in output and "0.tar: odd: " in output and reason in output


def test_missing_files_of_the_given_folder_are_reported(tmp_path: Path) -> None:
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG}).parent
    folder = write_files(tmp_path / "given", {"b.json": b""})
    with pytest.raises(
        ValueError, match=r"masks\.given_folder: .*given/a\.json: no such file, and none .* of the 1 samples of .*0\.tar"
    ):
        run(shards, tmp_path / "out", config(generator="given", given_folder=str(folder)))
    assert not [*tmp_path.glob(".out*")]  # before any work
    write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG, "b.jpg": JPEG})
    write_files(folder, {"b.json": annotation(STRIPES)})
    with pytest.raises(ValueError, match=r"(?s)1 of 2 .*given/a\.json: No such file"):
        run(shards, tmp_path / "out", config(generator="given", given_folder=str(folder)))
    with pytest.raises(ValueError, match=r"masks\.given_folder .*none: no such folder"):
        run(shards, tmp_path / "out", config(generator="given", given_folder=str(tmp_path / "none")))


def test_too_many_bad_samples_stop_the_stage_without_output(tmp_path: Path) -> None:
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG, "b.jpg": b"x"}).parent
    with pytest.raises(ValueError, match=r"(?s)1 of 2 .*b: unreadable image.*5\.0% \(masks\.max_bad_share\)"):
        run(shards, tmp_path / "out", config())
    assert not (tmp_path / "out").exists()


def damaged(folder: Path, bad: list[int]) -> Path:
    """Write one shard of 10 samples per entry of `bad`, the number of its samples that are not images."""
    for number, count in enumerate(bad):
        members = {f"{number}-{i}.jpg": bytes(len(JPEG)) if i < count else JPEG for i in range(10)}
        write_tar(folder / f"{number}.tar", members)
    return folder


def test_finished_shards_are_kept_when_a_low_limit_stops_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, made, plain = damaged(tmp_path / "shards", [1, 3, 0, 0]), [], module._mask_shard
    monkeypatch.setattr(module, "_mask_shard", lambda tar, *rest: made.append(tar.name) or plain(tar, *rest))
    with pytest.raises(ValueError, match=r"(?s)masks: 4 of 20 .*the limit is 5\.0% \(masks\.max_bad_share\)"):
        run(shards, tmp_path / "out", config())  # 4 of 40 exceed the limit even if all others are good
    assert made == ["0.tar", "1.tar"]
    metrics = run(shards, tmp_path / "out", config(max_bad_share=0.1))
    assert (metrics["images"], metrics["bad_images"]) == (36, 4)
    assert made == ["0.tar", "1.tar", "2.tar", "3.tar"]
    assert run(shards, tmp_path / "out", config(max_bad_share=0.2)) == metrics
    with pytest.raises(ValueError, match=r"(?s)masks: 4 of 40 .*0-0: unreadable image.*the limit is 9\.0%"):
        run(shards, tmp_path / "out", config(max_bad_share=0.09))


def test_one_bad_shard_among_good_ones_does_not_stop_the_stage(tmp_path: Path) -> None:
    metrics = run(damaged(tmp_path / "shards", [2, 0, 0, 0]), tmp_path / "out", config())
    assert metrics["bad_images"] == 2


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": b"x"}).parent
    with pytest.raises(ValueError, match="none of the images could be masked"):
        run(shards, tmp_path / "out", config(max_bad_share=1))
    assert not (tmp_path / "out").exists()


def test_truncated_shard_yields_its_complete_samples(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG, "b.jpg": JPEG})
    tar.write_bytes(tar.read_bytes()[: 512 + len(JPEG) // 512 * 512 + 512 + 600])
    metrics = run(tar.parent, tmp_path / "out", config(max_bad_share=0.9))
    assert metrics["images"] == 1 and metrics["bad_images"] >= 1
    assert list(read_tar(tmp_path / "out" / "0.tar")) == ["a.jpg", "a.json"]


def test_shards_with_the_same_name_are_rejected(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_tar(tmp_path / name / "0.tar", {f"{name}.jpg": JPEG})
    manifest = write_files(tmp_path, {"list.txt": b"one/0.tar\ntwo/0.tar\n"}) / "list.txt"
    with pytest.raises(ValueError, match=r"list\.txt: .* duplicates: 0\.tar"):
        run(manifest, tmp_path / "out", config())


@pytest.mark.parametrize("workers", [0, 2])
def test_signal_keeps_the_images_masked_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, workers) -> None:
    images = {f"{i}.jpg": encoded(pixels(HEIGHT, WIDTH, seed=i)) for i in range(6)} | {"bad.jpg": b"x"}
    write_tar(tmp_path / "shards" / "0.tar", {f"a{name}": data for name, data in images.items()})
    shards = write_tar(tmp_path / "shards" / "1.tar", dict(sorted(images.items()))).parent
    settings = config(workers=workers, max_bad_share=0.2)
    undisturbed = run(shards, tmp_path / "whole", settings)
    read, keys = module._read, []

    def read_or_stop(tar: Path, member: module.Member) -> module.EncodedSample:
        keys.append(member.key)
        if member.key == "3" and stop:
            signal.raise_signal(signal.SIGTERM)
        return read(tar, member)

    monkeypatch.setattr(module, "_read", read_or_stop)
    stop = True
    with pytest.raises(Terminated) as ended:
        run(shards, tmp_path / "out", settings)
    assert ended.value.code == 143
    done = keys.index("3") - keys.index("0") + 1 if workers == 0 else 1  # with workers all were read before the first result
    assert f"masks: stopped by SIGTERM after {done} of 7 images of {shards}/1.tar; the same command" in capsys.readouterr().out
    stop = False
    keys.clear()
    assert run(shards, tmp_path / "out", settings) == undisturbed
    assert len(keys) == 7 - done
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    for name in ("0.tar", "1.tar", "1.summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def stop_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, after: bool) -> None:
    """Send SIGTERM before or after a call of a function, at once even where signals are deferred."""
    original, calls = getattr(owner, name), iter(range(100))

    def stopped(*given: object) -> object:
        if (now := next(calls) == call) and not after:
            raise Terminated(signal.SIGTERM)
        result = original(*given)
        if now and after:
            raise Terminated(signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, stopped)


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [(Path, "replace", 1, True), (module.ShardWriter, "add", 3, False), (module.ShardWriter, "add", 3, True)],
    ids=["after the shard has its name", "between image and masks", "after a sample"],
)
def test_signal_elsewhere_repeats_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner, name, call, after) -> None:
    members = {f"{i}.jpg": encoded(pixels(HEIGHT, WIDTH, seed=i)) for i in range(3)}
    shards = write_tar(tmp_path / "shards" / "0.tar", members).parent
    undisturbed = run(shards, tmp_path / "whole", config())
    with monkeypatch.context() as patch:
        stop_at(patch, owner, name, call, after)
        with pytest.raises(Terminated):
            run(shards, tmp_path / "out", config())
    assert run(shards, tmp_path / "out", config()) == undisturbed
    assert (tmp_path / "out" / "0.tar").read_bytes() == (tmp_path / "whole" / "0.tar").read_bytes()


def test_resume_keeps_the_shards_finished_before_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    for i in range(2):
        write_tar(shards / f"{i}.tar", {f"{i}{part}.jpg": encoded(pixels(HEIGHT, WIDTH, seed=i)) for part in "ab"})
    undisturbed = run(shards, tmp_path / "undisturbed", config())
    calls = 0

    def killed_in_the_fourth(*arguments: object) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return felzenszwalb(*arguments)

    monkeypatch.setattr("pixelclip.mask_generators.felzenszwalb.felzenszwalb", killed_in_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "out", config())
    assert not (tmp_path / "out").exists()
    assert run(shards, tmp_path / "out", config()) == undisturbed
    assert calls == 4 + 2  # only the second shard, from its start
    for name in ("0.tar", "1.tar"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_every_generator_is_dispatched_by_name(tmp_path: Path) -> None:
    assert set(GENERATORS) == set(get_args(MasksConfig.model_fields["generator"].annotation))
    shards = write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": JPEG}).parent
    with pytest.raises(KeyError, match="other"):
        run(shards, tmp_path / "out", config().model_copy(update={"generator": "other"}))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Save a tiny SAM, a tiny DINO and a tiny PixelCLIP with random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(random_sam.make_sam().state_dict(), folder / "sam.pth")
    torch.save(random_dino.weights(), folder / "dino.pth")
    model = tiny.model_folder(folder / "model", tiny.clip_folder(folder / "clip"))
    return {name: str(folder / f"{name}.pth") for name in ("sam", "dino")} | {"model": str(model)}


LOOSE = {"sam_points_per_side": 5, "sam_pred_iou_thresh": 0.0, "sam_stability_score_thresh": 0.1, "dino_side": 20}
LOOSE |= {"model_min_area": 10}


def sources(folder: Path, shards: int = 1) -> Path:
    """Write shards of three images of different sizes and a broken one."""
    for number in range(shards):
        members = {f"{number}{key}.jpg": encoded(pixels(30 + 9 * i, 44, 7 * number + i)) for i, key in enumerate("abc")}
        write_tar(folder / f"{number}.tar", members | {f"{number}x.jpg": JPEG[:-40]})
    return folder


@pytest.mark.parametrize("generator", ["sam", "dino", "model"])
def test_batched_generators_agree_with_single_images(generator, checkpoints, tmp_path) -> None:
    shards = sources(tmp_path / "shards")
    settings = {"generator": generator, "weights": checkpoints[generator], "max_bad_share": 0.5, "device": "cpu", **LOOSE}
    metrics = run(shards, tmp_path / "batch", config(**settings, batch_size=3))
    run(shards, tmp_path / "single", config(**settings, batch_size=1))
    assert (metrics["images"], metrics["bad_images"]) == (3, 1)
    for key in ("0a", "0b", "0c"):
        found, alone = (masked(tmp_path / name / "0.tar", key) for name in ("batch", "single"))
        assert found.shape == alone.shape
        assert (found == alone).mean() > 0.99
        if generator == "dino":
            assert (found.sum(axis=0) == 1).all()
            assert 2 <= len(found) <= 16


def test_next_batch_is_computed_while_one_is_written() -> None:
    made = [Event() for _ in range(4)]

    def batches():
        for number, event in enumerate(made[:3]):
            event.set()
            yield number
        made[3].set()
        raise ValueError("the disk is full")

    ahead = module._ahead(batches())
    for number in range(3):
        assert next(ahead) == number
        assert made[number + 1].wait(60)  # computed before it is requested
    with pytest.raises(ValueError, match="the disk is full"):
        next(ahead)


def test_dino_masks_are_its_segments_resized_to_the_image(checkpoints, tmp_path) -> None:
    fine = np.random.default_rng(0).integers(0, 256, (39, 44, 3), dtype=np.uint8)  # resizing loses most of it
    shards = write_tar(tmp_path / "shards" / "0.tar", {"0b.jpg": encoded(fine, "PNG")}).parent
    settings = {"weights": checkpoints["dino"], "dino_side": 20, "dino_clusters": 3, "device": "cpu"}
    run(shards, tmp_path / "out", config(generator="dino", **settings))
    dino = load_dino(Path(checkpoints["dino"]))
    tensor = torch.from_numpy(fine).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))

    def labels(antialias: bool) -> np.ndarray:
        small = F.interpolate(((tensor - mean) / std)[None], size=(20, 20), mode="bilinear", antialias=antialias)
        return segment(dino, small, 3, [zlib.crc32(b"0 0b")])[0].numpy()

    assert not np.array_equal(labels(antialias=True), labels(antialias=False))
    found = masked(tmp_path / "out" / "0.tar", "0b")
    wanted = np.asarray(Image.fromarray(labels(antialias=False).astype(np.uint8)).resize((44, 39), Image.Resampling.NEAREST))
    assert np.array_equal(found, np.stack([wanted == number for number in np.unique(wanted)]))


def test_weights_of_another_model_fail_early(checkpoints, tmp_path) -> None:
    shards = sources(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"dino\.pth: .*Segment Anything"):
        run(shards, tmp_path / "out", config(generator="sam", weights=checkpoints["dino"]))
    with pytest.raises(ValueError, match=r"sam\.pth: .*DINO"):
        run(shards, tmp_path / "out", config(generator="dino", weights=checkpoints["sam"]))
    with pytest.raises(ValueError, match="weights is required for generator sam or dino or model and must be empty otherwise"):
        config(generator="sam")
    assert not (tmp_path / "out").exists()


def test_dino_sets_its_own_matmul_precision(checkpoints, tmp_path, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("pixelclip.mask_generators.dino.pick_precision", lambda name, device: calls.append((name, device.type)))
    settings = {"weights": checkpoints["dino"], "device": "cpu", "max_bad_share": 0.5, **LOOSE}
    run(sources(tmp_path / "shards"), tmp_path / "out", config(generator="dino", **settings))
    assert calls == [("float32", "cpu")]


@pytest.mark.parametrize(("raised", "kind"), [(ValueError, ValueError), (torch.OutOfMemoryError, RuntimeError)])
def test_failing_generator_names_its_images(checkpoints, tmp_path, monkeypatch, raised, kind) -> None:
    def fail(*_: object) -> None:
        raise raised("out of luck")

    monkeypatch.setattr("pixelclip.mask_generators.dino.segment", fail)
    settings = {"weights": checkpoints["dino"], "device": "cpu", "max_bad_share": 0.5, **LOOSE}
    with pytest.raises(kind, match=r"shards/0\.tar: 0a, 0b, 0c: out of luck"):
        run(sources(tmp_path / "shards"), tmp_path / "out", config(generator="dino", **settings))


def test_parts_equal_the_whole_and_a_missing_part_is_reported(tmp_path) -> None:
    shards = sources(tmp_path / "shards", 5)
    run(shards, tmp_path / "whole", config(max_bad_share=0.5))
    for number in (1, 3):
        run(shards, tmp_path / "parts" / str(number), config(max_bad_share=0.5, part=f"{number}/3"))
    with pytest.raises(ValueError, match=r"parts: contains parts, but not 2/3"):
        list_shards(tmp_path / "parts")
    run(shards, tmp_path / "parts" / "2", config(max_bad_share=0.5, part="2/3"))
    found = {path.name: read_tar(path) for path in list_shards(tmp_path / "parts")}
    assert found == {path.name: read_tar(path) for path in list_shards(tmp_path / "whole")}
    assert describe_shards(tmp_path / "parts")["provenance"]["settings"]["generator"] == "felzenszwalb"
    with pytest.raises(ValueError, match="has only 5 shards, so at most 5 parts are possible"):
        run(shards, tmp_path / "other", config(part="1/6"))
    for part in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match=r"written i/n"):
            config(part=part)


def test_given_masks_are_resized_with_their_image(tmp_path) -> None:
    big = np.repeat(np.repeat(STRIPES, 2, axis=1), 2, axis=2)
    dot = np.zeros((1, *big.shape[1:]), bool)
    dot[0, 0, 0] = True  # vanishes at half size
    members = {"a.jpg": encoded(pixels(2 * HEIGHT, 2 * WIDTH)), "a.json": annotation(np.concatenate([big, dot]))}
    write_tar(tmp_path / "shards" / "0.tar", members)
    run(tmp_path / "shards", tmp_path / "out", config(generator="given", shortest_edge=HEIGHT))
    half = read_tar(tmp_path / "out" / "0.tar")
    assert Image.open(io.BytesIO(half["a.jpg"])).size == (WIDTH, HEIGHT)
    assert np.array_equal(masked(tmp_path / "out" / "0.tar", "a"), STRIPES)
    write_files(tmp_path / "json", {"b.json": annotation(big)})
    write_tar(tmp_path / "plain" / "0.tar", {"b.jpg": members["a.jpg"]})
    settings = {"generator": "given", "given_folder": str(tmp_path / "json"), "shortest_edge": HEIGHT}
    run(tmp_path / "plain", tmp_path / "beside", config(**settings))
    assert np.array_equal(masked(tmp_path / "beside" / "0.tar", "b"), STRIPES)


def test_masks_are_shrunk_to_nearest_pixels_without_decoding_them_in_full() -> None:
    random = np.random.default_rng(0)
    blocks = random.random((100, 7, 9)) < 0.3
    masks = blocks[:, np.arange(3001) * 7 // 3001][:, :, np.arange(60) * 9 // 60]
    sample = EncodedSample("a", encoded(pixels(3001, 60)), annotation(masks))
    tracemalloc.start()
    _, image, document = shrink_sample(sample, 23, 95)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < masks.nbytes / 2
    assert Image.open(io.BytesIO(image)).size == (23, 1150)
    rows, columns = (((np.arange(count) + 0.5) * full / count).astype(int) for count, full in ((1150, 3001), (23, 60)))
    found = [rle.decode(entry["segmentation"]) for entry in json.loads(document)["annotations"]]
    assert np.array_equal(np.stack(found), masks[:, rows][:, :, columns])


def test_parts_with_different_settings_are_rejected(tmp_path) -> None:
    shards = sources(tmp_path / "shards", 2)
    run(shards, tmp_path / "parts" / "one", config(max_bad_share=0.5, part="1/2"))
    run(shards, tmp_path / "parts" / "two", config(max_bad_share=0.5, part="2/2", max_masks=1))
    with pytest.raises(ValueError, match=r"parts: contains parts from different runs .*: one, two"):
        list_shards(tmp_path / "parts")


def test_side_that_does_not_fit_the_patch_is_rejected(checkpoints, tmp_path) -> None:
    shards = sources(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"masks\.dino_side 23 is not a multiple of the patch size \(4\)"):
        run(shards, tmp_path / "out", config(generator="dino", weights=checkpoints["dino"], dino_side=23, device="cpu"))


def test_given_folder_is_rejected_for_other_generators() -> None:
    with pytest.raises(ValueError, match="given_folder must be empty unless generator is given"):
        config(given_folder="somewhere")
