"""Pack images into shards and index them; results are read independently with tarfile and Pillow."""

import io
import json
import os
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.fake_data import annotation, black_png, bomb, encoded, pixels, read_tar, turned, write_files, write_tar
from pixelclip.config import ShardsConfig
from pixelclip.data.annotations import parse_annotation
from pixelclip.data.shard_format import ShardWriter, index_shard, read_part
from pixelclip.data.shard_sources import list_shards
from pixelclip.shards import run
from pixelclip.workflow.bad_samples import BadSamples

JPEG = encoded(pixels(20, 30), quality=90)


def pack(tmp_path: Path, files: dict[str, bytes], **settings: object) -> dict[str, bytes]:
    """Pack files and return the members of the first shard."""
    run(write_files(tmp_path / "images", files), tmp_path / "out", ShardsConfig(**settings))
    return read_tar(tmp_path / "out" / "000000.tar")


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_plain_jpegs_and_json_are_kept_byte_for_byte(tmp_path: Path) -> None:
    members = pack(tmp_path, {"b/x y.jpg": JPEG, "b/x y.json": b"{}", "ä.JPEG": JPEG, "lonely.json": b"{}", "a.txt": b""})
    assert members == {"b/x y.jpg": JPEG, "b/x y.json": b"{}", "ä.jpg": JPEG}


def test_images_are_split_into_shards_and_counted(tmp_path: Path) -> None:
    images = write_files(tmp_path / "images", {f"{i}.jpg": JPEG for i in range(7)})
    metrics = run(images, tmp_path / "out", ShardsConfig(images_per_shard=3))
    assert metrics == {"images": 7.0, "bad_images": 0.0, "shards": 3.0}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    shards = list_shards(tmp_path / "out")
    assert [list(read_tar(shard)) for shard in shards] == [["0.jpg", "1.jpg", "2.jpg"], ["3.jpg", "4.jpg", "5.jpg"], ["6.jpg"]]


def test_shards_are_byte_for_byte_reproducible(tmp_path: Path) -> None:
    files = {"a.png": encoded(pixels(9, 9), "PNG"), "b.jpg": JPEG, f"{'long' * 40}.jpg": JPEG}
    first, second = (write_files(tmp_path / name, files) for name in ("one", "two"))
    os.utime(second / "b.jpg", (1, 1))
    for images in (first, second):
        run(images, images.with_name(f"{images.name}.out"), ShardsConfig())
    assert (tmp_path / "one.out" / "000000.tar").read_bytes() == (tmp_path / "two.out" / "000000.tar").read_bytes()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "LA"])
def test_other_formats_become_rgb_jpegs(tmp_path: Path, mode: str) -> None:
    source = Image.new("RGB", (12, 8), (255, 255, 255)).convert(mode)
    image = opened(pack(tmp_path, {"a.png": encoded(source, "PNG")})["a.jpg"])
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (12, 8))
    assert np.asarray(image).min() >= 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_beside_an_image_that_exif_turns_are_refused(tmp_path: Path, capsys, orientation: int) -> None:
    masks = annotation(np.ones((1, 20, 30)))
    files = {"a.jpg": encoded(pixels(20, 30), exif=turned(orientation)), "a.json": masks, "b.jpg": JPEG, "b.json": masks}
    members = pack(tmp_path, files, max_bad_share=0.5)
    assert ("a.jpg" in members) == (orientation == 1)
    refused = f"a.jpg: EXIF orientation {orientation} turns this image, but not its masks" in capsys.readouterr().out
    assert refused == (orientation != 1)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpegs_that_are_not_rgb_are_reencoded(tmp_path: Path, mode: str) -> None:
    assert opened(pack(tmp_path, {"a.jpg": encoded(Image.new(mode, (8, 8)))})["a.jpg"]).mode == "RGB"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, :8] = 255  # the stored left is the shown top: rotated by 90 degrees clockwise
    image = opened(pack(tmp_path, {"a.jpg": encoded(stored, exif=turned(6), quality=95)})["a.jpg"])
    assert image.size == (8, 16) and image.getexif().get(0x0112, 1) == 1
    shown = np.asarray(image)
    assert shown[:7].min() > 230 and shown[9:].max() < 25


