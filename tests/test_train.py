import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import fake_data, random_dino, tiny, training
from helpers.training import Killed, kill_at, losses
from pixelclip import evaluate, train
from pixelclip.config import EvaluateConfig, MasksConfig
from pixelclip.mask_generators.dino import IMAGENET_MEAN, IMAGENET_STD, segment
from pixelclip.models.checkpoint import load_clip, load_model
from pixelclip.models.concepts import new_concepts
from pixelclip.models.pixelclip import PixelCLIP
from pixelclip.models.text import TEMPLATES, TextTower, classifier
from pixelclip.workflow.stage import describe
from pixelclip.workflow.termination import Terminated

clip, config, shards = training.clip, training.config, training.shards


def test_training_writes_a_complete_model_folder(shards, config, clip, tmp_path):
    out = tmp_path / "model"
    metrics = train.run(shards, out, config())
    assert metrics["train/loss"] == losses(out)[-1]
    assert len(losses(out)) == 6
    model = load_model(out)
    start = load_clip(str(clip)).model.state_dict()
    for name, tensor in model.clip.model.state_dict().items():
        learned = name.startswith("visual.") and (".attn." in name or name.endswith("positional_embedding"))
        assert torch.equal(tensor, start[name]) is not learned, name
    gallery = json.loads((out / "gallery.json").read_text())
    assert sum(entry["masks"] for entry in gallery) == 12 * 4
    boxes = [tuple(best["box"]) for entry in gallery for best in entry["best"] if best["file"] == "gallery.jpg"]
    with Image.open(out / "gallery.jpg") as sheet:
        assert len(boxes) == len(set(boxes)) > 4
        assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(96, 96)}
        assert all(np.asarray(sheet.crop(box)).std() > 10 for box in boxes), "every box has a picture"
        assert sheet.height == 96 * sum(bool(entry["best"]) for entry in gallery)
    assert sum(path.is_file() for path in out.rglob("*")) < 15, "KFP moves file by file"
    assert sorted(path.name for path in (out / "pictures").iterdir()) == [
        "step-000001.jpg",
        "step-000003.jpg",
        "step-000006.jpg",
    ]
    assert not (out / "state.safetensors").exists()
    run = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(json.loads((out / "run.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "6"
    history = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(losses(out), 1))
    for curve in ("loss", "gradient_norm", "concepts_used", "assignment_entropy", "images_per_second"):
        assert f"train/{curve}" in run.data.metrics
    for group in ("backbone", "prompts", "decoder"):
        assert run.data.metrics[f"train/learning_rate_{group}"] > 0


def test_evaluation_during_training_keeps_the_best_model_and_changes_nothing(shards, config, tmp_path):
    labelled = tiny.labelled_set(tmp_path / "set")
    plain = train.run(shards, tmp_path / "plain", config(steps=4, picture_every=0))
    settings = config(steps=4, picture_every=0, log_every=3, evaluate_every=2, evaluate_on=str(labelled))
    assert train.run(shards, tmp_path / "model", settings) == plain
    assert describe(tmp_path / "model")["md5"] == describe(tmp_path / "plain")["md5"]

    client = MlflowClient()
    run_id = json.loads((tmp_path / "model" / "run.json").read_text())["run_id"]
    curve = {point.step: point.value for point in client.get_metric_history(run_id, "train/miou_set")}
    assert curve.keys() == {2, 4}
    best = json.loads((tmp_path / "model" / "best" / "best.json").read_text())
    assert best == {"step": max(curve, key=curve.__getitem__), "miou": max(curve.values()), "labelled": "set"}
    for folder, step in (("model", 4), ("model/best", best["step"])):
        measured = evaluate.run(tmp_path / folder, labelled, tmp_path / f"{step}-{len(folder)}", EvaluateConfig(device="cpu"))
        assert measured["miou/set"] == pytest.approx(curve[step], abs=1e-9)
    (logged,) = client.search_logged_models(["1"], f"source_run_id = '{run_id}'")
    assert (logged.name, [metric.value for metric in logged.metrics]) == ("best", [best["miou"]])
    images = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    assert sorted(path.partition("+timestamp")[0] for path in images)[:2] == [
        f"images/segmentations set+step+{step}" for step in (2, 4)
    ]


def test_gallery_is_computed_on_the_training_device(shards, config, tmp_path, monkeypatch):
    calls, to_cpu = [], PixelCLIP.cpu
    monkeypatch.setattr(train, "gallery", lambda model, dataset, folder, device: calls.append(device))
    monkeypatch.setattr(PixelCLIP, "cpu", lambda self: calls.append("cpu") or to_cpu(self))
    somewhere = config(steps=1).model_copy(update={"device": "cpu:0"})  # not allowed in settings, but distinct from "cpu"
    train.run(shards, tmp_path / "model", somewhere)
    assert calls == [torch.device("cpu:0"), "cpu"]


def die(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_killed_training_resumes_with_identical_losses(shards, config, tmp_path, monkeypatch, killed_at):
    undisturbed = train.run(shards, tmp_path / "whole", config())
    with monkeypatch.context() as patch:
        kill_at(killed_at, patch)
        with pytest.raises(Killed):
            train.run(shards, tmp_path / "broken", config())
    assert not (tmp_path / "broken").exists()
    continued = train.run(shards, tmp_path / "broken", config(workers=1))
    assert continued == undisturbed
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_concepts_from_data_are_chosen_before_training_and_resumed(shards, config, tmp_path, monkeypatch):
    settings = config(concept_init="data", concept_init_images=3, decoded_concepts=2, backbone_warmup=2)
    train.run(shards, tmp_path / "whole", settings)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            train.run(shards, tmp_path / "broken", settings)
    monkeypatch.setattr(train, "_first_mask_features", die)  # the state has the prompts
    train.run(shards, tmp_path / "broken", settings)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_damaged_training_state_is_named(shards, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(2, patch)
        with pytest.raises(Killed):
            train.run(shards, tmp_path / "out", config())
    (state,) = tmp_path.glob(".out.*.partial/state.safetensors")
    with safe_open(state, framework="pt") as file:
        whole = json.loads(file.metadata()["done"])
    tensors, tokens = load_file(state), "prompts.tokens"
    moment = f"optimizer.exp_avg.{tokens}"
    for done, kept, message in (
        ({}, tensors, r"done: entry 'steps' is missing"),
        (whole | {"steps": -1}, tensors, r"done: steps: Input should be greater than or equal to 0 \(found -1\)"),
        (whole, tensors | {tokens: torch.zeros(1)}, rf"does not fit the settings: of a different shape: {tokens}"),
        (whole, {name: kept for name, kept in tensors.items() if name != moment}, rf".*missing: {moment}"),
    ):
        save_file(kept, state, metadata={"done": json.dumps(done)})
        with pytest.raises(ValueError, match=rf"/state\.safetensors: {message}"):
            train.run(shards, tmp_path / "out", config())


@pytest.mark.parametrize(("number", "update"), [(signal.SIGTERM, 0), (signal.SIGINT, 2), (signal.SIGTERM, 5)])
def test_signal_ends_the_training_after_the_step_with_a_checkpoint(
    shards, config, tmp_path, monkeypatch, capsys, number, update
):
    undisturbed = train.run(shards, tmp_path / "whole", config(checkpoint_every=100))
    with monkeypatch.context() as patch:
        kill_at(update, patch, lambda: signal.raise_signal(number))
        with pytest.raises(Terminated) as ended:
            train.run(shards, tmp_path / "stopped", config(checkpoint_every=100, run_name="stopped"))
    assert ended.value.code == 128 + number
    stopped = update + 1 if update < 5 else 6
    reason = f"stopped by {number.name}" + (f" after step {stopped} of 6" if update < 5 else "")
    printed = capsys.readouterr().out
    assert f"train: {reason}; the same command continues\n" in printed
    assert "train: CLIP " in printed and ", 6 steps, batch " in printed and ", cpu, " in printed
    client = MlflowClient()

    def status() -> str:
        (run,) = client.search_runs(["1"], "attributes.run_name = 'stopped'")
        return run.info.status

    assert status() == "KILLED"
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(PixelCLIP, "update_teacher", lambda *_, move=PixelCLIP.update_teacher: (seen.append(1), move(*_)))
        assert train.run(shards, tmp_path / "stopped", config(checkpoint_every=100)) == undisturbed
    assert len(seen) == 6 - stopped, "no step is repeated"
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert status() == "FINISHED"


def test_checkpoints_are_written_by_time_too(shards, config, tmp_path, monkeypatch):
    saved = []
    save = train.save_state
    monkeypatch.setattr(train, "save_state", lambda *given: (saved.append(given[3].steps), save(*given)))
    train.run(shards, tmp_path / "model", config(checkpoint_every=100, checkpoint_minutes=1e-9))
    assert saved == [1, 2, 3, 4, 5, 6]
    saved.clear()
    train.run(shards, tmp_path / "other", config(checkpoint_every=100, checkpoint_minutes=0))
    assert saved == [6]


def flawed(folder: Path) -> Path:
    """Write three good images, an unreadable one, and one whose mask vanishes on the mask grid."""
    dot = np.zeros((1, 40, 48), bool)
    dot[0, 3, 3] = True
    members = {}
    for number in range(5):
        members[f"{number}.jpg"] = fake_data.encoded(fake_data.pixels(40, 48, number))[: -60 if number == 3 else None]
        members[f"{number}.json"] = fake_data.annotation(dot if number == 4 else np.ones((1, 40, 48), bool))
    fake_data.write_tar(folder / "0.tar", members)
    return folder


def test_counters_survive_two_interruptions(config, tmp_path, monkeypatch, capsys):
    """With one image per step, some steps have no mask; after the second kill only such a step remains."""
    settings = {"batch_size": 1, "steps": 9, "seed": 3, "max_bad_share": 0.2, "checkpoint_every": 1}
    masks = flawed(tmp_path / "masks")
    undisturbed = train.run(masks, tmp_path / "whole", config(**settings))
    assert undisturbed["train/bad_samples"] == 2
    assert undisturbed["train/maskless_batches"] == 4
    for kill in (partial(kill_at, 4), lambda patch: patch.setattr(train, "gallery", die)):
        with monkeypatch.context() as patch:
            kill(patch)
            with pytest.raises(Killed):
                train.run(masks, tmp_path / "broken", config(**settings))
    assert train.run(masks, tmp_path / "broken", config(**settings)) == undisturbed
    printed = capsys.readouterr().out
    assert [f"after step {step}" in printed for step in (7, 8)] == [True, True]
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_limit_of_bad_samples_is_the_same_at_the_start_and_the_end(config, tmp_path):
    members = {f"{number}.jpg": fake_data.encoded(fake_data.pixels(40, 48, number)) for number in range(4)}
    members |= {f"{number}.json": fake_data.annotation(np.ones((1, 40, 48), bool)) for number in range(5)}
    fake_data.write_tar(tmp_path / "masks" / "0.tar", members)
    settings = {"batch_size": 1, "steps": 3}
    train.run(tmp_path / "masks", tmp_path / "model", config(**settings, max_bad_share=0.2))
    with pytest.raises(ValueError, match=r"1 of 5 samples cannot be used:\n.*4\.json: has no image\nthe limit is 19\.0%"):
        train.run(tmp_path / "masks", tmp_path / "other", config(**settings, max_bad_share=0.19))


def test_training_killed_while_finishing_resumes_from_its_last_checkpoint(shards, config, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(train.Stage, "finish", die)
        with pytest.raises(Killed):
            train.run(shards, tmp_path / "model", config())
    train.run(shards, tmp_path / "model", config())
    assert "after step 6" in capsys.readouterr().out
    assert not (tmp_path / "model" / train.STATE_FILE).exists()


@pytest.mark.slow
def test_training_killed_by_sigkill_resumes_with_identical_losses(shards, config, tmp_path):
    settings = [f"{name}={value}" for name, value in config(steps=60, checkpoint_every=5).model_dump().items() if value != ""]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pixelclip", "train", "--masks", str(shards), "--out", str(out), *settings]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for seconds in (6, 9, 12):
        process = start(tmp_path / "broken")
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(tmp_path / "broken").wait() == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_only_the_main_process_identifies_the_inputs(shards, config, tmp_path, monkeypatch):
    broadcasts = iter([{"masks": {"md5": "0"}}, True, {"train/loss": 1.0}])  # inputs, finished, metrics
    second = SimpleNamespace(is_main=False, size=2, broadcast_object=lambda value: next(broadcasts))
    monkeypatch.setattr(train, "init_process_group", lambda device: nullcontext(second))
    monkeypatch.setattr(train, "describe_shards", die)
    assert train.run(shards, tmp_path / "model", config()) == {"train/loss": 1.0}


def test_finished_training_is_reused(shards, config, tmp_path, capsys):
    first = train.run(shards, tmp_path / "model", config())
    written = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert train.run(shards, tmp_path / "model", config(workers=1, log_every=5)) == first
    assert "reused" in capsys.readouterr().out
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == written


def test_non_finite_loss_stops_before_the_optimizer_step(shards, config, tmp_path):
    with pytest.raises(ValueError, match=r"step 2: loss .*nan|step 2: loss .*inf"):
        train.run(shards, tmp_path / "model", config(learning_rate_decoder=1e30))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("steps", [3, 30])
def test_masks_that_vanish_on_the_grid_are_an_error(config, tmp_path, steps):
    dots = np.zeros((1, 40, 48), bool)
    dots[0, 3, 3] = True
    members = {"a.jpg": fake_data.encoded(fake_data.pixels(40, 48)), "a.json": fake_data.annotation(dots)}
    fake_data.write_tar(tmp_path / "dots" / "0.tar", members)
    with pytest.raises(ValueError, match=rf"step {min(steps, 11)}: {min(steps, 11)} batches contained no mask"):
        train.run(tmp_path / "dots", tmp_path / "model", config(steps=steps))


def test_unreachable_server_fails_before_training(shards, config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot be reached"):
        train.run(shards, tmp_path / "model", config())


def test_side_below_one_patch_is_rejected(shards, config, tmp_path):
    tight = config().model_copy(update={"side": 4})
    with pytest.raises(ValueError, match=r"train\.side 4 is smaller than one patch"):
        train.run(shards, tmp_path / "model", tight)
    assert not list(tmp_path.glob(".model*")), "no unfinished folder is left"


@pytest.mark.parametrize("kind", ["fixed_prompts", "vectors", "names"])
def test_every_kind_of_concepts_can_be_trained(shards, config, clip, tmp_path, kind):
    names = {"concept_names": "dog|puppy,grass,sky"} if kind == "names" else {}
    train.run(shards, tmp_path / "model", config(concept_kind=kind, learning_rate_prompts=0.1, **names))
    model = load_model(tmp_path / "model")
    text = TextTower(load_clip(str(clip)).model)
    before = new_concepts(text, config(concept_kind=kind, **names))(text)
    after = model.prompts(TextTower(model.clip.model))
    assert len(after) == (3 if kind == "names" else 4)
    assert torch.allclose(before, after, atol=1e-6) is (kind != "vectors")
    if kind == "names":
        assert torch.allclose(after[0], classifier(text, ["dog, puppy"], TEMPLATES["single"])[0], atol=1e-6)


def test_concept_names_from_a_file_are_validated(shards, config, tmp_path):
    (tmp_path / "names.txt").write_text("grass\nsky\n")
    train.run(shards, tmp_path / "model", config(concept_kind="names", concept_names=str(tmp_path / "names.txt")))
    assert load_model(tmp_path / "model").prompts.values.shape[0] == 2
    many = ",".join(f"thing {number}" for number in range(40))  # longer than a file name may be
    train.run(shards, tmp_path / "many", config(concept_kind="names", concept_names=many, steps=1))
    (tmp_path / "names.txt").write_text("grass\ngrass\n")
    with pytest.raises(ValueError, match=r"names\.txt: class names must differ"):
        train.run(shards, tmp_path / "other", config(concept_kind="names", concept_names=str(tmp_path / "names.txt")))
    with pytest.raises(ValueError, match="concept_names is required for concept_kind names and must be empty otherwise"):
        config(concept_names="dog")


def test_dino_masks_during_training_do_not_depend_on_accumulation(config, tmp_path):
    members = {f"{number}.jpg": fake_data.encoded(fake_data.pixels(40, 48, number)) for number in range(8)}
    fake_data.write_tar(tmp_path / "images" / "0.tar", members)
    torch.save(random_dino.weights(), tmp_path / "dino.pth")
    settings = {"dino": str(tmp_path / "dino.pth"), "dino_clusters": 3, "dino_side": 20, "strong_view": True}
    for name, accumulate in (("one", 1), ("two", 1), ("accumulated", 4)):
        train.run(tmp_path / "images", tmp_path / name, config(**settings, accumulate=accumulate))
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    members["9.jpg"] = members["0.jpg"][:-60]  # a micro-batch with only this image has no image
    fake_data.write_tar(tmp_path / "broken" / "0.tar", members)
    metrics = train.run(tmp_path / "broken", tmp_path / "four", config(**settings, accumulate=4, max_bad_share=0.5))
    assert metrics["train/bad_samples"] > 0
    assert all(0 < loss < 2 for loss in losses(tmp_path / "one"))
    with pytest.raises(ValueError, match="no sample in these shards has masks"):
        train.run(tmp_path / "images", tmp_path / "three", config())


def test_dino_sees_the_crop_at_its_own_side(config, tmp_path, monkeypatch):
    image = fake_data.encoded(fake_data.pixels(40, 40))
    fake_data.write_tar(tmp_path / "images" / "0.tar", {"0.jpg": image})
    torch.save(random_dino.weights(), tmp_path / "dino.pth")
    assert config().dino_side == MasksConfig().dino_side == 640  # the reference's crop: 40 x 40 patches of 16 pixels
    seen = []

    def spy(dino, images, *others):
        seen.append(images)
        return segment(dino, images, *others)

    monkeypatch.setattr("pixelclip.mask_generators.dino.segment", spy)
    plain = {"color_jitter": False, "flip": False, "strong_view": False, "crop": 40, "shortest_edge": 40, "batch_size": 1}
    settings = {"dino": str(tmp_path / "dino.pth"), "dino_clusters": 3, "steps": 1, **plain}
    train.run(tmp_path / "images", tmp_path / "model", config(**settings, dino_side=40))
    ((crop,),) = seen
    assert config(**settings).side == 32  # CLIP's view
    pixels = np.array(Image.open(io.BytesIO(image)))  # the crop is the whole image
    expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(crop.permute(1, 2, 0), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"train\.dino_side 42 is not a multiple of the patch size \(4\)"):
        train.run(tmp_path / "images", tmp_path / "other", config(**settings, dino_side=42))


def test_all_parameters_of_a_convnext_are_trained(shards, config, tmp_path):
    clip = tiny.clip_folder(tmp_path / "clip", kind="convnext")
    start = tiny.clip_state(kind="convnext")
    settings = {"clip": str(clip), "side": 64, "crop": 40, "shortest_edge": 40, "assignment_scale": 1.0}
    train.run(shards, tmp_path / "model", config(**settings))
    for name, tensor in load_model(tmp_path / "model").clip.model.state_dict().items():
        assert torch.equal(tensor, start[name]) is not name.startswith("visual."), name


def test_killed_convnext_training_resumes_with_identical_losses(shards, config, tmp_path, monkeypatch):
    """Stochastic depth is seeded per step."""
    clip = tiny.clip_folder(tmp_path / "clip", kind="convnext", timm_drop_path=0.5)
    settings = {"clip": str(clip), "side": 64, "crop": 40, "shortest_edge": 40}
    train.run(shards, tmp_path / "whole", config(**settings))

    draw, count = train.training_picture, iter(range(9))

    def draw_or_die(*args):
        if next(count) == 1:  # step 3, after the checkpoint of step 2
            raise Killed
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "training_picture", draw_or_die)
        with pytest.raises(Killed):
            train.run(shards, tmp_path / "broken", config(**settings))
    train.run(shards, tmp_path / "broken", config(**settings))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
