"""KFP component of stage evaluate."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    model: dsl.Input[dsl.Model],
    labelled: dsl.Input[dsl.Dataset],
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
    settings: dict,
    clip_evaluation: dsl.Input[dsl.Artifact] = None,
    workspace: str = "",
):
    """Evaluate a model and the CLIP it was trained from on a labelled set."""
    import shutil

    from pixelclip.evaluate import REPORT, run
    from pixelclip.settings import load
    from pixelclip_pipelines.artifacts import located, place
    from pixelclip_pipelines.steps import compared, show_confusion, show_metrics

    out, config = place(evaluation, workspace, "evaluate"), load("evaluate", overrides=settings)
    values = run(located(model), located(labelled), out, config, clip_evaluation and located(clip_evaluation))
    show_metrics(metrics, compared(values, located(model)))
    show_confusion(confusion, out)
    shutil.copyfile(out / REPORT, report.path)
