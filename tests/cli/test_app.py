"""Command line: every command has help, every mistake is one message with exit code 2."""

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import typer
from PIL import Image

from helpers import command_line, tiny, training
from helpers.fake_data import annotation, encoded, pixels, write_tar
from pixelclip import __version__
from pixelclip.cli.app import app
from pixelclip.config import SETTINGS, STAGES
from pixelclip.inference.predictor import Predictor
from pixelclip.models.tokenizer import FileTokenizer
from pixelclip.registry.model_version import _inference_files
from pixelclip.storage.s3 import is_s3, list_below

pixelclip = command_line.pixelclip


def commands() -> list[tuple[str, ...]]:
    root = typer.main.get_command(app)

    def below(group, words: tuple[str, ...]) -> list[tuple[str, ...]]:
        found: list[tuple[str, ...]] = []
        for name, command in group.commands.items():
            found += below(command, (*words, name)) if hasattr(command, "commands") else [(*words, name)]
        return found

    return below(root, ())


def test_every_stage_has_a_command():
    assert {(stage,) for stage in SETTINGS} <= set(commands())
    assert {("predict",), ("settings",), ("pipeline", "run"), ("pipeline", "compile")} <= set(commands())


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_decides(pixelclip, monkeypatch, given, used):
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    pixelclip("--help")
    assert os.environ["OMP_WAIT_POLICY"] == used


def test_help_lists_every_command(pixelclip):
    code, out, _ = pixelclip("--help")
    assert code == 0
    assert all(words[0] in out for words in commands())


def test_version(pixelclip):
    code, out, _ = pixelclip("--version")
    assert (code, out) == (0, f"pixelclip {__version__}\n")


