"""KFP component of stage train."""

from typing import List  # noqa: UP035  (KFP reads lists of artifacts only under this name)

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    model: dsl.Output[dsl.Model],
    clip: str,
    steps: int,
    batch_size: int,
    concepts: int,
    seed: int,
    settings: dict,
    masks: dsl.Input[dsl.Dataset] = None,
    parts: dsl.Input[List[dsl.Dataset]] = None,  # noqa: UP006
    workspace: str = "",
):
    """Train PixelCLIP on masked shards with all GPUs of the pod."""
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import place, record
    from pixelclip_pipelines.steps import gathered, processes, train_by

    chosen = {"clip": clip, "steps": steps, "batch_size": batch_size, "concepts": concepts, "seed": seed}
    config = load("train", overrides={**settings, **{f"train.{name}": value for name, value in chosen.items()}})
    with gathered(masks, parts) as folder:
        result = train_by(processes(config.device), folder, place(model, workspace, "train"), config)
    record(model, result)
