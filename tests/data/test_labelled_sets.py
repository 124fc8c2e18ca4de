"""Labelled sets are read as published; every error names the file, the value found and the allowed values."""

import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from helpers.fake_data import encoded, pixels, turned, write_files
from pixelclip.data.class_names import read_classes
from pixelclip.data.labelled_images import IGNORE, LabelledSet
from pixelclip.data.labelled_sets import KINDS, open_folder, open_labelled

LABELS = np.array([[0, 1, 2], [255, 2, 0]], np.uint8)
FILES = {
    "classes.txt": b"road\nsky, heaven\n grass \n\n",
    "images/a.jpg": encoded(pixels(2, 3)),
    "labels/a.png": encoded(LABELS, "PNG"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "set", FILES)


def test_plain_folder_is_read(folder: Path) -> None:
    write_files(folder, {"images/sub/b.PNG": encoded(pixels(2, 3).copy(), "PNG"), "labels/sub/b.png": encoded(LABELS, "PNG")})
    opened = open_folder(folder)
    assert opened.classes == ["road", "sky, heaven", "grass"]
    assert [image.relative_to(folder / "images").as_posix() for image, _ in opened.pairs] == ["a.jpg", "sub/b.PNG"]
    image, labels = opened.read(1)
    assert np.array_equal(np.asarray(image), pixels(2, 3))
    assert np.array_equal(labels, LABELS)


def test_palette_label_map_gives_its_indices(folder: Path) -> None:
    label = Image.fromarray(LABELS)
    label.putpalette([200, 10, 10] * 256)
    (folder / "labels" / "a.png").write_bytes(encoded(label, "PNG"))
    assert np.array_equal(open_folder(folder).read(0)[1], LABELS)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
def test_labels_of_few_bits_are_not_scaled(folder: Path, bits: int, colour: int) -> None:
    """Pillow cannot write grey below 8 bits and scales it when reading."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    labels = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    bit_planes = (labels[..., None] >> np.arange(bits)[::-1]) & 1
    rows = b"".join(b"\0" + np.packbits(row.ravel()).tobytes() for row in bit_planes)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 3, 2, bits, colour, 0, 0, 0))
    colours = chunk(b"PLTE", bytes(3 * 2**bits)) if colour else b""
    data = b"\x89PNG\r\n\x1a\n" + header + colours + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (folder / "labels" / "a.png").write_bytes(data)
    assert np.array_equal(open_folder(folder).read(0)[1], labels)


def test_image_is_read_upright(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(encoded(pixels(3, 2), exif=turned(6)))
    assert open_folder(folder).read(0)[0].size == (3, 2)


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_label_map_that_may_belong_to_the_stored_or_the_turned_image_is_refused(folder: Path, orientation: int) -> None:
    (folder / "images" / "a.jpg").write_bytes(encoded(pixels(2, 3), exif=turned(orientation)))
    with pytest.raises(ValueError, match=rf"a\.jpg: EXIF orientation {orientation} turns this image, but not its labels"):
        open_folder(folder).read(0)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("images", "set: is not a labelled set, images/ is missing"),
        ("labels", "set: is not a labelled set, labels/ is missing"),
        ("classes.txt", r"classes\.txt: cannot read class names \(one per line\)"),
        ("labels/a.png", r"set: 1 images have no label map, the first is .*labels/a\.png"),
        ("images/a.jpg", "images: contains no image"),
    ],
)
def test_missing_part_is_reported(folder: Path, missing: str, message: str) -> None:
    (folder / missing).rename(folder / "away")
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


@pytest.mark.parametrize("value", [3, 100, 254])
def test_label_out_of_range_is_rejected(folder: Path, value: int) -> None:
    labels = LABELS.copy()
    labels[0, 0] = value
    (folder / "labels" / "a.png").write_bytes(encoded(labels, "PNG"))
    with pytest.raises(ValueError, match=rf"labels/a\.png: found label {value}; allowed: 0 to 2 .* and {IGNORE}"):
        open_folder(folder).read(0)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (encoded(LABELS.T.copy(), "PNG"), r"label map has size \(2, 3\), but image a\.jpg has \(3, 2\)"),
        (encoded(pixels(2, 3), "PNG"), "mode L or P.* found mode RGB"),
        (encoded(LABELS.astype(np.uint16), "PNG"), "found mode I;16"),
        (encoded(Image.new("1", (3, 2)), "PNG"), "found mode 1"),
        (b"", "unreadable image"),
        (encoded(LABELS, "PNG")[:-30], "unreadable image"),
    ],
)
def test_unusable_label_map_is_rejected(folder: Path, label: bytes, message: str) -> None:
    (folder / "labels" / "a.png").write_bytes(label)
    with pytest.raises(ValueError, match=rf"labels/a\.png: .*{message}"):
        open_folder(folder).read(0)


def test_unreadable_image_is_rejected(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(FILES["images/a.jpg"][:-50])
    with pytest.raises(ValueError, match=r"images/a\.jpg: unreadable image"):
        open_folder(folder).read(0)


def test_image_of_unknown_range_is_rejected(folder: Path) -> None:
    (folder / "images" / "a.jpg").write_bytes(encoded(np.ones((2, 3), np.float32), "TIFF"))
    with pytest.raises(ValueError, match=r"images/a\.jpg: .*found 32"):
        open_folder(folder).read(0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"road\n\nsky\n", "blank class name at position 2"),
        (b"road\n , \nsky\n", "blank class name at position 2"),
        (b"road\nsky\n road\n", "found twice: 'road'"),
        (b"stra\xdfe\n", "cannot read class names"),
    ],
)
def test_invalid_class_names_are_rejected(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_files(tmp_path, {"classes.txt": content}) / "classes.txt"
    with pytest.raises(ValueError, match=rf"classes\.txt: .*{message}"):
        read_classes(path)


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"classes.txt": b"\xef\xbb\xbfroad\r\nstra\xc3\x9fe\r\n"}) / "classes.txt"
    assert read_classes(path) == ["road", "straße"]


@pytest.mark.parametrize("name", ["b.jfif", "b.JPG", "b.Jpeg", "b.png", "b.WEBP", "sub/b.tiff", "b.c.bmp"])
def test_images_of_every_suffix_are_read(folder: Path, name: str) -> None:
    kind = {".jfif": "JPEG", ".jpg": "JPEG"}.get(Path(name).suffix.lower(), Path(name).suffix[1:].upper())
    label = f"labels/{name.rpartition('.')[0]}.png"
    write_files(folder, {f"images/{name}": encoded(pixels(2, 3), kind), label: FILES["labels/a.png"]})
    dataset = open_folder(folder)
    assert [path.relative_to(folder / "images").as_posix() for path, _ in dataset.pairs] == ["a.jpg", name]
    assert np.array_equal(dataset.read(1)[1], LABELS)


def test_label_map_without_an_image_is_an_unreadable_sample(folder: Path) -> None:
    write_files(folder, {"images/sub/b.heic": b"unknown", "labels/sub/b.png": FILES["labels/a.png"], "labels/notes.txt": b""})
    dataset = open_folder(folder)
    assert len(dataset) == 2
    with pytest.raises(ValueError, match=r"labels/sub/b\.png: label map without an image: .*images/sub/b with one of \.jpg"):
        dataset.read(1)


def test_more_than_255_classes_are_rejected(folder: Path) -> None:
    (folder / "classes.txt").write_text("\n".join(f"class{i}" for i in range(255)))
    assert len(open_folder(folder).classes) == 255
    (folder / "classes.txt").write_text("\n".join(f"class{i}" for i in range(256)))
    with pytest.raises(ValueError, match=r"classes\.txt: 256 classes, 8-bit label maps allow at most 255"):
        open_folder(folder)


# Miniature benchmarks: 2x3 images in the published layout and encoding, with hand-written labels.

Labels = list[list[int]]
PHOTO = encoded(pixels(2, 3))
# First colours of VOC's palette; only the indices matter.
VOC_COLOURS = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0]


def grey(values: Labels) -> bytes:
    """Encode an 8-bit single-channel PNG, as in COCO-Stuff, ADE20K and Cityscapes."""
    return encoded(np.array(values, np.uint8), "PNG")


def indexed(values: Labels) -> bytes:
    """Encode a palette PNG, as in VOC."""
    image = Image.fromarray(np.array(values, np.uint8))
    image.putpalette(VOC_COLOURS + [200] * (768 - len(VOC_COLOURS)))
    assert image.mode == "P"
    return encoded(image, "PNG")


def detail(images: dict[str, tuple[str, list[tuple[int, Labels]]]]) -> dict[str, Any]:
    """Build the document of PASCAL in Detail for images `{file name: (phase, [(category, mask), ...])}`."""
    document: dict[str, Any] = {"info": {"version": "1.0"}, "images": [], "annos_segmentation": []}
    document |= {"annos_occlusion": [], "annos_boundary": [], "annos_joints": [], "parts": []}
    document["categories"] = [
        {"category_id": 2, "name": "aeroplane", "supercategory": "object", "onlysemantic": 0, "parts": []}
    ]
    for name, (phase, masks) in images.items():
        number = int(name[:4] + name[5:11])
        entry = {"image_id": number, "file_name": name, "width": 3, "height": 2, "phase": phase, "date_captured": ""}
        document["images"].append(entry)
        for category, mask in masks:
            code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
            document["annos_segmentation"].append(
                {
                    "id": len(document["annos_segmentation"]) + 1,
                    "image_id": number,
                    "category_id": category,
                    "segmentation": {"size": [int(edge) for edge in code["size"]], "counts": code["counts"].decode()},
                    "area": int(rle.area(code)),
                    "bbox": rle.toBbox(code).tolist(),
                    "iscrowd": 0,
                    "parts": [],
                }
            )
    return document


DETAIL = detail(
    {
        "2008_000002.jpg": ("train", [(2, [[1, 1, 1], [1, 1, 1]])]),
        # The person is in front of the wall: it is drawn last.
        "2010_000003.jpg": ("val", [(440, [[1, 1, 1], [1, 1, 0]]), (284, [[0, 1, 0], [0, 1, 0]])]),
        "2008_000009.jpg": ("val", []),
    }
)
COCO_MAPS = "stuffthingmaps_trainval2017/val2017"
TREES: dict[str, dict[str, bytes]] = {
    "coco-stuff": {
        "val2017/000000000139.jpg": PHOTO,
        f"{COCO_MAPS}/000000000139.png": grey([[0, 10, 12], [181, 255, 91]]),
        "train2017/000000000009.jpg": b"unused",
    },
    "ade20k": {
        "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg": PHOTO,
        "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png": grey([[1, 2, 3], [150, 0, 13]]),
        "ADEChallengeData2016/objectInfo150.txt": b"",
    },
    "pascal-context": {
        "VOCdevkit/VOC2010/JPEGImages/2008_000009.jpg": PHOTO,
        "VOCdevkit/VOC2010/JPEGImages/2010_000003.jpg": PHOTO,
        "VOCdevkit/VOC2010/trainval_merged.json": json.dumps(DETAIL).encode(),
    },
    "cityscapes": {
        "leftImg8bit/val/munster/munster_000173_000019_leftImg8bit.png": encoded(pixels(2, 3), "PNG"),
        "gtFine/val/munster/munster_000173_000019_gtFine_labelIds.png": grey([[7, 26, 33], [0, 29, 11]]),
        "gtFine/val/munster/munster_000173_000019_gtFine_color.png": b"unused",
        "gtFine/val/munster/munster_000173_000019_gtFine_instanceIds.png": b"unused",
    },
    "voc": {
        "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg": PHOTO,
        "VOCdevkit/VOC2012/JPEGImages/2007_000027.jpg": b"not in the list",
        "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png": indexed([[1, 15, 20], [0, 255, 2]]),
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": b"2007_000033\n",
    },
}
EXPECTED: dict[str, Labels] = {
    "coco-stuff": [[0, 10, 11], [170, 255, 80]],
    "ade20k": [[0, 1, 2], [149, 255, 12]],
    "pascal-context": [[55, 36, 55], [55, 36, 255]],
    "cityscapes": [[0, 13, 18], [255, 255, 2]],
    "voc": [[0, 14, 19], [255, 255, 1]],
}
# The same PASCAL-Context after common conversions: category ids in ascending order, 0 for background.
CONVERTED = {
    "VOCdevkit/VOC2010/JPEGImages/2010_000003.jpg": PHOTO,
    "VOCdevkit/VOC2010/SegmentationClassContext/2010_000003.png": indexed([[56, 37, 56], [56, 37, 0]]),
    "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt": b"2010_000003\n\n",
}
TRAIN_IDS = {
    "leftImg8bit/val/munster/munster_000173_000019_leftImg8bit.png": encoded(pixels(2, 3), "PNG"),
    "gtFine/val/munster/munster_000173_000019_gtFine_labelTrainIds.png": grey([[0, 13, 18], [255, 255, 2]]),
}
BENCHMARKS = KINDS[1:]
# As converted by the reference's scripts: values are class indices. Images without a map belong to another split.
CONVERTED_TREES: dict[str, dict[str, bytes]] = {
    "coco-stuff": {
        "val2017/000000000139.jpg": PHOTO,
        "annotations_detectron2/val2017/000000000139.png": grey(EXPECTED["coco-stuff"]),
        "annotations/instances_val2017.json": b"unused",
    },
    "ade20k": {
        "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg": PHOTO,
        "ADEChallengeData2016/annotations_detectron2/validation/ADE_val_00000001.png": grey(EXPECTED["ade20k"]),
    },
    "pascal-context": {
        "VOCdevkit/VOC2010/JPEGImages/2010_000003.jpg": PHOTO,
        "VOCdevkit/VOC2010/JPEGImages/2008_000002.jpg": PHOTO,
        "VOCdevkit/VOC2010/annotations_detectron2/pc59_val/2010_000003.png": grey(EXPECTED["pascal-context"]),
    },
    "voc": {
        "VOCdevkit/VOC2012/JPEGImages/2007_000033.jpg": PHOTO,
        "VOCdevkit/VOC2012/JPEGImages/2007_000027.jpg": PHOTO,
        "VOCdevkit/VOC2012/annotations_detectron2/val/2007_000033.png": grey(EXPECTED["voc"]),
        "VOCdevkit/VOC2012/annotations_detectron2_bg/val/2007_000033.png": b"unused",
        "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt": b"2007_000033\n2007_000061\n",
    },
}


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the miniature of a kind, with files changed, added or (None) removed."""

    def write(kind: str, changed: dict[str, bytes | None] | None = None) -> Path:
        files = TREES[kind] | (changed or {})
        return write_files(tmp_path / "set", {name: data for name, data in files.items() if data is not None})

    return write


def labels_of(opened: LabelledSet, index: int = -1) -> NDArray[np.uint8]:
    image, labels = opened.read(index)
    assert image.mode == "RGB"
    assert image.size == labels.shape[::-1]
    assert labels.dtype == np.uint8
    return labels


def test_kinds_of_labelled_sets() -> None:
    assert KINDS == ("folder", "coco-stuff", "ade20k", "pascal-context", "cityscapes", "voc")


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_benchmark_is_read_as_published(tree: Callable[..., Path], kind: str) -> None:
    opened = open_labelled(tree(kind), kind)
    assert len(opened) == len(opened.pairs) == (2 if kind == "pascal-context" else 1)
    assert all(path.is_file() for pair in opened.pairs for path in pair)
    assert labels_of(opened).tolist() == EXPECTED[kind]


def test_names_of_a_benchmark_and_of_a_folder(tree: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    """A file replaces the names of both; the shipped lists are of the benchmarks only."""
    names = {chosen: open_labelled(tree("voc"), "voc", names=chosen).classes[10] for chosen in ("reference", "readable")}
    assert names == {"reference": "diningtable", "readable": "dining table"}
    assert open_labelled(tree("voc"), "voc").classes[10] == "diningtable"
    file = tmp_path / "names.txt"
    file.write_text("".join(f"thing {number}\n" for number in range(20)))
    assert open_labelled(tree("voc"), "voc", names=str(file)).classes[10] == "thing 10"
    for chosen in ("reference", "readable"):
        assert open_labelled(folder, "folder", names=chosen).classes == ["road", "sky, heaven", "grass"]
    with pytest.raises(ValueError, match=r"names\.txt: contains 20 class names, but .* \(folder\) has 3 classes"):
        open_labelled(folder, "folder", names=str(file))
    file.write_text("street\nsky\nlawn\n")
    opened = open_labelled(folder, "folder", names=str(file))
    assert opened.classes == ["street", "sky", "lawn"] and np.array_equal(labels_of(opened), LABELS)


def test_default_kind_is_folder(folder: Path) -> None:
    assert np.array_equal(labels_of(open_labelled(folder)), LABELS)


@pytest.mark.parametrize(
    ("kind", "below"),
    [
        ("ade20k", "ADEChallengeData2016"),
        ("pascal-context", "VOCdevkit"),
        ("pascal-context", "VOCdevkit/VOC2010"),
        ("voc", "VOCdevkit"),
        ("voc", "VOCdevkit/VOC2012"),
    ],
)
def test_subfolder_of_the_layout_is_accepted(tree: Callable[..., Path], kind: str, below: str) -> None:
    assert labels_of(open_labelled(tree(kind) / below, kind)).tolist() == EXPECTED[kind]


@pytest.mark.parametrize("images", ["val2017", "images/val2017"])
@pytest.mark.parametrize(
    "labels",
    [COCO_MAPS, "stuffthingmaps/val2017", "annotations/val2017", "annotations/stuffthingmaps_trainval2017/val2017"],
)
def test_common_layouts_of_coco_stuff_are_accepted(tmp_path: Path, images: str, labels: str) -> None:
    files = TREES["coco-stuff"]
    name = "000000000139"
    placed = {f"{images}/{name}.jpg": PHOTO, f"{labels}/{name}.png": files[f"{COCO_MAPS}/{name}.png"]}
    # mmsegmentation writes its own maps beside the published ones.
    write_files(tmp_path, placed | {f"{labels}/{name}_labelTrainIds.png": b"unused"})
    assert labels_of(open_labelled(tmp_path, "coco-stuff")).tolist() == EXPECTED["coco-stuff"]


@pytest.mark.parametrize("images", ["val2017", "images/val2017"])
@pytest.mark.parametrize("labels", ["val2017", "images/val2017"])
def test_coco_zips_may_be_unpacked_in_one_folder(tmp_path: Path, images: str, labels: str) -> None:
    """The zip of maps has the folders of the zips of images: train2017 and val2017."""
    maps = grey([[0, 10, 12], [181, 255, 91]])
    files = {f"{images}/000000000139.jpg": PHOTO, f"{labels}/000000000139.png": maps}
    files |= {name.replace("val2017", "train2017").replace("139", "009"): data for name, data in files.items()}
    write_files(tmp_path, files)
    opened = open_labelled(tmp_path, "coco-stuff")
    assert [image.name for image, _ in opened.pairs] == ["000000000139.jpg"]
    assert labels_of(opened).tolist() == EXPECTED["coco-stuff"]
    train = open_labelled(tmp_path, "coco-stuff", "train")
    assert [image.name for image, _ in train.pairs] == ["000000000009.jpg"]
    assert labels_of(train).tolist() == EXPECTED["coco-stuff"]


@pytest.mark.parametrize("kind", CONVERTED_TREES)
def test_label_maps_of_the_reference_are_read(tmp_path: Path, kind: str) -> None:
    opened = open_labelled(write_files(tmp_path, CONVERTED_TREES[kind]), kind)
    assert len(opened) == 1
    assert "annotations_detectron2/" in opened.pairs[0][1].as_posix()
    assert labels_of(opened).tolist() == EXPECTED[kind]
    count = len(opened.classes)
    assert opened.table[:256].tolist() == [*range(count), *[-1] * (255 - count), IGNORE]


@pytest.mark.parametrize("kind", CONVERTED_TREES)
def test_published_label_maps_take_precedence_over_those_of_the_reference(tree: Callable[..., Path], kind: str) -> None:
    converted = {name: b"unused" for name in CONVERTED_TREES[kind] if "annotations_detectron2/" in name}
    assert labels_of(open_labelled(tree(kind, converted), kind)).tolist() == EXPECTED[kind]


def test_label_map_of_the_reference_without_image_is_reported(tmp_path: Path) -> None:
    folder = write_files(tmp_path, CONVERTED_TREES["voc"])
    write_files(folder, {"VOCdevkit/VOC2012/annotations_detectron2/val/2007_000061.png": grey([[0, 0, 0], [0, 0, 0]])})
    with pytest.raises(ValueError, match=r"detectron2/val: 1 label maps have no image, the first is .*2007_000061\.jpg"):
        open_labelled(folder, "voc")


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_training_split_is_read_from_the_same_layout(tmp_path: Path, kind: str) -> None:
    """The validation split of each miniature becomes its training split."""
    files = {}
    document = json.dumps(DETAIL).replace('"train"', '"test"').replace('"val"', '"train"').encode()
    for name, data in TREES[kind].items():
        if name == "train2017/000000000009.jpg":
            continue
        name = re.sub(r"\bval2017", "train2017", name.replace("validation", "training"))
        name = name.replace("/val/", "/train/").replace("val.txt", "train.txt")
        files[name] = document if name.endswith(".json") else data
    folder = write_files(tmp_path, files)
    assert labels_of(open_labelled(folder, kind, "train")).tolist() == EXPECTED[kind]
    with pytest.raises(ValueError, match="val"):
        open_labelled(folder, kind)


def test_training_split_of_the_reference_is_read(tmp_path: Path) -> None:
    files = {name.replace("val2017", "train2017"): data for name, data in CONVERTED_TREES["coco-stuff"].items()}
    folder = write_files(tmp_path, files)
    assert labels_of(open_labelled(folder, "coco-stuff", "train")).tolist() == EXPECTED["coco-stuff"]
    with pytest.raises(ValueError, match=r"val2017 is missing; it needs val2017/\*\.jpg.*annotations_detectron2/val2017"):
        open_labelled(folder, "coco-stuff")
    with pytest.raises(ValueError, match="images/training is missing; it needs ADEChallengeData2016/images/training"):
        open_labelled(folder, "ade20k", "train")


def test_cityscapes_train_ids_are_used_without_label_ids(tmp_path: Path) -> None:
    opened = open_labelled(write_files(tmp_path, TRAIN_IDS), "cityscapes")
    assert opened.pairs[0][1].name == "munster_000173_000019_gtFine_labelTrainIds.png"
    assert labels_of(opened).tolist() == EXPECTED["cityscapes"]


def test_cityscapes_label_ids_take_precedence(tree: Callable[..., Path]) -> None:
    opened = open_labelled(tree("cityscapes", TRAIN_IDS), "cityscapes")
    assert opened.pairs[0][1].name == "munster_000173_000019_gtFine_labelIds.png"


def test_pascal_context_is_read_from_its_json(tree: Callable[..., Path]) -> None:
    opened = open_labelled(tree("pascal-context"), "pascal-context")
    assert [image.name for image, _ in opened.pairs] == ["2008_000009.jpg", "2010_000003.jpg"]
    assert {labels.name for _, labels in opened.pairs} == {"trainval_merged.json"}
    assert (labels_of(opened, 0) == IGNORE).all()  # no masks


def test_converted_pascal_context_takes_precedence(tree: Callable[..., Path]) -> None:
    opened = open_labelled(tree("pascal-context", CONVERTED), "pascal-context")
    assert [labels.name for _, labels in opened.pairs] == ["2010_000003.png"]
    assert labels_of(opened).tolist() == EXPECTED["pascal-context"]


@pytest.mark.parametrize(
    ("kind", "count"), [("coco-stuff", 171), ("ade20k", 150), ("pascal-context", 59), ("cityscapes", 19), ("voc", 20)]
)
def test_every_class_has_one_value_and_one_name(tree: Callable[..., Path], kind: str, count: int) -> None:
    opened = open_labelled(tree(kind), kind)
    assert len(opened.classes) == len(set(opened.classes)) == count
    assert sorted(label for label in opened.table.tolist() if label not in (-1, IGNORE)) == list(range(count))


@pytest.mark.parametrize(
    ("kind", "value", "label", "name"),
    [
        ("coco-stuff", 0, 0, "person"),
        ("coco-stuff", 12, 11, "stop sign"),
        ("coco-stuff", 89, 79, "toothbrush"),
        ("coco-stuff", 91, 80, "banner"),
        ("coco-stuff", 95, 84, "building"),
        ("coco-stuff", 108, 97, "curtain"),
        ("coco-stuff", 170, 159, "brick wall"),
        ("coco-stuff", 173, 162, "wall panel"),
        ("coco-stuff", 181, 170, "wood"),
        ("ade20k", 1, 0, "wall"),
        ("ade20k", 9, 8, "windowpane, window"),
        ("ade20k", 13, 12, "person, individual, someone, somebody, mortal, soul"),
        ("ade20k", 115, 114, "tent, collapsible shelter"),
        ("ade20k", 150, 149, "flag"),
        ("cityscapes", 7, 0, "road"),
        ("cityscapes", 17, 5, "pole"),
        ("cityscapes", 24, 11, "person"),
        ("cityscapes", 26, 13, "car"),
        ("cityscapes", 31, 16, "train"),
        ("cityscapes", 33, 18, "bicycle"),
        ("voc", 1, 0, "aeroplane"),
        ("voc", 11, 10, "dining table"),
        ("voc", 15, 14, "person"),
        ("voc", 20, 19, "tv, monitor"),
        ("pascal-context", 2, 0, "aeroplane"),
        ("pascal-context", 9, 1, "bag"),
        ("pascal-context", 23, 5, "bicycle"),
        ("pascal-context", 284, 36, "person"),
        ("pascal-context", 397, 49, "table"),
        ("pascal-context", 458, 58, "wood"),
    ],
)
def test_official_values_map_to_their_class_names(
    tree: Callable[..., Path], kind: str, value: int, label: int, name: str
) -> None:
    opened = open_labelled(tree(kind), kind, names="readable")
    assert opened.table[value] == label
    assert opened.classes[label] == name


def test_unknown_kind_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'cityscape', did you mean 'cityscapes'.*; allowed: folder, coco-stuff"):
        open_labelled(tmp_path, "cityscape")
    with pytest.raises(ValueError, match=r"'cityscape', did you mean 'cityscapes'.*; allowed: folder, coco-stuff"):
        open_labelled(Path("cityscape:nowhere"))  # typed KIND:FOLDER


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        open_labelled(tmp_path / "nowhere", "voc")


@pytest.mark.parametrize("kind", BENCHMARKS)
def test_error_for_an_empty_folder_describes_the_layout(tmp_path: Path, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"is not {kind} as published, .* is missing; it needs .*\.(jpg|png)"):
        open_labelled(tmp_path, kind)


@pytest.mark.parametrize(
    ("kind", "gone", "message"),
    [
        ("coco-stuff", COCO_MAPS, r"stuffthingmaps_trainval2017/val2017 is missing; it needs val2017/\*\.jpg"),
        ("ade20k", "annotations", r"annotations/validation is missing; it needs ADEChallengeData2016/images"),
        ("pascal-context", "trainval_merged", r"trainval_merged\.json is missing; it needs VOCdevkit/VOC2010/JPEGImages"),
        ("cityscapes", "gtFine", r"gtFine/val is missing; it needs leftImg8bit/val"),
        ("voc", "SegmentationClass", r"SegmentationClass is missing; it needs VOCdevkit/VOC2012/JPEGImages"),
        ("voc", "ImageSets", r"ImageSets/Segmentation/val\.txt is missing; it needs VOCdevkit/VOC2012/JPEGImages"),
    ],
)
def test_missing_part_of_a_benchmark_is_reported(tree: Callable[..., Path], kind: str, gone: str, message: str) -> None:
    folder = tree(kind, {name: None for name in TREES[kind] if gone in name})
    with pytest.raises(ValueError, match=rf"is not {kind} as published, {message}"):
        open_labelled(folder, kind)


def test_converted_pascal_context_requires_its_image_list(tree: Callable[..., Path]) -> None:
    changed = CONVERTED | {"VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt": None}
    with pytest.raises(ValueError, match=r"ImageSets/SegmentationContext/val\.txt is missing; it needs"):
        open_labelled(tree("pascal-context", changed), "pascal-context")


@pytest.mark.parametrize(
    ("kind", "image"),
    [
        ("coco-stuff", "val2017/000000000139.jpg"),
        ("ade20k", "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"),
        ("cityscapes", "_leftImg8bit.png"),
    ],
)
def test_every_image_and_label_map_of_a_benchmark_is_used_or_named(tree: Callable[..., Path], kind: str, image: str) -> None:
    root = tree(kind, {})
    samples = len(open_labelled(root, kind))
    path = next(path for path in root.rglob("*") if path.is_file() and path.as_posix().endswith(image))
    for suffix in (".JPG", ".jpeg", ".png", ".PNG"):
        path = path.rename(path.with_suffix(suffix))
        dataset = open_labelled(root, kind)
        assert len(dataset) == samples and path in [found for found, _ in dataset.pairs]
    path.rename(path.with_suffix(".heic"))
    with pytest.raises(ValueError, match=r"\.png: label map without an image|contains no \*"):
        [(dataset := open_labelled(root, kind)).read(index) for index in range(samples)]


@pytest.mark.parametrize(
    ("kind", "image", "label"),
    [
        ("coco-stuff", "val2017/000000000285.jpg", r"trainval2017/val2017/000000000285\.png"),
        (
            "ade20k",
            "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg",
            r"annotations/validation/ADE_val_00000002\.png",
        ),
        (
            "cityscapes",
            "leftImg8bit/val/lindau/lindau_0_1_leftImg8bit.png",
            r"gtFine/val/lindau/lindau_0_1_gtFine_labelIds\.png",
        ),
    ],
)
def test_image_without_label_map_is_reported(tree: Callable[..., Path], kind: str, image: str, label: str) -> None:
    with pytest.raises(ValueError, match=rf"1 images have no label map, the first is .*{label}$"):
        open_labelled(tree(kind, {image: PHOTO}), kind)


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("voc", {"ImageSets/Segmentation/val.txt": b"2007_000061"}, r"val\.txt: 2 of .*JPEGImages/2007_000061\.jpg"),
        ("voc", {"JPEGImages/2007_000033.jpg": None}, r"val\.txt: 1 of .*JPEGImages/2007_000033\.jpg"),
        ("voc", {"ImageSets/Segmentation/val.txt": b"2007_000027"}, r"val\.txt: 1 of .*Class/2007_000027\.png"),
        ("pascal-context", {"JPEGImages/2010_000003.jpg": None}, r"merged\.json: 1 of .*JPEGImages/2010_000003\.jpg"),
    ],
)
def test_missing_listed_file_is_reported(
    tree: Callable[..., Path], kind: str, changed: dict[str, bytes | None], message: str
) -> None:
    year = "VOC2012" if kind == "voc" else "VOC2010"
    folder = tree(kind, {f"VOCdevkit/{year}/{name}": data for name, data in changed.items()})
    with pytest.raises(ValueError, match=message.replace("of ", "listed files are missing, the first is ")):
        open_labelled(folder, kind)


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("coco-stuff", "val2017/000000000139.jpg", None, r"val2017: contains no \*\.jpg"),
        ("cityscapes", "leftImg8bit/val/munster/munster_000173_000019_leftImg8bit.png", None, "contains no .*_leftImg8bit"),
        ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", b"\n \n", r"val\.txt: lists no image"),
        ("voc", "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", b"\xff", r"val\.txt: .* cannot be read"),
        (
            "pascal-context",
            "VOCdevkit/VOC2010/trainval_merged.json",
            json.dumps(detail({"2008_000002.jpg": ("train", [])})).encode(),
            r"trainval_merged\.json: contains no image of phase 'val'",
        ),
    ],
)
def test_empty_split_is_reported(tree: Callable[..., Path], kind: str, name: str, content: bytes | None, message: str) -> None:
    folder = tree(kind, {name: content})
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with pytest.raises(ValueError, match=message):
        open_labelled(folder, kind)


