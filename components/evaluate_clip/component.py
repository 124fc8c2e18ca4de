"""KFP component of stage evaluate_clip."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_clip(
    labelled: dsl.Input[dsl.Dataset],
    clip_evaluation: dsl.Output[dsl.Artifact],
    clip: str,
    clip_version: str,
    data_version: str,
    settings: dict,
    workspace: str = "",
):
    """Evaluate the unchanged CLIP on a labelled set. The versions are part of KFP's cache key."""
    from pixelclip.evaluate_clip import run
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import located, place, record

    clip_evaluation.metadata.update(clip_version=clip_version, data_version=data_version)
    trained = load("train", overrides={**settings, "train.clip": clip})
    out, config = place(clip_evaluation, workspace, "evaluate_clip"), load("evaluate", overrides=settings)
    record(clip_evaluation, run(clip, located(labelled), out, config, trained.side, trained.residual))
