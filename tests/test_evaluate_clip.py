"""Evaluation of CLIP against the Predictor; its reuse by `evaluate` against an evaluation of both towers."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image

from helpers import evaluations, tiny
from helpers.evaluations import CONFIG, KilledError, Reads, naive_iou, result, with_settings
from helpers.fake_data import annotation, write_files
from pixelclip import evaluate, evaluate_clip
from pixelclip.config import EvaluateClipConfig, EvaluateConfig, lasting
from pixelclip.data.labelled_images import LabelledSet
from pixelclip.evaluate_clip import run
from pixelclip.evaluation.clip_baseline import COUNTS, MAPS
from pixelclip.evaluation.evaluator import evaluate_towers
from pixelclip.inference.predictor import Predictor
from pixelclip.storage.files import read_json, write_json

made, client, reads, seven = evaluations.made, evaluations.client, evaluations.reads, evaluations.seven
PROTOCOLS = {
    "whole": {},
    "slide": {"protocol": "slide", "slide_side": 40, "crop": 24, "stride": 10},
    "masks": {"protocol": "masks"},
    "masks-given": {"protocol": "masks", "masks": "given"},
}


def of_clip(made: Path, labelled: Path, out: Path, config: EvaluateConfig = CONFIG) -> dict[str, float]:
    return run(str(made / "clip"), labelled, out, config, tiny.SIDE, "cls")


def given_masks(folder: Path, labelled: Path) -> str:
    """Write three overlapping masks per image; some pixels of the first image are in none."""
    sizes = {path.stem: np.asarray(Image.open(path)).shape for path in (labelled / "labels").iterdir()}
    masks = {name: [y < 9, x < 11, x + y < 6] for name, (y, x) in ((name, np.indices(size)) for name, size in sizes.items())}
    write_files(folder, {f"{name}.json": annotation(np.array(image_masks)) for name, image_masks in masks.items()})
    return str(folder)


def config_of(protocol: str, masks: Path, labelled: Path, **settings) -> EvaluateConfig:
    chosen = PROTOCOLS[protocol] | settings
    return with_settings(**chosen | ({"masks_folder": given_masks(masks, labelled)} if protocol == "masks-given" else {}))


def test_evaluation_of_clip_agrees_with_the_predictor(made, tmp_path, capsys):
    metrics = of_clip(made, made / "labelled", tmp_path / "out")
    predictor = Predictor.load(made / "untrained", "cpu")
    truths = [np.asarray(Image.open(path)) for path in sorted((made / "labelled" / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((made / "labelled" / "images").iterdir())]
    predictions = [predictor(image, tiny.CLASSES).labels for image in images]
    dog, grass, _ = naive_iou(truths, predictions, 3)
    assert metrics["miou_clip/set"] == pytest.approx(100 * (dog + grass) / 2)
    names = ("miou_clip", "pixel_accuracy_clip", "image_recall_clip", "images")
    assert list(metrics) == [f"{name}/set" for name in names]
    assert read_json(tmp_path / "out" / "metrics.json") == metrics
    with np.load(tmp_path / "out" / MAPS) as maps:  # of the first and the last image, which a report shows
        assert {name: (maps[name] == predictions[int(name)]).all() for name in maps.files} == {"0": True, "2": True}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("metrics.json", "provenance.json", "protocol.json", COUNTS, MAPS)
    }
    capsys.readouterr()
    assert of_clip(made, made / "labelled", tmp_path / "out") == metrics
    assert "evaluate_clip: reused" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_evaluation_with_saved_clip_gives_identical_files(made, seven, client, tmp_path, monkeypatch, protocol):
    config = config_of(protocol, tmp_path / "masks", made / "seven", max_bad_share=0.2, pictures=7)
    whole = evaluate.run(made / "changed", seven, tmp_path / "whole", config)
    assert whole["images/" + next(iter(whole)).partition("/")[2]] == 6  # the second image is unreadable

    alone = of_clip(made, seven, tmp_path / "clip", config)
    assert alone.items() <= whole.items() and "gain" not in str(alone)
    assert ("mask_accuracy_clip" in str(alone)) == protocol.startswith("masks")

    monkeypatch.setattr(evaluate, "Backbone", None)  # building CLIP's tower would fail
    evaluated = []
    monkeypatch.setattr(
        evaluate, "evaluate_towers", lambda towers, *others: evaluated.append(list(towers)) or evaluate_towers(towers, *others)
    )
    assert evaluate.run(made / "changed", seven, tmp_path / "out", config, tmp_path / "clip") == whole
    assert evaluated == [[""]]
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    inputs = read_json(tmp_path / "out" / "provenance.json")["inputs"]
    assert inputs["clip_evaluation"]["provenance"]["stage"] == "evaluate_clip"
    assert set(inputs) == {"model", "labelled", "clip", "clip_evaluation"} | ({"masks"} if protocol == "masks-given" else set())


def test_folder_name_invalid_in_a_setting_is_accepted(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "my set", images=1)
    config = with_settings(name="")
    assert "miou_clip/my set" in of_clip(made, labelled, tmp_path / "clip", config)
    metrics = evaluate.run(made / "changed", labelled, tmp_path / "out", config, tmp_path / "clip")
    assert metrics["gain/my set"] == metrics["miou/my set"] - metrics["miou_clip/my set"]


# Mismatches.


def with_another_class(made: Path, tmp_path: Path) -> dict[str, object]:
    return {"labelled": tiny.labelled_set(tmp_path / "labelled", classes=("dog, puppy", "grass", "sea"))}


def with_other_names(made: Path, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "a.txt").write_text("dog\ngrass\nsky\n")
    (tmp_path / "b.txt").write_text("dog\nlawn\nsky\n")
    return {key: with_settings(names=str(tmp_path / file)) for key, file in (("before", "a.txt"), ("config", "b.txt"))}


def with_a_file_of_names(made: Path, tmp_path: Path) -> dict[str, object]:
    (tmp_path / "a.txt").write_text("dog, puppy\ngrass\nsky\n")
    return {"config": with_settings(names=str(tmp_path / "a.txt"))}


def with_another_clip(made: Path, tmp_path: Path) -> dict[str, object]:
    return {"config": with_settings(clip=str(tiny.clip_folder(tmp_path / "other", seed=1)))}


def with_other_masks(made: Path, tmp_path: Path) -> dict[str, object]:
    settings = {"protocol": "masks", "masks": "given"}
    first, second = (given_masks(tmp_path / name, made / "labelled") for name in "ab")
    (tmp_path / "b" / "0.json").write_bytes(annotation(np.ones((1, 20, 40))))
    return {"before": with_settings(**settings, masks_folder=first), "config": with_settings(**settings, masks_folder=second)}


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({"config": with_settings(side=56)}, r"side is 48, expected 56$"),
        ({"config": with_settings(shortest_edge=80)}, r"shortest_edge is 640, expected 80$"),
        (
            {"config": with_settings(shortest_edge=0)},
            r"shortest_edge is 640, expected none; longest_edge is 2560, expected none$",
        ),
        ({"config": with_settings(longest_edge=700)}, r"longest_edge is 2560, expected 700$"),
        ({"config": with_settings(feature_grid=9, templates="single")}, r"templates .*; feature_grid is 64, expected 9$"),
        ({"config": with_settings(name="b")}, r"name is 'set', expected 'b'$"),
        ({"config": with_settings(pictures=3)}, r"pictures is 2, expected 3$"),
        ({"config": with_settings(protocol="masks")}, r"protocol is 'whole', expected 'masks'; shortest_edge .* masks is None"),
        ({"residual": "patch"}, r"residual is 'patch', expected 'cls'$"),
        ({"side": 40}, r"side is 40, expected 48$"),
        (with_another_class, r"md5 of labelled is '\w{32}', expected '\w{32}'$"),
        (with_another_clip, r"md5 of clip is '\w{32}', expected '\w{32}'$"),
        (with_other_names, r"md5 of names is '\w{32}', expected '\w{32}'$"),
        (with_a_file_of_names, r"md5 of names is none, expected '\w{32}'$"),
        (with_other_masks, r"md5 of masks is '\w{32}', expected '\w{32}'$"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:40],
)
def test_saved_clip_under_different_conditions_is_rejected_with_the_differences(made, client, tmp_path, change, differences):
    case = change(made, tmp_path) if callable(change) else change
    out, side, residual = tmp_path / "clip", case.get("side", tiny.SIDE), case.get("residual", "cls")
    run(str(made / "clip"), made / "labelled", out, case.get("before", CONFIG), side, residual)
    with pytest.raises(
        ValueError, match=rf"clip: this evaluation of CLIP does not match the evaluation of the model: {differences}"
    ):
        evaluate.run(made / "changed", case.get("labelled", made / "labelled"), tmp_path / "o", case.get("config", CONFIG), out)
    assert not (tmp_path / "o").exists()


def test_saved_clip_of_an_older_version_is_accepted(made, client, tmp_path):
    saved = tmp_path / "clip"
    of_clip(made, made / "labelled", saved)
    write_json(saved / "provenance.json", read_json(saved / "provenance.json") | {"version": "0.0.1", "revision": "older"})
    metrics = evaluate.run(made / "changed", made / "labelled", tmp_path / "out", CONFIG, saved)
    assert metrics == evaluate.run(made / "changed", made / "labelled", tmp_path / "whole", CONFIG)


def test_path_of_the_clip_does_not_matter(made, client, tmp_path):
    (tmp_path / "linked").symlink_to(made / "clip")
    run(str(tmp_path / "linked"), made / "labelled", tmp_path / "clip", CONFIG, tiny.SIDE, "cls")
    assert evaluate.run(made / "untrained", made / "labelled", tmp_path / "out", CONFIG, tmp_path / "clip")["gain/set"] == 0


def test_other_or_damaged_folder_is_rejected(made, client, tmp_path):
    arguments = (made / "changed", made / "labelled", tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"changed: expected the output of evaluate_clip, found that of 'train'"):
        evaluate.run(*arguments, made / "changed")
    with pytest.raises(ValueError, match=r"nothing: no such file or folder"):
        evaluate.run(*arguments, tmp_path / "nothing")
    of_clip(made, made / "labelled", tmp_path / "clip")
    whole = (tmp_path / "clip" / COUNTS).read_bytes()
    for broken in (whole[:100], b""):
        (tmp_path / "clip" / COUNTS).write_bytes(broken)
        with pytest.raises(ValueError, match=r"clip/counts\.npz: cannot be read as \.npz: "):
            evaluate.run(*arguments, tmp_path / "clip")
    (tmp_path / "clip" / COUNTS).write_bytes(whole)
    assert evaluate.run(*arguments, tmp_path / "clip")["images/set"] == 3


def test_image_read_by_only_one_evaluation_is_rejected(made, client, tmp_path, monkeypatch):
    config = with_settings(max_bad_share=0.5)
    of_clip(made, made / "labelled", tmp_path / "clip", config)
    read = LabelledSet.read

    def fail_once(self, index):
        if index == 1:
            raise ValueError("1.png: read error")
        return read(self, index)

    monkeypatch.setattr(LabelledSet, "read", fail_once)
    message = r"clip: covers different pixels or masks .*bad samples: none; in this evaluation: 1\.png: read error"
    with pytest.raises(ValueError, match=message):
        evaluate.run(made / "changed", made / "labelled", tmp_path / "out", config, tmp_path / "clip")


def test_invalid_side_masks_or_clip_is_rejected(made, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate\.side 7 is smaller than one patch"):
        run(str(made / "clip"), made / "labelled", tmp_path / "out", CONFIG, 7, "cls")
    with pytest.raises(ValueError, match="masks_folder nowhere: no such folder"):
        of_clip(
            made, made / "labelled", tmp_path / "out", with_settings(protocol="masks", masks="given", masks_folder="nowhere")
        )
    with pytest.raises(ValueError, match="no such folder or CLIP"):
        run("VIT:openai", made / "labelled", tmp_path / "out", CONFIG, 48, "cls")
    assert not (tmp_path / "out").exists()


def test_fingerprint_depends_on_side_residual_and_pictures(made, tmp_path):
    assert lasting(EvaluateClipConfig()).keys() - lasting(EvaluateConfig()).keys() == {"residual", "pictures"}
    of_clip(made, made / "labelled", tmp_path / "out")
    for side, residual, config, message in (
        (40, "cls", CONFIG, "evaluate_clip.side 48 → 40"),
        (48, "patch", CONFIG, "evaluate_clip.residual 'cls' → 'patch'"),
        (48, "cls", with_settings(pictures=1), "evaluate_clip.pictures 2 → 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(str(made / "clip"), made / "labelled", tmp_path / "out", config, side, residual)
    # evaluate.side takes precedence over the side of training.
    first, second = (
        run(str(made / "clip"), made / "labelled", tmp_path / "own", with_settings(side=56), side, "cls") for side in (48, 40)
    )
    assert first == second


# Resume; several sets; several processes.


def test_interrupted_run_resumes(made, seven, tmp_path, reads: Reads, capsys):
    config = with_settings(max_bad_share=0.2, pictures=7, checkpoint_every=1)
    of_clip(made, seven, tmp_path / "undisturbed", config)
    reads.kill_at = 6
    with pytest.raises(KilledError):
        of_clip(made, seven, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
    reads.kill_at, reads.seen = -1, []
    capsys.readouterr()
    of_clip(made, seven, tmp_path / "out", config)
    assert reads.seen == [5, 6]
    printed = capsys.readouterr().out
    assert "evaluate_clip: resumes after 5 images" in printed and "evaluate_clip: 1 of 7 samples cannot be used" in printed
    for name in (COUNTS, MAPS, "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_interrupted_evaluation_with_saved_clip_resumes(made, seven, client, tmp_path, reads: Reads):
    config = with_settings(max_bad_share=0.2, pictures=7, checkpoint_every=1)
    whole = evaluate.run(made / "changed", seven, tmp_path / "whole", config)
    of_clip(made, seven, tmp_path / "clip", config)
    reads.kill_at = 6
    with pytest.raises(KilledError):
        evaluate.run(made / "changed", seven, tmp_path / "out", config, tmp_path / "clip")
    reads.kill_at, reads.seen = -1, []
    assert evaluate.run(made / "changed", seven, tmp_path / "out", config, tmp_path / "clip") == whole
    assert reads.seen == [5, 6]
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_several_sets_each_use_their_own_saved_clip(made, client, tmp_path):
    sets = [str(made / "labelled"), str(tiny.labelled_set(tmp_path / "other", images=2, seed=5))]
    config = with_settings(name="")
    metrics = evaluate_clip.run_all(str(made / "clip"), sets, tmp_path / "clip", config, tiny.SIDE, "cls")
    assert read_json(tmp_path / "clip" / "metrics.json") == metrics
    assert {key.partition("/")[2] for key in metrics} == {"labelled", "other"}
    both = evaluate.run_all(made / "changed", sets, tmp_path / "both", config)
    assert evaluate.run_all(made / "changed", sets, tmp_path / "out", config, tmp_path / "clip") == both
    assert metrics.items() <= both.items()
    for name in ("labelled", "other"):
        assert result(tmp_path / "out" / name) == result(tmp_path / "both" / name)
    alone = evaluate_clip.run_all(str(made / "clip"), sets[1:], tmp_path / "one", config, tiny.SIDE, "cls")
    assert alone.items() <= metrics.items() and (tmp_path / "one" / COUNTS).is_file()
    with pytest.raises(ValueError, match="two labelled sets have the name 'other'"):
        evaluate_clip.run_all(str(made / "clip"), [sets[1]] * 2, tmp_path / "twice", config, tiny.SIDE, "cls")


def settings_of(config: EvaluateConfig) -> list[str]:
    return [f"{key}={value}" for key, value in config.model_dump(exclude_defaults=True).items()]


def torchrun(*words: object) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "pixelclip"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([*command, *map(str, words)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(made, seven, tmp_path):
    config = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=7)
    of_clip(made, seven, tmp_path / "one", config)
    options = ["--clip", made / "clip", "--side", tiny.SIDE, "--labelled", seven, "--out", tmp_path / "two"]
    printed = torchrun("evaluate_clip", *options, *settings_of(config))
    assert printed.count("mIoU") == printed.count("1 of 7 samples cannot be used") == 1
    for name in (COUNTS, MAPS, "metrics.json", "protocol.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_use_the_clip_evaluation_of_one(made, seven, client: mlflow.MlflowClient, tmp_path):
    config = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=7)
    whole = evaluate.run(made / "changed", seven, tmp_path / "whole", config)
    of_clip(made, seven, tmp_path / "clip", config)
    options = ["--model", made / "changed", "--labelled", seven, "--out", tmp_path / "out"]
    torchrun("evaluate", *options, "--clip-evaluation", tmp_path / "clip", *settings_of(config))
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert read_json(tmp_path / "out" / "metrics.json") == whole
