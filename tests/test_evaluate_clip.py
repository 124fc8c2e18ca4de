"""CLIP by itself against the Predictor; a model's evaluation that takes it against the one that measures both towers."""

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import test_evaluate
import tiny
import torch
from conftest import annotation, write_files
from PIL import Image
from test_evaluate import CONFIG, KilledError, Reads, naive_iou, result, with_settings

from pixelclip import evaluate, evaluate_clip
from pixelclip.benchmarks import LabelledSet
from pixelclip.config import EvaluateClipConfig, EvaluateConfig, lasting
from pixelclip.evaluate_clip import COUNTS, MAPS, run
from pixelclip.predict import Predictor
from pixelclip.storage import read_json, write_json

made, client, reads, seven = test_evaluate.made, test_evaluate.client, test_evaluate.reads, test_evaluate.seven
PROTOCOLS = {
    "whole": {},
    "slide": {"protocol": "slide", "slide_side": 40, "crop": 24, "stride": 10},
    "masks": {"protocol": "masks"},
    "masks-given": {"protocol": "masks", "masks": "given"},
}


def of_clip(made: Path, labelled: Path, out: Path, config: EvaluateConfig = CONFIG) -> dict[str, float]:
    return run(str(made / "clip"), labelled, out, config, tiny.SIDE, "cls")


def given_masks(folder: Path, labelled: Path) -> str:
    """Three overlapping masks for every image; the first image of three has a pixel in none."""
    sizes = {path.stem: np.asarray(Image.open(path)).shape for path in (labelled / "labels").iterdir()}
    masks = {name: [y < 9, x < 11, x + y < 6] for name, (y, x) in ((name, np.indices(size)) for name, size in sizes.items())}
    write_files(folder, {f"{name}.json": annotation(np.array(found)) for name, found in masks.items()})
    return str(folder)


def config_of(protocol: str, masks: Path, labelled: Path, **settings) -> EvaluateConfig:
    chosen = PROTOCOLS[protocol] | settings
    return with_settings(**chosen | ({"masks_folder": given_masks(masks, labelled)} if protocol == "masks-given" else {}))


def test_clip_alone_agrees_with_the_predictor(made, tmp_path, capsys):
    metrics = of_clip(made, made / "labelled", tmp_path / "out")
    predictor = Predictor.load(made / "untrained", "cpu")
    truths = [np.asarray(Image.open(path)) for path in sorted((made / "labelled" / "labels").iterdir())]
    images = [Image.open(path) for path in sorted((made / "labelled" / "images").iterdir())]
    founds = [predictor(image, tiny.CLASSES).labels for image in images]
    dog, grass, _ = naive_iou(truths, founds, 3)
    assert metrics["miou_clip/set"] == pytest.approx(100 * (dog + grass) / 2)
    names = ("miou_clip", "pixel_accuracy_clip", "image_recall_clip", "images")
    assert list(metrics) == [f"{name}/set" for name in names]
    assert read_json(tmp_path / "out" / "metrics.json") == metrics
    with np.load(tmp_path / "out" / MAPS) as maps:  # of the first and the last picture, which a report shows
        assert {name: (maps[name] == founds[int(name)]).all() for name in maps.files} == {"0": True, "2": True}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("metrics.json", "provenance.json", "protocol.json", COUNTS, MAPS)
    }
    capsys.readouterr()
    assert of_clip(made, made / "labelled", tmp_path / "out") == metrics
    assert "evaluate_clip: reused" in capsys.readouterr().out


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_evaluation_that_takes_it_is_the_same_to_the_letter(made, seven, client, tmp_path, monkeypatch, protocol):
    config = config_of(protocol, tmp_path / "masks", made / "seven", max_bad_share=0.2, pictures=7)
    whole = evaluate.run(made / "changed", seven, tmp_path / "whole", config)
    assert whole["images/" + next(iter(whole)).partition("/")[2]] == 6  # the second image cannot be read

    alone = of_clip(made, seven, tmp_path / "clip", config)
    assert alone.items() <= whole.items() and "gain" not in str(alone)
    assert ("mask_accuracy_clip" in str(alone)) == protocol.startswith("masks")

    monkeypatch.setattr(evaluate, "Backbone", None)  # what CLIP's tower would be made by
    seen = []
    monkeypatch.setattr(
        evaluate, "measure", lambda towers, *others: seen.append(list(towers)) or test_evaluate.stage_measure(towers, *others)
    )
    assert evaluate.run(made / "changed", seven, tmp_path / "out", config, tmp_path / "clip") == whole
    assert seen == [[""]]
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    inputs = read_json(tmp_path / "out" / "provenance.json")["inputs"]
    assert inputs["clip_evaluation"]["provenance"]["stage"] == "evaluate_clip"
    assert set(inputs) == {"model", "labelled", "clip", "clip_evaluation"} | ({"masks"} if protocol == "masks-given" else set())


