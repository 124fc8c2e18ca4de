"""KFP component that ends the MLflow run."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(status: dsl.PipelineTaskFinalStatus):
    """End the MLflow run with the status of the pipeline's steps."""
    from pixelclip_pipelines.steps import close_run

    close_run(status.state)
