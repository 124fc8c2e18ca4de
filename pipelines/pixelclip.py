"""The DAG: data -> shards -> masks -> train -> evaluate -> register. Its exit handler always closes the MLflow run."""

import json

from kfp import dsl

from pixelclip.config import MasksConfig, RegisterConfig, TrainConfig
from pixelclip_components import IMAGE
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.evaluate_clip.component import evaluate_clip
from pixelclip_components.fetch_data.component import fetch_data
from pixelclip_components.finish.component import finish
from pixelclip_components.masks.component import masks
from pixelclip_components.pin_revision.component import pin_revision
from pixelclip_components.register.component import register
from pixelclip_components.shards.component import shards
from pixelclip_components.train.component import train
from pixelclip_components.train_job.component import train_job
from pixelclip_pipelines.cluster_config import Cluster
from pixelclip_pipelines.cluster_tasks import place_on, set_run_id
from pixelclip_pipelines.trainjob import template

SETTING_OF = {
    "generator": "masks.generator",
    "clip": "train.clip",
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "concepts": "train.concepts",
    "seed": "train.seed",
    "registry_name": "register.name",
    "min_gain": "register.min_gain",
}
"""Pipeline parameters that are settings of a stage. `settings` contains all others."""


def build(cluster: Cluster | None = None, nodes: int = 1, image: str = IMAGE) -> dsl.base_component.BaseComponent:
    """Build the pipeline for a cluster, or for one machine if `cluster` is None.

    Args:
        cluster: resources of each step, and the number of parts of stage masks.
        nodes: number of training nodes, which Kubeflow Trainer starts if there are several.
        image: container image of all steps.

    Raises:
        ValueError: the cluster cannot train on several nodes.
    """
    trainer = train_job if nodes > 1 else train
    job = {"job": json.dumps(template(cluster or Cluster(), nodes, image))} if nodes > 1 else {}
    parts, parallel = (cluster.parts, cluster.parallel) if cluster else (1, 0)

    def on(step: str, task: dsl.PipelineTask) -> dsl.PipelineTask:
        return set_run_id(place_on(task, cluster, step, image)) if cluster else task

    @dsl.pipeline(name="pixelclip", description="Teach CLIP where things are, from images that nobody labelled.")
    def pixelclip(
        images: str,
        labelled: str,
        repo: str = "",
        revision: str = "",
        generator: str = MasksConfig().generator,
        clip: str = TrainConfig().clip,
        steps: int = TrainConfig().steps,
        batch_size: int = TrainConfig().batch_size,
        concepts: int = TrainConfig().concepts,
        seed: int = TrainConfig().seed,
        registry_name: str = RegisterConfig().name,
        min_gain: float = RegisterConfig().min_gain,
        settings: dict = {},  # noqa: B006  (KFP reads the default; it is never changed)
        workspace: str = "",
    ):
        """Run all steps.

        Args:
            images: Folder of unlabelled images, searched recursively: path in `repo`, or a folder or s3:// prefix.
            labelled: Labelled set for evaluation (images/, labels/, classes.txt), given like `images`. Never read in training.
            repo: DVC repository (URL or path) with images and labelled set; if empty, they are folders or s3:// prefixes.
            revision: Branch, tag or commit of `repo`, resolved once to a full commit; if empty, the default branch.
            generator: felzenszwalb, given (SA-1B JSON beside the images), sam or dino (with masks.weights in settings).
            clip: CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED or NAME:FILE.
            steps: Optimizer steps.
            batch_size: Images in one optimizer step.
            concepts: Number of learnable concepts (K).
            seed: Seed of prompts, decoder, sample order and views.
            registry_name: Name of the registered model in MLflow.
            min_gain: Minimum gain over CLIP of a champion, in points of mIoU.
            settings: All other settings as {"stage.setting": value}, for example {"train.teacher_momentum": 0.99}.
            workspace: Folder on a mounted volume where finished stages are reused and interrupted ones resumed; if empty, the
                run's own artifact store.
        """
        everywhere = {"settings": settings, "workspace": workspace}
        training = {"clip": clip, "steps": steps, "batch_size": batch_size, "concepts": concepts, "seed": seed}
        with dsl.ExitHandler(on("finish", finish(nodes=nodes)), name="pixelclip"):
            pins = on("pin_revision", pin_revision(repo=repo, revision=revision, clip=clip, **everywhere)).outputs

            def fetched(path: str) -> dsl.PipelineTask:
                pin = {"revision": pins["commit"], "fetch": pins["fetch"]}
                task = on("fetch_data", fetch_data(repo=repo, path=path, **pin, **everywhere))
                # Safe to cache: `fetch` is the full commit SHA, or a unique value for unversioned data.
                return task.set_caching_options(True)

            pictures, truth = fetched(images), fetched(labelled)
            packed = on("shards", shards(images=pictures.outputs["data"], **everywhere))

            def masked(part: str) -> dsl.PipelineTask:
                return on("masks", masks(shards=packed.outputs["shards"], generator=generator, part=part, **everywhere))

            if parts == 1:  # without a loop, around which KFP before 2.17 loses the status of steps
                masked_data = {"masks": masked(part="").outputs["masks"]}
            else:
                numbers = [f"{number}/{parts}" for number in range(1, parts + 1)]
                with dsl.ParallelFor(numbers, name="parts", parallelism=parallel or None) as part:
                    one = masked(part=part)
                masked_data = {"parts": dsl.Collected(one.outputs["masks"])}
            train_task = trainer(**masked_data, **training, **job, **everywhere)
            model = on("train_job" if job else "train", train_task).outputs["model"]
            # KFP identifies artifacts only by address; the two versions identify the content of set and CLIP.
            versions = {"clip_version": pins["clip_version"], "data_version": truth.outputs["version"]}
            read_settings = {"settings": pins["clip_settings"], "workspace": workspace}
            clip_task = evaluate_clip(labelled=truth.outputs["data"], clip=clip, **versions, **read_settings)
            clip_evaluation = on("evaluate_clip", clip_task).set_caching_options(True).outputs["evaluation"]
            evaluate_task = evaluate(model=model, labelled=truth.outputs["data"], clip_evaluation=clip_evaluation, **everywhere)
            evaluation = on("evaluate", evaluate_task).outputs["evaluation"]
            gate = {"registry_name": registry_name, "min_gain": min_gain}
            on("register", register(model=model, evaluation=evaluation, **gate, **everywhere))

    return pixelclip


pixelclip = build()
"""The pipeline for one machine: without pod settings and retries."""
