"""KFP component of stage evaluate_clip."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_clip(
    labelled: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    clip: str,
    clip_version: str,
    data_version: str,
    settings: dict,
    workspace: str = "",
):
    """Evaluate the unchanged CLIP on a labelled set. The versions are part of KFP's cache key."""
    from pixelclip.config import load
    from pixelclip.evaluate_clip import run
    from pixelclip_pipelines.artifacts import located, place

    evaluation.metadata.update(clip_version=clip_version, data_version=data_version)
    trained = load("train", overrides={**settings, "train.clip": clip})
    out, config = place(evaluation, workspace, "evaluate_clip"), load("evaluate", overrides=settings)
    for name, value in run(clip, located(labelled), out, config, trained.side, trained.residual).items():
        metrics.log_metric(name, value)
