"""KFP component of stage train on several nodes."""

from typing import List  # noqa: UP035  (KFP reads lists of artifacts only under this name)

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_job(
    model: dsl.Output[dsl.Model],
    clip: str,
    steps: int,
    batch_size: int,
    concepts: int,
    seed: int,
    settings: dict,
    job: str,
    masks: dsl.Input[dsl.Dataset] = None,
    parts: dsl.Input[List[dsl.Dataset]] = None,  # noqa: UP006
    workspace: str = "",
):
    """Train on several nodes: start a TrainJob of Kubeflow Trainer and wait until it ends."""
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import place, record
    from pixelclip_pipelines.launcher import train_on_nodes

    chosen = {"clip": clip, "steps": steps, "batch_size": batch_size, "concepts": concepts, "seed": seed}
    config = load("train", overrides={**settings, **{f"train.{name}": value for name, value in chosen.items()}})
    record(model, train_on_nodes(job, workspace, config))
    place(model, workspace, "train")
