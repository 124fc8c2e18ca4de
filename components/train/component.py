"""KFP component of stage train."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    masks: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    clip: str,
    steps: int,
    batch_size: int,
    concepts: int,
    seed: int,
    settings: dict,
    workspace: str = "",
):
    """Trains a PixelCLIP from masked shards and a CLIP."""
    from pathlib import Path

    from pixelclip.config import load
    from pixelclip.stage import place
    from pixelclip.train import run

    chosen = {"clip": clip, "steps": steps, "batch_size": batch_size, "concepts": concepts, "seed": seed}
    config = load("train", overrides={**settings, **{f"train.{name}": value for name, value in chosen.items()}})
    for name, value in run(Path(masks.path), place(model, workspace, "train"), config).items():
        metrics.log_metric(name, value)
