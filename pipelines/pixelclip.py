"""The DAG: data -> shards -> masks -> train -> evaluate -> register. Its exit handler always closes the MLflow run."""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

from kfp import dsl

from pixelclip.config import MasksConfig, RegisterConfig, TrainConfig
from pixelclip_components import IMAGE
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.evaluate_clip.component import evaluate_clip
from pixelclip_components.fetch_data.component import fetch_data, fetch_labelled
from pixelclip_components.finish.component import finish
from pixelclip_components.masks.component import masks
from pixelclip_components.pin_revision.component import pin_revision
from pixelclip_components.register.component import register
from pixelclip_components.shards.component import shards
from pixelclip_components.train.component import train
from pixelclip_components.train_job.component import train_job
from pixelclip_pipelines.cluster_config import Cluster, default_workspace, shared_folder
from pixelclip_pipelines.cluster_tasks import place_on, run_config, set_run_id
from pixelclip_pipelines.form import label
from pixelclip_pipelines.trainjob import template


def build(
    cluster: Cluster | None = None, nodes: int = 1, image: str = IMAGE, labelled: bool = True
) -> dsl.base_component.BaseComponent:
    """Build the pipeline for a cluster, or for one machine if `cluster` is None.

    Args:
        cluster: resources of each step, and the number of parts of stage masks.
        nodes: number of training nodes, which Kubeflow Trainer starts if there are several.
        image: container image of all steps.
        labelled: False builds `pixelclip-unlabelled`, without `data_labelled` and the evaluations; the registered version is
            `unmeasured`.

    Raises:
        ValueError: the cluster cannot train on several nodes.
    """
    trainer = train_job if nodes > 1 else train
    job = {"job": json.dumps(template(cluster or Cluster(), nodes, image))} if nodes > 1 else {}
    parts, parallel = (cluster.parts, cluster.parallel) if cluster else (1, 0)

    def on(step: str, title: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        if not cluster:  # the local runners warn about names
            return task
        return set_run_id(place_on(task.set_display_name(title), cluster, step, image))

    def pixelclip(
        data_images: str,
        data_labelled: str,
        data_repo: str = "",
        data_revision: str = "",
        masks_generator: str = MasksConfig().generator,
        train_clip: str = TrainConfig().clip,
        train_steps: int = TrainConfig().steps,
        train_batch_size: int = TrainConfig().batch_size,
        train_concepts: int = TrainConfig().concepts,
        train_seed: int = TrainConfig().seed,
        register_name: str = RegisterConfig().name,
        register_min_gain: float = RegisterConfig().min_gain,
        settings: str = "",
        settings_file: str = "",
        workspace: str = default_workspace(cluster),
    ):
        """Run all steps.

        Args:
            data_images: Folder of unlabelled images, searched recursively: path in `data_repo`, or a folder or s3:// prefix.
            data_labelled: Labelled set for evaluation (images/, labels/, classes.txt), given like `data_images`. Never read in
                training.
            data_repo: DVC repository (URL or path) with images and labelled set; if empty, they are folders or s3:// prefixes.
            data_revision: Branch, tag or commit of `data_repo`, resolved once to a full commit; if empty, the default branch.
            masks_generator: felzenszwalb, given (SA-1B JSON beside the images), sam or dino (with masks.weights in `settings`),
                or labels (with masks.labels_folder).
            train_clip: CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED or NAME:FILE.
            train_steps: Optimizer steps.
            train_batch_size: Images in one optimizer step.
            train_concepts: Number of learnable concepts (K).
            train_seed: Seed of prompts, decoder, sample order and views.
            register_name: Name of the registered model in MLflow.
            register_min_gain: Minimum gain over CLIP of a champion, in points of mIoU.
            settings: Other settings as on the command line, only what differs: train.crop=80 evaluate.side=144.
            settings_file: Path of a params.yaml in `data_repo`; fields above that differ from their default override it, and so
                does `settings`.
            workspace: Folder on a mounted volume where finished stages are reused and interrupted ones resumed; if empty, the
                run's own artifact store.
        """
        form: dict[str, Any] = {"data_images": data_images, "data_repo": data_repo, "data_revision": data_revision}
        form |= {"data_labelled": data_labelled} if labelled else {}
        form |= {"masks_generator": masks_generator, "train_clip": train_clip}
        form |= {"train_steps": train_steps, "train_batch_size": train_batch_size, "train_concepts": train_concepts}
        form |= {"train_seed": train_seed, "register_name": register_name, "register_min_gain": register_min_gain}
        form |= {"settings": settings, "settings_file": settings_file, "workspace": workspace}
        place: dict[str, Any] = {}
        if cluster:
            place = {"volume": shared_folder(cluster), "nodes": nodes, "gpus": cluster.steps["train"].gpus}
        with dsl.ExitHandler(on("finish", "Close the MLflow run", finish(nodes=nodes)), name="pixelclip"):
            first = pin_revision(**form, **place)
            pins = on("pin_revision", "Check parameters, pin versions", first).outputs
            everywhere = {"settings": pins["stage_settings"], "workspace": workspace}

            def fetched(title: str, component: dsl.base_component.BaseComponent, path: str) -> dsl.PipelineTask:
                pin = {"revision": pins["commit"], "fetch": pins["fetch"]}
                task = on("fetch_data", title, component(repo=data_repo, path=path, **pin, **everywhere))
                # Safe to cache: `fetch` is the full commit SHA, or a unique value for unversioned data.
                return task.set_caching_options(True)

            pictures = fetched("Fetch images", fetch_data, data_images)
            truth = fetched("Fetch labelled set", fetch_labelled, data_labelled).outputs if labelled else {}
            packed = on("shards", "Pack shards", shards(images=pictures.outputs["data"], **everywhere))

            def masked(part: str) -> dsl.PipelineTask:
                task = masks(shards=packed.outputs["shards"], generator=pins["generator"], part=part, **everywhere)
                return on("masks", "Generate masks", task)

            if parts == 1:  # without a loop, around which KFP before 2.17 loses the status of steps
                masked_data = {"masks": masked(part="").outputs["masks"]}
            else:
                numbers = [f"{number}/{parts}" for number in range(1, parts + 1)]
                with dsl.ParallelFor(numbers, name="Parts", parallelism=parallel or None) as part:
                    one = masked(part=part)
                masked_data = {"parts": dsl.Collected(one.outputs["masks"])}
            training = {name: pins[name] for name in ("clip", "steps", "batch_size", "concepts", "seed")}
            train_task = trainer(**masked_data, **training, **job, **everywhere)
            model = on("train_job" if job else "train", "Train PixelCLIP", train_task).outputs["model"]
            evaluation = {}
            if labelled:
                # KFP identifies artifacts only by address; the two versions identify the content of set and CLIP.
                versions = {"clip_version": pins["clip_version"], "data_version": truth["version"]}
                read_settings = {"settings": pins["clip_settings"], "workspace": workspace}
                clip_task = evaluate_clip(labelled=truth["labelled"], clip=pins["clip"], **versions, **read_settings)
                clip_task = on("evaluate_clip", "Evaluate CLIP", clip_task).set_caching_options(True)
                inputs = {"labelled": truth["labelled"], "clip_evaluation": clip_task.outputs["clip_evaluation"]}
                evaluate_task = on("evaluate", "Evaluate PixelCLIP", evaluate(model=model, **inputs, **everywhere))
                evaluation = {"evaluation": evaluate_task.outputs["evaluation"]}
            gate = {"registry_name": pins["registry_name"], "min_gain": pins["min_gain"]}
            on("register", "Register model", register(model=model, **evaluation, **gate, **everywhere))

    described: dict[str, Any] = {"description": "Teach CLIP where things are, from images that nobody labelled."}
    described["pipeline_config"] = run_config(cluster)
    if labelled:
        return label(dsl.pipeline(pixelclip, name="pixelclip", **described))
    described["description"] += " Without a labelled set: the model is not evaluated, and registered as unmeasured."
    return label(dsl.pipeline(_without_labelled(pixelclip), name="pixelclip-unlabelled", **described))


def _without_labelled(pipeline: Callable[..., None]) -> Callable[..., None]:
    """Return a pipeline function without its second parameter `data_labelled`."""

    @functools.wraps(pipeline)
    def unlabelled(data_images: Any, *others: Any) -> None:  # KFP passes all parameters by position
        pipeline(data_images, None, *others)

    signature = inspect.signature(pipeline)
    kept = [parameter for name, parameter in signature.parameters.items() if name != "data_labelled"]
    unlabelled.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return unlabelled
