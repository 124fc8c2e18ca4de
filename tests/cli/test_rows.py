"""Rows of the paper that need a setting of their own train, evaluate and export through the command line, on random weights."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from helpers import command_line, tiny, training
from pixelclip.models.checkpoint import backbone_of, load_clip, load_model

pixelclip, shards = command_line.pixelclip, training.shards
TRAINING = training.SMALL | {"steps": 2, "batch_size": 2, "picture_every": 0}
CONVNEXT = {"side": 64, "crop": 40, "shortest_edge": 40, "longest_edge": 80, "assignment_scale": 1}


@pytest.fixture
def run_row(pixelclip, tmp_path, monkeypatch):
    """Return a function that trains, evaluates and exports a model, and returns its folder."""
    tiny.mlflow_at(monkeypatch, tmp_path / "mlflow")

    def run(masks: Path, kind: str = "vit", **settings: object) -> Path:
        clip = tiny.clip_folder(tmp_path / "clip", kind=kind)
        words = [f"{name}={value}" for name, value in (TRAINING | {"clip": clip} | settings).items()]
        model, labelled = tmp_path / "model", tiny.labelled_set(tmp_path / "set")
        for command in (
            ("train", "--masks", masks, "--out", model, *words),
            ("evaluate", "--model", model, "--labelled", labelled, "--out", tmp_path / "evaluation", "device=cpu"),
            ("export", "--model", model, "--out", tmp_path / "exported"),
        ):
            code, _, err = pixelclip(*command)
            assert code == 0, err
        metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
        assert {"miou/set", "miou_clip/set"} <= set(metrics)
        _check_export(model, tmp_path / "exported", clip)
        return model

    return run


def _check_export(model: Path, exported: Path, clip: Path) -> None:
    """Check that open_clip computes the trained model's features, which differ from those before training."""
    loaded, plain = load_model(model), open_clip.create_model(f"local-dir:{exported}").eval()
    images = torch.rand(2, 3, loaded.clip.side, loaded.clip.side)
    with torch.no_grad():
        features = backbone_of(loaded).image_features(images)
        assert torch.equal(features, plain.encode_image(images))
        assert not torch.equal(features, load_clip(str(clip)).model.encode_image(images))


def test_template_ensemble_in_training(run_row, shards):
    model = run_row(shards, templates="ensemble")
    assert json.loads((model / "config.json").read_text())["templates"] == "ensemble"
    tokens = load_file(model / "model.safetensors")["prompts.tokens"]
    assert tokens.shape == (4, 2, tiny.CLIP_CONFIG["text_cfg"]["width"])


def test_large_convnext_with_its_own_side_and_scale(run_row, shards):
    run_row(shards, kind="convnext_mlp", **CONVNEXT)


def test_ground_truth_masks_without_labels(run_row, pixelclip, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "labelled")
    settings = ("generator=labels", f"labels_folder={labelled}", "workers=0")
    for command in (
        ("shards", "--images", labelled / "images", "--out", tmp_path / "in"),
        ("masks", "--shards", tmp_path / "in", "--out", tmp_path / "masks", *settings),
    ):
        code, _, err = pixelclip(*command)
        assert code == 0, err
    run_row(tmp_path / "masks", shortest_edge=28)
