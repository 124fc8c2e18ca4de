"""KFP component that ends a run."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def finish(status: dsl.PipelineTaskFinalStatus, nodes: int = 1):
    """Delete an unfinished TrainJob, and end the MLflow run with the status of the pipeline's steps."""
    from pixelclip_pipelines.finish import finish as end

    end(status.state, nodes)