@pytest.mark.parametrize(
    ("size", "expected"), [((100, 200), (50, 100)), ((201, 99), (102, 50)), ((30, 40), (30, 40)), ((50, 50), (50, 50))]
)
def test_shortest_edge_shrinks_but_never_enlarges(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encoded(pixels(size[1], size[0]))
    packed = pack(tmp_path, {"a.jpg": data}, shortest_edge=50)["a.jpg"]
    assert opened(packed).size == expected
    assert (packed == data) == (size == expected)


def test_unreadable_images_are_skipped_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {f"{i}.jpg": JPEG for i in range(6)} | {"zero é.jpg": b"", "cut.jpg": JPEG[:-300], "text.png": b"hello"}
    images = write_files(tmp_path / "images", files)
    (images / "gone.jpg").symlink_to("nowhere")
    metrics = run(images, tmp_path / "out", ShardsConfig(max_bad_share=0.5))
    assert metrics == {"images": 6.0, "bad_images": 4.0, "shards": 1.0}
    assert sorted(read_tar(tmp_path / "out" / "000000.tar")) == [f"{i}.jpg" for i in range(6)]
    output = capsys.readouterr().out
    assert "4 of 10 samples cannot be used" in output
    assert [name for name in ("zero é.jpg", "cut.jpg", "text.png", "gone.jpg") if name not in output] == []


def test_file_names_that_are_not_unicode_are_packed_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good, bad = (os.fsdecode(name) for name in (b"g\xff.jpg", b"b\xfe.jpg"))
    members = pack(tmp_path, {good: JPEG, bad: b"x"}, max_bad_share=0.5)
    assert members == {good: JPEG}
    assert "b\\udcfe.jpg: unreadable image" in capfd.readouterr().out


def test_bombs_are_bad_samples(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELCLIP_MAX_PIXELS", "1000000")
    files = {f"{kind}.png": bomb(kind, 1001) for kind in ("ICO", "ICNS", "TIFF")} | {"b.png": black_png(1001), "good.jpg": JPEG}
    assert pack(tmp_path, files, max_bad_share=0.8) == {"good.jpg": JPEG}
    printed = capsys.readouterr().out
    assert "4 of 5 samples cannot be used" in printed
    for name in ("TIFF.png", "b.png"):
        assert f"{name}: image: 1001 x 1001 pixels; at most 1000000 are allowed (PIXELCLIP_MAX_PIXELS)" in printed


def test_too_many_bad_images_stop_the_stage_without_output(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)1 of 3 .*bad\.jpg: unreadable.*the limit is 5\.0% \(shards\.max_bad_share\)"):
        pack(tmp_path, {"a.jpg": JPEG, "b.jpg": JPEG, "bad.jpg": b"x"})
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="none of its 1 images can be used"):
        run(write_files(tmp_path / "all", {"bad.jpg": b"x"}), tmp_path / "out", ShardsConfig(max_bad_share=1))
    assert not (tmp_path / "out").exists()


def test_only_the_first_ten_bad_samples_are_listed() -> None:
    bad = BadSamples("shards", 0.0)
    for index in range(12):
        bad.add(f"image{index}", "broken")
    with pytest.raises(ValueError, match=r"(?s)12 of 20.*image9: broken\n  and 2 more\n"):
        bad.check(20)
    bad.max_fraction = 12 / 20
    bad.check(20)


def test_missing_or_empty_folder_of_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: contains no image"):
        pack(tmp_path, {"readme.txt": b""})
    with pytest.raises(ValueError, match="none: no such folder of images"):
        run(tmp_path / "none", tmp_path / "out", ShardsConfig())


@pytest.mark.parametrize("inside", ["", "out", "a/out", "../images/out"])
def test_output_inside_the_folder_of_images_is_rejected(tmp_path: Path, inside: str) -> None:
    images = write_files(tmp_path / "images", {"a/1.jpg": JPEG})
    with pytest.raises(ValueError, match=r"shards must not be inside the folder of images .*images; choose another --out$"):
        run(images, images / inside, ShardsConfig())
    assert [path.name for path in images.rglob("*")] == ["a", "1.jpg"]


def test_ignored_files_are_counted_by_suffix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"a.jpg": JPEG, "a.json": b"{}", "lonely.json": b"{}", ".hidden": b"", "b.HEIC": b"", "c.heic": b"", "d.gif": b""}
    pack(tmp_path / "some", files | {"photo": JPEG})
    message = "shards: ignored files by suffix: .heic 2, .gif 1, none 1; image suffixes are .jpg, .jpeg, .jfif, .png,"
    printed = capsys.readouterr().out
    assert message in printed and "heif-convert" in printed and "shards: 1 images found in " in printed
    pack(tmp_path / "none", {"a.jpg": JPEG, "a.json": b"{}"})
    printed = capsys.readouterr().out
    assert "ignored files" not in printed
    size = (tmp_path / "none" / "out" / "000000.tar").stat().st_size
    assert printed.endswith(f"shards: 1 images in 1 tars, {size:,} bytes\n")
    pack(tmp_path / "many", {"a.jpg": JPEG} | {f"{i}.x{i}": b"" for i in range(12)})
    assert ".x7 1, and 2 more suffixes; image suffixes are" in capsys.readouterr().out


