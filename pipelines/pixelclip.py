"""The DAG: images -> shards -> masks -> train -> evaluate -> register."""

from kfp import dsl

from pixelclip.config import MasksConfig, RegisterConfig, TrainConfig
from pixelclip_components.evaluate.component import evaluate
from pixelclip_components.masks.component import masks
from pixelclip_components.register.component import register
from pixelclip_components.shards.component import shards
from pixelclip_components.train.component import train

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
"""The pipeline parameters that are settings of a stage; every other setting goes through `settings`."""


@dsl.pipeline(name="pixelclip", description="Teach CLIP where things are, from images that nobody labelled.")
def pixelclip(
    images: str,
    labelled: str,
    generator: str = MasksConfig().generator,
    clip: str = TrainConfig().clip,
    steps: int = TrainConfig().steps,
    batch_size: int = TrainConfig().batch_size,
    concepts: int = TrainConfig().concepts,
    seed: int = TrainConfig().seed,
    registry_name: str = RegisterConfig().name,
    min_gain: float = RegisterConfig().min_gain,
    settings: dict = {},  # noqa: B006  (KFP reads the default, nothing changes it)
    workspace: str = "",
):
    """Runs the whole flow.

    Args:
        images: Folder of unlabelled images, searched recursively.
        labelled: Labelled set to evaluate on: a folder with images/, labels/ and classes.txt. Never read in training.
        generator: felzenszwalb, given (SA-1B JSON beside the images), sam or dino (with masks.weights in settings).
        clip: The CLIP to start from: toy, an open_clip folder, NAME:PRETRAINED or NAME:FILE.
        steps: Optimizer steps of the training.
        batch_size: Images in one optimizer step.
        concepts: Number of learnable concepts (K).
        seed: Seed of prompts, decoder, order and views.
        registry_name: Name of the registered model in MLflow.
        min_gain: Least gain over CLIP, in points of mIoU, that makes a champion.
        settings: Every other setting as {"stage.setting": value}, for example {"train.teacher_momentum": 0.99}.
        workspace: Folder that outlives the run (a mounted volume), where finished stages are reused and killed ones
            resumed. Empty: the run's own artifact store.
    """
    packed = shards(images=images, settings=settings, workspace=workspace)
    masked = masks(shards=packed.outputs["shards"], generator=generator, settings=settings, workspace=workspace)
    trained = train(
        masks=masked.outputs["masks"],
        clip=clip,
        steps=steps,
        batch_size=batch_size,
        concepts=concepts,
        seed=seed,
        settings=settings,
        workspace=workspace,
    )
    evaluated = evaluate(model=trained.outputs["model"], labelled=labelled, settings=settings, workspace=workspace)
    register(
        model=trained.outputs["model"],
        evaluation=evaluated.outputs["evaluation"],
        registry_name=registry_name,
        min_gain=min_gain,
        settings=settings,
        workspace=workspace,
    )
