"""Evaluation of CLIP and PixelCLIP on labelled images, and literally: one image at a time with scores at full size."""

import atexit
import contextlib
import copy
import io
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from bench.case import Case
from bench.train_step import SIDE, random_clip, reference
from pixelclip.config import EvaluateConfig
from pixelclip.data.labelled_images import IGNORE
from pixelclip.data.labelled_sets import open_labelled
from pixelclip.data.tensors import normalise, resize_square, to_tensor
from pixelclip.distributed import SINGLE_PROCESS
from pixelclip.evaluation.confusion import CLIP, OURS, EvaluationCounts, count_recalled
from pixelclip.evaluation.evaluator import evaluate_towers
from pixelclip.models.backbone import Backbone
from pixelclip.models.checkpoint import Clip

SIZE, CLASSES, IMAGES = (1500, 2250), 171, 4
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def labelled_set(folder: Path, size: tuple[int, int], classes: int, images: int) -> Path:
    """Write images of smooth noise with label maps of large regions and some ignored pixels."""
    generator = torch.Generator().manual_seed(5)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(images):
        pixels = F.interpolate(torch.rand(1, 3, 40, 60, generator=generator), size=size, mode="bicubic").clamp(0, 1)[0]
        Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(folder / "images" / f"{number}.jpg", quality=90)
        labels = torch.randint(0, classes, (12, 18), generator=generator).byte().numpy()
        labels[0, :3] = IGNORE
        Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST).save(folder / "labels" / f"{number}.png")
    (folder / "classes.txt").write_text("".join(f"class {number}\n" for number in range(classes)))
    return folder


def one_by_one(towers: dict[str, nn.Module], clip_side: int, classes: Tensor, folder: Path) -> dict[str, Any]:
    """Evaluate literally: one model after the other, image by image, with scores of all classes at full size."""
    confusions, recalled, count = {}, np.zeros(2, np.int64), len(classes)
    for name, visual in towers.items():
        confusion = np.zeros((count, count), np.int64)
        for path in sorted((folder / "images").iterdir()):
            image = normalise(to_tensor(Image.open(path))[None], MEAN, STD)
            truth = np.asarray(Image.open(folder / "labels" / f"{path.stem}.png"))
            features = F.interpolate(reference.dense_vit(visual, resize_square(image, SIDE)), size=(64, 64), mode="bilinear")
            scores = torch.einsum("bchw,kc->bkhw", F.normalize(features, dim=1), classes)
            labels = F.interpolate(scores, size=truth.shape, mode="bilinear")[0].argmax(dim=0).numpy()
            valid = truth != IGNORE
            joint = truth[valid].astype(np.int64) * count + labels[valid]
            confusion += np.bincount(joint, minlength=count**2).reshape(count, count)
            if name == CLIP:
                similarities = F.normalize(visual(resize_square(image, clip_side)), dim=-1) @ classes.T
                recalled += count_recalled(similarities, [np.unique(truth[valid])])
        confusions[name] = confusion
    return {"confusions": confusions, "recalled": recalled}


def ours(towers: dict[str, nn.Module], clip: Clip, classes: Tensor, folder: Path, config: EvaluateConfig) -> EvaluationCounts:
    """Evaluate as stage evaluate does, both models in one pass."""
    with tempfile.TemporaryDirectory() as state, contextlib.redirect_stderr(io.StringIO()):  # hides the progress bar
        wrapped = {name: Backbone(visual) for name, visual in towers.items()}
        dataset = open_labelled(folder, "folder")
        return evaluate_towers(wrapped, clip, classes, dataset, config, SINGLE_PROCESS, Path(state)).counts


def same(tolerance: float, theirs: dict[str, Any], counts: EvaluationCounts) -> str:
    """Compare confusion matrices and recall; rounding may change the class of this fraction of the pixels."""
    differing = pixels = 0
    for name, confusion in theirs["confusions"].items():
        found = counts.confusions[name].counts
        assert not found[:, -1].any()
        differing += int(np.abs(found[:, :-1] - confusion).sum()) // 2
        pixels += int(confusion.sum())
    assert differing <= tolerance * pixels, (differing, pixels)
    assert np.abs(theirs["recalled"] - counts.recalled).max() <= tolerance * theirs["recalled"][1]
    return f"{differing} of {pixels} pixels have a different class"


def make(
    size: tuple[int, int] = SIZE,
    classes: int = CLASSES,
    images: int = IMAGES,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Case:
    """Create the comparison, without the time to build the classifier."""
    temporary = Path(tempfile.mkdtemp())
    folder = labelled_set(temporary / "set", size, classes, images)
    original = random_clip()
    learned = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in learned.visual.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    vectors = F.normalize(torch.randn(classes, 512, generator=generator), dim=1)
    towers = {OURS: learned.visual.eval(), CLIP: original.visual.eval()}
    clip = Clip(original, {"vision_cfg": {}}, MEAN, STD)
    config = EvaluateConfig(side=SIDE, pictures=0, batch_size=4, shortest_edge=0, precision=precision)
    atexit.register(shutil.rmtree, temporary)
    return Case(
        what=f"ViT-B/16 twice at {SIDE} px, once at {clip.side} px, {images} photographs of {size[1]}x{size[0]}, K {classes}, "
        f"ours in {precision}",
        baseline=torch.no_grad()(partial(one_by_one, towers, clip.side, vectors, folder)),
        ours=partial(ours, towers, clip, vectors, folder, config),
        same=partial(same, 1e-5 if precision == "float32" else 0.05),
        rounds=3,
    )
