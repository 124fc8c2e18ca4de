"""STAGE toy: paint training images and a labelled set, the default data of this repository."""

from pathlib import Path

from PIL import Image

from pixelclip.config import ToyConfig
from pixelclip.data.images import encode_jpeg
from pixelclip.storage.progress import track
from pixelclip.toy_scenes.scenes import CLASSES, paint
from pixelclip.workflow.stage import Metrics, Stage


def run(out: Path, config: ToyConfig) -> Metrics:
    """Paint training images and a labelled set for evaluation.

    Args:
        out: Output folder: `images/` without labels, and the labelled set `toy/` of different scenes.
        config: Settings.

    Returns:
        `{"train_scenes": ..., "test_scenes": ...}`.
    """
    stage = Stage("toy", out, {}, config)
    if stage.finished:
        return stage.reuse()
    with stage:
        for folder in ("images", "toy/images", "toy/labels"):
            (stage.folder / folder).mkdir(parents=True, exist_ok=True)
        (stage.folder / "toy" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
        for index in track(range(config.train_scenes + config.test_scenes), "toy", "scene"):
            scene, is_test = paint(config.seed, index, config.side), index >= config.train_scenes
            jpeg = encode_jpeg(Image.fromarray(scene.image), quality=95)
            (stage.folder / ("toy/images" if is_test else "images") / f"{index:06d}.jpg").write_bytes(jpeg)
            if is_test:
                Image.fromarray(scene.label).save(stage.folder / "toy" / "labels" / f"{index:06d}.png")
        metrics = {"train_scenes": float(config.train_scenes), "test_scenes": float(config.test_scenes)}
        return stage.finish(metrics, files=["*"])
