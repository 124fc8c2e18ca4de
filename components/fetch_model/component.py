"""KFP component that fetches a model."""

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_model(
    name: str,
    classes: str,
    model: dsl.Output[dsl.Model],
    workspace: str = "",
    out: str = "",
    volume: str = "/",
):
    """Check the parameters of a prediction, and copy its model, so that all parts use the same version."""
    from pixelclip_pipelines.parameters import check_prediction
    from pixelclip_pipelines.steps import fetched_model

    check_prediction(classes, workspace, out, volume)
    fetched_model(model, name)
