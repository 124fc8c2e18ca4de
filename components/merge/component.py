"""KFP component of `merge`."""

from typing import List  # noqa: UP035  (KFP reads lists of artifacts only under this name)

from kfp import dsl

from pixelclip_components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge(
    parts: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    predictions: dsl.Output[dsl.Artifact],
    out: str = "",
    workspace: str = "",
):
    """Merge the parts of a prediction."""
    from pixelclip import api
    from pixelclip_pipelines.artifacts import place_in, record
    from pixelclip_pipelines.steps import gathered

    with gathered(None, parts) as folder:
        record(predictions, api.merge(folder, place_in(out, predictions, workspace, "predictions")))
