"""KFP component of the end of a run."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(status: dsl.PipelineTaskFinalStatus):
    """Ends the MLflow run with the status that the pipeline's steps had."""
    from pixelclip_pipelines.steps import close_run

    close_run(status.state)