def test_second_image_with_the_same_key_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = pack(tmp_path, {"a.b.jpg": JPEG, "a_b.png": encoded(pixels(5, 5), "PNG"), "c.jpg": JPEG}, max_bad_share=0.5)
    assert members == {"a_b.jpg": JPEG, "c.jpg": JPEG}
    assert "a_b.png: another image has the same key 'a_b'" in capsys.readouterr().out


def test_long_and_unusual_names_round_trip_through_the_index(tmp_path: Path) -> None:
    keys = ["n" * 150, "ü" * 90, f"{'folder/' * 30}{'deep ' * 20}x", "new\nline", "quote'\""]
    pack(tmp_path, {f"{key}.jpg": JPEG for key in keys} | {f"{keys[0]}.json": b"{}"})
    members, bad = index_shard(tmp_path / "out" / "000000.tar")
    assert bad == [] and sorted(member.key for member in members) == sorted(keys)
    for member in members:
        assert read_part(tmp_path / "out" / "000000.tar", member.image_offset, member.image_size) == JPEG


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_agrees_with_tarfile(tmp_path: Path, kind: int) -> None:
    long = f"{'d' * 90}/{'n' * 90}"
    contents = {"./sa_1.jpg": b"one", "./sa_1.json": b"{1}", "sa_2.json": b"{2}", "sa_2.jpg": b"two", f"{long}.jpg": b"3"}
    path = write_tar(tmp_path / "a.tar", contents | {"notes.txt": b"skip"}, kind)
    with tarfile.open(path, "a", format=kind) as tar:
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    members, bad = index_shard(path)
    assert bad == []
    parts = {
        member.key: (
            read_part(path, member.image_offset, member.image_size),
            read_part(path, member.json_offset, member.json_size),
        )
        for member in members
    }
    assert parts == {"sa_1": (b"one", b"{1}"), "sa_2": (b"two", b"{2}"), long: (b"3", b"")}


def joined(path: Path, *archives: dict[str, bytes | tuple[bytes, str]]) -> Path:
    """Join tars as `cat` does; a member is a file's content, or type and target of a link."""
    parts = []
    for archive in archives:
        with tarfile.open(path, "w") as tar:
            for name, content in archive.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, tuple):
                    info.type, info.linkname = content
                    tar.addfile(info)
                else:
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def contents(path: Path) -> dict[str, tuple[bytes, bytes]]:
    """Read image and JSON of every indexed sample."""
    return {
        m.key: (read_part(path, m.image_offset, m.image_size), read_part(path, m.json_offset, m.json_size))
        for m in index_shard(path)[0]
    }


