"""The commands as Python functions; the command line calls them too.

`out` is a folder or `s3://bucket/folder`, `params` a params.yaml. Settings are keywords, `steps=100`; see docs/settings.md.
Every function returns the metrics, and raises ValueError for invalid input or settings.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pixelclip.config import PredictConfig
from pixelclip.data.class_names import check_list, check_names, with_commas
from pixelclip.settings import build
from pixelclip.settings import load as load_settings
from pixelclip.storage.download import local_path
from pixelclip.storage.s3 import is_s3
from pixelclip.storage.upload import upload
from pixelclip.workflow.output import output_folder

if TYPE_CHECKING:
    from pixelclip.inference.segmenter import Segmenter

Place = str | os.PathLike[str]
"""A path, URL or `s3://` URI; for models also `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
Metrics = dict[str, float]


def load(model: Place, device: str = "auto", baseline: Literal["clip"] | None = None) -> "Segmenter":
    """Load a model: `pixelclip.load("models:/pixelclip@champion")("photo.jpg", ["dog|puppy", "grass"]).overlay()`.

    Args:
        model: model folder, `s3://bucket/folder`, `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        device: auto, cpu, cuda, cuda:N or mps.
        baseline: `clip` loads the CLIP that the model was trained from instead, to compare with.

    Raises:
        ValueError: no such model, not a model folder, or no such device.
    """
    from pixelclip.inference.loading import load_predictor
    from pixelclip.inference.segmenter import Segmenter

    if baseline not in (None, "clip"):
        raise ValueError(f"baseline must be 'clip' or None (found {baseline!r})")
    return Segmenter(load_predictor(model_path(model), device, original_clip=baseline == "clip"))


def toy(out: Place, params: Place | None = None, **settings: Any) -> Metrics:
    """Paint scenes: training images without labels, and a labelled set for evaluation."""
    return _run("toy", out, params, settings)


def fetch_data(repo: str, out: Place, params: Place | None = None, **settings: Any) -> Metrics:
    """Fetch DVC-tracked data of one git revision."""
    return _run("fetch_data", out, params, settings, repo)


def shards(images: Place, out: Place, params: Place | None = None, **settings: Any) -> Metrics:
    """Pack a folder of images into tar shards."""
    return _run("shards", out, params, settings, os.fspath(images))


def masks(shards: Place, out: Place, params: Place | None = None, preview: int = 0, **settings: Any) -> Metrics:
    """Generate class-agnostic masks for every image of the shards; draw those of `preview` images in `out`/preview.jpg."""
    metrics = _run("masks", out, params, settings, os.fspath(shards))
    if preview:
        _preview(os.fspath(out), preview)
    return metrics


def _preview(masks: str, images: int) -> None:
    from pixelclip.visualization.pictures import preview

    file = f"{masks.rstrip('/')}/preview.jpg"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "preview.jpg") if is_s3(masks) else Path(file)
        count = preview(masks, images, path)
        if is_s3(masks):
            upload(path, file)
    print(f"{count} images: {file}")


def train(masks: Place, out: Place, params: Place | None = None, **settings: Any) -> Metrics:
    """Train PixelCLIP on shards with masks, starting from a pretrained CLIP."""
    return _run("train", out, params, settings, os.fspath(masks))


def evaluate_clip(
    labelled: Place | Sequence[Place],
    out: Place,
    clip: str = "",
    side: int = 0,
    residual: str = "",
    params: Place | None = None,
    **settings: Any,
) -> Metrics:
    """Evaluate plain CLIP on labelled sets, once for all models trained from it (settings of evaluate).

    Args:
        labelled: `FOLDER` or `KIND:FOLDER`, or several.
        out: see the module.
        clip, side, residual: of the training; by default those of section train of `params`.
        params, settings: see the module.
    """
    config = _config("evaluate", params, settings)
    options = {"clip": clip, "side": side, "residual": residual}
    training = load_settings("train", _file(params), {name: value for name, value in options.items() if value})
    from pixelclip.evaluate_clip import run_all

    with output_folder(os.fspath(out)) as folder:
        return run_all(training.clip, _list(labelled), folder, config, training.side, training.residual)


def evaluate(
    model: Place,
    labelled: Place | Sequence[Place],
    out: Place,
    clip_evaluation: Place = "",
    params: Place | None = None,
    **settings: Any,
) -> Metrics:
    """Evaluate a model and the CLIP it was trained from on labelled sets.

    Args:
        model: see `load`.
        labelled: `FOLDER` or `KIND:FOLDER`, or several.
        out: see the module.
        clip_evaluation: output of evaluate_clip; CLIP is then not evaluated again.
        params, settings: see the module.
    """
    config = _config("evaluate", params, settings)
    from pixelclip.evaluate import run_all

    clip = model_path(clip_evaluation) if clip_evaluation else None
    with output_folder(os.fspath(out)) as folder:
        return run_all(model_path(model), _list(labelled), folder, config, clip)


def register(model: Place, out: Place, evaluation: Place = "", params: Place | None = None, **settings: Any) -> Metrics:
    """Register a model in MLflow and promote it to champion if it passes the gate.

    Args:
        model: see `load`.
        out: see the module.
        evaluation: output of evaluate; without one the version is `unmeasured`, and never champion by itself.
        params, settings: see the module.
    """
    config = _config("register", params, settings)
    from pixelclip.register import run

    with output_folder(os.fspath(out)) as folder:
        return run(model_path(model), model_path(evaluation) if evaluation else None, folder, config)


def predict(
    photos: Place,
    classes: Sequence[str],
    model: Place,
    out: Place,
    **settings: Any,
) -> Metrics:
    """Segment many images; see docs/python.md for what is written. An interrupted call continues.

    Args:
        photos: image, folder, glob, shards (folder of tars, manifest), or an `s3://` object or prefix.
        classes: class names; a bar separates synonyms of one class: `["dog|puppy", "grass"]`.
        model: see `load`.
        out: see the module.
        settings: the other fields of `config.PredictConfig`: `quality`, `part`, `overlays`, `label_studio`, ...
    """
    names = [with_commas(name) for name in check_list(classes)]
    config = build(PredictConfig, {**settings, "classes": check_names(names)}, "predict")
    from pixelclip.data.image_sources import check_output
    from pixelclip.predict import run

    check_output(os.fspath(photos), os.fspath(out))  # before it is replaced by a local folder
    with output_folder(os.fspath(out)) as folder:
        return run(os.fspath(photos), model_path(model), folder, config)


def merge(parts: Place, out: Place) -> Metrics:
    """Merge the parts of a prediction, `parts`/*, into what `predict` without parts writes."""
    from pixelclip.predict import merge as merge_parts

    with output_folder(os.fspath(out)) as folder:
        return merge_parts(local_path(os.fspath(parts)), folder)


def model_path(place: Place) -> Path:
    """Return the local path of a path, URI or registered model.

    Raises:
        ValueError: no such model, or MLflow is not installed.
    """
    spec = os.fspath(place)
    if not spec.startswith("models:/"):
        return local_path(spec)
    try:
        from pixelclip.registry.model_version import fetch
    except ModuleNotFoundError as error:
        raise ValueError(f"{spec}: needs the extra `train` (pip install 'pixelclip[train]'): {error.name} is missing") from None
    return fetch(spec)


def _run(stage: str, out: Place, params: Place | None, settings: Mapping[str, Any], *inputs: str) -> Metrics:
    config = _config(stage, params, settings)
    with output_folder(os.fspath(out)) as folder:
        metrics: Metrics = import_module(f"pixelclip.{stage}").run(*inputs, folder, config)
    return metrics


def _config(stage: str, params: Place | None, settings: Mapping[str, Any]) -> Any:
    foreign = [name for name in settings if "." in name and not name.startswith(f"{stage}.")]
    if foreign:
        raise ValueError(f"{foreign[0]} is not a setting of stage {stage}")
    return load_settings(stage, _file(params), {name: _text(value) for name, value in settings.items()})


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _file(params: Place | None) -> Path | None:
    return None if params is None else Path(params)


def _list(places: Place | Sequence[Place]) -> list[str]:
    return [os.fspath(place) for place in ([places] if isinstance(places, str | os.PathLike) else places)]
