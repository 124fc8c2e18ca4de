"""Prediction for many images as a pipeline: predict in parallel parts with one model, then merge the parts."""

from typing import Any

from kfp import dsl

from pixelclip.config import PredictConfig
from pixelclip.data.class_names import names_of
from pixelclip.settings import build as build_settings
from pixelclip_components import IMAGE
from pixelclip_components.fetch_data.component import fetch_data
from pixelclip_components.fetch_model.component import fetch_model
from pixelclip_components.merge.component import merge
from pixelclip_components.predict.component import predict
from pixelclip_pipelines.cluster_config import Cluster, default_workspace, shared_folder
from pixelclip_pipelines.cluster_tasks import place_on, run_config, set_run_id
from pixelclip_pipelines.form import label
from pixelclip_pipelines.parameters import check_source

_DEFAULTS = {name: field.default for name, field in PredictConfig.model_fields.items()}


def build(cluster: Cluster | None = None, image: str = IMAGE) -> dsl.base_component.BaseComponent:
    """Build the pipeline for a cluster, or for one machine if `cluster` is None.

    Args:
        cluster: resources of the steps' pods, and the number of parts.
        image: container image of all steps.
    """
    parts, parallel = (cluster.parts, cluster.parallel) if cluster else (1, 0)

    def on(step: str, title: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        return set_run_id(place_on(task.set_display_name(title), cluster, step, image)) if cluster else task

    def pixelclip_predict(
        images: str,
        classes: str,
        repo: str = "",
        revision: str = "",
        model: str = "models:/pixelclip@champion",
        out: str = "",
        quality: str = _DEFAULTS["quality"],
        overlays: bool = _DEFAULTS["overlays"],
        label_studio: bool = _DEFAULTS["label_studio"],
        max_bad_share: float = _DEFAULTS["max_bad_share"],
        workspace: str = default_workspace(cluster),
    ) -> None:
        """Run all steps.

        Args:
            images: Images (searched recursively) or shards: path in `repo`, or a folder on a mounted volume or s3:// prefix.
            classes: Class names, dog|puppy,grass,sky (bar between synonyms).
            repo: DVC repository (URL or path) with the images; if empty, they are a folder or s3:// prefix.
            revision: Branch, tag or commit of `repo`; if empty, the default branch.
            model: models:/NAME@ALIAS, models:/NAME/VERSION, or a model folder on a mounted volume or s3:// prefix.
            out: s3:// prefix for the merged predictions; if empty, the folder `predictions` of `workspace`, or the run's own
                artifact store. {run} in it or in `workspace` is replaced by the ID of the run.
            quality: fast (one view, as in the paper) or best (windows and refinement, several times slower).
            overlays: Also write every image blended with the colours of its classes.
            label_studio: Also write tasks for Label Studio; for images, not shards.
            max_bad_share: Maximum fraction of unreadable images.
            workspace: Folder on a mounted volume where finished parts are reused and interrupted ones resumed; if empty, the
                run's own artifact store.
        """
        place = {"volume": shared_folder(cluster)} if cluster else {}
        checked = fetch_model(name=model, classes=classes, workspace=workspace, out=out, **place)
        fetched = on("fetch_model", "Check parameters, fetch model", checked)
        data = {"repo": repo, "revision": revision, "settings": {}, "workspace": workspace}
        pictures = on("fetch_data", "Find images", fetch_data(path=images, **data))
        settings = {"classes": classes, "quality": quality, "overlays": overlays, "label_studio": label_studio}
        settings |= {"max_bad_share": max_bad_share}
        inputs = {"images": pictures.outputs["data"], "model": fetched.outputs["model"]}
        numbers = [f"{number}/{parts}" for number in range(1, parts + 1)]
        with dsl.ParallelFor(numbers, name="Parts", parallelism=parallel or None) as part:
            one = on("predict", "Predict", predict(part=part, workspace=workspace, **inputs, **settings))
        collected = dsl.Collected(one.outputs["predictions"])
        on("merge", "Merge parts", merge(parts=collected, out=out, workspace=workspace))

    described = {
        "description": "Segment many images into classes, with a registered model.",
        "pipeline_config": run_config(cluster),
    }
    return label(dsl.pipeline(pixelclip_predict, name="pixelclip-predict", **described))


def arguments(
    images: str,
    classes: str,
    model: str,
    out: str = "",
    workspace: str = "",
    repo: str = "",
    revision: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Return the checked arguments of the pipeline.

    Args:
        images, model, out, workspace, repo, revision: see the pipeline's parameters.
        classes: class names as in the parameter, or a text file with one class per line.
        settings: `quality`, `overlays`, `label_studio`, `max_bad_share`.

    Raises:
        ValueError: no images, an invalid class name or setting, or a URL with credentials.
    """
    if revision and not repo:
        raise ValueError(f"--revision {revision} needs --repo")
    optional = {name: place for name, place in {"out": out, "repo": repo}.items() if place}
    for name, place in {"images": images, "model": model, **optional}.items():
        check_source(name, place)
    names = names_of(classes)
    build_settings(PredictConfig, {**settings, "classes": names}, "predict")
    text = ",".join("|".join(word.strip() for word in name.split(",")) for name in names)
    places = {"images": images, "repo": repo, "revision": revision, "model": model, "out": out, "workspace": workspace}
    return {**places, "classes": text, **settings}