@settings(max_examples=30)
@given(samples=st.lists(st.lists(st.booleans(), max_size=4), min_size=1, max_size=4), padding=st.integers(0, 40))
def test_every_sample_of_joined_tars_is_read(samples: list[list[bool]], padding: int) -> None:
    archives, expected = [], {}
    for number, masked in enumerate(samples):
        archives.append({"notes.txt": b"x"})
        for index, has_json in enumerate(masked):
            key, image = f"d/{number}-{index}", b"i" * (600 * index) + key_bytes(number, index)
            archives[-1] |= {f"{key}.jpg": image} | ({f"{key}.json": b"{}"} if has_json else {})
            expected[key] = (image, b"{}" if has_json else b"")
    with TemporaryDirectory() as folder:
        path = joined(Path(folder, "0.tar"), *archives)
        path.write_bytes(path.read_bytes() + bytes(512 * padding))
        assert contents(path) == expected
        assert index_shard(path)[1] == []


def key_bytes(*numbers: int) -> bytes:
    return "-".join(map(str, numbers)).encode()


def test_bytes_that_are_no_tar_behind_the_end_are_reported(tmp_path: Path) -> None:
    path = joined(tmp_path / "0.tar", {"a.jpg": b"1"})
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"garbage" * 200)
    members, bad = index_shard(path)
    assert [member.key for member in members] == ["a"]
    assert bad == [(str(path), f"damaged tar: at byte {end} neither a member nor the end; the rest is skipped")]


def test_links_give_the_content_of_their_target(tmp_path: Path) -> None:
    hard, symbolic = tarfile.LNKTYPE, tarfile.SYMTYPE
    path = joined(
        tmp_path / "0.tar",
        {
            "early.jpg": (symbolic, "d/a.jpg"),
            "d/a.jpg": b"image",
            "d/a.json": b"{}",
            "b.jpg": (hard, "d/a.jpg"),
            "./d/c.jpg": (symbolic, "a.jpg"),
            "d/c.json": (symbolic, "../d/./a.json"),
            "e/d.jpg": (symbolic, "../d/c.jpg"),
            "f.jpg": (hard, "b.jpg"),
        },
    )
    expected = {"early": "", "d/a": "{}", "b": "", "d/c": "{}", "e/d": "", "f": ""}
    assert contents(path) == {key: (b"image", json.encode()) for key, json in expected.items()}
    assert list(contents(path)) == list(expected)
    assert index_shard(path)[1] == []


def test_member_that_is_not_read_is_reported(tmp_path: Path) -> None:
    path = joined(
        tmp_path / "0.tar",
        {
            "a.jpg": b"1",
            "a.depth.jpg": b"2",
            "v1.2/x.jpg": b"3",
            "frame.0001.jpg": b"4",
            "frame.0001.json": b"{}",
            "b.JPG": b"5",
            "gone.jpg": (tarfile.SYMTYPE, "/data/gone.jpg"),
            "out.jpg": (tarfile.SYMTYPE, "../a.jpg"),
            "loop.jpg": (tarfile.SYMTYPE, "pool.jpg"),
            "pool.jpg": (tarfile.SYMTYPE, "loop.jpg"),
            "to/text.jpg": (tarfile.LNKTYPE, "notes"),
            "notes": b"x",
            "pipe.jpg": (tarfile.FIFOTYPE, ""),
            "c.png": (tarfile.LNKTYPE, "a.jpg"),
            "twice.jpg": b"6",
            "twice.json": b"{}",
        },
        {"twice.jpg": b"7"},
    )
    members, bad = index_shard(path)
    assert [member.key for member in members] == ["a", "v1.2/x"]
    dots = "not read: the key of a sample ends at the first dot, and its parts must be named KEY.jpg and KEY.json"
    reasons = {name.removeprefix(f"{path}: "): reason for name, reason in bad}
    assert reasons == {
        "a.depth.jpg": dots,
        "frame.0001.jpg": dots,
        "frame.0001.json": dots,
        "b.JPG": "not read: images in a shard must be named KEY.jpg",
        "c.png": "not read: images in a shard must be named KEY.jpg",
        "gone.jpg": "link to /data/gone.jpg, which is not KEY.jpg or KEY.json in this tar",
        "out.jpg": "link to ../a.jpg, which is not KEY.jpg or KEY.json in this tar",
        "loop.jpg": "link to pool.jpg, which is not KEY.jpg or KEY.json in this tar",
        "pool.jpg": "link to loop.jpg, which is not KEY.jpg or KEY.json in this tar",
        "to/text.jpg": "link to notes, which is not KEY.jpg or KEY.json in this tar",
        "pipe.jpg": "neither a file nor a link",
        "twice": "several members have this name, so image and masks may not belong together",
    }