def test_a_folder_s_name_that_the_setting_could_not_be(made, client, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "my set", images=1)
    config = with_settings(name="")
    assert "miou_clip/my set" in of_clip(made, labelled, tmp_path / "clip", config)
    metrics = evaluate.run(made / "changed", labelled, tmp_path / "out", config, tmp_path / "clip")
    assert metrics["gain/my set"] == metrics["miou/my set"] - metrics["miou_clip/my set"]


# What does not fit.


def with_another_class(made: Path, tmp_path: Path) -> dict[str, object]:
    return {"labelled": tiny.labelled_set(tmp_path / "labelled", classes=("dog, puppy", "grass", "sea"))}


def with_another_clip(made: Path, tmp_path: Path) -> dict[str, object]:
    return {"config": with_settings(clip=str(tiny.clip_folder(tmp_path / "other", seed=1)))}


def with_other_masks(made: Path, tmp_path: Path) -> dict[str, object]:
    given = {"protocol": "masks", "masks": "given"}
    first, second = (given_masks(tmp_path / name, made / "labelled") for name in "ab")
    (tmp_path / "b" / "0.json").write_bytes(annotation(np.ones((1, 20, 40))))
    return {"before": with_settings(**given, masks_folder=first), "config": with_settings(**given, masks_folder=second)}


def of_another_version(made: Path, tmp_path: Path) -> dict[str, object]:
    def age(out: Path) -> None:
        write_json(out / "provenance.json", read_json(out / "provenance.json") | {"version": "0.0.1"})

    return {"then": age}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": with_settings(side=56)}, r"side 48 there, 56 here$"),
        ({"config": with_settings(feature_grid=9, templates="single")}, r"templates .*; feature_grid 64 there, 9 here$"),
        ({"config": with_settings(name="b")}, r"name 'set' there, 'b' here$"),
        ({"config": with_settings(pictures=3)}, r"pictures 2 there, 3 here$"),
        ({"config": with_settings(protocol="masks")}, r"protocol 'whole' there, 'masks' here; feature_grid .*; masks None"),
        ({"residual": "patch"}, r"residual 'patch' there, 'cls' here$"),
        ({"side": 40}, r"side 40 there, 48 here$"),
        (with_another_class, r"md5 of labelled '\w{32}' there, '\w{32}' here$"),
        (with_another_clip, r"md5 of clip '\w{32}' there, '\w{32}' here$"),
        (with_other_masks, r"md5 of masks '\w{32}' there, '\w{32}' here$"),
        (of_another_version, r"version '0\.0\.1' there, '\d\.\d\.\d' here$"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:40],
)
def test_clip_evaluated_otherwise_is_refused_by_what_differs(made, client, tmp_path, change, said):
    given = change(made, tmp_path) if callable(change) else change
    out, side, residual = tmp_path / "clip", given.get("side", tiny.SIDE), given.get("residual", "cls")
    run(str(made / "clip"), made / "labelled", out, given.get("before", CONFIG), side, residual)
    given.get("then", lambda _: None)(out)
    with pytest.raises(ValueError, match=rf"clip: CLIP was evaluated otherwise than this model is: {said}"):
        evaluate.run(
            made / "changed", given.get("labelled", made / "labelled"), tmp_path / "o", given.get("config", CONFIG), out
        )
    assert not (tmp_path / "o").exists()


def test_the_same_clip_by_another_path_is_the_same(made, client, tmp_path):
    (tmp_path / "linked").symlink_to(made / "clip")
    run(str(tmp_path / "linked"), made / "labelled", tmp_path / "clip", CONFIG, tiny.SIDE, "cls")
    assert evaluate.run(made / "untrained", made / "labelled", tmp_path / "out", CONFIG, tmp_path / "clip")["gain/set"] == 0


def test_what_is_no_evaluation_of_clip(made, client, tmp_path):
    arguments = (made / "changed", made / "labelled", tmp_path / "out", CONFIG)
    with pytest.raises(ValueError, match=r"changed: is no evaluation of CLIP, stage 'train' made it"):
        evaluate.run(*arguments, made / "changed")
    with pytest.raises(ValueError, match=r"nothing: no such file or folder"):
        evaluate.run(*arguments, tmp_path / "nothing")
    of_clip(made, made / "labelled", tmp_path / "clip")
    whole = (tmp_path / "clip" / COUNTS).read_bytes()
    for broken in (whole[:100], b""):
        (tmp_path / "clip" / COUNTS).write_bytes(broken)
        with pytest.raises(ValueError, match=r"clip: counts\.npz and maps\.npz cannot be read: "):
            evaluate.run(*arguments, tmp_path / "clip")
    (tmp_path / "clip" / COUNTS).write_bytes(whole)
    assert evaluate.run(*arguments, tmp_path / "clip")["images/set"] == 3