MAPS = {
    "coco-stuff": f"{COCO_MAPS}/000000000139.png",
    "ade20k": "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
    "cityscapes": "gtFine/val/munster/munster_000173_000019_gtFine_labelIds.png",
    "voc": "VOCdevkit/VOC2012/SegmentationClass/2007_000033.png",
}


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        ("coco-stuff", 11, r"0 to 10, 12 to 24, 26 to 27, .* 91 to 181 \(classes\) and 255 \(ignore\)"),
        ("coco-stuff", 182, "91 to 181"),
        ("ade20k", 151, r"1 to 150 \(classes\) and 0 \(ignore\)"),
        ("ade20k", 255, "1 to 150"),
        ("cityscapes", 34, r"7 to 8, 11 to 13, 17, 19 to 28, 31 to 33 \(classes\) and 0 to 6, .*, 29 to 30 \(ignore\)"),
        ("voc", 21, r"1 to 20 \(classes\) and 0, 255 \(ignore\)"),
    ],
)
def test_unknown_label_value_is_rejected(tree: Callable[..., Path], kind: str, value: int, allowed: str) -> None:
    opened = open_labelled(tree(kind, {MAPS[kind]: grey([[value, 1, 7], [1, 7, 7]])}), kind)
    with pytest.raises(ValueError, match=rf"{Path(MAPS[kind]).name}: found label {value}; allowed: .*{allowed}"):
        opened.read(0)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(
    ("content", "message"),
    [(grey([[7, 7], [7, 7], [7, 7]]), r"label map has size \(2, 3\), but image .* has \(3, 2\)"), (b"GIF", "unreadable")],
    ids=["turned", "damaged"],
)
def test_unusable_label_map_of_a_benchmark_is_rejected(
    tree: Callable[..., Path], kind: str, content: bytes, message: str
) -> None:
    opened = open_labelled(tree(kind, {MAPS[kind]: content}), kind)
    with pytest.raises(ValueError, match=rf"{Path(MAPS[kind]).name}: {message}"):
        opened.read(0)