def test_incomplete_shard_does_not_get_its_final_name(tmp_path: Path) -> None:
    def fail() -> None:
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add("a.jpg", JPEG)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not (tmp_path / "a.tar").exists()


def test_json_without_an_image_is_reported(tmp_path: Path) -> None:
    members, bad = index_shard(write_tar(tmp_path / "a.tar", {"a.json": b"{}", "b.jpg": b"b"}))
    assert [member.key for member in members] == ["b"]
    assert bad == [(f"{tmp_path}/a.tar: a.json", "has no image")]


OUTSIDE = ["../x", "/abs/x", "a/../../x", "a/..", "./../x", ".//abs/x", "//x", "././../x", "a/../x"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("suffix", [".jpg", ".json"])
@pytest.mark.parametrize("link", ["", "hard", "symbolic"])
def test_member_name_that_leads_out_of_a_folder_is_reported(tmp_path: Path, name: str, suffix: str, link: str) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, {"good.jpg": b"g", "good.json": b"{}"} | ({} if link else {f"{name}/y{suffix}": b"x"}))
    if link:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(f"{name}/y{suffix}")
            info.type = tarfile.LNKTYPE if link == "hard" else tarfile.SYMTYPE
            info.linkname = f"good{suffix}" if link == "hard" else f"/good{suffix}"
            tar.addfile(info)
    members, bad = index_shard(path)
    assert [member.key for member in members] == ["good"]
    assert bad == [(f"{path}: {name}/y{suffix}", "not read: a member's name must be relative, without '..'")]


@pytest.mark.parametrize("name", ["a..b/x", "..a/x", "a/b../x", "ü ß/x", "a/./x", "x'\"`$(y)"])
def test_unusual_but_safe_member_name_is_kept(tmp_path: Path, name: str) -> None:
    members, bad = index_shard(write_tar(tmp_path / "a.tar", {f"{name}.jpg": b"x"}))
    assert [member.key for member in members] == [name] and bad == []


def test_control_characters_of_names_do_not_reach_the_terminal(tmp_path: Path, capsys) -> None:
    assert set(pack(tmp_path, {"a\x1b[2J.jpg": b"x", "b.jpg": JPEG}, max_bad_share=0.5)) == {"b.jpg"}
    printed = capsys.readouterr().out
    assert r"a\x1b[2J.jpg: unreadable image" in printed and "\x1b" not in printed


@pytest.mark.parametrize("removed", [1, 600, 5000])
def test_truncated_tar_keeps_complete_members_and_reports_the_cut(tmp_path: Path, removed: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": bytes([i]) * 4000 for i in range(4)})
    with tarfile.open(path) as tar:
        starts = [member.offset_data for member in tar]
    path.write_bytes(path.read_bytes()[: starts[3] + 4000 - removed])
    members, bad = index_shard(path)
    whole = 3 if removed < 4000 else 2
    assert [member.key for member in members] == [str(i) for i in range(whole)]
    assert bad and all("a.tar" in name and ("truncated" in why or "damaged" in why) for name, why in bad)


@pytest.mark.parametrize("at", [0, 3])
def test_damaged_header_is_reported(tmp_path: Path, at: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 100 for i in range(6)})
    data = bytearray(path.read_bytes())
    data[at * 1024 + 150] ^= 255  # inside the header's checksum
    path.write_bytes(data)
    if at == 0:
        with pytest.raises(ValueError, match=r"a\.tar: cannot be read as a tar"):
            index_shard(path)
    else:
        members, bad = index_shard(path)
        assert [member.key for member in members] == ["0", "1", "2"]
        assert len(bad) == 1 and "damaged tar: at byte 3072" in bad[0][1]


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b" + bytes(700)])
def test_file_that_is_not_a_tar_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar: cannot be read as a tar"):
        index_shard(tmp_path / "a.tar")


