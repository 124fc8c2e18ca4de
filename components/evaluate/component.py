"""KFP component of stage evaluate."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    model: dsl.Input[dsl.Model],
    labelled: str,
    evaluation: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    settings: dict,
    workspace: str = "",
):
    """Measures a model and the CLIP it came from on a labelled set."""
    import shutil
    from pathlib import Path

    from pixelclip.config import load
    from pixelclip.evaluate import REPORT, run
    from pixelclip.stage import place

    out, config = place(evaluation, workspace, "evaluate"), load("evaluate", overrides=settings)
    for name, value in run(Path(model.path), Path(labelled), out, config).items():
        metrics.log_metric(name, value)
    shutil.copyfile(out / REPORT, report.path)