def with_json(tree: Callable[..., Path], document: Any) -> Path:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    return tree("pascal-context", {"VOCdevkit/VOC2010/trainval_merged.json": content})


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"images": [', "cannot be read as JSON"),
        ([], "is not a trainval_merged.json of PASCAL in Detail"),
        ({"images": []}, "KeyError 'annos_segmentation'.*; it needs images .image_id, file_name, phase"),
        (DETAIL | {"images": [{"image_id": 1, "file_name": "a.jpg"}]}, "KeyError 'phase'"),
        (DETAIL | {"annos_segmentation": [{"image_id": 2008000009, "category_id": 1 << 16}]}, "category_id 65536"),
        (DETAIL | {"annos_segmentation": [{"image_id": 2008000009, "category_id": 2}]}, "KeyError 'segmentation'"),
    ],
)
def test_unusable_json_is_rejected(tree: Callable[..., Path], document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"trainval_merged\.json: .*{message}"):
        open_labelled(with_json(tree, document), "pascal-context")


@pytest.mark.parametrize(
    ("category", "mask", "message"),
    [
        (3, [[0, 1, 0], [0, 0, 0]], r"found label 3; allowed: 2, 9, 18 to 19, .* 454, 458 \(classes\) and 0 \(ignore\)"),
        (459, [[0, 1, 0], [0, 0, 0]], "found label 459"),
        (284, [[0, 1], [0, 0], [0, 0]], "mask has size 2x3, but the image is 3x2"),
    ],
)
def test_unusable_mask_is_rejected(tree: Callable[..., Path], category: int, mask: Labels, message: str) -> None:
    document = detail({"2008_000009.jpg": ("val", [(category, mask)])})
    with pytest.raises(ValueError, match=rf"trainval_merged\.json: 2008_000009\.jpg: {message}"):
        open_labelled(with_json(tree, document), "pascal-context").read(0)


@pytest.mark.parametrize(
    "segmentation", [[[0, 0, 1, 1, 2, 0]], {"size": [2, 3], "counts": [2, 2, 2]}, {"size": [2, 3], "counts": "9"}]
)
def test_mask_without_compressed_rle_is_rejected(tree: Callable[..., Path], segmentation: Any) -> None:
    document = detail({"2008_000009.jpg": ("val", [(2, [[0, 1, 0], [0, 0, 0]])])})
    document["annos_segmentation"][0]["segmentation"] = segmentation
    with pytest.raises(ValueError, match=r"trainval_merged\.json: 2008_000009\.jpg: .*(annotation format|damaged RLE)"):
        open_labelled(with_json(tree, document), "pascal-context").read(0)