def test_shards_are_listed_from_a_folder_or_a_manifest(tmp_path: Path) -> None:
    shards = [write_tar(tmp_path / "data" / f"{name}.tar", {}) for name in "ba"]
    write_files(tmp_path / "data", {"notes.txt": b""})
    assert list_shards(tmp_path / "data") == shards[::-1]
    manifest = tmp_path / "list.txt"
    manifest.write_text(f"# two shards\ndata/b.tar\n\n  {shards[1]}  \n")
    assert list_shards(manifest) == shards
    manifest.write_text("data/b.tar\ndata/c.tar\n")
    with pytest.raises(ValueError, match=r"list\.txt: 1 of its shards are missing, the first is .*c\.tar"):
        list_shards(manifest)
    manifest.write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"list\.txt: contains no shard"):
        list_shards(manifest)


def test_location_without_shards_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no shard"):
        list_shards(tmp_path)
    with pytest.raises(ValueError, match="none: no such folder or manifest"):
        list_shards(tmp_path / "none")
    with pytest.raises(ValueError, match=r"a\.tar: is not a shard manifest"):
        list_shards(write_tar(tmp_path / "a.tar", {"a.jpg": JPEG}))


def document(size: object, counts: object) -> bytes:
    return json.dumps({"annotations": [{"segmentation": {"size": size, "counts": counts}}]}).encode()


def test_annotation_in_sa1b_format_is_accepted() -> None:
    masks = np.random.default_rng(0).random((5, 7, 9)) < np.array([0, 0.1, 0.5, 0.9, 1])[:, None, None]
    assert len(parse_annotation(annotation(masks), (9, 7))[0]["annotations"]) == 5


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "unreadable JSON"),
        (b"[" * 100_000, "unreadable JSON"),
        (b"\xff\xfe\xfa", "unreadable JSON"),
        (b"[]", "not in SA-1B's annotation format"),
        (b"{}", "annotations"),
        (b'{"annotations": []}', "no mask found"),
        (annotation(np.zeros((2, 7, 9))), "all 2 masks are empty"),
        (annotation(np.ones((1, 7, 9))).replace(b'"area": 63', b'"area": NaN'), "unreadable JSON: NaN is not a JSON number"),
        (annotation(np.ones((1, 7, 9))).replace(b'"area": 63', b'"predicted_iou": -Infinity'), "-Infinity is not a JSON"),
        (document([7], "ng0"), "size must be two integers"),
        (document([7.0, 9.0], "ng0"), "size must be two integers"),
        (document([7, 9], [63]), "counts must be a compressed RLE"),
        (document([9, 7], "o1"), "mask has size 7x9, but the image is 9x7"),
        (document([7, 9], ""), "damaged RLE"),
        (document([7, 9], "o"), "damaged RLE"),
        (document([7, 9], "oooooooo1"), "damaged RLE"),
        (document([7, 9], "é1"), "damaged RLE"),
        (document([7, 9], "n1"), "its runs cover 62 pixels, the image has 63"),
        (document([7, 9], "V2I"), "damaged RLE"),  # runs of 70 and -7 pixels: 63
    ],
)
def test_annotation_in_another_format_is_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_annotation(data, (9, 7))


def test_second_run_reuses_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_files(tmp_path / "images", {"a.jpg": JPEG})
    first = run(images, tmp_path / "out", ShardsConfig())
    written = (tmp_path / "out" / "000000.tar").stat().st_mtime_ns
    assert run(images, tmp_path / "out", ShardsConfig()) == first
    assert (tmp_path / "out" / "000000.tar").stat().st_mtime_ns == written
    assert "reused" in capsys.readouterr().out