@pytest.mark.parametrize("group", [(), ("pipeline",), ("pipeline", "schedule"), ("serve",)], ids=" ".join)
def test_no_summary_is_cut(pixelclip, group):
    code, out, _ = pixelclip(*group, "--help")
    assert code == 0
    command = typer.main.get_command(app)
    for word in group:
        command = command.commands[word]
    text = " ".join(out.split())
    for each in command.commands.values():
        assert " ".join(each.help.partition("\n")[0].split()) in text


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_example_of_a_command_is_valid(pixelclip, words):
    code, out, _ = pixelclip(*words, "--help")
    assert code == 0
    (line,) = [line.strip() for line in out.splitlines() if line.strip().startswith("pixelclip ")]
    name, *example = shlex.split(line.partition(" | ")[0])
    assert (name, *example[: len(words)]) == ("pixelclip", *words)
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    command.make_context(words[-1], example[len(words) :])  # raises UsageError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("shards", "--images", "imges", "--out", "o"), "imges: no such folder of images, did you mean 'images'?"),
        (
            ("masks", "--shards", "imags/a", "--out", "o"),
            "imags/a: no such folder or manifest of shards, did you mean 'images'?",
        ),
        (("train", "--masks", "imags", "--out", "o"), "imags: no such folder or manifest of shards, did you mean 'images'?"),
        (
            ("evaluate", "--model", "imags", "--labelled", "l", "--out", "o"),
            "imags: no such model folder, did you mean 'images'?",
        ),
        (
            ("predict", "imags", "--classes", "a,b", "--model", "m", "--out", "o.png"),
            "imags: no such file, did you mean 'images'?",
        ),
        (
            ("shards", "--images", "images", "--out", "o"),
            "images: contains no image (.jpg, .jpeg, .jfif, .png, .webp, .bmp, .tif, .tiff); HEIC, HEIF and AVIF are not read",
        ),
        (
            ("predict", "images/photo.heic", "--classes", "a,b", "--model", "m", "--out", "o.png"),
            "images/photo.heic: unreadable image: HEIC, HEIF and AVIF are not read: convert them to JPEG",
        ),
    ],
)
def test_mistyped_place_or_heic_says_what_to_do(pixelclip, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    code, _, err = pixelclip(*words)
    assert code == 2
    assert err.startswith(f"pixelclip: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_that_explains_every_option(pixelclip, words):
    code, out, _ = pixelclip(*words, "--help")
    assert code == 0
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert command.help and command.help.split(".")[0].split("\n")[0][:40] in out
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} of {' '.join(words)} is not explained"
        assert parameter.opts[0] in out or parameter.metavar in out or parameter.name.upper() in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "--masks", "m", "--out", "o", "stpes=3"), "unknown setting 'stpes', did you mean 'steps'?"),
        (("train", "--masks", "m", "--out", "o", "steps=many"), "steps: "),
        (("train", "--masks", "m", "--out", "o", "steps"), "settings are written NAME=VALUE, found 'steps'"),
        (("train", "--masks", "m", "--out", "o", "evaluate.side=3"), "evaluate.side is not a setting of stage train"),
        (("toy", "--out", "o", "sead=3"), "unknown setting 'sead', did you mean 'seed'?"),
        (("evaluate", "--model", "m", "--labelled", "l", "--out", "o", "template=single"), "did you mean 'templates'?"),
        (("register", "--model", "m", "--evaluation", "e", "--out", "o", "min_gian=1"), "did you mean 'min_gain'?"),
        (("shards", "--images", "i", "--out", "o", "--params", "no.yaml"), "no.yaml: cannot be read as YAML"),
        (("masks", "--shards", "nowhere", "--out", "o"), "nowhere"),
        (("evaluate", "--model", "nowhere", "--labelled", "l", "--out", "o"), "nowhere: no such model folder"),
        (("register", "--model", "nowhere", "--evaluation", "e", "--out", "o"), "nowhere/provenance.json: no such file"),
    ],
)
def test_mistake_is_one_line_with_exit_code_2(pixelclip, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = pixelclip(*words)
    assert code == 2
    assert err.startswith("pixelclip: ") and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SMALL = ("train_scenes=1", "test_scenes=1", "side=32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("toy", "--out", "/proc/x", *SMALL), "/proc/x: cannot be created: No such file or directory"),
        (("toy", "--out", "file/x", *SMALL), "file/x: cannot be created: Not a directory"),
        (
            ("predict", "photo.png", "--classes", "a,b", "--model", "m", "--out", "file/x.png"),
            "file/x.png: cannot be written: ",
        ),
        (
            ("predict", "photo.png", "--classes", "a,b", "--model", "m", "--out", "/proc/x.png"),
            "/proc/x.png: cannot be written",
        ),
        (("predict", "photo.png", "--classes", "a,b", "--model", "m", "--out", "dir.png"), "dir.png: must be a file, found a"),
        (("export", "--model", "m", "--out", "file"), "file/open_clip_model.safetensors: cannot be written: "),
        (("pipeline", "compile", "--out", "/proc/x.yaml"), "/proc/x.yaml: No such file or directory"),
    ],
    ids=lambda words: " ".join(words[:1]) if isinstance(words, tuple) else "",
)
def test_unwritable_output_is_one_line_with_exit_code_2(pixelclip, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIXELCLIP_IMAGE", "registry/pixelclip:1")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "m").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    code, _, err = pixelclip(*words)
    assert code == 2
    assert err.startswith("pixelclip: ") and message in err and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "x.png", "--classes", "a,b", "--model", "m", "--out", "s3://b/x.png"),
        ("export", "--model", "m", "--out", "s3://b/x.png"),
        ("sweep", "s.yaml", "--masks", "m", "--labelled", "l", "--out", "s3://b/x.png"),
        ("pipeline", "run", "--images", "i", "--labelled", "l", "--out", "S3://b/x.png"),
        ("pipeline", "compile", "--out", "s3://b/x.png"),
        ("reproduce", "models:/a/1", "--out", "s3://b/x.png"),
    ],
    ids=" ".join,
)
def test_s3_is_rejected_where_only_local_paths_work(pixelclip, monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = pixelclip(*words)
    assert (code, err) == (2, "pixelclip: s3://b/x.png: must be a path on this machine\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["s3://data/masks", "masks"])
def test_preview_is_written_beside_the_masks(pixelclip, bucket, monkeypatch, tmp_path, out):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "shards" / "0.tar", {"a.jpg": encoded(pixels(40, 48))})
    words = ("masks", "--shards", "shards", "--out", out, "--preview", 1, "workers=0", "felzenszwalb_min_size=5")
    code, said, _ = pixelclip(*words)
    assert code == 0 and said.endswith(f"1 images: {out}/preview.jpg\n")
    assert not (tmp_path / "preview.jpg").exists()
    there = [one.uri for one in list_below("s3://data/masks")] if is_s3(out) else [str(path) for path in Path(out).iterdir()]
    assert f"{out}/preview.jpg" in there


def test_unknown_command_or_option_has_exit_code_2(pixelclip):
    code, _, err = pixelclip("trian")
    assert code == 2 and "trian" in err
    code, _, err = pixelclip("train", "--mask", "x")
    assert code == 2 and "--mask" in err


def test_settings_prints_every_setting(pixelclip):
    code, out, _ = pixelclip("settings")
    assert code == 0
    for stage, kind in STAGES.items():
        section = out.split(f"## {stage}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert len(rows) == len(kind.model_fields)
        for (name, field), row in zip(kind.model_fields.items(), rows, strict=True):
            assert row.startswith(f"| `{name}` | `{field.default!r}` | ") and len(row.split("|")[3].strip()) > 10


def test_params_and_overrides_reach_the_stage(pixelclip, tmp_path):
    (tmp_path / "params.yaml").write_text("toy:\n  train_scenes: 3\n  test_scenes: 2\n  side: 32\n")
    words = ("toy", "--out", tmp_path / "toy", "--params", tmp_path / "params.yaml", "toy.test_scenes=1")
    code, _, _ = pixelclip(*words)
    assert code == 0
    assert len(list((tmp_path / "toy" / "images").rglob("*.*"))) == 3
    assert len(list((tmp_path / "toy" / "toy" / "labels").iterdir())) == 1


def test_command_is_installed():
    assert Path(sys.executable).with_name("pixelclip").is_file()


def test_siglip_is_trained_evaluated_and_exported(pixelclip, monkeypatch, tmp_path):
    """Its image tower pools by attention, and its text tower has its own tokenizer and context length."""
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")
    clip, masks = tiny.clip_folder(tmp_path / "clip", kind="siglip"), np.zeros((2, 40, 48), bool)
    masks[0, :, :24] = masks[1, :, 24:] = True
    members = {"0.jpg": encoded(pixels(40, 48)), "0.json": annotation(masks)}
    write_tar(tmp_path / "masks" / "0.tar", members)
    small = {name: value for name, value in training.SMALL.items() if name != "workers"} | {"steps": 2, "batch_size": 2}
    settings = [f"{name}={value}" for name, value in (small | {"side": 48, "clip": clip}).items()]
    code, _, error = pixelclip("train", "--masks", tmp_path / "masks", "--out", tmp_path / "model", *settings, "workers=0")
    assert code == 0, error
    labelled = tiny.labelled_set(tmp_path / "labelled")
    code, _, error = pixelclip(
        "evaluate", "--model", tmp_path / "model", "--labelled", labelled, "--out", tmp_path / "evaluation", "device=cpu"
    )
    assert code == 0, error
    assert 0 <= json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["miou/labelled"] <= 100
    code, _, error = pixelclip("export", "--model", tmp_path / "model", "--out", tmp_path / "exported")
    assert code == 0, error
    predictor = Predictor.load(_inference_files(tmp_path / "model", tmp_path, {}), "cpu")  # as in a registered model
    exported = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}").eval()
    start, x = tiny.clip_of("siglip").visual, torch.randn(1, 3, 160, 160)
    for name, tensor in exported.visual.named_parameters():
        asks = name in ("trunk.attn_pool.latent", "trunk.attn_pool.q.weight", "trunk.attn_pool.q.bias")  # no token asks another
        learned = ("attn" in name or "pos_embed" in name) and not asks
        assert torch.equal(tensor, start.get_parameter(name)) is not learned, name
    assert torch.equal(predictor.backbone.image_features(x), exported.encode_image(x))
    texts = ["a dog in the scene", "grass"]
    tokens = FileTokenizer(tmp_path / "exported", 64, "canonicalize")(texts)
    torch.testing.assert_close(predictor.text.encode(texts), exported.encode_text(tokens), atol=1e-5, rtol=0)