def test_an_image_that_only_one_of_them_could_read(made, client, tmp_path, monkeypatch):
    config = with_settings(max_bad_share=0.5)
    of_clip(made, made / "labelled", tmp_path / "clip", config)
    read = LabelledSet.read

    def fail_once(self, index):
        if index == 1:
            raise ValueError("1.png: the disk had a bad day")
        return read(self, index)

    monkeypatch.setattr(LabelledSet, "read", fail_once)
    said = r"clip: other pixels or masks were counted there .*there: none, here: 1\.png: the disk had a bad day"
    with pytest.raises(ValueError, match=said):
        evaluate.run(made / "changed", made / "labelled", tmp_path / "out", config, tmp_path / "clip")


def test_the_gate_of_a_clip_s_side_and_of_the_labels(made, tmp_path):
    with pytest.raises(ValueError, match=r"evaluate\.side 7 is smaller than one patch"):
        run(str(made / "clip"), made / "labelled", tmp_path / "out", CONFIG, 7, "cls")
    with pytest.raises(ValueError, match="masks_folder nowhere: no such folder"):
        of_clip(
            made, made / "labelled", tmp_path / "out", with_settings(protocol="masks", masks="given", masks_folder="nowhere")
        )
    with pytest.raises(ValueError, match="no CLIP with that name"):
        run("VIT:openai", made / "labelled", tmp_path / "out", CONFIG, 48, "cls")
    assert not (tmp_path / "out").exists()


def test_what_it_makes_hangs_on_side_residual_and_pictures(made, tmp_path):
    assert lasting(EvaluateClipConfig()).keys() - lasting(EvaluateConfig()).keys() == {"residual", "pictures"}
    of_clip(made, made / "labelled", tmp_path / "out")
    for side, residual, config, said in (
        (40, "cls", CONFIG, "evaluate_clip.side 48 → 40"),
        (48, "patch", CONFIG, "evaluate_clip.residual 'cls' → 'patch'"),
        (48, "cls", with_settings(pictures=1), "evaluate_clip.pictures 2 → 1"),
    ):
        with pytest.raises(ValueError, match=said):
            run(str(made / "clip"), made / "labelled", tmp_path / "out", config, side, residual)
    # evaluate.side goes before the training's, which then does not matter.
    first, second = (
        run(str(made / "clip"), made / "labelled", tmp_path / "own", with_settings(side=56), side, "cls") for side in (48, 40)
    )
    assert first == second


# Killed and continued; several sets; several processes.


def test_a_killed_run_continues(made, seven, tmp_path, reads: Reads, capsys):
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
    said = capsys.readouterr().out
    assert "evaluate_clip: continues after 5 images" in said and "evaluate_clip: 1 of 7 samples cannot be used" in said
    for name in (COUNTS, MAPS, "metrics.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_killed_evaluation_that_takes_it_continues(made, seven, client, tmp_path, reads: Reads):
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


def test_several_sets_each_take_their_own(made, client, tmp_path):
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
    with pytest.raises(ValueError, match="two labelled sets are called 'other'"):
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
def test_two_processes_make_what_one_makes(made, seven, tmp_path):
    config = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=7)
    of_clip(made, seven, tmp_path / "one", config)
    options = ["--clip", made / "clip", "--side", tiny.SIDE, "--labelled", seven, "--out", tmp_path / "two"]
    said = torchrun("evaluate_clip", *options, *settings_of(config))
    assert said.count("mIoU") == said.count("1 of 7 samples cannot be used") == 1
    for name in (COUNTS, MAPS, "metrics.json", "protocol.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_two_processes_take_what_one_made(made, seven, client: mlflow.MlflowClient, tmp_path):
    config = with_settings(max_bad_share=0.2, checkpoint_every=1, pictures=7)
    whole = evaluate.run(made / "changed", seven, tmp_path / "whole", config)
    of_clip(made, seven, tmp_path / "clip", config)
    options = ["--model", made / "changed", "--labelled", seven, "--out", tmp_path / "out"]
    torchrun("evaluate", *options, "--clip-evaluation", tmp_path / "clip", *settings_of(config))
    assert result(tmp_path / "out") == result(tmp_path / "whole")
    assert read_json(tmp_path / "out" / "metrics.json") == whole
